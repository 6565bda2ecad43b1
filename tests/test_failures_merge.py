"""The failures of ../shared/reference/failures.md of tools that merge, each as a test that passes here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adaptkit.errors import AdaptkitError, ShapeMismatch, Unclaimed
from adaptkit.ops import merge
from tests import made, oracle
from tests.cli.test_cli import adaptkit
from tests.ops.merge import test_fp8 as fp8
from tests.ops.merge.test_verify import PLACES, base_file

State = dict[str, torch.Tensor]
QKV = "double_blocks.0.img_attn.qkv.weight"
LINEAR1 = "single_blocks.3.linear1.weight"


def run(
    base: Path, *adapters: Path | tuple[Path, float], **options: Any
) -> tuple[merge.Report, State]:
    """A merge that is read back and checked, and the tensors it wrote."""
    pairs = [item if isinstance(item, tuple) else (item, 1.0) for item in adapters]
    target = merge.Options(
        **{
            "output": base.with_name("merged.safetensors"),
            "overwrite": True,
            "verify": True,
            **options,
        }
    )
    report = merge.run(merge.plan(base, pairs, target))
    return report, load_file(report.output)


def flux(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Two fused layers of FLUX.1, 16 wide."""
    draw = torch.Generator().manual_seed(0)
    state = {
        QKV: torch.randn(48, 16, generator=draw),
        LINEAR1: torch.randn(112, 16, generator=draw),
    }
    save_file({key: tensor.to(dtype) for key, tensor in state.items()}, folder / "flux.safetensors")
    return folder / "flux.safetensors"


def lora(
    stem: str, rows: int, inputs: int, up: str = "lora_B", down: str = "lora_A", rank: int = 3
) -> State:
    draw = torch.Generator().manual_seed(len(stem))
    return {
        f"{stem}.{up}.weight": torch.randn(rows, rank, generator=draw),
        f"{stem}.{down}.weight": torch.randn(rank, inputs, generator=draw),
    }


def product(state: State, stem: str, up: str = "lora_B", down: str = "lora_A") -> np.ndarray:
    return oracle.lora(
        state[f"{stem}.{up}.weight"].double().numpy(),
        state[f"{stem}.{down}.weight"].double().numpy(),
        1.0,
    )


def strength(found: torch.Tensor, base: torch.Tensor, delta: np.ndarray) -> float:
    """How much of ΔW arrived: its projection on what was to be added."""
    change = (found.double() - base.double()).numpy().reshape(delta.shape)
    return float((change * delta).sum() / (delta**2).sum())


def test_f7_diffusers_keys_merge_into_a_fused_flux_without_being_told(tmp_path: Path) -> None:
    """sd-scripts: no tensor changed, 12 GB written, and metadata that claims the LoRA."""
    base = flux(tmp_path)
    stems = [f"transformer.transformer_blocks.0.attn.to_{name}" for name in "qkv"]
    state = {key: tensor for stem in stems for key, tensor in lora(stem, 16, 16).items()}
    single = "transformer.single_transformer_blocks.3.proj_mlp"
    state |= lora(single, 64, 16)
    save_file(state, tmp_path / "a.safetensors")
    report, found = run(base, tmp_path / "a.safetensors", family="flux")
    whole = np.concatenate([product(state, stem) for stem in stems])
    np.testing.assert_allclose(found[QKV].numpy() - load_file(base)[QKV].numpy(), whole, atol=1e-5)
    assert strength(
        found[LINEAR1][48:], load_file(base)[LINEAR1][48:], product(state, single)
    ) == pytest.approx(1, abs=1e-5)
    assert torch.equal(found[LINEAR1][:48], load_file(base)[LINEAR1][:48])
    assert report.tensors_changed == 2


@pytest.mark.parametrize("kind", ["lokr", "loha"])
def test_f7_lokr_and_loha_are_merged_and_nothing_is_claimed_otherwise(
    tmp_path: Path, kind: str
) -> None:
    base, adapter = (
        base_file(tmp_path, torch.float32),
        made.adapter(tmp_path / "a.safetensors", kind),
    )
    report, found = run(base, adapter, family="sd1")
    for name, delta in made.deltas(adapter).items():
        assert strength(found[PLACES[name]], load_file(base)[PLACES[name]], delta) == pytest.approx(
            1, abs=1e-5
        )
    assert report.tensors_changed == 4
    other = lora("lora_unet_single_blocks_3_linear1", 8, 8, "lora_up", "lora_down")
    save_file(other, tmp_path / "flux.safetensors")
    with pytest.raises(AdaptkitError):
        run(base, tmp_path / "flux.safetensors", family="sd1", output=tmp_path / "none.safetensors")
    assert not (tmp_path / "none.safetensors").exists()


