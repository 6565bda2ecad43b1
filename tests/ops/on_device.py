"""Every command on a device gives what it gives on the CPU: the same modules and ranks, errors and ΔW within rounding.

Without a GPU the device is an emulated one (tests/emulated.py), which sees to where tensors are, not to how a GPU rounds.
PyTorch has that device for good once it is there, and other packages then use it: so `test_device.py` runs these tests in a
process of their own, as `python -m pytest tests/ops/on_device.py` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit.errors import NonFinite
from adaptkit.ops import advise, combine, compare, convert, extract, merge, resize
from tests import emulated
from tests.made import KINDS, adapter, deltas, relative
from tests.ops.models import Delta, changed, lokr_delta, lora_delta, save

CLOSE = 1e-3  # of an error: fixed and adaptive Krylov spaces lie within this of the optimum


SHAPES: tuple[tuple[int, ...], ...] = (  # three wide enough for Lanczos, two by two of one shape
    *[(240, 240)] * 2, *[(48, 32)] * 2, (16, 288), (24, 16, 3, 3), (40, 24, 1, 1), (320, 240),
)  # fmt: skip


def falling_delta() -> Delta:
    """Full rank, σᵢ ~ 1/i: that a direction is missed, shows."""

    def make(shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
        wide = random.standard_normal((shape[0], int(np.prod(shape[1:]))))
        u, s, vh = np.linalg.svd(wide, full_matrices=False)
        return (0.05 * (u / np.arange(1, s.size + 1)) @ vh).reshape(shape)

    return make


@pytest.fixture
def device() -> Iterator[str]:
    """A GPU, or where there is none a device that is not there but behaves as one."""
    if torch.cuda.is_available():
        yield "cuda:0"
    else:
        with emulated.emulated() as name:
            yield name


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Base and tuned checkpoints of a model that no family knows, by what was done to them."""
    draw = torch.Generator().manual_seed(0)
    base = {
        f"blocks.{n}.layer.weight": torch.randn(shape, generator=draw) / 16
        for n, shape in enumerate(SHAPES)
    }
    base = {key: tensor.half() for key, tensor in base.items()}
    found = {}
    for name, delta in (
        ("lora", lora_delta(4)),
        ("lokr", lokr_delta(4)),
        ("falling", falling_delta()),
    ):
        folder = tmp_path_factory.mktemp(name)
        tuned, _ = changed(base, base, delta)
        found[name] = (
            save(folder / "base.safetensors", base),
            save(folder / "tuned.safetensors", tuned),
        )
    return found


def run(op: Any, inputs: tuple[Any, ...], options: dict[str, Any], **more: Any) -> Any:
    plan = op.plan(*inputs, op.Options(**options, **more))
    try:
        return op.run(plan)
    finally:
        plan.close()


def both(
    op: Any, inputs: tuple[Any, ...], options: dict[str, Any], device: str, folder: Path
) -> tuple[Any, Any]:
    """The reports of the CPU and of the device; the same modules and ranks, and errors that differ by rounding."""
    here = run(op, inputs, options, output=folder / "cpu.safetensors", device="cpu")
    there = run(op, inputs, options, output=folder / "device.safetensors", device=device)
    assert there.relative_error == pytest.approx(here.relative_error, rel=CLOSE, abs=2e-6)
    for one, two in zip(here.details, there.details, strict=True):
        assert (one["module"], one["algorithm"]) == (two["module"], two["algorithm"])
        if one["relative_error"] is not None:
            assert two["relative_error"] == pytest.approx(
                one["relative_error"], rel=10 * CLOSE, abs=1e-4
            )
    return here, there


@pytest.mark.parametrize(
    ("pair", "options"),
    [
        ("falling", {"rank": 4}),
        ("falling", {"rank": 4, "svd": "exact"}),
        ("falling", {"rank": 3, "dtype": "fp32", "vectors": True}),
        ("falling", {"energy": 0.6}),
        ("falling", {"size": 120_000}),
        ("falling", {"rank": 4, "alpha": 2.0}),
        ("falling", {"rank": 4, "clamp_quantile": 0.99}),
        ("lora", {"rank": 4}),
        ("lokr", {"algo": "lokr", "factor": 4}),
        ("lokr", {"algo": "lokr"}),
        ("falling", {"algo": "lokr", "factor": 4, "rank": 2}),
        ("falling", {"algo": "lokr", "factor": 4, "rank": 2, "decompose_both": True}),
        ("falling", {"algo": "lokr", "factor": 4, "energy": 0.05}),
        ("falling", {"algo": "full"}),
        ("lora", {"algo": "auto", "size": 120_000}),
        ("falling", {"algo": "auto", "error": 0.5}),
    ],
)
def test_extract(
    pair: str,
    options: dict[str, Any],
    pairs: dict[str, tuple[Path, Path]],
    device: str,
    tmp_path: Path,
) -> None:
    here, there = both(extract, pairs[pair], options, device, tmp_path)
    assert there.made_by == here.made_by
    assert there.noise_floor == pytest.approx(here.noise_floor, rel=1e-3)
    shapes = [
        {k: tuple(t.shape) for k, t in load_file(report.output).items()} for report in (here, there)
    ]
    if (
        not {"energy", "size", "error"} & options.keys()
    ):  # there a hair's breadth decides about a rank
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", [{"rank": 2}, {"energy": 0.8}, {"error": 0.3}])
def test_resize(kind: str, rule: dict[str, float], device: str, tmp_path: Path) -> None:
    source = adapter(tmp_path / "a.safetensors", kind)
    here, there = both(resize, (source,), rule, device, tmp_path)
    assert [item["rank"] for item in here.details] == [item["rank"] for item in there.details]
    one, two = (deltas(tmp_path / f"{name}.safetensors") for name in ("cpu", "device"))
    assert relative(one, two) < 1e-5


