"""Block weights: which modules a rule means, the vectors of LoRA Block Weight, and what a merge does with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit.detect import families
from adaptkit.errors import NoSuchName, WrongUsage
from adaptkit.keymap import compile_keys
from adaptkit.names import Slot
from adaptkit.ops import block_weights, merge, selecting
from adaptkit.ops.block_weights import Blocks

NAMES = {  # kohya stem -> block of the extension, per family
    "sd1": {
        "lora_unet_conv_in": "IN00",
        "lora_unet_down_blocks_0_attentions_0_proj_in": "IN01",
        "lora_unet_down_blocks_0_downsamplers_0_conv": "IN03",
        "lora_unet_down_blocks_2_attentions_1_transformer_blocks_0_attn1_to_q": "IN08",
        "lora_unet_down_blocks_3_resnets_1_conv1": "IN11",
        "lora_unet_mid_block_attentions_0_proj_in": "M00",
        "lora_unet_up_blocks_0_resnets_0_conv1": "OUT00",
        "lora_unet_up_blocks_1_attentions_0_proj_in": "OUT03",
        "lora_unet_up_blocks_3_attentions_2_proj_out": "OUT11",
        "lora_unet_time_embedding_linear_1": None,
        "lora_te_text_model_encoder_layers_3_mlp_fc1": "BASE",
    },
    "sdxl": {
        "lora_unet_input_blocks_4_1_proj_in": "IN04",
        "lora_unet_input_blocks_8_1_proj_in": "IN08",
        "lora_unet_middle_block_1_proj_in": "M00",
        "lora_unet_output_blocks_0_1_proj_in": "OUT00",
        "lora_unet_output_blocks_5_1_proj_in": "OUT05",
        "lora_te2_text_model_encoder_layers_3_mlp_fc1": "BASE",
    },
    "flux": {
        "lora_unet_double_blocks_7_img_attn_qkv": "D007",
        "lora_unet_single_blocks_37_linear2": "S037",
        "lora_unet_img_in": "IN",
        "lora_unet_final_layer_linear": "OUT",
        "lora_te1_text_model_encoder_layers_3_mlp_fc1": "CLIP",
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q": "T5",
    },
}


def slot(family: str, stem: str) -> Slot:
    found = compile_keys(family, "kohya").slot(stem)
    assert found is not None, stem
    return found


@pytest.mark.parametrize(("family", "stem"), [(f, s) for f, stems in NAMES.items() for s in stems])
def test_modules_stand_in_the_blocks_that_the_extension_says(family: str, stem: str) -> None:
    assert selecting.block_name(families()[family], slot(family, stem)) == NAMES[family][stem]


@pytest.mark.parametrize(
    ("family", "count", "names"),
    [
        (
            "sd1",
            17,
            "BASE IN01 IN02 IN04 IN05 IN07 IN08 M00 OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11",
        ),
        ("sdxl", 12, "BASE IN04 IN05 IN07 IN08 M00 OUT00 OUT01 OUT02 OUT03 OUT04 OUT05"),
        (
            "sdxl",
            20,
            "BASE IN00 IN01 IN02 IN03 IN04 IN05 IN06 IN07 IN08 M00 OUT00 OUT01 OUT02 OUT03 OUT04 OUT05 OUT06 OUT07 OUT08",
        ),
    ],
)
def test_vectors_are_in_the_order_of_the_extension(family: str, count: int, names: str) -> None:
    rules = block_weights.parse([",".join(str(n / 8) for n in range(count))], families()[family])
    assert [(rule.name, rule.weight) for rule in rules] == [
        (name, n / 8) for n, name in enumerate(names.split())
    ]


@pytest.mark.parametrize(("family", "count"), [("sd2", 26), ("flux", 57), ("flux", 61)])
def test_the_longer_vectors(family: str, count: int) -> None:
    rules = block_weights.parse([",".join(["1"] * (count - 1)) + ",0.25"], families()[family])
    assert len(rules) == count
    assert rules[-1].name == {26: "OUT11", 57: "S037", 61: "OUT"}[count]
    assert rules[0].name == {26: "BASE", 57: "D000", 61: "CLIP"}[count]


SD1 = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"


@pytest.mark.parametrize(
    ("family", "stem", "yes", "no"),
    [
        (
            "sd1",
            SD1,
            "unet unet.down_blocks.* unet.down_blocks.1 down_blocks.1.attentions down.1 unet.down.0-2 *.attn2.* down.[01] "
            "input_blocks.4 input.3-5 IN04 IN01-IN05 *to_k",
            "te unet.down_blocks.10 down_blocks.2-9 unet.down_blocks.1.att up IN05 MID OUT04 unet.mid_block IN OUT01-OUT11",
        ),
        (
            "sd1",
            "lora_unet_mid_block_attentions_0_proj_in",
            "mid unet.mid_block MID M00 middle",
            "middle_block.0 IN00-IN11",
        ),
        (
            "sd1",
            "lora_te_text_model_encoder_layers_3_mlp_fc1",
            "te te1 BASE text_encoder te.text_model.encoder.layers.0-5 text_model.encoder.layers.3",
            "unet te2 text_encoder_2 te.text_model.encoder.layers.4-9",
        ),
        (
            "sdxl",
            "lora_te2_text_model_encoder_layers_3_mlp_fc1",
            "te te2 text_encoder_2 BASE",
            "te1 text_encoder unet",
        ),
        (
            "flux",
            "lora_unet_double_blocks_4_img_attn_qkv",
            "double double.0-5 double_blocks.4 transformer.double.4 unet D004 D000-D010 transformer_blocks.4 transformer_blocks.4.attn",
            "single.0-5 double.5-9 S004 te D005-S037",
        ),
        (
            "flux",
            "lora_unet_single_blocks_4_linear2",
            "single.0-5 S004 D005-S037",
            "double.0-5 D004",
        ),
    ],
)
def test_what_a_name_means(family: str, stem: str, yes: str, no: str) -> None:
    for name in yes.split():
        assert Blocks([f"{name}=0.5"], families()[family]).weight(slot(family, stem)) == 0.5, name
    for name in no.split():
        assert Blocks([f"{name}=0.5"], families()[family]).weight(slot(family, stem)) == 1.0, name


def test_a_part_of_a_fused_layer_is_meant_by_both_names() -> None:
    family = families()["flux"]
    key = "transformer.transformer_blocks.3.attn.to_q.lora_A.weight"
    parsed = compile_keys("flux", "diffusers").parse(key)
    assert parsed is not None
    for name in ("double.3", "transformer_blocks.3", "transformer_blocks.*.attn.to_q", "D003"):
        assert Blocks([f"{name}=0.5"], family).weight(parsed.slot) == 0.5, name


def test_the_last_rule_that_matches_counts_and_each_is_reported() -> None:
    blocks = Blocks(["unet=0.5,down=0.25", "down.1=2"], families()["sd1"])
    stems = [
        "lora_unet_mid_block_attentions_0_proj_in",
        SD1,
        "lora_unet_down_blocks_0_attentions_0_proj_in",
    ]
    stems.append("lora_te_text_model_encoder_layers_3_mlp_fc1")
    assert [blocks.weight(slot("sd1", stem)) for stem in stems] == [0.5, 2.0, 0.25, 1.0]
    blocks.check()
    assert [(r["rule"], r["weight"], r["modules"]) for r in blocks.records()] == [
        ("unet", 0.5, 1),
        ("down", 0.25, 1),
        ("down.1", 2.0, 1),
        ("(no rule)", 1.0, 1),
    ]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("unet", "expected a number"),
        ("unet=x", "expected a number, got 'x'"),
        ("unet=nan", "expected a number"),
        ("=0.5", "expected NAME=VALUE"),
        ("", "empty"),
        ("te=1,,unet=0", "empty"),
        ("1,0,1", "Stable Diffusion 1.x has no vector of 3 values"),
        (",".join(["1"] * 12), "no vector of 12"),
    ],
)
def test_what_cannot_be_read_is_refused(text: str, what: str) -> None:
    with pytest.raises(WrongUsage, match=what) as caught:
        block_weights.parse([text], families()["sd1"])
    assert caught.value.hint


def test_a_family_without_vectors_says_so() -> None:
    with pytest.raises(WrongUsage, match="has no vector of 17 values"):
        block_weights.parse([",".join(["1"] * 17)], families()["wan"])


# in a merge ------------------------------------------------------------------------------------------------------------


def merged(
    folder: Path, tiny: Path, *blocks: str, adapter: str = "lora-kohya", **options: Any
) -> merge.Report:
    target = merge.Options(
        output=folder / "o.safetensors", overwrite=True, blocks=blocks, **options
    )
    return merge.run(
        merge.plan(tiny / "base.safetensors", [(tiny / f"{adapter}.safetensors", 0.5)], target)
    )


def test_weights_multiply_the_strength_and_zero_is_a_copy(tmp_path: Path, tiny: Path) -> None:
    base = load_file(tiny / "base.safetensors")
    report = merged(tmp_path, tiny, "te=0,unet.mid_block=0.5,up=-1")
    found = load_file(tmp_path / "o.safetensors")
    strengths = {detail["tensor"]: detail["strength"] for detail in report.details}
    expected = {
        "cond_stage": 0.0,
        "model.diffusion_model.middle": 0.25,
        "model.diffusion_model.output": -0.5,
    }
    for tensor, strength in strengths.items():
        assert strength == next(
            (s for start, s in expected.items() if tensor.startswith(start)), 0.5
        ), tensor
    by_strength = {}
    for strength in sorted(set(strengths.values())):
        target = merge.Options(output=tmp_path / "p.safetensors", overwrite=True)
        merge.run(
            merge.plan(
                tiny / "base.safetensors", [(tiny / "lora-kohya.safetensors", strength)], target
            )
        )
        by_strength[strength] = load_file(tmp_path / "p.safetensors")
    for key, tensor in found.items():
        assert torch.equal(tensor, by_strength.get(strengths.get(key, 0.0), base)[key]), key
    weights = {r["rule"]: r["modules"] for r in report.block_weights}
    assert weights["te"] == sum(s == 0 for s in strengths.values()) > 0
    assert sum(weights.values()) == report.modules
    assert report.tensors_changed == sum(s != 0 for s in strengths.values())


def test_a_vector_applies_in_a_merge(tmp_path: Path, tiny: Path) -> None:
    values = [0.0] * 26
    values[1 + 4] = 1.0  # IN04
    report = merged(tmp_path, tiny, ",".join(map(str, values)))
    base, found = load_file(tiny / "base.safetensors"), load_file(tmp_path / "o.safetensors")
    changed = {key for key in base if not torch.equal(base[key], found[key])}
    assert changed
    assert all(key.startswith("model.diffusion_model.input_blocks.4.") for key in changed)
    assert report.tensors_changed == len(changed)


def test_a_rule_that_matches_nothing_is_an_error_with_the_blocks_there_are(
    tmp_path: Path, tiny: Path
) -> None:
    with pytest.raises(NoSuchName, match="'unet.down_block.7' matches no module") as caught:
        merged(tmp_path, tiny, "unet.down_block.7=0.5")
    assert "unet.down_blocks" in caught.value.hint
    with pytest.raises(NoSuchName, match="'double' matches no module") as caught:
        merged(tmp_path, tiny, "te=0,double=0.5")
    assert caught.value.hint == (
        "these adapters have the blocks text_encoder.text_model.encoder.layers.0-11, "
        "unet.down_blocks.0-2, unet.mid_block, unet.up_blocks.1-3"
    )
    assert not (tmp_path / "o.safetensors").exists()


def test_blocks_that_a_vector_leaves_open_are_asked_for(tmp_path: Path) -> None:
    """The web UI's extension sets them to 0 without a word: 17 values on a LoCon."""
    stems = ["lora_unet_conv_in", "lora_unet_down_blocks_0_attentions_0_proj_in"]
    base = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.randn(8, 4, 3, 3),
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": torch.randn(8, 8, 1, 1),
    }
    adapter = {}
    for stem, weight in zip(stems, base.values(), strict=True):
        adapter |= {
            f"{stem}.lora_up.weight": torch.randn(8, 2, 1, 1),
            f"{stem}.lora_down.weight": torch.randn(2, *weight.shape[1:]),
        }
    save_file(base, tmp_path / "base.safetensors")
    save_file(adapter, tmp_path / "a.safetensors")
    vector = ",".join(["0.5"] * 17)

    def run(*blocks: str) -> dict[str, float]:
        target = merge.Options(
            output=tmp_path / "o.safetensors", family="sd1", overwrite=True, blocks=blocks
        )
        plan = merge.plan(
            tmp_path / "base.safetensors", [(tmp_path / "a.safetensors", 1.0)], target
        )
        return {c.label: c.strength for one in plan.merges for c in one.contributions}

    with pytest.raises(
        WrongUsage, match="no value for IN00, but these adapters have 1 module there"
    ) as caught:
        run(vector)
    assert "IN00=0" in caught.value.hint
    assert run(vector, "IN00=0") == {
        "unet.conv_in": 0.0,
        "unet.down_blocks.0.attentions.0.proj_in": 0.5,
    }
