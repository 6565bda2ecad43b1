"""Merging into a model of a family that adaptkit has no table for: its own names are what both files go by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit.errors import NoSuchName, Unclaimed, UnknownAdapter
from adaptkit.ops import compare, extract, merge
from tests.ops.models import State, save

FORMATS = ("kohya", "comfy", "peft", "bare", "lycoris", "diffusers")


def model(prefix: str = "") -> State:
    """A small model nobody has a table for: linears, a convolution in one and in two dimensions, norms, an embedding."""
    draw = torch.Generator().manual_seed(1)
    shapes: dict[str, tuple[int, ...]] = {"embeddings.word_embeddings.weight": (30, 16)}
    for n in range(3):
        shapes |= {
            f"tower.{n}.mixer.in_proj.weight": (24, 16),
            f"tower.{n}.mixer.in_proj.bias": (24,),
            f"tower.{n}.conv_a.weight": (16, 8, 3),
            f"tower.{n}.conv_b.weight": (16, 8, 3, 3),
            f"tower.{n}.norm.weight": (16,),
        }
    return {prefix + key: torch.randn(shape, generator=draw) for key, shape in shapes.items()}


def tuned(base: State) -> State:
    """Each matrix with a difference of rank 2 (a Kronecker product would do for none)."""
    draw = torch.Generator().manual_seed(2)
    made = {}
    for key, tensor in base.items():
        made[key] = tensor.clone()
        if key.endswith("weight") and tensor.ndim > 1 and "embed" not in key:
            rows, columns = tensor.shape[0], tensor[0].numel()
            delta = torch.randn(rows, 2, generator=draw) @ torch.randn(2, columns, generator=draw)
            made[key] += 0.1 * delta.reshape(tensor.shape)
    return made


def extracted(folder: Path, base: State, other: State, **options: Any) -> tuple[Path, Path, Path]:
    paths = save(folder / "base.safetensors", base), save(folder / "tuned.safetensors", other)
    output = folder / ("adapter" if options.get("to") == "peft" else "adapter.safetensors")
    extract.run(extract.plan(*paths, extract.Options(output=output, dtype="fp32", **options)))
    return *paths, output


def merged(base: Path, *adapters: tuple[Path, float], **options: Any) -> tuple[merge.Report, State]:
    output = base.parent / "merged.safetensors"
    report = merge.run(
        merge.plan(base, adapters, merge.Options(output=output, overwrite=True, **options))
    )
    return report, load_file(output)


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_what_was_extracted_gives_the_tuned_model_back(
    tmp_path: Path, to: str, prefix: str
) -> None:
    base = model(prefix)
    want = tuned(base)
    path, _, adapter = extracted(tmp_path, base, want, algo="lora", rank=2, to=to)
    report, found = merged(path, (adapter, 1.0), verify=True)
    assert report.family == "unknown"
    assert report.tensors_changed == report.modules == 9
    for key, tensor in want.items():
        assert torch.allclose(found[key], tensor, atol=1e-5), key


@pytest.mark.parametrize(
    "options", [{"algo": "full"}, {"algo": "lokr", "factor": 4}, {"algo": "lokr", "rank": 2}]
)
def test_other_algorithms_merge_what_they_hold(tmp_path: Path, options: dict[str, Any]) -> None:
    """Kernels come from the checkpoint's shapes, where the adapter's are flat."""
    base = model()
    paths = extracted(tmp_path, base, tuned(base), **options)
    report, found = merged(paths[0], (paths[2], 1.0))
    assert report.tensors_changed == 9
    save_file(found, tmp_path / "again.safetensors")
    contained = compare.run(
        compare.plan(
            (paths[2], 1.0), (tmp_path / "again.safetensors", 1.0), compare.Options(base=paths[0])
        )
    )
    assert contained.relative_error < 1e-5


def test_blocks_are_named_as_the_model_names_them(tmp_path: Path) -> None:
    base = model()
    want = tuned(base)
    path, _, adapter = extracted(tmp_path, base, want, rank=2)
    report, found = merged(path, (adapter, 1.0), blocks=("tower.1=0", "tower.2.mixer=0.5"))
    assert report.tensors_changed == 6
    key = "tower.2.mixer.in_proj.weight"
    assert torch.allclose(found[key], (base[key] + want[key]) / 2, atol=1e-5)
    assert torch.equal(found["tower.1.conv_b.weight"], base["tower.1.conv_b.weight"])
    with pytest.raises(NoSuchName):
        merged(path, (adapter, 1.0), blocks=("tower.7=0",))


def test_an_adapter_with_other_names_is_refused(tmp_path: Path, tiny: Path) -> None:
    base = model()
    path, _, adapter = extracted(tmp_path, base, tuned(base), rank=2)
    with pytest.raises(UnknownAdapter, match="match no module of this"):
        merged(path, (tiny / "lora-kohya.safetensors", 1.0))
    state = load_file(adapter)
    renamed = {
        key.replace("tower_1_mixer", "tower_9_mixer"): tensor for key, tensor in state.items()
    }
    save_file(renamed, tmp_path / "renamed.safetensors")
    with pytest.raises(Unclaimed) as caught:
        merged(path, (tmp_path / "renamed.safetensors", 1.0))
    assert "tower_9_mixer" in str(caught.value)


def test_an_adapter_is_no_base(tmp_path: Path) -> None:
    base = model()
    _, _, adapter = extracted(tmp_path, base, tuned(base), rank=2)
    with pytest.raises(UnknownAdapter, match="this is an adapter, and a checkpoint belongs here"):
        merged(adapter, (adapter, 1.0))
