"""Planted modules stand out of their kind, each by its figure; ordinary ones do not."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from adaptkit.ops import inspect
from adaptkit.ops.inspect.outliers import SCORE, outliers
from adaptkit.ops.inspect.stats import Measured
from tests.cli.test_cli import adaptkit

Array = np.ndarray
BLOCKS, RANK, SIZE = 14, 4, 48


def stem(block: int) -> str:
    return f"lora_unet_double_blocks_{block}_img_attn_proj"


def pairs(seed: int = 0) -> list[tuple[Array, Array]]:
    """Factors of ordinary modules whose strengths differ as trained ones do."""
    draw = np.random.default_rng(seed)
    return [
        (
            draw.normal(size=(SIZE, RANK)) * float(np.exp(draw.normal() * 0.3)),
            draw.normal(size=(RANK, SIZE)),
        )
        for _ in range(BLOCKS)
    ]


def saved(path: Path, made: list[tuple[Array, Array]]) -> Path:
    tensors = {}
    for n, (up, down) in enumerate(made):
        tensors[f"{stem(n)}.lora_up.weight"] = torch.from_numpy(up).float()
        tensors[f"{stem(n)}.lora_down.weight"] = torch.from_numpy(down).float()
        tensors[f"{stem(n)}.alpha"] = torch.tensor(float(RANK))
    save_file(tensors, path)
    return path


def found(path: Path) -> list[dict[str, Any]]:
    report = inspect.run(path, inspect.Options(stats=True, family="flux"))
    assert report.error is None, report.error
    json.dumps(report.record, allow_nan=False)
    return list(report.record["outliers"])


def expected(made: list[tuple[Array, Array]]) -> dict[str, list[float]]:
    """The figures of every module from its dense ΔW in float64."""
    told: dict[str, list[float]] = {"strength": [], "outputs": [], "rank": []}
    for up, down in made:
        delta = up.astype(np.float32).astype(float) @ down.astype(np.float32).astype(float)
        sigma = np.linalg.svd(delta, compute_uv=False)
        energies = np.sum(delta**2, axis=1)
        told["strength"].append(float(np.sqrt(np.mean(delta**2))))
        told["outputs"].append(float(energies.sum() ** 2 / np.sum(energies**2) / SIZE))
        told["rank"].append(float(np.sum(sigma**2) / sigma[0] ** 2 / RANK))
    return told


def strong(up: Array, down: Array) -> None:
    up *= 20


def weak(up: Array, down: Array) -> None:
    up /= 20


def few_outputs(up: Array, down: Array) -> None:
    up[1:] *= 1e-4
    up[0] *= 7


def collapsed(up: Array, down: Array) -> None:
    up[:, 1:] *= 1e-5
    up[:, 0] = 2.0


PLANTED = {strong: "strength", weak: "strength", few_outputs: "outputs", collapsed: "rank"}


@pytest.mark.parametrize("plant", PLANTED)
def test_a_planted_module_stands_out_by_its_figure(plant: Any, tmp_path: Path) -> None:
    made = pairs()
    plant(*made[5])
    told = [
        one
        for one in found(saved(tmp_path / "a.safetensors", made))
        if one["figure"] == PLANTED[plant]
    ]
    (one,) = told
    wanted = expected(made)[PLANTED[plant]]
    assert one["module"] == "transformer.double_blocks.5.img_attn.proj"
    assert (one["component"], one["kind"]) == ("transformer", "out")
    assert one["value"] == pytest.approx(wanted[5], rel=1e-4)
    logs = np.log(wanted)
    middle = median(logs)
    least = np.log(1.2 if PLANTED[plant] == "strength" else 1.1)
    spread = max(median(np.abs(logs - middle)), least)
    assert one["median"] == pytest.approx(np.exp(middle), rel=1e-4)
    assert one["score"] == pytest.approx(0.6745 * (logs[5] - middle) / spread, rel=1e-3)
    assert abs(one["score"]) > SCORE


@pytest.mark.parametrize("seed", range(4))
def test_ordinary_modules_do_not_stand_out(seed: int, tmp_path: Path) -> None:
    assert found(saved(tmp_path / "a.safetensors", pairs(seed))) == []


def test_the_effective_outputs_of_every_kind(tmp_path: Path) -> None:
    """LoRA of a low and of a high rank, LoKr and a dense difference, against the dense ΔW."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw) * torch.rand(
            shape[0], *[1] * (len(shape) - 1), generator=draw
        )

    w1, w2, up, down, wide = (
        normal(4, 4),
        normal(12, 12),
        normal(48, 2),
        normal(2, 48),
        normal(48, 40),
    )
    tensors = {
        f"{stem(0)}.lokr_w1": w1, f"{stem(0)}.lokr_w2": w2,
        f"{stem(1)}.lora_up.weight": up, f"{stem(1)}.lora_down.weight": down,
        f"{stem(2)}.lora_up.weight": wide, f"{stem(2)}.lora_down.weight": wide.T.contiguous(),
        f"{stem(3)}.diff": normal(48, 48),
    }  # fmt: skip
    save_file(tensors, tmp_path / "a.safetensors")
    deltas = [
        np.kron(w1.double().numpy(), w2.double().numpy()),
        (up.double() @ down.double()).numpy(),
        (wide.double() @ wide.double().T).numpy(),
        tensors[f"{stem(3)}.diff"].double().numpy(),
    ]
    report = inspect.run(tmp_path / "a.safetensors", inspect.Options(stats=True, family="flux"))
    for module, delta in zip(report.modules, deltas, strict=True):
        energies = np.sum(delta**2, axis=1)
        assert module["outputs"] == pytest.approx(
            energies.sum() ** 2 / np.sum(energies**2), rel=1e-5
        )


def test_what_has_no_figure_is_left_out() -> None:
    alike = [
        Measured(f"m{n}", "unet", "b", "q", 1.0, (1.0,), outputs=4.0, shape=(8, 8))
        for n in range(9)
    ]
    odd = [
        Measured("zero", "unet", "b", "q", 0.0, (0.0,), shape=(8, 8)),
        Measured("nan", "unet", "b", "q", None, shape=(8, 8)),
        Measured("bias", "unet", "b", "bias", 1e9, shape=(0, 0)),
        Measured("other kind", "unet", "b", "k", 1e9, (1e9,), outputs=4.0, shape=(8, 8)),
    ]
    assert outliers([*alike, *odd]) == []
    far = Measured("m", "unet", "b", "q", 4.0, (4.0,), outputs=4.0, shape=(8, 8))
    assert [one.module for one in outliers([*alike, far])] == ["m"]


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_numbers_whose_squares_are_none(size: float) -> None:
    """A LoHa of four tiny factors once ended in a division by zero."""
    one = Measured("m", "unet", "b", "q", size, (2 * size, size), shape=(2, 2))
    assert (one.stable_rank, one.rank(0.7), one.rank(0.9)) == (pytest.approx(1.25), 1, 2)


def test_the_terminal_shows_the_figure_beside_the_median(tmp_path: Path) -> None:
    made = pairs()
    few_outputs(*made[5])
    shown = adaptkit(
        "inspect", saved(tmp_path / "a.safetensors", made), "--stats", "--family", "flux"
    ).stdout
    (line,) = [one for one in shown.splitlines() if " outputs " in one]
    assert line.endswith("transformer.double_blocks.5.img_attn.proj")
    assert "2.1%" in line
    for word in ("tamper", "malicious", "attack", "broken"):
        assert word not in shown
