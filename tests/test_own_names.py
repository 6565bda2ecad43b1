"""Modules that no table names keep their own names in every verb; only a translation is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit import ops
from adaptkit.adapter import Adapter
from adaptkit.checkpoint import Checkpoint
from adaptkit.errors import AdaptkitError

D, T = 3072, 5120  # the widths of FLUX.1 and of Wan 14B
FLUX = tuple(f"double_blocks.{i}.img_attn.qkv" for i in range(12))
FLUX_OWN = "double_blocks.3.new_mixer.to_in"
DIFFUSERS = tuple(f"transformer_blocks.{i}.attn.to_q" for i in range(12))
DIFFUSERS_OWN = "transformer_blocks.3.new_mixer.to_in"
WAN = tuple(f"blocks.{i}.self_attn.q" for i in range(12))
WAN_OWN = "blocks.3.new_mixer.to_in"
OWN_SHAPE = (24, 40)

# family, format, prefix, joiner, factors, known modules and their shape, the module of its own
SPELLED = {
    "flux-comfy": ("diffusion_model.", ".", ("lora_A", "lora_B"), FLUX, (3 * D, D), FLUX_OWN),
    "flux-kohya": ("lora_unet_", "_", ("lora_down", "lora_up"), FLUX, (3 * D, D), FLUX_OWN),
    "flux-bare": ("", ".", ("lora_A", "lora_B"), FLUX, (3 * D, D), FLUX_OWN),
    "flux-diffusers": (
        "transformer.", ".", ("lora_A", "lora_B"), DIFFUSERS, (D, D), DIFFUSERS_OWN,
    ),
    "wan-comfy": ("diffusion_model.", ".", ("lora_A", "lora_B"), WAN, (T, T), WAN_OWN),
    "wan-kohya": ("lora_unet_", "_", ("lora_down", "lora_up"), WAN, (T, T), WAN_OWN),
}  # fmt: skip
ALIKE = {
    ("flux-comfy", "kohya"), ("flux-comfy", "comfy"), ("flux-kohya", "kohya"),
    ("flux-bare", "comfy"), ("flux-bare", "kohya"),
    ("flux-diffusers", "diffusers"), ("flux-diffusers", "peft"), ("flux-diffusers", "bare"),
    ("flux-diffusers", "lycoris"), ("wan-comfy", "kohya"), ("wan-kohya", "kohya"),
}  # fmt: skip
APART = {
    ("flux-comfy", "diffusers"), ("flux-kohya", "comfy"), ("flux-diffusers", "kohya"),
    ("flux-diffusers", "comfy"), ("wan-comfy", "diffusers"), ("wan-kohya", "comfy"),
}  # fmt: skip


def adapter(path: Path, spelled: str, seed: int = 0, rank: int = 2, own: str = "") -> Path:
    """A LoRA with twelve known modules and one that no table has; alpha is half of the rank in kohya's."""
    prefix, joiner, (down, up), known, shape, stranger = SPELLED[spelled]
    draw = np.random.default_rng(seed)
    tensors: dict[str, torch.Tensor] = {}
    for module, (rows, columns) in [
        *((name, shape) for name in known),
        (own or stranger, OWN_SHAPE),
    ]:
        stem = prefix + module.replace(".", joiner)
        for factor, size in ((down, (rank, columns)), (up, (rows, rank))):
            tensors[f"{stem}.{factor}.weight"] = torch.from_numpy(
                draw.standard_normal(size).astype(np.float32)
            )
        if joiner == "_":
            tensors[f"{stem}.alpha"] = torch.tensor(rank / 2)
    save_file(tensors, path)
    return path


def delta(path: Path, words: str = "new_mixer") -> np.ndarray:
    """ΔW of the module with these words in its name, in NumPy float64."""
    file = next(path.glob("*.safetensors")) if path.is_dir() else path
    tensors = {k: v.double().numpy() for k, v in load_file(file).items() if words in k}
    (up,) = (v for k, v in tensors.items() if "lora_up" in k or "lora_B" in k)
    (down,) = (v for k, v in tensors.items() if "lora_down" in k or "lora_A" in k)
    alphas = [float(v) for k, v in tensors.items() if k.endswith(".alpha")]
    return (alphas[0] / len(down) if alphas else 1.0) * up @ down


