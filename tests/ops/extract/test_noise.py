"""extract spends no bytes on rounding noise: a LoRA merged into a half-precision checkpoint, and a size with room for more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adaptkit.ops import advise, extract
from adaptkit.ops.extract.random import random_share
from tests.ops.models import State, save

RANK = 8
SHAPES = {"q": (192, 160), "k": (160, 192), "up": (384, 160), "down": (160, 384)}


class Merged:
    """A model of a few layers, a LoRA of rank 8 merged into it in half precision, and what it was before rounding."""

    def __init__(self, folder: Path, dtype: torch.dtype, ulps: float) -> None:
        draw = torch.Generator().manual_seed(6)
        base: State = {}
        tuned: State = {}
        self.true: dict[str, torch.Tensor] = {}
        for block in range(3):
            for name, (rows, columns) in SHAPES.items():
                key = f"layers.{block}.{name}.weight"
                base[key] = (torch.randn(rows, columns, generator=draw) / columns**0.5).to(dtype)
                grid = torch.finfo(dtype).eps * float(base[key].float().abs().mean())
                factors = torch.randn(rows, RANK, generator=draw) @ torch.randn(
                    RANK, columns, generator=draw
                )
                self.true[key] = (ulps * grid / RANK**0.5 * factors).double()
                tuned[key] = (base[key].double() + self.true[key]).to(dtype)
        self.folder = folder
        self.paths = (
            save(folder / "base.safetensors", base),
            save(folder / "tuned.safetensors", tuned),
        )

    def extract(self, **options: Any) -> extract.Report:
        chosen = extract.Options(
            output=self.folder / "out.safetensors", overwrite=True, to="bare", **options
        )
        return extract.run(extract.plan(*self.paths, chosen))

    def error(self) -> float:
        """‖stored − true‖ / ‖true‖, the LoRA before it was rounded."""
        stored = load_file(self.folder / "out.safetensors")
        left = total = 0.0
        for key, true in self.true.items():
            stem = key.removesuffix(".weight")
            up, down = (stored[f"{stem}.lora_{side}.weight"].double() for side in "BA")
            left += float((true - up @ down).square().sum())
            total += float(true.square().sum())
        return (left / total) ** 0.5


@pytest.fixture(params=[torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def merged(request: pytest.FixtureRequest, tmp_path: Path) -> Merged:
    return Merged(tmp_path, request.param, ulps=6.0)


def test_a_size_is_not_filled_with_noise(merged: Merged) -> None:
    """Every layer has the LoRA's rank, and is nearer to the LoRA than with all the ranks that there is room for."""
    report = merged.extract(size=2_000_000)
    assert [detail["rank"] for detail in report.details] == [RANK] * 12
    assert report.ranks_below_noise == 0
    assert report.bytes < 200_000
    assert any("not filled with noise" in note for note in report.notes)
    trimmed = merged.error()
    report = merged.extract(rank=64)
    assert report.bytes > 5 * 100_000
    assert trimmed < 0.5 * merged.error()


def test_a_size_too_small_is_used_whole(merged: Merged) -> None:
    report = merged.extract(size=60_000)
    assert 59_000 < report.bytes <= 60_000
    assert not any("filled with noise" in note for note in report.notes)


def test_auto_stores_no_noise_either(merged: Merged) -> None:
    """Neither as further ranks, nor as a full difference, nor as a LoKr."""
    report = merged.extract(algo="auto", size=2_000_000)
    assert {(detail["algorithm"], detail["rank"]) for detail in report.details} == {("lora", RANK)}
    assert report.optimality_gap == pytest.approx(0.0, abs=1e-6)
    assert any("not filled with noise" in note for note in report.notes)


@pytest.mark.parametrize(
    "options", [{"energy": 0.999999}, {"error": 0.01}, {"algo": "auto", "error": 0.01}]
)
def test_what_is_asked_of_the_difference_as_it_is_holds(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    """These rules promise something about the files as they are; how much of that is noise is said."""
    merged = Merged(tmp_path, torch.bfloat16, ulps=6.0)
    report = merged.extract(**options, max_rank=160)
    assert report.relative_error <= 0.01
    assert report.ranks_below_noise is not None
    if any(detail["algorithm"] == "lora" for detail in report.details):
        assert report.ranks_below_noise > 12
        assert any("within the rounding noise" in note for note in report.notes)


def test_a_difference_within_the_grid_is_left_as_it_is(tmp_path: Path) -> None:
    """Most entries did not move at all: what rounding did to them is no noise of its own."""
    merged = Merged(tmp_path, torch.bfloat16, ulps=0.2)
    report = merged.extract(size=300_000)
    assert report.ranks_below_noise == 0
    assert 295_000 < report.bytes <= 300_000


def test_in_float32_there_is_no_noise_to_speak_of(tmp_path: Path) -> None:
    merged = Merged(tmp_path, torch.float32, ulps=3e4)
    draw = torch.Generator().manual_seed(1)
    state = load_file(merged.paths[1])
    save(
        merged.paths[1],
        {key: t + 1e-4 * torch.randn(t.shape, generator=draw) for key, t in state.items()},
    )
    report = merged.extract(size=500_000)
    assert 495_000 < report.bytes <= 500_000


def test_advice_knows_it_too(merged: Merged) -> None:
    """From the LoRA's rank on, more bytes are of no use: neither for further ranks nor for full differences."""
    report = advise.run(advise.plan(*merged.paths, advise.Options(to="bare", max_rank=32)))
    assert report.made_by is not None
    assert report.made_by["rank"] == RANK
    assert report.size[16] == report.size[8] == report.size[32]
    assert report.auto[16] == report.auto[8]
    assert report.auto[16].mix == {"lora": 12}
    assert (
        report.rank[16].relative_error < report.rank[8].relative_error
    )  # of the files as they are


def test_modules_of_one_rank_that_hold_nothing_but_noise_are_counted(tmp_path: Path) -> None:
    """A rank for every layer spends bytes on those that were only rounded again; a note says so."""
    draw = torch.Generator().manual_seed(1)
    base: State = {}
    tuned: State = {}
    for n in range(4):
        key = f"layers.{n}.q.weight"
        base[key] = torch.randn(192, 160, generator=draw)
        delta = torch.randn(192, 160, generator=draw) * 1e-3
        if n == 0:  # a direction that stands out of it
            delta += (
                2e-3 * torch.randn(192, 1, generator=draw) @ torch.randn(1, 160, generator=draw)
            )
        tuned[key] = base[key] + delta
    paths = save(tmp_path / "b.safetensors", base), save(tmp_path / "t.safetensors", tuned)

    def notes(rank: int) -> list[str]:
        options = extract.Options(rank=rank, output=tmp_path / "o.safetensors", overwrite=True)
        report = extract.run(extract.plan(*paths, options))
        return [note for note in report.notes if "random numbers" in note]

    for rank in (1, 4, 16):
        assert notes(rank)[0].startswith("3 of 4 modules hold no more")
    assert notes(160) == []  # a rank that holds all of any matrix tells nothing


@pytest.mark.parametrize("shape", [(64, 48), (320, 320), (96, 640)])
def test_random_numbers_keep_what_the_law_says(shape: tuple[int, int]) -> None:
    draw = torch.Generator().manual_seed(3)
    energy = torch.linalg.svdvals(torch.randn(*shape, generator=draw, dtype=torch.float64)) ** 2
    for rank in (2, 8, 24, min(shape)):
        kept = float(energy[:rank].sum() / energy.sum())
        assert random_share(*shape, rank) == pytest.approx(kept, rel=0.04, abs=0.01)
