"""MiniMax-H3 by DiffSynth-Studio: q, k and v are stored head by head, which its names alone tell.

Every verb must do with such a file what it does with the same rows in the order of all other tools.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit import ops
from adaptkit.adapter import Adapter
from adaptkit.errors import AdaptkitError

HEAD, HEADS, SIDE = 128, 2, 64
ROWS = 3 * HEAD * HEADS
STEM = "blocks.0.attn.qkv_proj"
PLAIN = {"attn.out_proj": (SIDE, HEAD * HEADS), "mlp.fc2": (SIDE, SIDE)}


def one_after_the_other(rows: torch.Tensor) -> torch.Tensor:
    """(heads, 3, head) -> (3, heads, head), written down apart from the package."""
    return torch.cat(
        [rows[HEAD * (3 * h + part) :][:HEAD] for part in range(3) for h in range(HEADS)]
    )


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """The same adapter as DiffSynth-Studio and as the original's tools write it."""
    draw = torch.Generator().manual_seed(0)
    down, up = torch.randn(4, SIDE, generator=draw), torch.randn(ROWS, 4, generator=draw)
    theirs = {f"{STEM}.lora_A.default.weight": down, f"{STEM}.lora_B.default.weight": up}
    usual = {f"{STEM}.lora_A.weight": down, f"{STEM}.lora_B.weight": one_after_the_other(up)}
    for name, (rows, columns) in PLAIN.items():
        pair = torch.randn(4, columns, generator=draw), torch.randn(rows, 4, generator=draw)
        for infix, found in ((".default", theirs), ("", usual)):
            for letter, tensor in zip("AB", pair, strict=True):
                found[f"blocks.0.{name}.lora_{letter}{infix}.weight"] = tensor
    paths = tmp_path / "diffsynth.safetensors", tmp_path / "usual.safetensors"
    for path, tensors in zip(paths, (theirs, usual), strict=True):
        save_file(tensors, path)
    return paths


FAMILY = "minimax-h3"


def test_every_format_has_the_usual_order(files: tuple[Path, Path], tmp_path: Path) -> None:
    for to in ("bare", "comfy", "kohya", "diffusers"):
        found = []
        for n, path in enumerate(files):
            output = tmp_path / f"{to}-{n}.safetensors"
            ops.convert.run(ops.convert.plan(path, ops.convert.Options(to=to, family=FAMILY, output=output)))  # fmt: skip
            found.append(load_file(output))
        assert found[0].keys() == found[1].keys()
        assert all(torch.equal(found[0][key], found[1][key]) for key in found[0]), to
        assert not any(".default." in key for key in found[0])


def test_merge_resize_compare_and_inspect_agree(files: tuple[Path, Path], tmp_path: Path) -> None:
    base, weights = tmp_path / "base.safetensors", torch.Generator().manual_seed(1)
    shapes = {f"{STEM}.weight": (ROWS, SIDE)} | {f"blocks.0.{n}.weight": s for n, s in PLAIN.items()}  # fmt: skip
    save_file({name: torch.randn(*shape, generator=weights) for name, shape in shapes.items()}, base)  # fmt: skip
    merged, resized, read = [], [], []
    for n, path in enumerate(files):
        output, small = tmp_path / f"m{n}.safetensors", tmp_path / f"r{n}.safetensors"
        ops.merge.run(ops.merge.plan(base, [(path, 0.5)], ops.merge.Options(output=output, family=FAMILY)))  # fmt: skip
        ops.resize.run(ops.resize.plan(path, ops.resize.Options(rank=2, family=FAMILY, output=small)))  # fmt: skip
        merged.append(load_file(output))
        with Adapter.open(small, family=FAMILY) as adapter:
            read.append(
                {slot: adapter.weights(entry).delta() for slot, entry in adapter.entries.items()}
            )
        resized.append(small)
    up = load_file(files[1])
    change = 0.5 * up[f"{STEM}.lora_B.weight"].double() @ up[f"{STEM}.lora_A.weight"].double()
    expected = load_file(base)[f"{STEM}.weight"].double() + change
    torch.testing.assert_close(merged[0][f"{STEM}.weight"].double(), expected, rtol=0, atol=1e-6)
    assert all(torch.equal(merged[0][key], merged[1][key]) for key in merged[0])
    assert read[0].keys() == read[1].keys()
    for slot, delta in read[0].items():
        torch.testing.assert_close(delta, read[1][slot], rtol=0, atol=1e-5)
    report = ops.compare.run(ops.compare.plan(*files, ops.compare.Options(family=FAMILY)))
    assert report.to_dict()["relative_error"] == 0.0
    (problem,) = ops.inspect.run(files[0]).to_dict()["problems"]
    assert problem["severity"] == "warning"
    assert "head by head" in problem["what"]


def test_rows_that_are_no_whole_heads_are_refused(files: tuple[Path, Path]) -> None:
    tensors = load_file(files[0])
    key = f"{STEM}.lora_B.default.weight"
    tensors[key] = tensors[key][:-3].clone()
    save_file(tensors, files[0])
    with pytest.raises(AdaptkitError, match="are not q, k and v of heads of 128"):
        ops.convert.plan(files[0], ops.convert.Options(to="kohya", family=FAMILY, output=files[0].with_name("o.safetensors")))  # fmt: skip
