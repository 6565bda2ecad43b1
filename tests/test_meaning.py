"""What a file means to its reader: alpha, PEFT's configuration, stored tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit.adapter import Adapter
from adaptkit.algorithms.contract import Stated
from adaptkit.algorithms.lora import Lora
from adaptkit.errors import NotRepresentable, ShapeMismatch, WrongUsage
from adaptkit.meaning import Meaning, as_read
from adaptkit.ops import combine, compare, convert, inspect, merge, resize

STEM = "transformer_blocks.0.attn.to_q"
RANK, SIZE = 4, 24


def folder(path: Path, config: dict[str, Any], *, bias: bool = False) -> Path:
    """A PEFT folder of one module, seeded."""
    draw = np.random.default_rng(1)
    tensors = {
        "lora_A.weight": draw.standard_normal((RANK, SIZE)),
        "lora_B.weight": draw.standard_normal((SIZE, RANK)),
    }
    if bias:
        tensors["lora_B.bias"] = draw.standard_normal(SIZE)
    path.mkdir()
    save_file(
        {f"base_model.model.{STEM}.{k}": torch.tensor(v).float() for k, v in tensors.items()},
        path / "adapter_model.safetensors",
    )
    whole = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": ["to_q"],
        **config,
    }
    (path / "adapter_config.json").write_text(json.dumps(whole), encoding="utf-8")
    return path


def base(path: Path) -> Path:
    draw = torch.Generator().manual_seed(0)
    state = {
        f"{STEM}.weight": torch.randn(SIZE, SIZE, generator=draw),
        f"{STEM}.bias": torch.randn(SIZE, generator=draw),
    }
    save_file(state, path)
    return path


def merged(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    output = base.with_name("merged.safetensors")
    merge.run(merge.plan(base, [(adapter, 1.0)], merge.Options(output=output, overwrite=True)))
    return load_file(output)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 1.0),
        ({"lora_alpha": 16}, 4.0),
        ({"lora_alpha": 6, "use_rslora": True}, 3.0),
        ({"lora_alpha": 4, "alpha_pattern": {"to_q": 10}}, 2.5),
        ({"lora_alpha": 4, "r": 8, "rank_pattern": {"to_q": RANK}}, 1.0),
    ],
)
def test_the_bias_of_a_lora_is_scaled_as_its_factors_are(
    tmp_path: Path, config: dict[str, Any], scale: float
) -> None:
    """peft/tuners/lora/layer.py: merge adds `lora_B.bias * scaling`."""
    source, adapter = base(tmp_path / "base.safetensors"), folder(tmp_path / "a", config, bias=True)
    before, after = load_file(source), merged(source, adapter)
    stored = load_file(adapter / "adapter_model.safetensors")
    stem = f"base_model.model.{STEM}."
    bias = scale * stored[f"{stem}lora_B.bias"].double()
    weight = (
        scale * stored[f"{stem}lora_B.weight"].double() @ stored[f"{stem}lora_A.weight"].double()
    )
    for name, delta in (("bias", bias), ("weight", weight)):
        found = after[f"{STEM}.{name}"].double() - before[f"{STEM}.{name}"].double()
        assert float((found - delta).norm()) <= 1e-5 * float(delta.norm())


@pytest.mark.interop
@pytest.mark.parametrize("config", [{"lora_alpha": 16}, {"lora_alpha": 6, "use_rslora": True}])
def test_the_bias_of_a_lora_is_what_peft_merges(tmp_path: Path, config: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            block, attn = torch.nn.Module(), torch.nn.Module()
            attn.to_q, block.attn = torch.nn.Linear(SIZE, SIZE), attn
            self.transformer_blocks = torch.nn.ModuleList([block])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.transformer_blocks[0].attn.to_q(x)

    torch.manual_seed(0)
    model = Model()
    source = tmp_path / "base.safetensors"
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, source)
    settings = peft.LoraConfig(
        r=RANK, target_modules=["to_q"], lora_bias=True, init_lora_weights=False, **config
    )
    tuned = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    tuned.save_pretrained(tmp_path / "a")
    after = merged(source, tmp_path / "a")
    for name, tensor in tuned.merge_and_unload().state_dict().items():
        assert torch.allclose(after[name], tensor, atol=1e-5), name


class Attention(torch.nn.Module):
    """A model of one linear layer, named as FLUX's."""

    def __init__(self) -> None:
        super().__init__()
        block, attn = torch.nn.Module(), torch.nn.Module()
        attn.to_q, block.attn = torch.nn.Linear(SIZE, SIZE + 8), attn
        self.transformer_blocks = torch.nn.ModuleList([block])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.transformer_blocks[0].attn.to_q(x)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("config", [{"lora_alpha": 3}, {"lora_alpha": 8, "use_rslora": True}])