def test_resize_of_stacks(device: str, tmp_path: Path) -> None:
    """Enough modules of one shape for a device to take them together, one of them zero, ranks of their own."""
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for n in range(12):
        name = f"lora_unet_down_blocks_{n % 3}_attentions_{n % 2}_transformer_blocks_0_attn{n // 6 + 1}_to_q"
        tensors[f"{name}.lora_up.weight"] = (
            torch.randn(40, 6, generator=draw) * torch.arange(1, 7).pow(-0.3 * n)
        ).half()
        tensors[f"{name}.lora_down.weight"] = torch.randn(6, 32, generator=draw).half() * (n != 4)
        tensors[f"{name}.alpha"] = torch.tensor(3.0)
    save_file(tensors, tmp_path / "a.safetensors")
    for rule in ({"rank": 3}, {"energy": 0.9}, {"size": 14_000}):
        here, there = both(resize, (tmp_path / "a.safetensors",), rule, device, tmp_path)
        assert [item["rank"] for item in here.details] == [item["rank"] for item in there.details]
        (tmp_path / "cpu.safetensors").unlink()
        (tmp_path / "device.safetensors").unlink()


@pytest.mark.parametrize("algo", ["lora", "lokr", "full"])
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "tucker"])
def test_change_of_algorithm(kind: str, algo: str, device: str, tmp_path: Path) -> None:
    source = adapter(tmp_path / "a.safetensors", kind)
    both(convert, (source,), {"to": "kohya", "algo": algo, "factor": 4}, device, tmp_path)
    one, two = (load_file(tmp_path / f"{name}.safetensors") for name in ("cpu", "device"))
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        np.testing.assert_allclose(
            tensor.float(), two[key].float(), rtol=2e-3, atol=2e-3 * float(tensor.abs().max())
        )


@pytest.mark.parametrize(
    "options", [{}, {"rank": 3}, {"method": "dare-ties", "density": 0.5, "seed": 1}]
)
def test_combine(options: dict[str, Any], device: str, tmp_path: Path) -> None:
    inputs = [
        (adapter(tmp_path / "a.safetensors", "lora"), 0.7),
        (adapter(tmp_path / "b.safetensors", "lokr", seed=1), -0.5),
    ]
    both(combine, (inputs,), options, device, tmp_path)
    one, two = (deltas(tmp_path / f"{name}.safetensors") for name in ("cpu", "device"))
    assert relative(one, two) < 1e-3


def test_compare_merge_and_advise(
    pairs: dict[str, tuple[Path, Path]], device: str, tmp_path: Path
) -> None:
    base, tuned = pairs["lora"]
    made = run(
        extract, (base, tuned), {"rank": 4}, output=tmp_path / "a.safetensors", device="cpu"
    ).output
    found = {}
    for where in ("cpu", device):
        against = run(compare, ((made, 1.0), (tuned, 1.0)), {"base": base}, device=where)
        merged = run(
            merge,
            (base, [(made, 1.0)]),
            {"verify": True},
            output=tmp_path / "m",
            device=where,
            overwrite=True,
        )
        advised = run(advise, (base, tuned), {}, device=where)
        found[where] = against, load_file(merged.output), advised
    (one, first, told), (two, second, said) = found.values()
    assert one.relative_error == pytest.approx(two.relative_error, rel=1e-4)
    for key, tensor in first.items():
        torch.testing.assert_close(tensor, second[key], rtol=2e-3, atol=1e-6)
    told, said = told.to_dict(), said.to_dict()
    assert told["made_by"] == said["made_by"]
    for key, kind in (("lora", "lora_rank"), ("lora", "lora_size"), ("lokr", "lokr")):
        assert len(told[key]) == len(said[key]) > 1
        for ours, theirs in zip(told[key], said[key], strict=True):
            assert theirs[kind]["bytes"] == ours[kind]["bytes"]
            assert theirs[kind]["relative_error"] == pytest.approx(
                ours[kind]["relative_error"], rel=1e-2, abs=1e-4
            )


def test_what_is_not_finite_is_named(
    pairs: dict[str, tuple[Path, Path]], device: str, tmp_path: Path
) -> None:
    base, tuned = pairs["falling"]
    state = load_file(tuned)
    key = "blocks.1.layer.weight"
    state[key][0, 0] = float("nan")
    broken = save(tmp_path / "broken.safetensors", state)
    with pytest.raises(NonFinite) as caught:
        run(extract, (base, broken), {"rank": 4}, output=tmp_path / "o.safetensors", device=device)
    assert key in str(caught.value)


def test_the_device_refuses_what_a_real_one_refuses(device: str) -> None:
    ours, other = torch.ones(3, device=device), torch.ones(3)
    assert float((ours + ours.cpu().to(device) * 2).sum()) == 9
    for mixed in (lambda: ours + other, lambda: torch.cat([ours, other]), ours.numpy):
        with pytest.raises((RuntimeError, TypeError)):
            mixed()


def test_a_device_shares_no_memory_with_its_host(device: str) -> None:
    with torch.inference_mode():
        here = torch.ones(3)
        there = here.to(device)
        here.zero_()
        back = there.cpu()
        there.add_(1)
    assert (float(there.sum()), float(back.sum())) == (6.0, 3.0)
