"""resize --weigh: the best ranks by ‖ΔW‖ / ‖W‖, against every choice there is."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit.errors import NotRepresentable, ShapeMismatch, WrongUsage
from adaptkit.ops import resize

SIDE, RANK = 16, 4
NAMES = [f"double_blocks.{n}.img_mlp.0" for n in range(3)]
SIZES = (1.0, 30.0, 0.05)  # ‖W‖ of the layers, about


def files(folder: Path) -> tuple[Path, Path]:
    draw = torch.Generator().manual_seed(4)
    base = {
        f"{name}.weight": size * torch.randn(SIDE, SIDE, generator=draw)
        for name, size in zip(NAMES, SIZES, strict=True)
    }
    adapter = {}
    for name in NAMES:
        adapter[f"diffusion_model.{name}.lora_B.weight"] = torch.randn(SIDE, RANK, generator=draw)
        adapter[f"diffusion_model.{name}.lora_A.weight"] = torch.randn(RANK, SIDE, generator=draw)
    save_file(base, folder / "base.safetensors")
    save_file(adapter, folder / "a.safetensors")
    return folder / "base.safetensors", folder / "a.safetensors"


def energies(path: Path) -> list[np.ndarray]:
    stored = load_file(path)
    found = []
    for name in NAMES:
        up, down = (
            stored[f"diffusion_model.{name}.lora_{one}.weight"].double().numpy() for one in "BA"
        )
        found.append(np.linalg.svd(up @ down, compute_uv=False)[:RANK] ** 2)
    return found


def run(adapter: Path, size: int, **options: object) -> resize.Report:
    output = adapter.with_name("out.safetensors")
    given = resize.Options(size=size, output=output, family="flux", overwrite=True, **options)  # type: ignore[arg-type]
    plan = resize.plan(adapter, given)
    try:
        return resize.run(plan)
    finally:
        plan.close()


@pytest.mark.parametrize("kept", [5, 7, 9])
def test_no_other_ranks_of_this_size_lose_less_of_the_layers(kept: int, tmp_path: Path) -> None:
    base, adapter = files(tmp_path)
    norms = [float(load_file(base)[f"{name}.weight"].double().square().sum()) for name in NAMES]
    limit = 4 * 2 * SIDE * kept + 1100  # the header beside `kept` ranks
    report = run(adapter, limit, weigh=base)
    ranks = [one["rank"] or 0 for one in report.details]
    found = energies(adapter)

    def lost(ranks: tuple[int, ...], by: list[float]) -> float:
        left = sum(e[r:].sum() / n for e, r, n in zip(found, ranks, by, strict=True))
        return float((left / sum(e.sum() / n for e, n in zip(found, by, strict=True))) ** 0.5)

    total = sum(ranks)
    same = [one for one in product(range(RANK + 1), repeat=3) if sum(one) <= total]
    best = min(lost(one, norms) for one in same)
    plain = tuple(one["rank"] or 0 for one in run(adapter, limit).details)
    assert lost(tuple(ranks), norms) == pytest.approx(best, rel=1e-6)
    assert best < lost(plain, norms)
    figures = [
        lost(tuple(ranks), norms),
        lost(plain, norms),
        lost(tuple(ranks), [1.0] * 3),
        lost(plain, [1.0] * 3),
    ]
    (note,) = (note for note in report.notes if "weighed" in note)
    assert [f"{one:.3g}" in note for one in figures] == [True] * 4
    assert figures[2] >= figures[3]


def test_it_is_refused_where_it_has_no_meaning(tmp_path: Path) -> None:
    base, adapter = files(tmp_path)
    with pytest.raises(WrongUsage, match="--weigh goes with --size"):
        resize.plan(adapter, resize.Options(rank=2, weigh=base))
    state = load_file(base)
    for wrong, error, what in (
        (
            {key: value for key, value in state.items() if ".1." not in key},
            NotRepresentable,
            "has no",
        ),
        ({key: value[:8] for key, value in state.items()}, ShapeMismatch, "8 × 16"),
        (
            {key: value * 0 for key, value in state.items()},
            NotRepresentable,
            "nothing can be weighed",
        ),
    ):
        save_file({key: value.clone() for key, value in wrong.items()}, base)
        with pytest.raises(error, match=what):
            run(adapter, 2000, weigh=base)