def test_factors_taken_from_the_base_are_what_peft_loads(
    tmp_path: Path, init: str, config: dict[str, Any]
) -> None:
    """Merged, and as a plain difference: PEFT subtracts the first factors from the base again."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = Attention()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    source = tmp_path / "base.safetensors"
    save_file(state, source)
    settings = peft.LoraConfig(r=RANK, target_modules=["to_q"], init_lora_weights=init, **config)
    tuned = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    tuned.save_pretrained(tmp_path / "a")
    fresh = Attention()
    fresh.load_state_dict(state)
    theirs = peft.PeftModel.from_pretrained(fresh, tmp_path / "a").merge_and_unload().state_dict()
    key = f"{STEM}.weight"
    change = theirs[key] - state[key]
    after = merged(source, tmp_path / "a")
    assert torch.allclose(after[key] - state[key], change, atol=1e-5)
    for algo in ("lora", "full"):
        out = tmp_path / f"as-{algo}.safetensors"
        shared = {"to": "diffusers", "family": "flux", "dtype": "fp32", "verify": True}
        options = convert.Options(algo=algo, base=source, output=out, **shared)
        report = convert.run(convert.plan(tmp_path / "a", options))
        assert report.measured is not None
        assert report.measured < 1e-5
        with Adapter.open(out, family="flux") as found:
            (entry,) = found.entries.values()
            assert torch.allclose(found.weights(entry).delta(), change, atol=1e-5)
    # as they are, the factors would be read as a LoRA
    with pytest.raises(NotRepresentable, match="init_lora_weights") as caught:
        convert.plan(tmp_path / "a", convert.Options(to="kohya", family="flux"))
    assert "--algo lora with --base" in (caught.value.hint or "")


@pytest.mark.parametrize("init", ["pissa_niter_16", "corda", "loftq", "lora_ga"])
def test_adapters_whose_training_changed_the_base_are_refused_by_every_verb(
    tmp_path: Path, init: str
) -> None:
    adapter = folder(tmp_path / "a", {"init_lora_weights": init})
    source, out = base(tmp_path / "base.safetensors"), tmp_path / "out.safetensors"
    plans = [
        lambda: merge.plan(source, [(adapter, 1.0)], merge.Options(output=out)),
        lambda: convert.plan(adapter, convert.Options(to="comfy", family="flux", output=out)),
        lambda: resize.plan(adapter, resize.Options(rank=2, output=tmp_path / "small")),
        lambda: combine.plan([(adapter, 1.0)] * 2, combine.Options(output=tmp_path / "both")),
        lambda: compare.plan((adapter, 1.0), (adapter, 1.0), compare.Options()),
    ]
    for plan in plans:
        with pytest.raises(NotRepresentable, match=f"init_lora_weights = {init}"):
            plan()
    assert not out.exists()
    problems = inspect.run(adapter).record["problems"]
    assert [p["severity"] for p in problems if "init_lora_weights" in p["what"]] == ["error"]


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_inits_that_leave_the_base_as_it_is_are_read(tmp_path: Path, init: object) -> None:
    adapter = folder(tmp_path / "a", {"init_lora_weights": init, "lora_alpha": 8})
    with Adapter.open(adapter) as found:
        assert found.problems == ()
        assert [entry.facts.scale for entry in found.entries.values()] == [2.0]


def test_diffusers_metadata_states_the_init_too(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {
        f"transformer.{STEM}.lora_A.weight": torch.randn(RANK, SIZE),
        f"transformer.{STEM}.lora_B.weight": torch.randn(SIZE, RANK),
    }
    stated = {"transformer.init_lora_weights": "corda", "transformer.r": RANK}
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(stated)})
    with pytest.raises(NotRepresentable, match="transformer: init_lora_weights = corda"):
        Adapter.open(path, family="flux")


@pytest.mark.parametrize(
    "config",
    [{"use_cayley_neumann": False}, {"num_cayley_neumann_terms": 2}, {"coft": True}],
)
def test_an_oft_that_is_not_computed_here_stops_every_verb(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    path = tmp_path / "a"
    path.mkdir()
    save_file(
        {f"base_model.model.{STEM}.oft_R.weight": torch.randn(3, 28)},
        path / "adapter_model.safetensors",
    )
    whole = {"peft_type": "OFT", "r": 3, "oft_block_size": 8, "use_cayley_neumann": True, **config}
    (path / "adapter_config.json").write_text(json.dumps(whole), encoding="utf-8")
    source = base(tmp_path / "base.safetensors")
    with pytest.raises(NotRepresentable, match="this kind of OFT is not supported"):
        merge.plan(source, [(path, 1.0)], merge.Options(output=tmp_path / "o.safetensors"))
    with pytest.raises(NotRepresentable, match="this kind of OFT is not supported"):
        compare.plan((path, 1.0), (path, 1.0), compare.Options())


def test_weights_named_directly_are_read_with_the_configuration_beside_them(
    tmp_path: Path,
) -> None:
    adapter = folder(tmp_path / "a", {"lora_alpha": 1})
    for path in (adapter, adapter / "adapter_model.safetensors"):
        with Adapter.open(path) as found:
            assert [entry.facts.scale for entry in found.entries.values()] == [0.25], path
            assert found.alpha_source == "metadata"


def test_a_broken_configuration_beside_the_weights_is_named(tmp_path: Path) -> None:
    adapter = folder(tmp_path / "a", {})
    (adapter / "adapter_config.json").write_text("[1, 2", encoding="utf-8")
    record = inspect.run(adapter / "adapter_model.safetensors").record
    assert "adapter_config.json is not valid JSON" in record["error"]


def flat(path: Path, metadata: dict[str, str], alpha: float | None = None) -> Path:
    """A LoRA whose alpha, if any, stands in the metadata alone, unless `alpha` is given."""
    draw = torch.Generator().manual_seed(8)
    name = f"transformer.{STEM}"
    tensors = {
        f"{name}.lora_A.weight": torch.randn(RANK, SIZE, generator=draw),
        f"{name}.lora_B.weight": torch.randn(SIZE, RANK, generator=draw),
    }
    if alpha is not None:
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path, metadata)
    return path


def scale_of(path: Path, **options: str) -> float:
    with Adapter.open(path, family="flux", **options) as found:
        (entry,) = found.entries.values()
        return entry.facts.scale


@pytest.mark.parametrize("key", ["lora_alpha", "alpha", "network_alpha"])
def test_an_alpha_beside_its_rank_in_the_metadata_counts(tmp_path: Path, key: str) -> None:
    path = flat(tmp_path / "a.safetensors", {key: "1", "rank": str(RANK)})
    assert scale_of(path) == 1 / RANK
    record = inspect.run(path, inspect.Options(family="flux")).record
    assert record["alpha_source"] == "metadata"
    assert any("most hosts ignore" in p["what"] for p in record["problems"])
    # it is written once, and not read twice
    out = tmp_path / "out.safetensors"
    options = convert.Options(to="kohya", family="flux", output=out)
    convert.run(convert.plan(path, options))
    assert load_file(out)["lora_unet_double_blocks_0_img_attn_qkv.alpha"] == 1.0
    folded = tmp_path / "folded.safetensors"
    options = convert.Options(to="diffusers", family="flux", dtype="fp32", output=folded)
    convert.run(convert.plan(path, options))
    assert scale_of(folded) == 1.0


RANKED = {"lora_alpha": 1, "r": RANK}


@pytest.mark.parametrize(
    ("metadata", "diffusers"),
    [
        ({"lora_alpha": "1", "r": str(RANK)}, False),
        ({"transformer.lora_alpha": "1", "transformer.r": str(RANK)}, False),
        ({"lora_config": json.dumps(RANKED)}, False),
        ({"adapter_config": json.dumps(RANKED | {"peft_type": "LORA"})}, False),
        ({"lora_adapter_metadata": json.dumps(RANKED)}, False),
        (
            {
                "lora_adapter_metadata": json.dumps(
                    {f"transformer.{k}": v for k, v in RANKED.items()}
                )
            },
            True,
        ),
    ],
)
def test_wherever_the_metadata_state_alpha_it_counts_once(
    tmp_path: Path, metadata: dict[str, str], diffusers: bool
) -> None:
    """diffusers reads it under the component's name in its own metadata only, which its loader shows."""
    path = flat(tmp_path / "a.safetensors", metadata)
    assert scale_of(path) == 1 / RANK
    record = inspect.run(path, inspect.Options(family="flux")).record
    assert record["alpha_source"] == "metadata"
    assert record["loads_in"]["diffusers"] is diffusers, record["why"]
    assert diffusers or "in metadata that it does not read" in record["why"]["diffusers"]
    for to in ("kohya", "diffusers", "comfy"):
        out = tmp_path / f"{to}.safetensors"
        options = convert.Options(to=to, family="flux", dtype="fp32", output=out)
        convert.run(convert.plan(path, options))
        report = compare.run(compare.plan(path, out, compare.Options(family="flux")))
        assert report.relative_error < 1e-6


