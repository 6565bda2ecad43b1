"""Packed checkpoints: every number against a float64 formula, and every verb that reads a base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit import ops
from adaptkit.errors import NotRepresentable
from adaptkit.files.open import open_source
from adaptkit.files.packed import unpacked

ROWS, COLUMNS = 136, 320  # more than one tile of scales, and not a whole number of them
KEY = "double_blocks.0.img_mlp.0"
Array = np.ndarray
# from the papers: QLoRA (arXiv:2305.14314), and bitsandbytes' own four-bit floats
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip
FP4 = [n / 12 for n in (0, 0.0625, 8, 12, 4, 6, 2, 3)]
FP4 += [-n for n in FP4]
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
State = dict[str, torch.Tensor]


def text(value: dict[str, Any]) -> torch.Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def e4m3(code: int) -> float:
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    size = (1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa / 8 * 2.0**-6
    return -size if sign else size


def four(kind: str, nested: bool, draw: np.random.Generator) -> tuple[State, Array]:
    """bitsandbytes: two places of a table in a byte, blocks of 64, perhaps scales of scales."""
    table, blocks = (NF4 if kind == "nf4" else FP4), ROWS * COLUMNS // 64
    codes = draw.integers(0, 16, ROWS * COLUMNS)
    said: dict[str, Any] = {
        "quant_type": kind,
        "blocksize": 64,
        "shape": [ROWS, COLUMNS],
        "dtype": "bfloat16",
    }
    state = {
        f"{KEY}.weight": torch.tensor(codes[0::2] * 16 + codes[1::2], dtype=torch.uint8)[:, None],
        f"{KEY}.weight.quant_map": torch.tensor(table),
    }
    if nested:
        places, outer = draw.integers(0, 256, blocks), draw.uniform(0.1, 0.2, -(-blocks // 256))
        inner = np.linspace(-1, 1, 256)
        said |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.375}
        absmax = np.array(
            [
                np.float32(inner[p]) * np.float64(np.float32(outer[n // 256])) + 0.375
                for n, p in enumerate(places)
            ]
        )
        state |= {
            f"{KEY}.weight.absmax": torch.tensor(places, dtype=torch.uint8),
            f"{KEY}.weight.nested_absmax": torch.tensor(outer, dtype=torch.float32),
            f"{KEY}.weight.nested_quant_map": torch.tensor(inner, dtype=torch.float32),
        }
    else:
        stored = torch.tensor(draw.uniform(0.1, 0.3, blocks), dtype=torch.float32)
        absmax = stored.double().numpy()
        state[f"{KEY}.weight.absmax"] = stored
    state[f"{KEY}.weight.quant_state.bitsandbytes__{kind}"] = text(said)
    exact = [np.float64(np.float32(table[c])) * absmax[n // 64] for n, c in enumerate(codes)]
    return state, np.array(exact).reshape(ROWS, COLUMNS)


def eight(draw: np.random.Generator) -> tuple[State, Array]:
    codes = draw.integers(-127, 128, (ROWS, COLUMNS))
    scale = torch.tensor(draw.uniform(0.1, 0.3, ROWS), dtype=torch.float32)
    state = {
        f"{KEY}.weight": torch.tensor(codes, dtype=torch.int8),
        f"{KEY}.SCB": scale,
        f"{KEY}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return state, codes * scale.double().numpy()[:, None] / 127


def tiled(scales: Array) -> Array:
    """cuBLAS: scale (r, c) of a tile of 128 × 4 is at 16 (r mod 32) + 4 (r div 32) + c."""
    tall, wide = -(-scales.shape[0] // 128), -(-scales.shape[1] // 4)
    found = np.zeros(tall * wide * 512, scales.dtype)
    for r in range(scales.shape[0]):
        for c in range(scales.shape[1]):
            at = 512 * (r // 128 * wide + c // 4)
            found[at + 16 * (r % 32) + 4 * (r % 128 // 32) + c % 4] = scales[r, c]
    return found.reshape(tall * 128, wide * 4)


def nvfp4(draw: np.random.Generator) -> tuple[State, Array]:
    codes = draw.integers(0, 16, (ROWS, COLUMNS))
    scales = draw.integers(40, 80, (ROWS, COLUMNS // 16)).astype(np.uint8)
    state = {
        f"{KEY}.weight": torch.tensor(codes[:, 0::2] * 16 + codes[:, 1::2], dtype=torch.uint8),
        f"{KEY}.weight_scale": torch.tensor(tiled(scales)).view(torch.float8_e4m3fn),
        f"{KEY}.weight_scale_2": torch.tensor(0.0625),
        f"{KEY}.comfy_quant": text({"format": "nvfp4"}),
    }
    exact = [
        [E2M1[codes[r, c]] * e4m3(int(scales[r, c // 16])) / 16 for c in range(COLUMNS)]
        for r in range(ROWS)
    ]
    return state, np.array(exact)


def mxfp8(draw: np.random.Generator) -> tuple[State, Array]:
    codes = draw.integers(0, 126, (ROWS, COLUMNS)) + 128 * draw.integers(0, 2, (ROWS, COLUMNS))
    scales = draw.integers(112, 120, (ROWS, COLUMNS // 32)).astype(np.uint8)
    state = {
        f"{KEY}.weight": torch.tensor(codes, dtype=torch.uint8).view(torch.float8_e4m3fn),
        f"{KEY}.weight_scale": torch.tensor(tiled(scales)),
        f"{KEY}.comfy_quant": text({"format": "mxfp8"}),
    }
    exact = [
        [e4m3(int(codes[r, c])) * 2.0 ** (int(scales[r, c // 32]) - 127) for c in range(COLUMNS)]
        for r in range(ROWS)
    ]
    return state, np.array(exact)


def int8(group: int, by_row: bool, draw: np.random.Generator) -> tuple[State, Array]:
    codes = draw.integers(-127, 128, (ROWS, COLUMNS))
    scale = torch.tensor(
        draw.uniform(0.001, 0.002, (ROWS, 1) if by_row else ()), dtype=torch.float32
    )
    said: dict[str, Any] = {"format": "int8_tensorwise"}
    exact = codes * scale.double().numpy()
    if group > 1:
        said |= {"convrot": True, "convrot_groupsize": group}
        four = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
        # undone digit by digit of the place in a group, in base 4
        whole = exact.reshape(ROWS, -1, *(4,) * round(np.log(group) / np.log(4)))
        for axis in range(2, whole.ndim):
            whole = np.moveaxis(np.moveaxis(whole, axis, -1) @ four.T, -1, axis)
        exact = whole.reshape(ROWS, COLUMNS)
    state = {
        f"{KEY}.weight": torch.tensor(codes, dtype=torch.int8),
        f"{KEY}.weight_scale": scale,
        f"{KEY}.comfy_quant": text(said),
    }
    return state, exact


KINDS: dict[str, tuple[str, Callable[[np.random.Generator], tuple[State, Array]]]] = {
    "nf4": ("NF4", lambda draw: four("nf4", False, draw)),
    "nf4-nested": ("NF4", lambda draw: four("nf4", True, draw)),
    "fp4": ("FP4", lambda draw: four("fp4", False, draw)),
    "int8-bitsandbytes": ("INT8", eight),
    "nvfp4": ("NVFP4", nvfp4),
    "mxfp8": ("MXFP8", mxfp8),
    "int8-rows": ("INT8", lambda draw: int8(1, True, draw)),
    "int8-one": ("INT8", lambda draw: int8(1, False, draw)),
    "int8-rotated": ("INT8", lambda draw: int8(64, True, draw)),
}


class Base:
    def __init__(self, kind: str, folder: Path) -> None:
        self.dtype, made = KINDS[kind]
        self.state, self.exact = made(np.random.default_rng(3))
        self.state["double_blocks.0.img_mlp.2.weight"] = torch.ones(4, 8, dtype=torch.bfloat16)
        self.path, self.adapter = folder / "base.safetensors", folder / "a.safetensors"
        save_file({key: value.contiguous() for key, value in self.state.items()}, self.path)
        draw = torch.Generator().manual_seed(5)
        up, down = torch.randn(ROWS, 2, generator=draw), torch.randn(2, COLUMNS, generator=draw)
        self.delta = (up.double() @ down.double()).numpy()
        tensors = {"lora_B.weight": up, "lora_A.weight": down}
        save_file(
            {f"diffusion_model.{KEY}.{key}": value for key, value in tensors.items()}, self.adapter
        )

    def merged(self, folder: Path, **options: Any) -> Array:
        out = folder / "out.safetensors"
        given = ops.merge.Options(output=out, family="flux", overwrite=True, **options)
        ops.merge.run(ops.merge.plan(self.path, [(self.adapter, 0.5)], given))
        return load_file(out)[f"{KEY}.weight"].double().numpy()


@pytest.fixture(params=KINDS)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Base:
    return Base(request.param, tmp_path)


def test_numbers_are_those_of_the_format(base: Base) -> None:
    with unpacked(open_source(base.path)) as source:
        info = source.infos[f"{KEY}.weight"]
        assert (info.dtype, info.shape) == (base.dtype, (ROWS, COLUMNS))
        assert len(source.infos) == 2
        found = source.read(f"{KEY}.weight").double().numpy()
        np.testing.assert_allclose(
            found, base.exact, rtol=1e-6, atol=3e-7 * np.abs(base.exact).max()
        )
        rows = source.read(f"{KEY}.weight", slice(120, 131)).double().numpy()
        np.testing.assert_array_equal(rows, found[120:131])


def test_a_merge_writes_plain_numbers(base: Base, tmp_path: Path) -> None:
    found = base.merged(tmp_path, dtype="fp32", verify=True)
    np.testing.assert_allclose(found, base.exact + 0.5 * base.delta, rtol=0, atol=5e-6)
    assert len(load_file(tmp_path / "out.safetensors")) == 2
    halves = base.merged(tmp_path, dtype="bf16")
    exact = torch.from_numpy(base.exact + 0.5 * base.delta)
    assert float((torch.from_numpy(halves) - exact).norm()) < 2.0**-8 * float(exact.norm())


def test_it_is_extracted_from_compared_with_and_inspected(base: Base, tmp_path: Path) -> None:
    tuned, out = tmp_path / "tuned.safetensors", tmp_path / "lora.safetensors"
    state = {f"{KEY}.weight": torch.from_numpy(base.exact + base.delta).float()}
    state["double_blocks.0.img_mlp.2.weight"] = torch.ones(4, 8)
    save_file(state, tuned)
    options = ops.extract.Options(output=out, family="flux", rank=2, to="comfy", dtype="fp32")
    report = ops.extract.run(ops.extract.plan(base.path, tuned, options))
    assert report.relative_error is not None
    assert report.relative_error < 1e-4
    against = ops.compare.Options(base=base.path, family="flux")
    found = ops.compare.run(ops.compare.plan((base.adapter, 1.0), (tuned, 1.0), against))
    assert found.relative_error is not None
    assert found.relative_error < 1e-5
    record = ops.inspect.run(base.path, ops.inspect.Options(family="flux")).record
    assert record["dtypes"] == {base.dtype: 1, "BF16": 1}


def test_it_is_extracted_from_under_names_that_no_family_has(base: Base, tmp_path: Path) -> None:
    def renamed(state: State) -> State:
        return {key.replace("double_blocks.0.img_mlp", "tower.3"): state[key] for key in state}

    save_file(renamed(base.state), base.path)
    tuned = {f"{KEY}.weight": torch.from_numpy(base.exact + base.delta).float()}
    tuned["double_blocks.0.img_mlp.2.weight"] = torch.ones(4, 8)
    save_file(renamed(tuned), tmp_path / "tuned.safetensors")
    options = ops.extract.Options(output=tmp_path / "lora.safetensors", rank=2, dtype="fp32")
    plan = ops.extract.plan(base.path, tmp_path / "tuned.safetensors", options)
    report = ops.extract.run(plan)
    assert report.relative_error is not None
    assert report.relative_error < 1e-4


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("nf4", "weight.quant_state.bitsandbytes__nf4", text({"quant_type": "nf4"})),
        ("nf4", "weight.quant_state.bitsandbytes__nf4", text({"quant_type": "nf4", "blocksize": 32, "shape": [ROWS, COLUMNS]})),
        ("nf4", "weight.absmax", torch.ones(3)),
        ("nf4", "weight.quant_map", torch.ones(15)),
        ("int8-bitsandbytes", "SCB", torch.ones(3)),
        ("int8-bitsandbytes", "weight_format", torch.tensor(2, dtype=torch.uint8)),
        ("nvfp4", "comfy_quant", text({"format": "nvfp4", "swizzled": False})),
        ("nvfp4", "comfy_quant", torch.tensor([123], dtype=torch.uint8)),
        ("mxfp8", "weight_scale", torch.ones(ROWS, COLUMNS // 32, dtype=torch.uint8)),
        ("int8-rotated", "comfy_quant", text({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 48})),
        ("int8-rows", "comfy_quant", text({"format": "int8_blockwise"})),
    ],
)  # fmt: skip
def test_what_is_described_otherwise_is_not_guessed(
    kind: str, key: str, value: torch.Tensor, tmp_path: Path
) -> None:
    base = Base(kind, tmp_path)
    save_file(base.state | {f"{KEY}.{key}": value}, base.path)
    with unpacked(open_source(base.path)) as source:
        assert base.dtype not in {info.dtype for info in source.infos.values()}
    for dtype in ("keep", "bf16"):
        with pytest.raises(NotRepresentable, match="stored as"):
            base.merged(tmp_path, dtype=dtype)


@pytest.mark.parametrize("group", [4, 64])
def test_the_rotation_is_that_of_its_digits(group: int) -> None:
    from adaptkit.files.packed.int8 import hadamard

    found = hadamard(group).double().numpy()
    np.testing.assert_allclose(found @ found, np.eye(group), atol=1e-6)
    four = [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]
    digits = [[n // 4**d % 4 for d in range(3)] for n in range(group)]
    exact = [
        [np.prod([four[a][b] for a, b in zip(one, other, strict=True)]) for other in digits]
        for one in digits
    ]
    scale = 1 if group == 64 else four[0][0] ** 2
    np.testing.assert_allclose(found * group**0.5, np.array(exact) * scale, atol=1e-6)