def close(a: np.ndarray, b: np.ndarray, tolerance: float = 1e-6) -> bool:
    return float(np.linalg.norm(a - b)) <= tolerance * float(np.linalg.norm(b))


@pytest.mark.parametrize("spelled", SPELLED)
def test_inspect_names_what_is_in_no_table(spelled: str, tmp_path: Path) -> None:
    path = adapter(tmp_path / "a.safetensors", spelled)
    report = ops.inspect.run(path)
    record = report.record
    assert record["family"] == spelled.partition("-")[0]
    assert record["unclaimed"] == []
    assert record["modules"] == 13
    (own,) = record["own_names"]
    assert "new_mixer" in own
    (problem,) = (p for p in record["problems"] if "not in the table" in p["what"])
    assert problem["severity"] == "warning"
    assert own in problem["what"]
    assert "nearest" not in problem["what"], "it is like no other name"
    assert True not in record["loads_in"].values(), "no host was tried with it"


def test_a_misspelt_name_is_told_what_it_may_be(tmp_path: Path) -> None:
    path = adapter(tmp_path / "a.safetensors", "wan-comfy", own="blocks.3.self_atn.q")
    record = ops.inspect.run(path).record
    (problem,) = (p for p in record["problems"] if "not in the table" in p["what"])
    assert "nearest known name is diffusion_model.blocks.3.self_attn.q" in problem["what"]


@pytest.mark.parametrize(("spelled", "to"), sorted(ALIKE))
def test_convert_carries_it_where_modules_are_named_alike(
    spelled: str, to: str, tmp_path: Path
) -> None:
    path, family = adapter(tmp_path / "a.safetensors", spelled), spelled.partition("-")[0]
    output = tmp_path / ("out" if to == "peft" else "out.safetensors")
    ops.convert.run(
        ops.convert.plan(path, ops.convert.Options(to=to, output=output, family=family))
    )
    with Adapter.open(output, family=family) as found:
        assert (found.family.name, found.format.name) == (spelled.partition("-")[0], to)
        assert len(found.own) == 1
        assert not found.unclaimed
    assert close(delta(output), delta(path))


@pytest.mark.parametrize(("spelled", "to"), sorted(APART))
def test_convert_refuses_only_what_needs_a_name_that_nobody_knows(
    spelled: str, to: str, tmp_path: Path
) -> None:
    path, output = adapter(tmp_path / "a.safetensors", spelled), tmp_path / "out.safetensors"
    family = spelled.partition("-")[0]
    with pytest.raises(AdaptkitError, match="new_mixer") as refused:
        ops.convert.plan(path, ops.convert.Options(to=to, output=output, family=family))
    assert "--allow-unused" in (refused.value.hint or "")
    options = ops.convert.Options(to=to, output=output, family=family, allow_unused=True)
    ops.convert.run(ops.convert.plan(path, options))
    with Adapter.open(output, family=family) as found:
        assert len(found.entries) == 12 * (3 if (spelled, to) == ("flux-comfy", "diffusers") else 1)
        assert not found.own


def test_resize_and_combine_carry_it(tmp_path: Path) -> None:
    one, two = (adapter(tmp_path / f"{n}.safetensors", "flux-comfy", n) for n in range(2))
    small, both = tmp_path / "small.safetensors", tmp_path / "both.safetensors"
    ops.resize.run(ops.resize.plan(one, ops.resize.Options(output=small, rank=1)))
    left, *_ = np.linalg.svd(delta(one), full_matrices=False)
    best = left[:, :1] @ left[:, :1].T @ delta(one)
    assert close(delta(small), best, 1e-5)
    ops.combine.run(ops.combine.plan([(one, 1.0), (two, -0.5)], ops.combine.Options(output=both)))
    assert close(delta(both), delta(one) - 0.5 * delta(two))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_another_input_tells_the_dots_of_a_name_in_underscores(
    order: tuple[int, int], tmp_path: Path
) -> None:
    files = (
        adapter(tmp_path / "dots.safetensors", "flux-comfy", 0),
        adapter(tmp_path / "under.safetensors", "flux-kohya", 1),
    )
    for to in ("comfy", "kohya"):
        output = tmp_path / f"{to}.safetensors"
        options = ops.combine.Options(output=output, to=to, family="flux")
        ops.combine.run(ops.combine.plan([(files[n], 1.0) for n in order], options))
        assert close(delta(output), delta(files[0]) + delta(files[1]))
    report = ops.compare.run(
        ops.compare.plan(files[0], files[1], ops.compare.Options(family="flux"))
    )
    assert not report.unused