@pytest.mark.parametrize(
    ("metadata", "scale"),
    [
        ({"alpha": "1"}, 1.0),  # nothing tells whether it was folded
        ({"lora_config": json.dumps(RANKED | {"use_rslora": True})}, 1.0),
        ({"alpha": "1", "rank": "77"}, 1.0),
        ({"ss_network_alpha": "1", "ss_network_dim": str(RANK)}, 1.0),  # outlives every change
        ({"alpha": "many", "rank": str(RANK)}, 1.0),
    ],
)
def test_an_alpha_that_cannot_be_trusted_does_not_count(
    tmp_path: Path, metadata: dict[str, str], scale: float
) -> None:
    path = flat(tmp_path / "a.safetensors", metadata)
    assert scale_of(path) == scale
    assert scale_of(path, alpha="2") == 2 / RANK


def test_the_alpha_of_a_training_is_named_where_no_tensor_states_one(tmp_path: Path) -> None:
    """It may have been multiplied into the weights, or lost: only a person can tell."""

    def warnings(stated: dict[str, str], **alpha: float) -> list[str]:
        record = inspect.run(flat(tmp_path / "a.safetensors", stated, **alpha)).record
        return [p["what"] for p in record["problems"] if "ss_network_alpha" in p["what"]]

    assert len(warnings({"ss_network_alpha": "1", "ss_network_dim": str(RANK)})) == 1
    assert warnings({"ss_network_alpha": str(RANK)}) == []
    assert warnings({"ss_network_alpha": "Dynamic"}) == []
    assert warnings({"ss_network_alpha": "1"}, alpha=2.0) == []


