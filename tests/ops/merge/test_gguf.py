"""Merges into GGUF files, read back by the gguf package: types, blocks, entries and names as before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit import ops
from adaptkit.errors import CannotWrite, CorruptFile, NotRepresentable
from adaptkit.files.gguf import blocks, kquants

gguf = pytest.importorskip("gguf")
from gguf import quants  # noqa: E402

Array = np.ndarray
ROWS, COLUMNS, STILL = 24, 256, 8  # the adapter changes nothing in the first rows
KEY, OTHER, CONV = "double_blocks.{}.img_attn.qkv", "final_layer.linear.weight", "img_in.weight"
FIVE = "extra.patch.weight"
# types that the package packs; of the others, random blocks with small scales
PLAIN = {
    "Q8_0": (34, 0.5),
    "Q4_0": (18, 1.0),
    "Q4_1": (20, 0.5),
    "Q5_0": (22, 1.0),
    "Q5_1": (24, 0.5),
}
K = {"Q4_K": (144, (0, 2)), "Q5_K": (176, (0, 2)), "Q6_K": (210, (208,))}
READ = {"Q3_K": (110, (108,)), "IQ4_XS": (136, (0,))}


def stored(kind: str, draw: np.random.Generator) -> Array:
    weight = (0.05 * draw.standard_normal((ROWS, COLUMNS))).astype(np.float32)
    if kind in PLAIN or kind == "BF16":
        return quants.quantize(weight, gguf.GGMLQuantizationType[kind])
    if kind in ("F32", "F16"):
        return weight.astype(np.float32 if kind == "F32" else np.float16)
    size, scales = (K | READ)[kind]
    raw = draw.integers(0, 256, (ROWS, size), dtype=np.uint8)
    for at in scales:
        scale = draw.uniform(1e-4, 2e-4, (ROWS, 1)).astype(np.float16)
        raw[:, at : at + 2] = scale.view(np.uint8)
    return raw


def base_file(path: Path, kind: str) -> None:
    """One weight of this type and plain ones beside it, with entries of many types."""
    draw = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "flux")
    writer.add_quantization_version(2)
    writer.add_file_type(7)
    writer.add_string("general.name", "Größe")
    writer.add_array("test.numbers", [1, 2, 3])
    writer.add_array("test.texts", ["a", "", "ü"])
    writer.add_bool("test.flag", True)
    writer.add_array(f"comfy.gguf.orig_shape.{FIVE}", [2, 3, 1, 4, 4])
    raw = stored(kind, draw)
    plain = kind in ("F32", "F16")
    form = None if plain else gguf.GGMLQuantizationType[kind]
    writer.add_tensor(OTHER, draw.standard_normal((5, 7)).astype(np.float16))  # an odd size
    writer.add_tensor(f"{KEY.format(0)}.weight", raw, raw_dtype=form)
    writer.add_tensor(FIVE, draw.standard_normal((6, 16)).astype(np.float32))
    writer.add_tensor(f"{KEY.format(1)}.weight", raw, raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def lora(path: Path, scale: float = 0.02) -> Array:
    draw = np.random.default_rng(2)
    down, up = (draw.standard_normal(s).astype(np.float32) for s in ((2, COLUMNS), (ROWS, 2)))
    up[:STILL] = 0
    up *= scale
    stem = f"diffusion_model.{KEY.format(0)}"
    tensors = {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    save_file({key: torch.from_numpy(array) for key, array in tensors.items()}, path)
    return up.astype(np.float64) @ down.astype(np.float64)


def merged(folder: Path, strength: float = 1.0, **options: Any) -> ops.merge.Report:
    given = {"output": folder / "out.gguf", "overwrite": True, **options}
    pairs = [(folder / "a.safetensors", strength)]
    plan = ops.merge.plan(folder / "base.gguf", pairs, ops.merge.Options(family="flux", **given))
    return ops.merge.run(plan)


def tensors(path: Path) -> dict[str, Any]:
    return {t.name: t for t in gguf.GGUFReader(path).tensors}


def entries(path: Path) -> dict[str, Any]:
    fields = gguf.GGUFReader(path).fields.values()
    return {f.name: (f.types, f.contents()) for f in fields if not f.name.startswith("GGUF.")}


def numbers(tensor: Any) -> Array:
    return quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)


def widths(kind: str, raw: Array, found: Array) -> Array:
    """The largest error of each number by its block's own scale, as ggml describes the type."""
    if kind in PLAIN:
        size, ends = PLAIN[kind]
        step = np.abs(raw.reshape(-1, size)[:, :2].copy().view(np.float16).astype(np.float64))
        return np.repeat(step * max(ends, 0.57), 32).reshape(found.shape)
    return np.abs(found) * 2.0 ** -(8 if kind == "BF16" else 11) + 1e-9


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", *PLAIN, *K])
def test_it_stays_the_file_that_it_was(kind: str, tmp_path: Path) -> None:
    base_file(tmp_path / "base.gguf", kind)
    delta = lora(tmp_path / "a.safetensors")
    report = merged(tmp_path, verify=True)
    before, after = tensors(tmp_path / "base.gguf"), tensors(tmp_path / "out.gguf")
    assert [*before] == [*after]
    name = f"{KEY.format(0)}.weight"
    for key, tensor in after.items():
        assert tensor.tensor_type == before[key].tensor_type
        assert tensor.shape.tolist() == before[key].shape.tolist()
        assert tensor.data_offset % 32 == 0
        assert key == name or tensor.data.tobytes() == before[key].data.tobytes()
    # blocks without a change keep their bytes
    assert after[name].data[:STILL].tobytes() == before[name].data[:STILL].tobytes()
    assert after[name].data[STILL:].tobytes() != before[name].data[STILL:].tobytes()
    exact, found = numbers(before[name]) + delta, numbers(after[name])
    error = np.abs(found - exact)
    if kind in K:
        # at most the error of ggml's own quantisation of such numbers, about
        share = {"Q4_K": 0.085, "Q5_K": 0.043, "Q6_K": 0.022}[kind]
        assert np.linalg.norm(error[STILL:]) < share * np.linalg.norm(exact[STILL:])
        assert np.median(error[STILL:]) > 0
    else:
        assert (error <= widths(kind, after[name].data, found) + 1e-7).all()
        made = quants.quantize(exact.astype(np.float32), after[name].tensor_type)
        same = made.view(np.uint8) == after[name].data.view(np.uint8)
        assert same[STILL:].mean() > (0.999 if kind != "F32" else 0.6)
    assert report.relative_error == pytest.approx(
        np.linalg.norm(found - exact) / np.linalg.norm(delta), rel=1e-3, abs=3e-7
    )
    assert report.verified is not None
    assert report.verified.merged == 1
    assert report.quantised == (kind in (*PLAIN, *K))


