"""Differences so small that their squares leave float32, or their factors fp16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit.errors import NotRepresentable
from adaptkit.ops import extract

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"algo": "lora", "rank": 2},
    "lokr": {"algo": "lokr", "factor": 8},
    "lokr-rank": {"algo": "lokr", "factor": 8, "rank": 2},
    "lokr-both": {"algo": "lokr", "factor": 8, "rank": 2, "decompose_both": True},
}


def pair(folder: Path, size: float) -> torch.Tensor:
    """A layer that changes by 1e-3, and one that starts at zero and changes by `size`."""
    random = torch.Generator().manual_seed(0)
    first, change, noise = (torch.randn(64, 64, generator=random) for _ in range(3))
    base = {"blocks.0.layer.weight": first / 8, "blocks.1.layer.weight": torch.zeros(64, 64)}
    small = (noise.double() * size).float()
    tuned = {"blocks.0.layer.weight": first / 8 + change * 1e-3, "blocks.1.layer.weight": small}
    save_file(base, folder / "base.safetensors")
    save_file(tuned, folder / "tuned.safetensors")
    return small.double()


def extracted(folder: Path, **options: Any) -> tuple[extract.Report, torch.Tensor | None]:
    """The report, and the stored ΔW of the small layer in float64; None if it is left out."""
    chosen = extract.Options(output=folder / "out.safetensors", overwrite=True, **options)
    plan = extract.plan(folder / "base.safetensors", folder / "tuned.safetensors", chosen)
    report = extract.run(plan)
    stored = load_file(folder / "out.safetensors")
    own = {
        key.removesuffix(".weight").rpartition(".")[2]: tensor.double()
        for key, tensor in stored.items()
        if "blocks_1" in key and not key.endswith("alpha")
    }
    if not own:
        return report, None
    if "lora_up" in own:
        return report, own["lora_up"] @ own["lora_down"]
    one, two = (
        own[f"lokr_{side}"]
        if f"lokr_{side}" in own
        else own[f"lokr_{side}_a"] @ own[f"lokr_{side}_b"]
        for side in ("w1", "w2")
    )
    return report, torch.kron(one, two)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_layer_is_stored_further_from_the_difference_than_nothing(
    tmp_path: Path, kind: str, dtype: str
) -> None:
    """At 1e-13 `--algo lokr --rank` wrote numbers of 1e15: an error of 1e28 times ‖ΔW‖."""
    share = {}
    for size in (1e-3, 1e-13, 1e-16, 1e-20, 1e-37):
        delta = pair(tmp_path, size)
        report, stored = extracted(tmp_path, to="kohya", dtype=dtype, **KINDS[kind])
        # read and compared in float64, whatever the report says
        left = 1.0 if stored is None else float((delta - stored).norm() / delta.norm())
        share[size] = left
        assert left < 1.0 or stored is None
        assert (stored is None) == any("no nearer" in note for note in report.notes)
        assert report.modules == 2 - (stored is None)
        if stored is not None:
            detail = next(d for d in report.details if "blocks.1" in d["module"])
            assert detail["relative_error"] == pytest.approx(left, rel=1e-4)
    assert share[1e-13] == pytest.approx(share[1e-3], rel=2e-2)
    if dtype != "fp16":  # the range of float32
        assert all(one == pytest.approx(share[1e-3], rel=1e-4) for one in share.values())
    assert share[1e-37] <= 1.0


def test_a_difference_that_no_rounded_layer_comes_near_is_refused(tmp_path: Path) -> None:
    pair(tmp_path, 1e-20)
    with pytest.raises(NotRepresentable, match="no nearer to the difference") as caught:
        extracted(tmp_path, algo="lora", rank=2, dtype="fp16", only=("*blocks.1*",))
    assert caught.value.hint == "write with --dtype bf16 or fp32"
    assert not (tmp_path / "out.safetensors").exists()
    report, stored = extracted(tmp_path, algo="lora", rank=2, dtype="fp32", only=("*blocks.1*",))
    assert stored is not None
    assert report.relative_error < 0.95