def test_alphas_that_contradict_each_other_are_refused_with_a_hint_that_works(
    tmp_path: Path,
) -> None:
    two = flat(tmp_path / "a.safetensors", {"alpha": "1", "lora_alpha": "2", "rank": str(RANK)})
    stored = json.dumps({"transformer.r": RANK, "transformer.lora_alpha": 2 * RANK})
    both = flat(tmp_path / "b.safetensors", {"lora_adapter_metadata": stored}, alpha=1.0)
    for path in (two, both):
        with pytest.raises(NotRepresentable) as caught:
            scale_of(path)
        assert "--alpha-in" in (caught.value.hint or "")
        assert scale_of(path, alpha="as-rank") == 1.0
        assert scale_of(path, alpha="3") == 3 / RANK
    # what agrees is no contradiction
    same = flat(tmp_path / "c.safetensors", {"lora_adapter_metadata": stored}, alpha=2.0 * RANK)
    assert scale_of(same) == 2.0


@pytest.mark.parametrize("given", ["2", "as-rank"])
def test_an_alpha_that_is_given_counts_in_every_verb(tmp_path: Path, given: str) -> None:
    path = flat(tmp_path / "a.safetensors", {}, alpha=1.0)
    scale = 1.0 if given == "as-rank" else 2 / RANK
    stem = "transformer." + STEM
    stored = load_file(path)
    delta = scale * stored[f"{stem}.lora_B.weight"] @ stored[f"{stem}.lora_A.weight"]
    shared = {"family": "flux", "alpha_in": given, "dtype": "fp32"}
    outputs = [tmp_path / f"{n}.safetensors" for n in range(3)]
    convert.run(convert.plan(path, convert.Options(to="bare", output=outputs[0], **shared)))
    resize.run(resize.plan(path, resize.Options(rank=99, output=outputs[1], **shared)))
    combine.run(combine.plan([(path, 1.0)], combine.Options(output=outputs[2], **shared)))
    for out in outputs:
        with Adapter.open(out, family="flux") as found:
            (entry,) = found.entries.values()
            torch.testing.assert_close(found.weights(entry).delta(), delta)
    with pytest.raises(WrongUsage, match="--alpha-in takes a number"):
        scale_of(path, alpha="-1")