def test_entries_are_kept_and_the_record_is_added(tmp_path: Path) -> None:
    base_file(tmp_path / "base.gguf", "Q8_0")
    lora(tmp_path / "a.safetensors")
    merged(tmp_path)
    old, new = entries(tmp_path / "base.gguf"), entries(tmp_path / "out.gguf")
    assert {key: new[key] for key in old} == old
    assert [*new][: len(old)] == [*old]
    (record,) = json.loads(new["adaptkit"][1])
    assert (record["command"], record["adapters"][0]["strength"]) == ("merge", 1.0)
    assert "a.safetensors" in new["sd_merge_recipe"][1]
    # a second merge continues the record, and its name is not written twice
    (tmp_path / "out.gguf").replace(tmp_path / "base.gguf")
    merged(tmp_path, 0.5)
    again = entries(tmp_path / "out.gguf")
    assert again.keys() == new.keys()
    assert again["modelspec.merged_from"][1].count(", a") == 2
    shape = ops.inspect.run(tmp_path / "out.gguf").record["dtypes"]
    assert shape == {"F16": 1, "Q8_0": 2, "F32": 1}


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "F16"])
def test_what_adds_nothing_leaves_every_byte(kind: str, tmp_path: Path) -> None:
    base_file(tmp_path / "base.gguf", kind)
    for strength, scale in ((0.0, 1.0), (1.0, 0.0)):
        lora(tmp_path / "a.safetensors", scale)
        merged(tmp_path, strength, verify=True)
        after = tensors(tmp_path / "out.gguf")
        for name, tensor in tensors(tmp_path / "base.gguf").items():
            assert tensor.data.tobytes() == after[name].data.tobytes()