def checkpoint(path: Path, extra: Mapping[str, tuple[int, ...]], seed: int = 0) -> Path:
    """Layers of FLUX.1 in its own names, and some of nobody's."""
    draw = np.random.default_rng(seed)
    tensors = {
        name: torch.from_numpy(draw.standard_normal(shape, dtype=np.float32)).to(torch.bfloat16)
        for name, shape in {"img_in.weight": (D, 64), **extra}.items()
    }
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("spelled", ["flux-comfy", "flux-kohya", "flux-bare"])
def test_merge_finds_it_in_the_checkpoint(spelled: str, tmp_path: Path) -> None:
    key = f"{FLUX_OWN}.weight"
    base = checkpoint(tmp_path / "base.safetensors", {key: OWN_SHAPE})
    lora = adapter(tmp_path / "a.safetensors", spelled)
    output = tmp_path / "merged.safetensors"
    options = ops.merge.Options(output=output, dtype="fp32", only=("*new_mixer*",), family="flux")
    ops.merge.run(ops.merge.plan(base, [(lora, 0.5)], options))
    old, new = load_file(base)[key].double().numpy(), load_file(output)[key].double().numpy()
    assert close(new - old, 0.5 * delta(lora))


def test_merge_refuses_it_where_the_checkpoint_lacks_it(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base.safetensors", {})
    lora = adapter(tmp_path / "a.safetensors", "flux-comfy")
    options = ops.merge.Options(output=tmp_path / "m.safetensors", only=("*new_mixer*",))
    with pytest.raises(AdaptkitError, match="new_mixer"):
        ops.merge.plan(base, [(lora, 1.0)], options)


def test_extract_takes_it_under_its_own_name(tmp_path: Path) -> None:
    key = f"{FLUX_OWN}.weight"
    base = checkpoint(tmp_path / "base.safetensors", {key: OWN_SHAPE})
    tensors = load_file(base)
    draw = np.random.default_rng(5)
    change = draw.standard_normal((24, 2)) @ draw.standard_normal((2, 40))
    tensors[key] = (tensors[key].double() + torch.from_numpy(change)).float()
    tensors["img_in.weight"] = tensors["img_in.weight"].float()
    tensors["img_in.weight"][0] += 1.0
    tuned, output = tmp_path / "tuned.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, tuned)
    options = ops.extract.Options(output=output, rank=2, to="comfy", dtype="fp32", family="flux")
    report = ops.extract.run(ops.extract.plan(base, tuned, options))
    assert report.relative_error is not None
    assert report.relative_error < 1e-5
    assert close(delta(output), change, 1e-5)
    refused = ops.extract.Options(
        output=output, rank=2, to="diffusers", overwrite=True, family="flux"
    )
    report = ops.extract.run(ops.extract.plan(base, tuned, refused))
    lost, kept = np.linalg.norm(change), np.sqrt(64.0)
    assert report.relative_error == pytest.approx(lost / np.hypot(lost, kept), rel=1e-3)


def test_a_name_that_would_read_as_another_is_not_written_with_underscores(tmp_path: Path) -> None:
    # `img_attn.qkv` of the table, with a dot for an underscore
    path = adapter(tmp_path / "a.safetensors", "flux-comfy", own="double_blocks.3.img.attn.qkv")
    with Adapter.open(path) as found:
        assert len(found.own) == 1
    options = ops.convert.Options(to="kohya", output=tmp_path / "out.safetensors")
    with pytest.raises(AdaptkitError, match=r"img\.attn\.qkv"):
        ops.convert.plan(path, options)


def test_vectors_of_a_layer_that_no_table_names(tmp_path: Path) -> None:
    """`--vectors` carries its bias, and a norm's weight is a vector and no matrix."""
    extra = {f"{FLUX_OWN}.weight": OWN_SHAPE, f"{FLUX_OWN}.bias": (24,), "new_norm.weight": (40,)}
    base = checkpoint(tmp_path / "base.safetensors", extra)
    tensors = {k: v.float() for k, v in load_file(base).items()}
    changed = {k: v if k == f"{FLUX_OWN}.weight" else v + 1.0 for k, v in tensors.items()}
    save_file(changed, tmp_path / "tuned.safetensors")
    output, merged = tmp_path / "out.safetensors", tmp_path / "merged.safetensors"
    options = ops.extract.Options(
        output=output, rank=2, to="comfy", vectors=True, dtype="fp32", family="flux"
    )
    ops.extract.run(ops.extract.plan(base, tmp_path / "tuned.safetensors", options))
    with Checkpoint.open(base, family="flux") as read:
        assert "new_norm.weight" in read.places
    ops.merge.run(
        ops.merge.plan(
            base, [(output, 1.0)], ops.merge.Options(output=merged, dtype="fp32", family="flux")
        )
    )
    found = load_file(merged)
    for key in (f"{FLUX_OWN}.bias", "new_norm.weight"):
        assert torch.allclose(found[key], changed[key], atol=1e-5)


# families that nobody knows ------------------------------------------------------------------

STRANGE = tuple(f"stages.{i}.mix.to_in_{k}" for i in range(3) for k in range(2))


def stranger(path: Path, prefix: str, joiner: str = ".") -> Path:
    draw = np.random.default_rng(3)
    down, up = ("lora_down", "lora_up") if joiner == "_" else ("lora_A", "lora_B")
    save_file(
        {
            f"{prefix}{module.replace('.', joiner)}.{factor}.weight": torch.from_numpy(
                draw.standard_normal(size).astype(np.float32)
            )
            for module in STRANGE
            for factor, size in ((down, (2, 40)), (up, (24, 2)))
        },
        path,
    )
    return path


@pytest.mark.parametrize(
    ("prefix", "to", "written"),
    [
        ("", "comfy", "diffusion_model."),
        ("base_model.model.", "comfy", "diffusion_model."),
        ("", "diffusers", "transformer."),
        ("diffusion_model.", "bare", ""),
        ("diffusion_model.", "kohya", "lora_unet_"),
    ],
)
def test_an_unknown_family_changes_its_prefix(
    prefix: str, to: str, written: str, tmp_path: Path
) -> None:
    path, output = stranger(tmp_path / "a.safetensors", prefix), tmp_path / "b.safetensors"
    ops.convert.run(ops.convert.plan(path, ops.convert.Options(to=to, output=output)))
    joiner = "_" if to == "kohya" else "."
    stems = {key.partition(".lora")[0].removesuffix(".alpha") for key in load_file(output)}
    assert stems == {written + module.replace(".", joiner) for module in STRANGE}


def test_the_base_tells_the_dots_of_an_unknown_family(tmp_path: Path) -> None:
    path = stranger(tmp_path / "a.safetensors", "lora_unet_", "_")
    base, output = tmp_path / "base.safetensors", tmp_path / "b.safetensors"
    save_file({f"{module}.weight": torch.zeros(24, 40) for module in STRANGE}, base)
    with pytest.raises(AdaptkitError, match="family is unknown"):
        ops.convert.plan(path, ops.convert.Options(to="comfy", output=output))
    options = ops.convert.Options(to="comfy", output=output, base=base)
    ops.convert.run(ops.convert.plan(path, options))
    stems = {key.partition(".lora")[0] for key in load_file(output)}
    assert stems == {f"diffusion_model.{module}" for module in STRANGE}
    assert close(delta(output, "stages.0.mix.to_in_0"), delta(path, "stages_0_mix_to_in_0"))


def test_a_fault_in_a_checkpoint_of_an_unknown_family_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    tensors = {f"model.diffusion_model.{module}.weight": torch.zeros(24, 40) for module in STRANGE}
    flat = f"diffusion_model{STRANGE[0]}weight".replace(".", "")
    save_file({**tensors, f"model_ema.{flat}": torch.zeros(3, 40)}, path)
    with pytest.raises(AdaptkitError, match="shape of this average") as refused:
        Checkpoint.open(path, strangers=True, ema=True)
    assert str(refused.value.file) == str(path)
