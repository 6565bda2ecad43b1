"""`inspect --stats` against a float64 SVD of the dense difference, kind by kind; blocks; what has no numbers."""

from __future__ import annotations

import json
import math
import re
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit.adapter import Adapter
from adaptkit.algorithms.contract import Facts
from adaptkit.cli.show.heat_map import grouped
from adaptkit.ops import inspect
from adaptkit.ops.blocks import KINDS, block_of, kind_of
from adaptkit.ops.inspect.stats import Measured, measure, rolled_up
from tests import oracle
from tests.synth import FIXTURES, load_listing, write_header_only

Array = np.ndarray
STEM = "lora_unet_down_blocks_0_"
ATTENTION = f"{STEM}attentions_0_"
LINEAR = f"{ATTENTION}transformer_blocks_0_attn1_to_q"  # 12 × 10
CONV = f"{STEM}resnets_0_conv1"  # 12 × 6 of 3 × 3


def arrays(seed: int, **shapes: tuple[int, ...]) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(shape) for name, shape in shapes.items()}


def stats(path: Path) -> tuple[dict[str, Any], dict[str, Mapping[str, Any]], inspect.Report]:
    report = inspect.run(path, inspect.Options(stats=True))
    assert report.error is None, report.error
    json.dumps(report.record, allow_nan=False)
    json.dumps(report.modules, allow_nan=False)
    return dict(report.record), {module["module"]: module for module in report.modules}, report


def saved(path: Path, tensors: Mapping[str, Any]) -> Path:
    save_file({key: torch.as_tensor(value).contiguous() for key, value in tensors.items()}, path)
    return path


def spelled(
    module: str, tensors: Mapping[str, Array], prefix: str, alpha: float | None
) -> dict[str, Any]:
    """In float32, with alpha."""
    found = {
        f"{module}.{prefix}{name}": torch.from_numpy(value).float()
        for name, value in tensors.items()
    }
    return found if alpha is None else found | {f"{module}.alpha": torch.tensor(alpha)}


def expected(delta: Array) -> dict[str, float]:
    sigma = np.linalg.svd(delta.reshape(len(delta), -1).astype(np.float64), compute_uv=False)
    held = np.cumsum(sigma**2) / np.sum(sigma**2)
    return {
        "norm": float(np.linalg.norm(delta)),
        "spectral_norm": float(sigma[0]),
        "stable_rank": float(np.sum(sigma**2) / sigma[0] ** 2),
        "rank_90": 1 + int(np.argmax(held >= 0.9)),
        "rank_99": 1 + int(np.argmax(held >= 0.99)),
    }


def rounded(tensors: Mapping[str, Array]) -> dict[str, Array]:
    """What is stored: float32."""
    return {name: value.astype(np.float32) for name, value in tensors.items()}


FORMS: dict[str, tuple[str, dict[str, Array], str, float | None]] = {
    "lora": (LINEAR, arrays(0, up=(12, 5), down=(5, 10)), "lora_", 2.0),
    "lora of a rank above its sides": (
        LINEAR,
        arrays(1, up=(12, 16), down=(16, 10)),
        "lora_",
        None,
    ),
    "locon": (CONV, arrays(2, up=(12, 4, 1, 1), down=(4, 6, 3, 3)), "lora_", 1.0),
    "tucker": (
        CONV,
        arrays(3, up=(12, 4, 1, 1), mid=(4, 4, 3, 3), down=(4, 6, 1, 1)),
        "lora_",
        1.0,
    ),
    "loha": (
        LINEAR,
        arrays(4, w1_a=(12, 2), w1_b=(2, 10), w2_a=(12, 2), w2_b=(2, 10)),
        "hada_",
        1.5,
    ),
    "loha of a high rank": (
        LINEAR,
        arrays(5, w1_a=(12, 4), w1_b=(4, 10), w2_a=(12, 4), w2_b=(4, 10)),
        "hada_",
        2.0,
    ),
    "loha, tucker": (
        CONV,
        arrays(
            6,
            w1_a=(3, 12),
            w1_b=(3, 6),
            w2_a=(3, 12),
            w2_b=(3, 6),
            t1=(3, 3, 3, 3),
            t2=(3, 3, 3, 3),
        ),
        "hada_",
        1.0,
    ),
    "lokr": (LINEAR, arrays(7, w1=(3, 2), w2=(4, 5)), "lokr_", 1e10),
    "lokr, factored": (
        LINEAR,
        arrays(8, w1_a=(3, 1), w1_b=(1, 2), w2_a=(4, 2), w2_b=(2, 5)),
        "lokr_",
        3.0,
    ),
    "lokr, conv": (CONV, arrays(9, w1=(3, 2), w2=(4, 3, 3, 3)), "lokr_", None),
    "lokr, tucker": (
        CONV,
        arrays(10, w1=(3, 2), w2_a=(2, 4), w2_b=(2, 3), t2=(2, 2, 3, 3)),
        "lokr_",
        1.0,
    ),
    "full": (LINEAR, arrays(11, diff=(12, 10)), "", None),
    "full, conv": (CONV, arrays(12, diff=(12, 6, 3, 3)), "", None),
}


