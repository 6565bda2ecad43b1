"""Merges into packed checkpoints: every code and scale against NumPy's reading of the formulas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit import ops
from adaptkit.errors import CorruptFile, NonFinite
from adaptkit.files import packed
from adaptkit.files.open import open_source
from adaptkit.files.packing import Was
from tests.files.test_packed import COLUMNS, E2M1, FP4, KEY, KINDS, NF4, ROWS, Base, text

Array = np.ndarray
State = dict[str, torch.Tensor]
STILL = 64  # rows that the adapter leaves as they are: more than the blocks of nested scales
OTHER = "double_blocks.0.img_mlp.2.weight"


def grid(dtype: torch.dtype) -> Array:
    """Every number of an 8-bit format by its bits, as torch reads them."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).double().numpy()


def part(state: State, name: str, dtype: torch.dtype | None = None) -> Array:
    tensor = state[f"{KEY}.{name}"]
    return (tensor if dtype is None else tensor.view(dtype)).numpy()


def scales_of(tiles: Array, columns: int) -> Array:
    """cuBLAS: scale (r, c) of a tile of 128 × 4 is at 16 (r mod 32) + 4 (r div 32) + c."""
    flat, wide = tiles.reshape(-1), -(-columns // 4)
    r, c = np.meshgrid(np.arange(ROWS), np.arange(columns), indexing="ij")
    return flat[512 * (r // 128 * wide + c // 4) + 16 * (r % 32) + 4 * (r % 128 // 32) + c % 4]


def halves(codes: Array) -> Array:
    return np.stack([codes >> 4, codes & 15], -1)


def absmax(state: State) -> Array:
    stored = part(state, "weight.absmax")
    if stored.dtype != np.uint8:
        return stored.astype(np.float64)
    table = part(state, "weight.nested_quant_map").astype(np.float64)
    outer = part(state, "weight.nested_absmax").astype(np.float64)
    return table[stored] * np.repeat(outer, 256)[: len(stored)] + 0.375


# of each format: the scale of every number, and the numbers that it may have times that scale
def four(state: State) -> tuple[Array, Array, Array]:
    table = np.array(NF4 if f"{KEY}.weight.quant_state.bitsandbytes__nf4" in state else FP4)
    codes = halves(part(state, "weight")).reshape(ROWS, COLUMNS)
    scale = np.repeat(absmax(state), 64).reshape(ROWS, COLUMNS)
    return np.float64(np.float32(table))[codes], scale, np.float64(np.float32(table))


def nvfp4(state: State) -> tuple[Array, Array, Array]:
    codes = halves(part(state, "weight")).reshape(ROWS, COLUMNS)
    blocks = grid(torch.float8_e4m3fn)[
        scales_of(part(state, "weight_scale", torch.uint8), COLUMNS // 16)
    ]
    scale = np.repeat(blocks * part(state, "weight_scale_2").astype(np.float64), 16, axis=1)
    return np.array(E2M1)[codes], scale, np.array(E2M1)


def mxfp8(state: State) -> tuple[Array, Array, Array]:
    codes = part(state, "weight", torch.uint8)
    blocks = grid(torch.float8_e8m0fnu)[
        scales_of(part(state, "weight_scale", torch.uint8), COLUMNS // 32)
    ]
    table = grid(torch.float8_e4m3fn)
    return table[codes], np.repeat(blocks, 32, axis=1), table[np.isfinite(table)]


def int8(state: State) -> tuple[Array, Array, Array]:
    scb = f"{KEY}.SCB" in state
    scale = part(state, "SCB" if scb else "weight_scale").astype(np.float64).reshape(-1, 1)
    scale = np.broadcast_to(scale / (127 if scb else 1), (ROWS, COLUMNS))
    return part(state, "weight").astype(np.float64), scale, np.arange(-127, 128.0)


def turned(numbers: Array) -> Array:
    """ConvRot: groups of 64 inputs times a Hadamard matrix, digit by digit in base 4."""
    four = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
    whole = numbers.reshape(ROWS, -1, 4, 4, 4)
    for axis in (2, 3, 4):
        whole = np.moveaxis(np.moveaxis(whole, axis, -1) @ four.T, -1, axis)
    return whole.reshape(ROWS, COLUMNS)


READ: dict[str, Callable[[State], tuple[Array, Array, Array]]] = {
    "nf4": four, "nf4-nested": four, "fp4": four, "nvfp4": nvfp4, "mxfp8": mxfp8,
    "int8-bitsandbytes": int8, "int8-rows": int8, "int8-one": int8, "int8-rotated": int8,
}  # fmt: skip


def largest(kind: str, exact: Array) -> Array:
    """The scale that the largest magnitude of each block asks for, at each number."""
    size = {"nvfp4": 16, "mxfp8": 32, "int8-one": exact.size}.get(
        kind, COLUMNS if kind.startswith("int8") else 64
    )
    top = np.abs(exact).reshape(-1, size).max(1)
    return np.repeat(top, size).reshape(exact.shape)


def check_scales(kind: str, state: State, scale: Array, exact: Array) -> None:
    top = largest(kind, exact)
    if kind.startswith("int8"):
        np.testing.assert_allclose(scale, top / 127, rtol=2e-6)
    elif kind in ("nf4", "fp4"):
        np.testing.assert_allclose(scale, top, rtol=3e-7)
    elif kind == "nf4-nested":  # within a step of the scales of scales
        assert np.abs(scale - top).max() < np.abs(part(state, "weight.nested_absmax")).max() / 250
    elif kind == "mxfp8":  # the least power of two that holds them
        np.testing.assert_array_equal(scale, 2.0 ** np.ceil(np.log2(top / 448)))
    else:
        one = float(part(state, "weight_scale_2"))
        steps = grid(torch.float8_e4m3fn)
        steps = steps[np.isfinite(steps)]
        wanted = top[:, ::16] / 6 / one
        assert wanted.max() < 448 * 1.001
        best = np.abs(wanted[..., None] - steps).min(-1)
        assert (np.abs(scale[:, ::16] / one - wanted) <= best + 1e-4).all()


def moved(base: Base, strength: float = 0.02) -> Array:
    """Give the adapter rows that change nothing; what it adds."""
    stored = load_file(base.adapter)
    up, down = (stored[f"diffusion_model.{KEY}.lora_{name}.weight"] for name in "BA")
    up[:STILL] = 0
    save_file(stored, base.adapter)
    return strength * (up.double() @ down.double()).numpy()


def merged(base: Base, out: Path, strength: float = 0.02, **options: Any) -> ops.merge.Report:
    given = ops.merge.Options(output=out, family="flux", overwrite=True, **options)
    return ops.merge.run(ops.merge.plan(base.path, [(base.adapter, strength)], given))


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_packed_again(kind: str, tmp_path: Path) -> None:
    """The nearest numbers for scales that the largest ask for; all else keeps its bytes."""
    base, out = Base(kind, tmp_path), tmp_path / "out.safetensors"
    delta = moved(base)
    report = merged(base, out, verify=True)
    state = load_file(out)
    assert {k: (t.dtype, t.shape) for k, t in state.items()} == {
        k: (t.dtype, t.shape) for k, t in base.state.items()
    }
    codes, scale, table = READ[kind](state)
    turn = turned if kind == "int8-rotated" else lambda numbers: numbers
    exact = turn(base.exact + delta)
    check_scales(kind, state, scale[STILL:], exact[STILL:])
    near = np.abs(exact[..., None] - np.unique(table) * scale[..., None]).min(-1)
    error = np.abs(codes * scale - exact)
    assert (error <= near + 1e-6 * np.abs(exact).max())[STILL:].all()
    # one step aside is not the nearest: the check can fail
    assert not (np.abs(exact - 1.5 * codes * scale) <= near + 1e-6).all()
    lost = np.linalg.norm(codes * scale - exact) / np.linalg.norm(delta)
    assert report.relative_error == pytest.approx(lost, rel=2e-3)
    assert (report.quantised, report.tensors_changed) == (1, 1)
    assert report.verified is not None
    assert 0.1 < report.verified.largest <= 1
    # what the adapter does not change
    beside = {OTHER, *(k for k in state if k.endswith(("comfy_quant", "quant_map", "format")))}
    assert all(same(state[k], base.state[k]) for k in beside)
    if kind != "int8-one":
        before = READ[kind](base.state)
        rows = STILL - 13 if kind == "nf4-nested" else STILL  # whole groups of 256 blocks of 64
        np.testing.assert_array_equal(codes[:rows], before[0][:rows])
        np.testing.assert_array_equal(scale[:rows], before[1][:rows])


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    flat = (t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(*flat)


@pytest.mark.parametrize("kind", KINDS)
def test_what_adds_nothing_leaves_every_byte(kind: str, tmp_path: Path) -> None:
    base, out = Base(kind, tmp_path), tmp_path / "out.safetensors"
    merged(base, out, 0.0, verify=True)
    assert all(same(t, base.state[k]) for k, t in load_file(out).items())
    stored = load_file(base.adapter)
    save_file({k: torch.zeros_like(t) if "_B" in k else t for k, t in stored.items()}, base.adapter)
    report = merged(base, out, 1.0, verify=True)
    assert all(same(t, base.state[k]) for k, t in load_file(out).items())
    assert (report.relative_error, report.tensors_changed) == (0.0, 0)


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp8", "nf4", "int8-rows"])
def test_zeros_and_a_larger_range(kind: str, tmp_path: Path) -> None:
    """Blocks that become zero, and numbers a thousand times as large as before."""
    base, out = Base(kind, tmp_path), tmp_path / "out.safetensors"
    up = torch.zeros(ROWS, ROWS)
    down = torch.from_numpy(base.exact).float()
    up[range(ROWS), range(ROWS)] = torch.where(torch.arange(ROWS) < 8, -1.0, 1000.0)
    name = f"diffusion_model.{KEY}.lora_"
    save_file({f"{name}B.weight": up, f"{name}A.weight": down}, base.adapter)
    merged(base, out, 1.0, verify=True)
    codes, scale, _ = READ[kind](load_file(out))
    found = codes * scale
    assert not found[:8].any()
    error = np.linalg.norm(found[8:] / 1001 - base.exact[8:]) / np.linalg.norm(base.exact[8:])
    assert error < 0.12


def test_a_wrong_code_fails_the_verification(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind, module in (
        ("nvfp4", "nvfp4"),
        ("mxfp8", "mxfp8"),
        ("nf4", "bitsandbytes"),
        ("int8-rotated", "int8"),
    ):
        base, out = Base(kind, tmp_path), tmp_path / "out.safetensors"
        inner = (getattr(packed, module, None) or _module(module))._encode

        def spoilt(*args: Any, inner: Any = inner, **more: Any) -> Any:
            found = inner(*args, **more)
            raw = found["weight"].view(torch.uint8)
            raw[70, 0] ^= 64
            return found

        monkeypatch.setattr(_module(module), "_encode", spoilt)
        with pytest.raises(CorruptFile, match="differs from base"):
            merged(base, out, verify=True)
        assert not out.exists()
        monkeypatch.undo()


def _module(name: str) -> Any:
    import importlib

    return importlib.import_module(f"adaptkit.files.packed.{name}")


def test_a_scale_that_is_no_number_is_refused(tmp_path: Path) -> None:
    for kind, key, value in (
        ("nvfp4", "weight_scale_2", torch.tensor(float("nan"))),
        ("int8-rows", "weight_scale", torch.full((ROWS, 1), float("inf"))),
        ("nf4", "weight.absmax", torch.full((ROWS * COLUMNS // 64,), float("nan"))),
    ):
        base = Base(kind, tmp_path)
        save_file(base.state | {f"{KEY}.{key}": value}, base.path)
        with pytest.raises(NonFinite, match="NaN or infinity") as refused:
            merged(base, tmp_path / "out.safetensors")
        assert refused.value.tensor == f"{KEY}.weight"
        assert not (tmp_path / "out.safetensors").exists()


def test_shards_stay_shards(tmp_path: Path) -> None:
    base = Base("nvfp4", tmp_path)
    folder, out = tmp_path / "base", tmp_path / "out"
    folder.mkdir()
    keys = sorted(base.state)
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    table = {}
    for n, name in enumerate(names):
        held = {k: base.state[k].contiguous() for k in keys[n::2]}
        save_file(held, folder / name)
        table |= dict.fromkeys(held, name)
    import json

    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    delta = moved(base)
    given = ops.merge.Options(output=out, family="flux", verify=True)
    ops.merge.run(ops.merge.plan(folder, [(base.adapter, 0.02)], given))
    state = {k: t for name in names for k, t in load_file(out / name).items()}
    assert state.keys() == base.state.keys()
    codes, scale, _ = nvfp4(state)
    assert np.linalg.norm(codes * scale - base.exact - delta) < 0.12 * np.linalg.norm(base.exact)


def test_blocks_that_a_layer_does_not_fill(tmp_path: Path) -> None:
    """nf4 of 3 × 5 numbers: one block of 64 that ends early, and a byte of which half is used."""
    codes = torch.tensor([0x1F, 0x82, 0x33, 0x7C, 0xE0, 0x55, 0x9A, 0xB0], dtype=torch.uint8)
    said = {"quant_type": "nf4", "blocksize": 64, "shape": [3, 5], "dtype": "float32"}
    state = {
        f"{KEY}.weight": codes.unsqueeze(1),
        f"{KEY}.weight.absmax": torch.tensor([2.0]),
        f"{KEY}.weight.quant_map": torch.tensor(NF4),
        f"{KEY}.weight.quant_state.bitsandbytes__nf4": text(said),
    }
    save_file(state, tmp_path / "base.safetensors")
    with packed.unpacked(open_source(tmp_path / "base.safetensors")) as source:
        one = source.packed(f"{KEY}.weight")
        assert one is not None
        assert one.packing is not None
        stored, old = source.parts(one), source.read(f"{KEY}.weight")
        new = old + torch.linspace(-0.3, 0.3, 15).reshape(3, 5)
        was = Was(new == old, float(old.abs().max()))
        fresh = one.packing.encode(new, was, stored)
        found = one.decode(stored | fresh).reshape(3, 5)
    top = float(new.abs().max())
    assert float(fresh["absmax"]) == pytest.approx(top)
    near = (new.unsqueeze(-1) - top * torch.tensor(NF4)).abs().amin(-1)
    assert torch.allclose((found - new).abs(), near, atol=1e-6)
    assert fresh["weight"].shape == (8, 1)
