"""merge into checkpoints of other families: fused or split, halves in either order, the same weights come out."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit.checkpoint import Checkpoint, exchanged
from adaptkit.detect import families
from adaptkit.families.contract import Kind
from adaptkit.names import Slot, Target
from adaptkit.ops import convert, extract, merge
from tests.ops.test_convert import COLUMNS, lora
from tests.synth import expand, fill, shares

FAMILIES = ("flux", "sd3", "z-image", "hunyuan-video", "wan")


def checkpoint(family: str, naming: str, path: Path) -> Path:
    """Every matrix of the first and last blocks, in one naming; the same numbers whatever the naming."""
    part = families()[family].component("transformer")
    tensors: dict[str, torch.Tensor] = {}
    for row in part.rows:
        every = list(expand(row))
        for indices in every[:1] + every[1:][-1:]:
            draw = torch.Generator().manual_seed(zlib.crc32(fill(row.target, indices).encode()))
            rows = 8 * shares(row)
            whole = (
                torch.randn(rows, COLUMNS, generator=draw)
                if row.kind is Kind.MATRIX
                else torch.randn(rows, generator=draw)
            )
            for name in row.names.get(naming, row.names["diffusers"]):
                start, stop = (0, rows) if name.rows is None else name.rows.bounds(rows)  # type: ignore[misc]
                held = whole[start:stop]
                tensors[fill(name.weight, indices)] = (
                    exchanged(held) if name.swapped else held
                ).contiguous()
    save_file(tensors, path)
    return path


def weights(path: Path, family: str) -> dict[Target, torch.Tensor]:
    """Every matrix in the family's own order of rows."""
    with Checkpoint.open(path, family=family) as opened:
        found: dict[Target, torch.Tensor] = {}
        for target, held in opened.targets().items():
            pieces = opened.locate(Slot(target), held)
            assert pieces is not None
            found[target] = opened.read(pieces)
        return found


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def test_the_layout_of_the_base_does_not_matter(family: str, tmp_path: Path) -> None:
    adapters = [lora(family, "kohya", tmp_path / "a.safetensors")]
    plan = convert.plan(
        adapters[0],
        convert.Options(to="diffusers", family=family, output=tmp_path / "b.safetensors"),
    )
    convert.run(plan)
    plan.close()
    adapters.append(tmp_path / "b.safetensors")
    found = []
    for naming in ("native", "diffusers"):
        base = checkpoint(family, naming, tmp_path / f"{naming}.safetensors")
        for n, adapter in enumerate(adapters):
            output = tmp_path / f"{naming}-{n}.safetensors"
            shared = {"output": output, "family": family, "allow_unused": True, "verify": True}
            options = merge.Options(format=("kohya", "diffusers")[n], **shared)  # type: ignore[arg-type]
            merged = merge.plan(base, [(adapter, 0.5)], options)
            report = merge.run(merged)
            merged.close()
            assert report.tensors_changed > 10
            found.append(weights(output, family))
    before = weights(tmp_path / "native.safetensors", family)
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for target, weight in other.items():
            torch.testing.assert_close(weight, found[0][target], rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(found[0][target], before[target]) for target in before)


def test_what_was_merged_is_extracted(family: str, tmp_path: Path) -> None:
    """E1 for a transformer: the difference of two diffusers checkpoints, written in kohya's names, gives the tuned one."""
    base = checkpoint(family, "diffusers", tmp_path / "base.safetensors")
    generator = torch.Generator().manual_seed(5)
    tensors = load_file(base)
    tuned = {
        k: t
        + torch.randn(t.shape[0], 2, generator=generator)
        @ torch.randn(2, t.shape[1], generator=generator)
        if t.ndim == 2
        else t
        for k, t in tensors.items()
    }
    save_file(tuned, tmp_path / "tuned.safetensors")
    options = extract.Options(
        output=tmp_path / "e.safetensors", family=family, to="comfy", rank=6, dtype="fp32"
    )
    plan = extract.plan(base, tmp_path / "tuned.safetensors", options)
    report = extract.run(plan)
    assert report.captured > 0.3
    merged = merge.plan(
        base,
        [(report.output, 1.0)],
        merge.Options(output=tmp_path / "m.safetensors", family=family),
    )
    merge.run(merged)
    merged.close()
    after, aim, start = (
        weights(tmp_path / f"{n}.safetensors", family) for n in ("m", "tuned", "base")
    )
    error = sum(float((after[t] - aim[t]).square().sum()) for t in aim)
    norm = sum(float((start[t] - aim[t]).square().sum()) for t in aim)
    assert (error / norm) ** 0.5 == pytest.approx(report.relative_error, abs=1e-3)