def dense(prefix: str, tensors: Mapping[str, Array], alpha: float | None) -> Array:
    if prefix == "lora_":
        rank = tensors["down"].shape[0]
        return oracle.lora(
            tensors["up"], tensors["down"], (alpha or rank) / rank, tensors.get("mid")
        )
    if prefix == "hada_":
        return oracle.loha(tensors, alpha)
    return tensors["diff"] if prefix == "" else oracle.lokr_stored(tensors, alpha)


@pytest.mark.parametrize("form", FORMS)
def test_numbers_are_those_of_the_dense_difference(form: str, tmp_path: Path) -> None:
    module, tensors, prefix, alpha = FORMS[form]
    spelling = (
        {"up": "up.weight", "down": "down.weight", "mid": "mid.weight"} if prefix == "lora_" else {}
    )
    stored = {spelling.get(name, name): value for name, value in tensors.items()}
    path = saved(tmp_path / "a.safetensors", spelled(module, stored, prefix, alpha))
    record, modules, report = stats(path)
    ((name, found),) = modules.items()
    wanted = expected(dense(prefix, rounded(tensors), alpha))
    for field in ("norm", "spectral_norm", "stable_rank"):
        assert found[field] == pytest.approx(wanted[field], rel=2e-6), field
    assert (found["rank_90"], found["rank_99"]) == (wanted["rank_90"], wanted["rank_99"])
    assert (found["non_finite_tensors"], found["zero_tensors"]) == (0, 0)
    assert (found["block"], found["kind"]) == (
        "unet.down_blocks.0",
        "q" if module == LINEAR else "conv",
    )
    assert record["norm"] == found["norm"]
    assert list(report.spectra[0])[:1] == [found["spectral_norm"]]
    assert name.startswith("unet.down_blocks.0.")


def test_ranks_count_what_holds_the_share() -> None:
    def ranks(*sigma: float) -> tuple[int | None, int | None]:
        one = Measured("m", "c", "b", "q", 1.0, sigma)
        return one.rank(0.9), one.rank(0.99)

    assert ranks(*[1.0] * 10) == (9, 10)
    assert ranks(*[0.07] * 100) == (
        90,
        99,
    )  # where sums of equal parts miss the share by their rounding
    assert ranks(1.0, 0.0, 0.0) == (1, 1)
    assert ranks(3.0, 1.0) == (1, 2)
    assert ranks(0.0, 0.0) == (0, 0)
    assert ranks() == (None, None)
    assert Measured("m", "c", "b", "q", 0.0, (0.0,)).stable_rank == 0.0


def test_vectors_have_a_norm_alone(tmp_path: Path) -> None:
    bias, norm = np.arange(4.0), np.ones(9)
    block = f"{ATTENTION}transformer_blocks_0_"
    tensors = {f"{block}attn1_to_out_0.diff_b": bias, f"{block}norm1.w_norm": norm}
    record, modules, report = stats(saved(tmp_path / "a.safetensors", tensors))
    assert [module["kind"] for module in modules.values()] == ["bias", "norm"]
    assert [module["norm"] for module in modules.values()] == pytest.approx([math.sqrt(14), 3.0])
    fields = ("spectral_norm", "stable_rank", "rank_90", "rank_99")
    assert {module[field] for module in modules.values() for field in fields} == {None}
    (only,) = record["blocks"]
    assert (only["norm"], only["rank_90"], only["spectral_norm"]) == (
        pytest.approx(math.sqrt(23)),
        None,
        None,
    )
    assert list(map(len, report.spectra)) == [0, 0]


