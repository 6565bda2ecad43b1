"""The failures of ../shared/reference/failures.md of tools that resize and combine, each as a test that passes here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit.errors import NothingToDo
from adaptkit.ops import combine, convert, merge, resize
from tests import oracle
from tests.made import CONV, LINEAR, SHAPES, WIDE, adapter, deltas, relative


def combined(
    folder: Path, *inputs: tuple[Path, float], **options: object
) -> tuple[Path, combine.Report]:
    output = folder / "combined.safetensors"
    plan = combine.plan(inputs, combine.Options(output=output, overwrite=True, **options))  # type: ignore[arg-type]
    return output, combine.run(plan)


def resized(source: Path, **options: object) -> tuple[Path, resize.Report]:
    output = source.with_name("resized.safetensors")
    plan = resize.plan(source, resize.Options(output=output, overwrite=True, **options))  # type: ignore[arg-type]
    return output, resize.run(plan)


def test_f1_half_strength_is_half(tmp_path: Path) -> None:
    """sd-scripts' merge_lora multiplies both factors: a quarter."""
    source = adapter(tmp_path / "a.safetensors")
    output, _ = combined(tmp_path, (source, 0.5))
    assert relative(deltas(output), {name: 0.5 * d for name, d in deltas(source).items()}) < 1e-7


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 0.5)])
def test_f2_two_at_one_are_the_sum(weights: tuple[float, float], tmp_path: Path) -> None:
    """Sums of factors have cross terms, and a concatenation that keeps alpha halves the strength (F2b)."""
    a, b = (adapter(tmp_path / f"{n}.safetensors", seed=n) for n in (1, 2))
    output, report = combined(tmp_path, (a, weights[0]), (b, weights[1]))
    total = {name: weights[0] * d + weights[1] * deltas(b)[name] for name, d in deltas(a).items()}
    assert relative(deltas(output), total) < 1e-6
    assert report.relative_error < 1e-6