@pytest.mark.parametrize("axis", [0, 1], ids=["out", "in"])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_f8_dora_is_merged_as_dora(tmp_path: Path, scale: float, axis: int) -> None:
    """sd-scripts lists dora_scale under "unused keys" and merges a plain LoRA."""
    base, adapter = base_file(tmp_path, torch.float32), tmp_path / "a.safetensors"
    rows, columns = made.SHAPES[made.LINEAR]
    magnitude = 1 + torch.rand(
        (rows, 1) if axis == 0 else (1, columns), generator=torch.Generator().manual_seed(0)
    )
    made.adapter(adapter, names=[made.LINEAR], extra={f"{made.LINEAR}.dora_scale": magnitude})
    save_file(
        {k: v for k, v in load_file(adapter).items() if "dora" not in k},
        tmp_path / "plain.safetensors",
    )
    delta = made.deltas(tmp_path / "plain.safetensors")[made.LINEAR]
    _, found = run(base, (adapter, scale), family="sd1")
    before = load_file(base)[PLACES[made.LINEAR]].double().numpy()
    whole = oracle.dora(before, delta, magnitude.double().numpy(), axis)
    np.testing.assert_allclose(
        found[PLACES[made.LINEAR]].numpy(), before + scale * (whole - before), rtol=1e-5, atol=1e-5
    )
    assert np.abs(whole - before - delta).max() > 0.1


@pytest.mark.parametrize("scales", ["one", "rows", "blocks"])
def test_f9_scaled_fp8_gets_the_full_strength(tmp_path: Path, scales: str) -> None:
    """Added to the raw codes the strength is 0.009; the whole oracle is in tests/ops/merge/test_fp8.py."""
    base, adapter = fp8.base_file(tmp_path, scales=scales), made.adapter(tmp_path / "a.safetensors")
    _, found = run(base, adapter, family="sd1")
    for place, name in fp8.KEYS.items():
        change = torch.from_numpy(fp8.meant(found, place))
        before = torch.from_numpy(fp8.meant(load_file(base), place))
        assert strength(change, before, made.deltas(adapter)[name]) == pytest.approx(1, abs=0.01)


def test_f27_dora_t5_biases_and_norms_all_arrive(tmp_path: Path) -> None:
    """diffusers filters all of them out: a plain LoRA without T5, biases and norms is left."""
    stem = "encoder.block.0.layer.0.SelfAttention.q"
    part = "text_encoder_2"
    base = {QKV: torch.randn(48, 16), f"{part}.{stem}.weight": torch.randn(16, 16)}
    save_file(base, tmp_path / "flux.safetensors")
    state = lora(f"lora_te3_{stem.replace('.', '_')}", 16, 16, "lora_up", "lora_down")
    save_file(state, tmp_path / "t5.safetensors")
    _, found = run(tmp_path / "flux.safetensors", tmp_path / "t5.safetensors", family="flux")
    delta = product(state, f"lora_te3_{stem.replace('.', '_')}", "lora_up", "lora_down")
    key = f"{part}.{stem}.weight"
    assert strength(found[key], base[key], delta) == pytest.approx(1, abs=1e-5)

    block = "blocks.0.self_attn"
    wan = {
        f"{block}.q.weight": torch.randn(16, 16),
        f"{block}.q.bias": torch.randn(16),
        f"{block}.norm_q.weight": torch.randn(16),
    }
    save_file(wan, tmp_path / "wan.safetensors")
    diffs = {
        f"diffusion_model.{block}.q.diff_b": torch.randn(16),
        f"diffusion_model.{block}.norm_q.diff": torch.randn(16),
        **lora(f"diffusion_model.{block}.q", 16, 16),
    }
    save_file(diffs, tmp_path / "diffs.safetensors")
    report, found = run(tmp_path / "wan.safetensors", tmp_path / "diffs.safetensors", family="wan")
    assert report.tensors_changed == 3
    torch.testing.assert_close(
        found[f"{block}.q.bias"],
        wan[f"{block}.q.bias"] + diffs[f"diffusion_model.{block}.q.diff_b"],
    )
    norm = f"{block}.norm_q"
    torch.testing.assert_close(
        found[f"{norm}.weight"], wan[f"{norm}.weight"] + diffs[f"diffusion_model.{norm}.diff"]
    )


