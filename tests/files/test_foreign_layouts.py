"""torchao and SVDQuant bases, packed by NumPy as their authors describe: read, compared, extracted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit import ops
from adaptkit.errors import AdaptkitError, NotRepresentable
from adaptkit.files.open import open_source
from adaptkit.files.packed import unpacked
from tests.files.test_packed import E2M1, e4m3

Array = np.ndarray
State = dict[str, torch.Tensor]
MODULE = "transformer_blocks.0.ff.net.0.proj"
PLAIN = "transformer_blocks.0.ff.net.2.weight"
ROWS, COLUMNS = 256, 384


def bf16(array: Array) -> tuple[torch.Tensor, Array]:
    stored = torch.tensor(array).to(torch.bfloat16)
    return stored, stored.double().numpy()


# torchao


def described(kind: str, **data: Any) -> dict[str, str]:
    names = [f"{MODULE}.weight", PLAIN]
    said = {"_type": kind, "_data": data, "_tensor_data_names": ["qdata", "scale"]}
    return {
        "tensor_names": json.dumps(names),
        names[0]: json.dumps(said),
        PLAIN: json.dumps({"_type": "Tensor"}),
    }


def integers(draw: np.random.Generator, grid: tuple[int, int], zero: bool) -> tuple[State, Array]:
    codes = draw.integers(-127, 128, (ROWS, COLUMNS))
    scale, exact = bf16(draw.uniform(0.001, 0.002, grid))
    state = {"qdata": torch.tensor(codes, dtype=torch.int8), "scale": scale}
    wide = np.repeat(np.repeat(exact, ROWS // grid[0], 0), COLUMNS // grid[1], 1)
    if not zero:
        return state, codes * wide
    places = draw.integers(-5, 5, grid)
    state["zero_point"] = torch.tensor(places, dtype=torch.int8)
    return state, (
        codes - np.repeat(np.repeat(places, ROWS // grid[0], 0), COLUMNS // grid[1], 1)
    ) * wide


def float8(draw: np.random.Generator) -> tuple[State, Array]:
    codes = draw.integers(0, 126, (ROWS, COLUMNS)) + 128 * draw.integers(0, 2, (ROWS, COLUMNS))
    scale = draw.uniform(0.001, 0.002, (ROWS, 1)).astype(np.float32)
    state = {
        "qdata": torch.tensor(codes, dtype=torch.uint8).view(torch.float8_e4m3fn),
        "scale": torch.tensor(scale),
    }
    return state, np.vectorize(e4m3)(codes) * scale.astype(np.float64)


def int4(draw: np.random.Generator) -> tuple[State, Array]:
    codes = draw.integers(-8, 8, (ROWS, COLUMNS))
    groups = COLUMNS // 128
    scale, s = bf16(draw.uniform(0.01, 0.02, (groups, ROWS)))
    zero, z = bf16(draw.uniform(-0.01, 0.01, (groups, ROWS)))
    packed = (codes[:, 0::2] & 15) | ((codes[:, 1::2] & 15) << 4)
    state = {
        "qdata": torch.tensor(packed, dtype=torch.uint8).view(torch.int8),
        "scale": scale,
        "zero_point": zero,
    }
    return state, codes * np.repeat(s.T, 128, 1) + np.repeat(z.T, 128, 1)


TORCHAO = {
    "Int8Tensor": ("INT8", lambda draw: integers(draw, (ROWS, 1), False)),
    "Int8Tensor one": ("INT8", lambda draw: integers(draw, (1, 1), False)),
    "IntxUnpackedToInt8Tensor": ("INT8", lambda draw: integers(draw, (ROWS, 3), True)),
    "Float8Tensor": ("FP8", float8),
    "Int4Tensor": ("INT4", int4),
}


# nunchaku: n = 128 a + 16 b + 8 c + d, k = 64 e + 32 f + 8 g + h


def tiles(codes: Array) -> Array:
    """The byte of two places: of each lane, rows apart by 8, then columns apart by 32."""
    out = np.zeros(codes.size, np.uint8)
    n, k = np.meshgrid(*map(np.arange, codes.shape), indexing="ij")
    a, b, c, d = n // 128, n // 16 % 8, n // 8 % 2, n % 8
    e, f, g, h = k // 64, k // 32 % 2, k // 8 % 4, k % 8
    at = ((((((a * (codes.shape[1] // 64) + e) * 8 + b) * 8 + d) * 4 + g) * 2 + c) * 2 + f) * 8 + h
    out[at] = codes & 15
    return (out[0::2] | (out[1::2] << 4)).reshape(codes.shape[0], -1)


def lanes(scale: Array) -> Array:
    """Rows (n, groups): 0 1 8 9, 2 3 10 11, … of each 16, all of 128 for one group together."""
    out = np.zeros(scale.size, scale.dtype)
    n, g = np.meshgrid(*map(np.arange, scale.shape), indexing="ij")
    at = 128 * (n // 128 * scale.shape[1] + g) + n % 128 // 16 * 16
    out[at + n % 8 // 2 * 4 + n % 16 // 8 * 2 + n % 2] = scale
    return out


def micro(scale: Array) -> Array:
    """Rows (n, groups of 16): 0 32 64 96, 8 40 72 104, …, each with four groups side by side."""
    out = np.zeros(scale.size, scale.dtype)
    n, g = np.meshgrid(*map(np.arange, scale.shape), indexing="ij")
    tile = n // 128 * (scale.shape[1] // 4) + g // 4
    row = n % 128
    out[512 * tile + row % 8 * 64 + row % 32 // 8 * 16 + row // 32 * 4 + g % 4] = scale
    return out


def factor(matrix: Array, down: bool) -> Array:
    """Tiles of 16 × 16: (r, c) of `down` by c then r, (c, r) of `up` by c then r."""
    out = np.zeros(matrix.size, matrix.dtype)
    n, k = np.meshgrid(*map(np.arange, matrix.shape), indexing="ij")
    tall, wide = matrix.shape[0] // 16, matrix.shape[1] // 16
    tile = k // 16 * tall + n // 16 if down else n // 16 * wide + k // 16
    i, j = n % 16, k % 16
    at = (((i % 8 * 4 + j % 8 // 2) * 2 + i // 8) * 2 + j // 8) * 2 + j % 2
    out[256 * tile + at] = matrix
    return out.reshape(matrix.shape[::-1] if down else matrix.shape)


def svdquant(draw: np.random.Generator, float_: bool, rows: int = ROWS) -> tuple[State, Array]:
    codes = draw.integers(0, 16, (rows, COLUMNS))
    smooth, divisor = bf16(lanes(draw.uniform(0.5, 2, (COLUMNS, 1))))
    down, d = bf16(0.1 * draw.standard_normal((32, COLUMNS)))
    up, u = bf16(0.1 * draw.standard_normal((rows, 32)))
    state = {
        "qweight": torch.tensor(tiles(codes)).view(torch.int8),
        "smooth_factor": smooth,
        "smooth_factor_orig": smooth.clone(),
        "proj_down": torch.tensor(factor(down.float().numpy(), True)).to(torch.bfloat16),
        "proj_up": torch.tensor(factor(up.float().numpy(), False)).to(torch.bfloat16),
        "bias": torch.zeros(rows, dtype=torch.bfloat16),
    }
    if float_:
        scale = draw.integers(40, 80, (rows, COLUMNS // 16)).astype(np.uint8)
        by_row, r = bf16(draw.uniform(0.5, 2, (rows, 1)))
        packed = torch.tensor(micro(scale)).view(torch.float8_e4m3fn)
        state["wscales"] = packed.reshape(COLUMNS // 16, rows)
        state["wcscales"] = torch.tensor(lanes(by_row.float().numpy())).to(torch.bfloat16)
        state["wtscale"] = torch.tensor([0.0625], dtype=torch.bfloat16)
        wide = np.repeat(np.vectorize(e4m3)(scale), 16, 1) * r / 16
        numbers = np.array(E2M1)[codes]
    else:
        scale, s = bf16(draw.uniform(0.01, 0.02, (rows, COLUMNS // 64)))
        packed = lanes(scale.float().numpy()).reshape(COLUMNS // 64, rows)
        state["wscales"] = torch.tensor(packed).to(torch.bfloat16)
        wide, numbers = np.repeat(s, 64, 1), np.where(codes > 7, codes - 16, codes)
    order = lanes(np.arange(COLUMNS)[:, None])
    by_column = np.empty(COLUMNS)
    by_column[order] = divisor
    return state, numbers * wide / by_column + u @ d


def written(folder: Path, kind: str) -> tuple[Path, str, Array]:
    """A file with one weight of a kind and a plain one; its dtype and its numbers."""
    draw, path = np.random.default_rng(7), folder / "base.safetensors"
    plain = {PLAIN: torch.ones(8, 16, dtype=torch.bfloat16)}
    if kind in TORCHAO:
        dtype, made = TORCHAO[kind]
        state, exact = made(draw)
        named = {f"{MODULE}._weight_{part}": tensor for part, tensor in state.items()}
        save_file(named | plain, path, metadata=described(kind.split()[0], block_size=[1, 128]))
        return path, dtype, exact
    state, exact = svdquant(draw, kind == "SVDQ_NVFP4")
    named = {f"{MODULE}.{part}": tensor.contiguous() for part, tensor in state.items()}
    save_file(named | plain, path)
    return path, kind, exact


KINDS = [*TORCHAO, "SVDQ_INT4", "SVDQ_NVFP4"]


def lora(path: Path) -> Array:
    draw = torch.Generator().manual_seed(5)
    up, down = torch.randn(ROWS, 2, generator=draw), torch.randn(2, COLUMNS, generator=draw)
    tensors = {"lora_B.weight": up / 9, "lora_A.weight": down}
    save_file({f"transformer.{MODULE}.{key}": value for key, value in tensors.items()}, path)
    return (up.double() / 9 @ down.double()).numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_read_and_extracted_from(kind: str, tmp_path: Path) -> None:
    base, dtype, exact = written(tmp_path, kind)
    with unpacked(open_source(base)) as source:
        assert [*source.infos] == [f"{MODULE}.weight", PLAIN] or [*source.infos] == [
            PLAIN, f"{MODULE}.weight",
        ]  # fmt: skip
        assert source.infos[f"{MODULE}.weight"].shape == (ROWS, COLUMNS)
        found = source.read(f"{MODULE}.weight").double().numpy()
        np.testing.assert_allclose(found, exact, rtol=0, atol=2e-6 * np.abs(exact).max())
    record = ops.inspect.run(base, ops.inspect.Options(family="flux")).record
    assert (record["kind"], record["dtypes"]) == ("checkpoint", {dtype: 1, "BF16": 1})
    adapter, tuned, out = (tmp_path / f"{name}.safetensors" for name in ("a", "tuned", "out"))
    delta = lora(adapter)
    state = {f"{MODULE}.weight": torch.from_numpy(exact + delta).float(), PLAIN: torch.ones(8, 16)}
    save_file(state, tuned)
    options = ops.extract.Options(output=out, family="flux", rank=2, to="comfy", dtype="fp32")
    report = ops.extract.run(ops.extract.plan(base, tuned, options))
    assert report.relative_error is not None
    assert report.relative_error < 1e-3
    against = ops.compare.Options(base=base, family="flux")
    same = ops.compare.run(ops.compare.plan((adapter, 1.0), (tuned, 1.0), against))
    assert same.relative_error is not None
    assert same.relative_error < 1e-4


def check_packed_again(base: Path, adapter: Path, exact: Array, given: dict[str, Any]) -> None:
    """With fresh scales, each number the nearest; nothing changes where nothing is added."""
    report = ops.merge.run(
        ops.merge.plan(base, [(adapter, 1.0)], ops.merge.Options(**given, verify=True))
    )
    before, after = load_file(base), load_file(given["output"])
    assert before.keys() == after.keys()
    codes, scale = (after[f"{MODULE}._weight_{part}"] for part in ("qdata", "scale"))
    step = scale.double().numpy().reshape(-1, 1)
    integer = codes.dtype == torch.int8
    end, rough = (127, 2.0**-8) if integer else (448, 1e-6)
    top = np.abs(exact).max(1, keepdims=True) if len(step) > 1 else np.abs(exact).max()
    np.testing.assert_allclose(step, np.broadcast_to(top / end, step.shape), rtol=rough)
    table = np.arange(-127, 128.0)
    if not integer:
        table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
        table = np.unique(table[np.isfinite(table)])
    wanted = exact / step
    place = np.clip(np.searchsorted(table, wanted), 1, len(table) - 1)
    near = np.minimum(np.abs(wanted - table[place]), np.abs(wanted - table[place - 1]))
    error = np.abs(codes.double().numpy() - wanted)
    assert (error <= near + 1e-4 * np.abs(wanted).max() / end + 1e-4).all()
    assert report.quantised == 1
    factors = load_file(adapter)
    save_file({k: t * ("lora_A" in k) for k, t in factors.items()}, adapter)
    for strength in (0.0, 1.0):
        plan = ops.merge.plan(base, [(adapter, strength)], ops.merge.Options(**given))
        ops.merge.run(plan)
        after = load_file(given["output"])
        assert all(torch.equal(before[k].float(), after[k].float()) for k in before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_writes_plain_numbers_or_says_what_works(kind: str, tmp_path: Path) -> None:
    base, dtype, exact = written(tmp_path, kind)
    adapter, out = tmp_path / "a.safetensors", tmp_path / "out.safetensors"
    delta = lora(adapter)
    given = {"output": out, "family": "flux", "overwrite": True}
    if kind.startswith(("Int8Tensor", "Float8Tensor")):
        return check_packed_again(base, adapter, exact + delta, given)
    with pytest.raises(NotRepresentable, match=f"stored as {dtype}") as refused:
        ops.merge.plan(base, [(adapter, 1.0)], ops.merge.Options(**given))
    hint = refused.value.hint or ""
    options = ops.merge.Options(**given, dtype="fp32", verify=True)
    if kind.startswith("SVDQ"):
        assert "plain model" in hint
        with pytest.raises(NotRepresentable, match=f"stored as {dtype}"):
            ops.merge.plan(base, [(adapter, 1.0)], options)
        return
    assert "--dtype bf16" in hint
    ops.merge.run(ops.merge.plan(base, [(adapter, 1.0)], options))
    found = load_file(out)
    assert found.keys() == {f"{MODULE}.weight", PLAIN}
    np.testing.assert_allclose(
        found[f"{MODULE}.weight"].double().numpy(), exact + delta, rtol=0, atol=5e-6
    )


def test_layers_of_a_nunchaku_file_have_their_own_names(tmp_path: Path) -> None:
    """Queries, keys and values share one tensor, and `proj_out` of a single block has two."""
    draw = np.random.default_rng(1)
    stem, state, exact = "single_transformer_blocks.0.", {}, {}
    for name, rows in (("qkv_proj", 384), ("out_proj", 128), ("mlp_fc1", 128), ("mlp_fc2", 128)):
        parts, exact[name] = svdquant(draw, False, rows)
        renamed = {"smooth_factor": "smooth", "smooth_factor_orig": "smooth_orig"}
        renamed |= {"proj_down": "lora_down", "proj_up": "lora_up"}
        state |= {f"{stem}{name}.{renamed.get(k, k)}": t.contiguous() for k, t in parts.items()}
    state[f"{stem}norm.linear.qweight"] = torch.zeros(96, 64, dtype=torch.int32)
    for part in ("wscales", "wzeros"):
        state[f"{stem}norm.linear.{part}"] = torch.ones(2, 384, dtype=torch.bfloat16)
    state["x_embedder.weight"] = torch.ones(8, 16)
    base = tmp_path / "base.safetensors"
    save_file(state, base)
    wanted = {
        "attn.to_q": exact["qkv_proj"][:128], "attn.to_k": exact["qkv_proj"][128:256],
        "attn.to_v": exact["qkv_proj"][256:], "proj_mlp": exact["mlp_fc1"],
        "proj_out": np.concatenate([exact["out_proj"], exact["mlp_fc2"]], 1),
    }  # fmt: skip
    with unpacked(open_source(base)) as source:
        assert source.infos[f"{stem}norm.linear.weight"].dtype == "AWQ_INT4"
        assert source.infos[f"{stem}norm.linear.weight"].shape == (384, 128)
        for name, numbers in wanted.items():
            found = source.read(f"{stem}{name}.weight").double().numpy()
            np.testing.assert_allclose(found, numbers, rtol=0, atol=1e-5)
        with pytest.raises(AdaptkitError, match="AWQ_INT4"):
            source.read(f"{stem}norm.linear.weight")
    record = ops.inspect.run(base).record
    assert record["family"] == "flux"
    assert record["dtypes"] == {"SVDQ_INT4": 5, "AWQ_INT4": 1, "F32": 1}


@pytest.mark.parametrize("kind", ["Int4TilePackedTo4dTensor", "NVFP4Tensor", "SomethingNew"])
def test_other_classes_are_told_by_name(kind: str, tmp_path: Path) -> None:
    base, adapter = tmp_path / "base.safetensors", tmp_path / "a.safetensors"
    state = {
        f"{MODULE}._weight_qdata": torch.zeros(32, 3, 32, 4, dtype=torch.int32),
        f"{MODULE}._weight_scale_and_zero": torch.ones(3, ROWS, 2),
        PLAIN: torch.ones(8, 16),
    }
    save_file(state, base, metadata=described(kind, shape=[ROWS, COLUMNS]))
    lora(adapter)
    record = ops.inspect.run(base, ops.inspect.Options(family="flux")).record
    assert any(name.startswith("TORCHAO") for name in record["dtypes"])
    for dtype in ("keep", "bf16"):
        given = ops.merge.Options(output=tmp_path / "o.safetensors", family="flux", dtype=dtype)
        with pytest.raises(NotRepresentable, match="stored as TORCHAO"):
            ops.merge.plan(base, [(adapter, 1.0)], given)