@pytest.mark.parametrize("key", ["lora_alpha", "alpha", "network_alpha"])
def test_an_alpha_that_stands_only_in_the_metadata_is_warned_about(
    tmp_path: Path, key: str
) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {
        f"transformer.{STEM}.lora_A.weight": torch.randn(RANK, SIZE),
        f"transformer.{STEM}.lora_B.weight": torch.randn(SIZE, RANK),
    }
    save_file(tensors, path, {key: "8"})
    problems = inspect.run(path, inspect.Options(family="flux")).record["problems"]
    assert any(p["severity"] == "warning" and f"{key} = 8" in p["what"] for p in problems)


CONFIG = {
    "lora_alpha": 8,
    "r": 4,
    "alpha_pattern": {"^proj_out": 2, "attn.to_q": 3.5},
    "rank_pattern": {"attn.to_q": 16},
    "use_rslora": True,
}


def test_a_tensor_counts_before_the_configuration() -> None:
    meaning = Meaning.of({}, CONFIG)
    assert meaning.alpha("unet", "mid.ff", 5.0) == (Stated(5.0), "tensor")
    assert meaning.alpha("unet", "mid.ff", None) == (Stated(8.0, 4, True), "metadata")
    assert Meaning.of({}, None).alpha("unet", "mid.ff", None) == (None, "none")


def test_patterns_match_the_ends_of_names() -> None:
    meaning = Meaning.of({}, CONFIG)
    assert meaning.alpha("unet", "down.0.attn.to_q", None)[0] == Stated(3.5, 16, True)
    assert meaning.alpha("unet", "proj_out", None)[0] == Stated(2.0, 4, True)
    # `^` in a pattern that follows a prefix never matches
    assert meaning.alpha("unet", "down.proj_out", None)[0] == Stated(8.0, 4, True)


def test_diffusers_keeps_a_configuration_for_each_component() -> None:
    stored = {"transformer.lora_alpha": 6, "transformer.r": 3, "text_encoder.lora_alpha": 1}
    meaning = Meaning.of({"lora_adapter_metadata": json.dumps(stored)}, None)
    assert meaning.alpha("transformer", "any", None)[0] == Stated(6.0, 3)
    assert meaning.alpha("text_encoder", "any", None)[0] == Stated(1.0)
    assert meaning.alpha("vae", "any", None) == (None, "none")
    assert Meaning.of({"lora_adapter_metadata": "{broken"}, None).configs == {}
    assert Meaning.of({"lora_adapter_metadata": "[1]"}, None).configs == {}


def test_settings_that_are_not_supported_are_named() -> None:
    assert list(Meaning.of({}, {"peft_type": "OFT", "coft": False}).problems()) == []
    (problem,) = Meaning.of({}, {"peft_type": "OFT", "coft": True}).problems()
    assert problem.what == "coft = True: this kind of OFT is not supported"
    assert list(Meaning.of({}, {"peft_type": "LORA", "coft": True}).problems()) == []


@pytest.mark.parametrize("batch", [(), (3,)])
def test_what_is_written_is_read_back(batch: tuple[int, ...]) -> None:
    up, down = torch.randn(*batch, 6, 2), torch.randn(*batch, 2, 5)
    stored = {"up": up, "down": down} | ({} if batch else {"alpha": torch.tensor(1.0)})
    found = as_read(Lora, stored, batch=len(batch))
    assert found.shapes == {"up": (6, 2), "down": (2, 5)}
    assert (found.facts.rank, found.alpha) == (2, None if batch else 1.0)
    scale = 1.0 if batch else 0.5
    torch.testing.assert_close(found.weights.delta(), scale * (up @ down))


def test_tensors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ShapeMismatch):
        as_read(Lora, {"up": torch.zeros(6, 2), "down": torch.zeros(3, 5)})