def test_what_depends_on_the_weight_has_none(tmp_path: Path) -> None:
    """The inner difference of a DoRA is not what it changes."""
    tensors = arrays(0, up=(12, 4), down=(4, 10))
    stored = {
        f"{LINEAR}.lora_{name}.weight": torch.from_numpy(value) for name, value in tensors.items()
    }
    path = saved(
        tmp_path / "a.safetensors",
        stored | {f"{LINEAR}.dora_scale": torch.ones(12, 1), f"{LINEAR}.alpha": 4.0},
    )
    record, modules, _ = stats(path)
    ((_, found),) = modules.items()
    assert found["algorithm"] == "lora+dora"
    assert {
        found[name] for name in ("norm", "spectral_norm", "stable_rank", "rank_90", "rank_99")
    } == {None}
    assert record["problems"] == []
    assert (record["norm"], record["blocks"][0]["norm"], record["blocks"][0]["kinds"]) == (
        None,
        None,
        {"q": None},
    )


class TestWrongNumbers:
    @pytest.fixture
    def tensors(self, tiny: Path) -> dict[str, torch.Tensor]:
        return load_file(tiny / "lora-kohya.safetensors")

    @pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
    def test_not_finite(
        self, tensors: dict[str, torch.Tensor], tmp_path: Path, wrong: float
    ) -> None:
        key = next(
            key for key in tensors if "down_blocks_1" in key and key.endswith("lora_up.weight")
        )
        tensors[key].view(-1)[-1] = wrong
        record, modules, _ = stats(saved(tmp_path / "a.safetensors", tensors))
        ((name, found),) = [(name, m) for name, m in modules.items() if m["norm"] is None]
        assert found["non_finite_tensors"] == 1
        assert (found["rank_90"], found["spectral_norm"]) == (None, None)
        assert {
            "severity": "error",
            "module": name,
            "what": f"{key} holds NaN or infinity",
        } in record["problems"]
        blocks = {block["block"]: block for block in record["blocks"]}
        assert {
            block: found["non_finite_tensors"]
            for block, found in blocks.items()
            if found["non_finite_tensors"]
        } == {"unet.down_blocks.1": 1}
        others = [
            m["norm"]
            for m in modules.values()
            if m["block"] == "unet.down_blocks.1" and m["norm"] is not None
        ]
        assert blocks["unet.down_blocks.1"]["norm"] == pytest.approx(np.linalg.norm(others))

    def test_zero(self, tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
        key = next(
            key for key in tensors if "down_blocks_1" in key and key.endswith("lora_up.weight")
        )
        tensors[key].zero_()
        record, modules, _ = stats(saved(tmp_path / "a.safetensors", tensors))
        ((name, found),) = [(name, m) for name, m in modules.items() if m["zero_tensors"]]
        assert [
            found[k] for k in ("norm", "spectral_norm", "stable_rank", "rank_90", "rank_99")
        ] == [0, 0, 0, 0, 0]
        assert [(p["severity"], p["module"]) for p in record["problems"]] == [("warning", name)]
        assert sum(block["zero_tensors"] for block in record["blocks"]) == 1

    def test_a_product_that_overflows(self, tmp_path: Path) -> None:
        """Finite tensors, an infinite ΔW: LoHa multiplies four of them in float32."""
        sides = {f"{LINEAR}.hada_w{n}_{s}": torch.full((8, 8), 1e20) for n in (1, 2) for s in "ab"}
        sides[f"{LINEAR}.alpha"] = torch.tensor(8.0)
        record, modules, _ = stats(saved(tmp_path / "a.safetensors", sides))
        ((_, found),) = modules.items()
        assert (found["norm"], found["non_finite_tensors"]) == (None, 0)
        assert [p["severity"] for p in record["problems"]] == ["error"]
        assert "overflows" in record["problems"][0]["what"]

    def test_too_large_for_half(self, tmp_path: Path) -> None:
        path = saved(tmp_path / "a.safetensors", {f"{LINEAR}.diff": torch.full((8, 8), 1e4)})
        assert "fp16" in stats(path)[0]["problems"][0]["what"]


def test_one_module_is_in_memory_at_a_time(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    order: list[str] = []
    read = Adapter.read

    def spy(self: Adapter, entry: Any) -> dict[str, torch.Tensor]:
        assert not any(tensor() is not None for tensor in alive)
        found = read(self, entry)
        alive.extend(weakref.ref(tensor) for tensor in found.values())
        order.extend(key for _, key in entry.tensors())
        return found

    monkeypatch.setattr(Adapter, "read", spy)
    seen: list[tuple[int, int]] = []
    with Adapter.open(tiny / "lora-kohya.safetensors") as adapter:
        measure(adapter, lambda _, done, total, *__: seen.append((done, total)))
        stored = [key for key in adapter.source.infos if not key.endswith("alpha")]
    assert seen == [(n, 104) for n in range(105)]
    assert sorted(order) == sorted(stored)
    firsts = [stored.index(key) for key in order]
    assert firsts[::2] == sorted(
        firsts[::2]
    )  # by the first of each module's tensors: in file order


def test_without_stats_the_record_has_none(tiny: Path) -> None:
    report = inspect.run(tiny / "lora-kohya.safetensors")
    assert not {"norm", "blocks"} & report.record.keys()
    assert not {"norm", "block"} & report.modules[0].keys()
    assert report.spectra == ()


# blocks


@pytest.mark.parametrize(
    ("label", "block"),
    [
        ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "unet.down_blocks.1"),
        ("unet.mid_block.attentions.0.proj_in", "unet.mid_block"),
        ("unet.input_blocks.10.1.transformer_blocks.3.attn2.to_k", "unet.input_blocks.10"),
        ("unet.middle_block.1.proj_in", "unet.middle_block"),
        ("unet.time_embed.0", "unet"),
        ("unet.label_emb.0.0", "unet"),
        ("transformer.double_blocks.18.img_attn.qkv", "transformer.double_blocks.18"),
        (
            "transformer.single_transformer_blocks.7.norm.linear",
            "transformer.single_transformer_blocks.7",
        ),
        ("transformer.layers.29.attention.qkv", "transformer.layers.29"),
        ("transformer.noise_refiner.1.attention.qkv", "transformer.noise_refiner.1"),
        ("transformer.final_layer.adaLN_modulation.1", "transformer"),
        ("transformer.x_embedder.proj.1", "transformer"),
        ("transformer.t_embedder.1.linear_1", "transformer"),
        (
            "transformer.context_embedder.token_refiner.refiner_blocks.0.attn.to_q",
            "transformer.context_embedder.token_refiner.refiner_blocks.0",
        ),
        (
            "text_encoder_2.text_model.encoder.layers.31.mlp.fc1",
            "text_encoder_2.text_model.encoder.layers.31",
        ),
        ("text_encoder.encoder.block.7.layer.0.SelfAttention.q", "text_encoder.encoder.block.7"),
        ("text_encoder.text_projection", "text_encoder"),
        ("unet.up_blocks.3.resnets.0.norm1.bias", "unet.up_blocks.3"),
        (
            "transformer.strange_blocks_12_attn_q",
            "transformer.strange_blocks_12",
        ),  # an unknown family, kohya's keys
    ],
)
def test_blocks(label: str, block: str) -> None:
    assert block_of(label, label.partition(".")[0]) == block


@pytest.mark.parametrize(
    ("inside", "kind"),
    [
        (".attentions.0.transformer_blocks.0.attn2.to_q", "q"),
        (".attn.add_k_proj", "k"),
        (".cross_attn.v_img", "v"),
        (".img_attn.qkv", "qkv"),
        (".attn.in_proj", "qkv"),
        (".attn1.to_out.0", "out"),
        (".attn.to_add_out", "out"),
        (".img_attn.proj", "out"),
        (".attention.o", "out"),
        (".linear1", "fused"),
        (".ff.net.0.proj", "ff"),
        (".mlp.fc1", "ff"),
        (".feed_forward.linear_1", "ff"),
        (".norm1_context.linear", "mod"),
        (".adaln_modulation_mlp.1", "mod"),
        (".img_mod.lin", "mod"),
        (".resnets.0.conv1", "conv"),
        (".0.in_layers.2", "conv"),
        (".attentions.0.proj_in", "proj"),
        (".proj_out", "proj"),
        (".resnets.0.time_emb_proj", "emb"),
        (".time_in.in_layer", "emb"),
        (".attn.to_gate", "other"),
    ],
)
def test_kinds(inside: str, kind: str) -> None:
    assert kind in KINDS
    assert kind_of(inside, "weight", Facts(8, 8, (), 4, 1.0)) == kind


def test_a_kernel_tells_a_convolution() -> None:
    assert kind_of(".strange", "weight", Facts(8, 72, (3, 3), 4, 1.0)) == "conv"
    assert kind_of(".strange", "weight", Facts(8, 8, (1, 1), 4, 1.0)) == "other"


def measured(block: str, kind: str, norm: float | None, *sigma: float) -> Measured:
    return Measured(f"{block}.{kind}", block.partition(".")[0], block, kind, norm, sigma)


def test_roll_up() -> None:
    parts = [
        measured("unet.up_blocks.1", "q", 3.0, 3.0),
        measured("unet.up_blocks.1", "q", 4.0, *[math.sqrt(8.0)] * 2),
        measured("unet.up_blocks.1", "ff", 12.0, *[math.sqrt(36.0)] * 4),
        measured("unet.up_blocks.1", "bias", 0.0),
    ]
    (block,) = rolled_up(parts, ["unet"])
    assert (block["block"], block["modules"], block["norm"], block["spectral_norm"]) == (
        "unet.up_blocks.1",
        4,
        13.0,
        6.0,
    )
    assert (block["stable_rank"], block["rank_90"], block["rank_99"]) == (pytest.approx(2.0), 2, 2)
    assert block["kinds"] == {"q": pytest.approx(math.sqrt(12.5)), "ff": 12.0, "bias": 0.0}
    assert list(block["kinds"]) == ["q", "ff", "bias"]


def test_blocks_come_in_the_order_of_the_model() -> None:
    shuffled = [
        "text_encoder.layers.1",
        "text_encoder_2",
        "unet",
        "unet.up_blocks.0",
        "unet.mid_block",
        "unet.down_blocks.10",
        "unet.down_blocks.9",
        "text_encoder.layers.0",
    ]
    found = rolled_up(
        [measured(block, "q", 1.0, 1.0) for block in shuffled],
        ["unet", "text_encoder", "text_encoder_2"],
    )
    assert [block["block"] for block in found] == [
        "unet.down_blocks.9",
        "unet.down_blocks.10",
        "unet.mid_block",
        "unet.up_blocks.0",
        "unet",
        "text_encoder.layers.0",
        "text_encoder.layers.1",
        "text_encoder_2",
    ]
    assert list(grouped(found)) == [
        "unet.down_blocks",
        "unet.mid_block",
        "unet.up_blocks",
        "unet",
        "text_encoder.layers",
        "text_encoder_2",
    ]


def test_the_record_adds_up(tiny: Path) -> None:
    record, modules, report = stats(tiny / "lora-kohya.safetensors")
    assert (
        sum(block["modules"] for block in record["blocks"])
        == len(modules)
        == len(report.spectra)
        == 104
    )
    assert record["norm"] == pytest.approx(np.linalg.norm([m["norm"] for m in modules.values()]))
    assert record["norm"] == pytest.approx(
        np.linalg.norm([block["norm"] for block in record["blocks"]])
    )
    for block in record["blocks"]:
        mine = [m for m in modules.values() if m["block"] == block["block"]]
        assert all(m["module"].startswith(f"{block['block']}.") for m in mine)
        for kind, value in block["kinds"].items():
            norms = [m["norm"] for m in mine if m["kind"] == kind]
            assert value == pytest.approx(math.sqrt(np.mean(np.square(norms))))


def test_every_family_has_blocks_and_few_modules_of_no_kind(tmp_path: Path) -> None:
    """Of all key lists: what stands in a numbered block is found there, and nearly every layer is of a known kind."""
    paths = [
        *(FIXTURES / "keys").glob("*-kohya*.tsv"),
        *(FIXTURES / "keys").glob("[fsw]*-diffusers.tsv"),
    ]
    listings = {path.stem: load_listing(path) for path in paths}
    assert len(listings) > 25
    for name, listing in listings.items():
        with Adapter.open(write_header_only(tmp_path / "a.safetensors", listing)) as adapter:
            labels = {
                adapter.label(slot): (slot, entry.facts) for slot, entry in adapter.entries.items()
            }
        kinds = []
        for label, (slot, facts) in labels.items():
            block = block_of(label, slot.component)
            assert label.startswith(f"{block}."), (name, label)
            if re.search(r"\w(blocks|layers)\.\d+\.", label) and "guidance" not in label:
                assert block != slot.component, (name, label)
                kinds.append(kind_of(label.removeprefix(block), slot.param, facts))
        assert kinds.count("other") <= 0.13 * len(kinds), name
