"""GGUF bases: read by type, merged, compared and extracted from, within the rounding of their blocks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit import ops
from adaptkit.errors import CorruptFile, UnreadableFile
from adaptkit.files.open import open_source

gguf = pytest.importorskip("gguf")
ROWS, COLUMNS = 24, 256
KEY = "double_blocks.{}.img_attn.qkv"
Array = np.ndarray


def q8_0(raw: Array) -> Array:
    """ggml `block_q8_0`: a half-precision scale and 32 signed bytes."""
    blocks = raw.reshape(-1, 34)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float64)
    return (scale * blocks[:, 2:].view(np.int8)).reshape(-1)


def q4_0(raw: Array) -> Array:
    """ggml `block_q4_0`: a scale and 32 nibbles minus 8, the lower halves of the bytes first."""
    blocks = raw.reshape(-1, 18)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float64)
    nibbles = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], 1).astype(np.int8) - 8
    return (scale * nibbles).reshape(-1)


def q6_k(raw: Array) -> Array:
    """ggml `block_q6_K`: 256 numbers of six bits in two parts, 16 scales of a byte, and one scale."""
    found = []
    for block in raw.reshape(-1, 210):
        low, high = block[:128].reshape(2, 64), block[128:192].reshape(2, 32)
        scales, d = block[192:208].view(np.int8), block[208:].copy().view(np.float16)
        for half in range(2):
            parts = [
                (low[half, :32] & 15) | ((high[half] >> 0 & 3) << 4),
                (low[half, 32:] & 15) | ((high[half] >> 2 & 3) << 4),
                (low[half, :32] >> 4) | ((high[half] >> 4 & 3) << 4),
                (low[half, 32:] >> 4) | ((high[half] >> 6 & 3) << 4),
            ]
            numbers = np.concatenate(parts).astype(np.int16) - 32
            weights = np.repeat(scales[8 * half : 8 * half + 8].astype(np.float64), 16)
            found.append(float(d[0]) * weights * numbers)
    return np.concatenate(found)


def plain(dtype: type) -> Callable[[Array], Array]:
    return lambda raw: raw.view(dtype).astype(np.float64).reshape(-1)


ORACLES = {
    "Q8_0": q8_0,
    "Q4_0": q4_0,
    "Q6_K": q6_k,
    "F16": plain(np.float16),
    "F32": plain(np.float32),
}


def stored(kind: str, draw: np.random.Generator) -> Array:
    """The bytes of a weight (ROWS, COLUMNS) in a type."""
    weight = (0.1 * draw.standard_normal((ROWS, COLUMNS))).astype(np.float32)
    if kind == "Q6_K":  # the package only reads it
        blocks = draw.integers(0, 256, (ROWS, 210), dtype=np.uint8)
        blocks[:, 208:] = np.full((ROWS, 1), 1e-4, np.float16).view(np.uint8)
        return blocks
    if kind == "F32":
        return weight
    if kind == "F16":
        return weight.astype(np.float16)
    return gguf.quants.quantize(weight, gguf.GGMLQuantizationType[kind])


def base_file(path: Path, kind: str) -> Array:
    """A file with one weight of this type and a plain one; returns the numbers of the first."""
    raw = stored(kind, np.random.default_rng(1))
    writer = gguf.GGUFWriter(path, "flux")
    name = f"{KEY.format(0)}.weight"
    if kind in ("F16", "F32"):
        writer.add_tensor(name, raw)
    else:
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.add_tensor(f"{KEY.format(1)}.weight", np.ones((ROWS, COLUMNS), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ORACLES[kind](np.ascontiguousarray(raw).view(np.uint8)).reshape(ROWS, COLUMNS)


def lora(path: Path) -> Array:
    draw = np.random.default_rng(2)
    down, up = (draw.standard_normal(s).astype(np.float32) for s in ((2, COLUMNS), (ROWS, 2)))
    stem = f"diffusion_model.{KEY.format(0)}"
    tensors = {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    save_file({key: torch.from_numpy(array) for key, array in tensors.items()}, path)
    return up.astype(np.float64) @ down.astype(np.float64)


@pytest.mark.parametrize("kind", ORACLES)
def test_numbers_are_those_of_the_format(kind: str, tmp_path: Path) -> None:
    expected = base_file(tmp_path / "base.gguf", kind)
    name = f"{KEY.format(0)}.weight"
    with open_source(tmp_path / "base.gguf") as source:
        assert source.infos[name].shape == (ROWS, COLUMNS)
        assert source.infos[name].dtype == kind
        whole = source.read(name).double().numpy()
        np.testing.assert_allclose(whole, expected, rtol=1e-6, atol=1e-9)
        rows = source.read(name, slice(5, 9)).double().numpy()
        np.testing.assert_allclose(rows, expected[5:9], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ORACLES)
def test_a_merge_writes_plain_numbers(kind: str, tmp_path: Path) -> None:
    weight, delta = base_file(tmp_path / "base.gguf", kind), lora(tmp_path / "a.safetensors")
    output = tmp_path / "out.safetensors"
    options = ops.merge.Options(output=output, family="flux", dtype="fp32")
    plan = ops.merge.plan(tmp_path / "base.gguf", [(tmp_path / "a.safetensors", 0.5)], options)
    ops.merge.run(plan)
    found = load_file(output)
    merged = found[f"{KEY.format(0)}.weight"].double().numpy()
    np.testing.assert_allclose(merged, weight + 0.5 * delta, rtol=0, atol=2e-6)
    assert torch.equal(found[f"{KEY.format(1)}.weight"], torch.ones(ROWS, COLUMNS))


@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K"])
def test_a_difference_from_it_is_extracted(kind: str, tmp_path: Path) -> None:
    weight, delta = base_file(tmp_path / "base.gguf", kind), lora(tmp_path / "a.safetensors")
    tuned = {
        f"{KEY.format(0)}.weight": torch.from_numpy(weight + delta).float(),
        f"{KEY.format(1)}.weight": torch.ones(ROWS, COLUMNS),
    }
    save_file(tuned, tmp_path / "tuned.safetensors")
    output = tmp_path / "out.safetensors"
    options = ops.extract.Options(output=output, family="flux", rank=2, to="comfy", dtype="fp32")
    report = ops.extract.run(
        ops.extract.plan(tmp_path / "base.gguf", tmp_path / "tuned.safetensors", options)
    )
    assert report.relative_error is not None
    assert report.relative_error < 1e-4
    found = load_file(output)
    (up,) = (v for k, v in found.items() if "lora_B" in k)
    (down,) = (v for k, v in found.items() if "lora_A" in k)
    np.testing.assert_allclose((up @ down).numpy(), delta, atol=1e-4)


def test_inspect_names_its_types(tmp_path: Path) -> None:
    base_file(tmp_path / "base.gguf", "Q4_0")
    record = ops.inspect.run(tmp_path / "base.gguf").record
    assert record["kind"] == "checkpoint"
    assert record["dtypes"] == {"Q4_0": 1, "F32": 1}


def test_a_damaged_file_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "base.gguf"
    base_file(path, "Q8_0")
    whole = path.read_bytes()
    for length in (4, 20, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptFile, match=r"base\.gguf"):
            open_source(path)


def test_without_the_package_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base_file(tmp_path / "base.gguf", "Q8_0")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UnreadableFile, match="gguf package") as refused:
        open_source(tmp_path / "base.gguf")
    assert "adaptkit[gguf]" in (refused.value.hint or "")