def test_f27_what_finds_no_place_fails_by_name(tmp_path: Path) -> None:
    state = {f"{made.LINEAR}.mystery": torch.ones(2)}
    adapter = made.adapter(tmp_path / "a.safetensors", extra=state)
    with pytest.raises(Unclaimed, match="mystery"):
        run(base_file(tmp_path), adapter, family="sd1")


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp8"])
def test_f32_several_adapters_are_rounded_once(tmp_path: Path, dtype: str) -> None:
    """Two amounts, each below half a step at 1: alone each is lost, together they make a step."""
    stored = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}[dtype]
    place, shape = PLACES[made.LINEAR], made.SHAPES[made.LINEAR]
    save_file({place: torch.ones(shape).to(stored)}, tmp_path / "base.safetensors")
    amount = torch.full(shape, float(torch.finfo(stored).eps) * 0.45)
    save_file({f"{made.LINEAR}.diff": amount}, tmp_path / "a.safetensors")
    base, adapter = tmp_path / "base.safetensors", tmp_path / "a.safetensors"
    _, one = run(base, adapter, family="sd1")
    assert (one[place].float() == 1).all()
    _, two = run(base, adapter, adapter, family="sd1")
    assert (two[place].float() == 1 + torch.finfo(stored).eps).all()


@pytest.mark.parametrize("kind", ["lora", "lokr", "loha"])
def test_f33_a_shape_that_does_not_fit_stops_the_merge(tmp_path: Path, kind: str) -> None:
    """ComfyUI logs the exception, leaves the layer as it is and goes on."""
    base = base_file(tmp_path)
    state: State = {}
    draw = np.random.default_rng(0)
    for key, array in made.module(kind, made.LINEAR, (28, 36), draw).items():
        state[key] = torch.tensor(array, dtype=torch.float32)
    save_file(
        state | load_file(made.adapter(tmp_path / "good.safetensors", names=[made.CONV])),
        tmp_path / "a.safetensors",
    )
    with pytest.raises(ShapeMismatch, match="24 × 32 in base") as caught:
        run(base, tmp_path / "a.safetensors", family="sd1")
    assert "down_blocks.0" in str(caught.value)
    assert not (tmp_path / "merged.safetensors").exists()


def test_c3_bf16_mixed_kinds_peft_keys_and_unequal_ranks(tmp_path: Path) -> None:
    """Four ways in which sd-scripts' merge_lora stops with an exception."""
    base = base_file(tmp_path)
    low, high = (made.adapter(tmp_path / f"{n}.safetensors", seed=n, rank=n) for n in (2, 6))
    lokr = made.adapter(tmp_path / "lokr.safetensors", "lokr")
    stem = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    peft = lora(stem, *made.SHAPES[made.LINEAR])
    save_file(peft, tmp_path / "peft.safetensors")
    report, found = run(
        base, low, high, lokr, tmp_path / "peft.safetensors", family="sd1", dtype="bf16"
    )
    assert {t.dtype for t in found.values()} == {torch.bfloat16}
    assert [a["modules"] for a in report.adapters] == [4, 4, 4, 1]
    deltas = [made.deltas(path) for path in (low, high, lokr)]
    before = load_file(base)
    for name, place in PLACES.items():
        exact = before[place].double().numpy() + sum(d[name] for d in deltas).reshape(
            before[place].shape
        )
        if name == made.LINEAR:
            exact = exact + product(peft, stem)
        assert (
            np.abs(found[place].double().numpy() - exact) <= 2**-8 * 1.01 * np.abs(exact) + 1e-5
        ).all()


def test_c7_split_projections_under_the_original_prefix(tmp_path: Path) -> None:
    """`diffusion_model.` with q, k and v apart on a fused layer: RuntimeError, size 192 against 64."""
    base = flux(tmp_path)
    stems = [f"diffusion_model.transformer_blocks.0.attn.to_{name}" for name in "qkv"]
    state = {key: tensor for stem in stems for key, tensor in lora(stem, 16, 16).items()}
    save_file(state, tmp_path / "a.safetensors")
    report, found = run(base, tmp_path / "a.safetensors", family="flux")
    whole = np.concatenate([product(state, stem) for stem in stems])
    np.testing.assert_allclose(found[QKV].numpy() - load_file(base)[QKV].numpy(), whole, atol=1e-5)
    assert report.tensors_changed == 1


def test_c8_an_output_without_a_folder_stands_in_this_one(tmp_path: Path, tiny: Path) -> None:
    done = adaptkit(
        "merge",
        tiny / "base.safetensors",
        tiny / "lora-kohya.safetensors",
        "-o",
        "name.safetensors",
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "name.safetensors")
    with safe_open(tmp_path / "name.safetensors", "pt") as file:
        assert file.metadata()["modelspec.merged_from"] == "base, lora-kohya"