def test_the_name_of_the_output_says_what_is_written(tmp_path: Path) -> None:
    base_file(tmp_path / "base.gguf", "Q4_K")
    delta = lora(tmp_path / "a.safetensors")
    assert merged(tmp_path, output=None).output == tmp_path / "base-merged.gguf"
    name = f"{KEY.format(0)}.weight"
    exact = numbers(tensors(tmp_path / "base.gguf")[name]) + delta
    with pytest.raises(NotRepresentable, match="no place in a safetensors") as refused:
        merged(tmp_path, output=tmp_path / "out.safetensors")
    assert "--dtype bf16" in (refused.value.hint or "")
    # that hint works, and so does a GGUF file of plain numbers
    merged(tmp_path, output=tmp_path / "out.safetensors", dtype="bf16", verify=True)
    plain = load_file(tmp_path / "out.safetensors")[name].double().numpy()
    assert np.abs(plain - exact).max() < 2.0**-8 * np.abs(exact).max()
    merged(tmp_path, dtype="fp16", verify=True)
    after = tensors(tmp_path / "out.gguf")
    assert {t.tensor_type.name for t in after.values()} == {"F16"}
    assert np.abs(numbers(after[name]) - exact).max() < 2.0**-11 * np.abs(exact).max() + 1e-9
    assert entries(tmp_path / "out.gguf")["general.architecture"][1] == "flux"
    for options in ({"layout": "folder"}, {"shard_size": 1000}):
        with pytest.raises(NotRepresentable, match="GGUF"):
            merged(tmp_path, output=None, **options)
    save_file({name: torch.ones(ROWS, COLUMNS)}, tmp_path / "plain.safetensors")
    given = ops.merge.Options(output=tmp_path / "x.gguf", family="flux")
    with pytest.raises(NotRepresentable, match="only a GGUF") as refused:
        ops.merge.plan(tmp_path / "plain.safetensors", [(tmp_path / "a.safetensors", 1.0)], given)
    assert "safetensors" in (refused.value.hint or "")


@pytest.mark.parametrize("kind", READ)
def test_types_that_are_only_read_are_refused_with_what_works(kind: str, tmp_path: Path) -> None:
    base_file(tmp_path / "base.gguf", kind)
    lora(tmp_path / "a.safetensors")
    with pytest.raises(NotRepresentable, match=f"stored as {kind}, which is read") as refused:
        merged(tmp_path)
    assert "--dtype bf16" in (refused.value.hint or "")
    assert not (tmp_path / "out.gguf").exists()
    merged(tmp_path, dtype="bf16")
    merged(tmp_path, 0.0)  # nothing to write in that type
    assert {t.tensor_type.name for t in tensors(tmp_path / "out.gguf").values()} >= {kind}


def test_a_wrong_block_fails_the_verification(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = blocks._encode

    def spoilt(*args: Any, **more: Any) -> Any:
        found = inner(*args, **more)
        found["weight"].view(-1)[-60:-30] ^= 64
        return found

    monkeypatch.setattr(blocks, "_encode", spoilt)
    lora(tmp_path / "a.safetensors")
    for kind in (*PLAIN, *K):
        base_file(tmp_path / "base.gguf", kind)
        with pytest.raises(CorruptFile, match="differs from base"):
            merged(tmp_path, verify=True)
        assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("kind", kquants.WRITTEN)
def test_blocks_of_any_numbers(kind: str) -> None:
    """Zeros, one number, a constant, one sign and every size: finite, and within what is allowed."""
    draw = np.random.default_rng(3)
    rows = draw.standard_normal((64, 256))
    rows[0], rows[1], rows[2, 1:], rows[3] = 0.0, 0.25, 0.0, -0.25
    rows[4], rows[5] = np.abs(rows[4]), -np.abs(rows[5])
    rows[6, :128] = 0.0
    rows[8:] *= 10.0 ** np.linspace(-12, 3, 56)[:, None]
    numbers = torch.from_numpy(rows.astype(np.float32))
    raw = kquants.encode(numbers, kind)
    kind_ = gguf.GGMLQuantizationType[kind]
    found = torch.from_numpy(quants.dequantize(raw.numpy(), kind_))
    assert torch.isfinite(found).all()
    error = (found - numbers).abs()
    assert bool((error <= kquants.allowed(raw, found, kind) * (1 + 1e-6) + 1e-12).all())
    assert not found[0].any()
    assert float(error[[1, 3]].max()) < 0.25 * 2.0**-8
    # half precision has steps enough for the scales of these
    normal = error[48:].norm(dim=1) / numbers[48:].norm(dim=1)
    assert float(normal.max()) < {"Q4_K": 0.1, "Q5_K": 0.05, "Q6_K": 0.025}[kind]


def test_files_that_are_not_written(tmp_path: Path) -> None:
    """Big-endian numbers, and one part of a file that was split."""
    lora(tmp_path / "a.safetensors")
    for big in (True, False):
        endian = gguf.GGUFEndian.BIG if big else gguf.GGUFEndian.LITTLE
        writer = gguf.GGUFWriter(tmp_path / "base.gguf", "flux", endianess=endian)
        if not big:
            writer.add_uint16("split.count", 3)
        writer.add_tensor(f"{KEY.format(0)}.weight", np.ones((ROWS, COLUMNS), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises((NotRepresentable, CannotWrite), match="big-endian|3 parts"):
            merged(tmp_path)
        assert not (tmp_path / "out.gguf").exists()