def test_f3_rules_count_ranks_as_they_say(tmp_path: Path) -> None:
    """For σ = 10, 5, 2, 1 sd-scripts keeps one more than asked for."""
    left = torch.linalg.qr(torch.randn(24, 4, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(32, 4, dtype=torch.float64))[0].T
    up = left * torch.tensor([10.0, 5.0, 2.0, 1.0], dtype=torch.float64)
    source = tmp_path / "a.safetensors"
    tensors = {
        "lora_up.weight": up.float().contiguous(),
        "lora_down.weight": right.float().contiguous(),
    }
    save_file({f"{LINEAR}.{role}": tensor for role, tensor in tensors.items()}, source)
    for rule, kept in (({"sv_ratio": 2.5}, 2), ({"sv_fro": 0.85}, 1), ({"sv_cumulative": 0.5}, 1)):
        _, report = resized(source, family="sd1", **rule)
        assert report.details[0]["rank"] == kept, rule


@pytest.mark.parametrize("kind", ["loha", "lokr-low"])
def test_f4_loha_and_lokr_are_really_resized(kind: str, tmp_path: Path) -> None:
    source = adapter(
        tmp_path / "a.safetensors", kind, metadata={"ss_network_dim": "3", "ss_network_alpha": "3"}
    )
    output, report = resized(source, rank=1)
    assert output.stat().st_size < source.stat().st_size
    assert report.relative_error == pytest.approx(
        relative(deltas(output), deltas(source)), rel=1e-6
    )
    assert 0.01 < report.relative_error < 1


def test_f5_tucker_is_resized_whole(tmp_path: Path) -> None:
    source = adapter(tmp_path / "a.safetensors", "tucker", names=[CONV])
    output, _ = resized(source, rank=4)
    assert set(load_file(output)) == {
        f"{CONV}.{role}" for role in ("lora_up.weight", "lora_down.weight", "alpha")
    }
    before, after = deltas(source)[CONV], deltas(output)[CONV]
    assert np.linalg.norm(before - after) == pytest.approx(oracle.best_rank(before, 4), rel=1e-5)


def test_f6_a_resized_dora_says_so(tmp_path: Path) -> None:
    source = adapter(tmp_path / "a.safetensors")
    tensors = load_file(source)
    tensors |= {
        f"{name}.dora_scale": torch.rand(shape[0], *(1,) * (len(shape) - 1))
        for name, shape in SHAPES.items()
    }
    save_file(tensors, source)
    output, report = resized(source, rank=2)
    assert {item["algorithm"] for item in report.details} == {"lora+dora"}
    assert all(
        torch.equal(load_file(output)[key], t)
        for key, t in tensors.items()
        if key.endswith("dora_scale")
    )
    assert any("DoRA" in note and "--base" in note for note in report.notes)
    assert all(item["relative_error"] is None for item in report.details)


def test_f10_no_input_contributes_nothing_in_silence(tmp_path: Path) -> None:
    """LoRA + LoKr, and LoRA + a PEFT-keyed file: both are in the sum; a LoKr alone is no empty LoRA."""
    lora, lokr = (
        adapter(tmp_path / "a.safetensors", seed=1),
        adapter(tmp_path / "b.safetensors", "lokr", seed=2),
    )
    peft = tmp_path / "c.safetensors"
    convert.run(
        convert.plan(
            adapter(tmp_path / "c0.safetensors", seed=3),
            convert.Options(to="diffusers", output=peft),
        )
    )
    output, report = combined(tmp_path, (lora, 1.0), (lokr, 1.0), (peft, 1.0))
    total = {
        name: d + deltas(lokr)[name] + deltas(tmp_path / "c0.safetensors")[name]
        for name, d in deltas(lora).items()
    }
    assert relative(deltas(output), total) < 1e-6
    assert report.modules == len(SHAPES)
    alone, report = combined(tmp_path, (lokr, 1.0), rank=8, algo="lora")
    assert report.modules == len(SHAPES)
    assert 0 < report.relative_error < 1
    assert report.relative_error == pytest.approx(relative(deltas(alone), deltas(lokr)), rel=1e-6)


def test_f12_scale_is_applied_once_before_an_svd(tmp_path: Path) -> None:
    """alpha = 2 r came out at twice the strength."""
    source = adapter(tmp_path / "a.safetensors")
    tensors = load_file(source)
    tensors |= {f"{name}.alpha": torch.tensor(12.0) for name in SHAPES}
    save_file(tensors, source)
    output, _ = combined(tmp_path, (source, 1.0), rank=6)
    assert relative(deltas(output), deltas(source)) < 1e-6
    output, _ = combined(tmp_path, (source, 1.0), method="dare", density=1.0, rank=6)
    assert relative(deltas(output), deltas(source)) < 1e-5


@pytest.mark.parametrize(
    ("weights", "alpha"), [((0.5,), True), ((-1.0,), True), ((-1.0,), False), ((1.0, 1.0), True)]
)
def test_f16_weights_are_linear_with_and_without_alpha(
    weights: tuple[float, ...], alpha: bool, tmp_path: Path
) -> None:
    paths = [adapter(tmp_path / f"{n}.safetensors", seed=n) for n in range(len(weights))]
    if not alpha:
        for path in paths:
            save_file(
                {key: t for key, t in load_file(path).items() if not key.endswith("alpha")}, path
            )
    output, _ = combined(tmp_path, *zip(paths, weights, strict=True))
    total: dict[str, np.ndarray] = {}
    for path, weight in zip(paths, weights, strict=True):
        for name, delta in deltas(path).items():
            total[name] = total.get(name, 0.0) + weight * delta
    assert relative(deltas(output), total) < 1e-6


def test_c1_a_rank_above_the_smaller_side(tmp_path: Path) -> None:
    name = "lora_unet_conv_in"
    tensors = {
        "lora_up.weight": torch.randn(32, 64, 1, 1),
        "lora_down.weight": torch.randn(64, 4, 1, 1),
    }
    source = tmp_path / "a.safetensors"
    save_file({f"{name}.{role}": tensor for role, tensor in tensors.items()}, source)
    for rank in (64, 16):
        output, report = resized(source, family="sd1", rank=rank)
        assert report.details[0]["rank"] == 4
        shapes = {name: (32, 4, 1, 1)}
        assert relative(deltas(output, shapes), deltas(source, shapes)) < 1e-6


@pytest.mark.parametrize("kernel", [(1, 3), (3,), (2, 3, 3)])
def test_c2_any_kernel(kernel: tuple[int, ...], tmp_path: Path) -> None:
    ones = (1,) * len(kernel)
    tensors = {
        "lora_up.weight": torch.randn(16, 6, *ones),
        "lora_down.weight": torch.randn(6, 12, *kernel),
    }
    source = tmp_path / "a.safetensors"
    save_file({f"{CONV}.{role}": tensor for role, tensor in tensors.items()}, source)
    output, _ = resized(source, family="sd1", rank=3)
    shapes = {CONV: (16, 12, *kernel)}
    before, after = deltas(source, shapes)[CONV], deltas(output, shapes)[CONV]
    assert load_file(output)[f"{CONV}.lora_down.weight"].shape == (3, 12, *kernel)
    assert np.linalg.norm(before - after) == pytest.approx(oracle.best_rank(before, 3), rel=1e-5)


def test_c5_alpha_of_one_dimension(tmp_path: Path, tiny: Path) -> None:
    source = adapter(tmp_path / "a.safetensors")
    tensors = load_file(source)
    save_file(
        {k: t.reshape(1) if k.endswith("alpha") else t for k, t in tensors.items()},
        tmp_path / "b.safetensors",
    )
    expected = load_file(resized(source, rank=3)[0])
    found = load_file(resized(tmp_path / "b.safetensors", rank=3)[0])
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
    fixture = load_file(tiny / "lora-kohya.safetensors")
    flat = {k: t.reshape(1) if k.endswith("alpha") else t for k, t in fixture.items()}
    save_file(flat, tmp_path / "c.safetensors")
    outputs = []
    for name, path in (
        ("one", tiny / "lora-kohya.safetensors"),
        ("two", tmp_path / "c.safetensors"),
    ):
        target = tmp_path / f"{name}.safetensors"
        merge.run(
            merge.plan(tiny / "base.safetensors", [(path, 1.0)], merge.Options(output=target))
        )
        outputs.append(load_file(target))
    assert all(torch.equal(tensor, outputs[1][key]) for key, tensor in outputs[0].items())


def test_nothing_that_has_no_rank_is_called_resized(tmp_path: Path) -> None:
    save_file({f"{WIDE}.diff_b": torch.randn(48)}, tmp_path / "a.safetensors")
    with pytest.raises(NothingToDo):
        resized(tmp_path / "a.safetensors", rank=2, family="sd1", format="kohya")
