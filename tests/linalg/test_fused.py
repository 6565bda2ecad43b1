"""The Triton kernels against float64, interpreted on the CPU; and who decides that they are used.

`pip install triton`, then `TRITON_INTERPRET=1 python -m pytest tests/linalg/test_fused.py`: a process interprets either all
kernels or none.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch

from adaptkit.algorithms._factor import Dense
from adaptkit.algorithms.lokr import Lokr
from adaptkit.algorithms.lora import Lora
from adaptkit.linalg import fused as module
from adaptkit.linalg.fused import Contest, fits, fused
from adaptkit.ops.merge.at_once import merged
from adaptkit.ops.merge.cutting import Part

interpreted = pytest.mark.skipif(
    find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs Triton, and TRITON_INTERPRET=1",
)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
EPS = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check(
    w: torch.Tensor,
    deltas: list[np.ndarray],
    strength: float,
    dtype: torch.dtype,
    found: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """The numbers within half a unit of the last place, and the three norms of each layer."""
    out, norms = found
    assert out.dtype == dtype
    for n, delta in enumerate(deltas):
        before, after = w[n].double().numpy(), out[n].double().numpy()
        exact = before + strength * delta
        near = EPS[dtype] * 1.01 * np.abs(exact) + 3e-6 * np.abs(delta).max()
        assert (np.abs(after - exact) <= near + 6e-8).all()
        weight, rounding, change = norms[n if norms.ndim == 1 else slice(None), n].tolist()
        assert weight == pytest.approx(np.linalg.norm(before), rel=1e-5)
        assert change == pytest.approx(abs(strength) * np.linalg.norm(delta), rel=1e-5)
        if dtype != torch.float32:
            assert rounding == pytest.approx(np.linalg.norm(after - exact), rel=2e-3)
        elif w.dtype == torch.float32:
            assert rounding == 0.0


@interpreted
@pytest.mark.parametrize(("source", "target"), [(d, d) for d in DTYPES] + [(torch.float32, torch.float16), (torch.float16, torch.bfloat16)])  # fmt: skip
@pytest.mark.parametrize(
    "sides", [(4, 4, 16, 20), (3, 5, 33, 7), (1, 2, 130, 70), (8, 8, 8, 8)], ids=str
)
def test_kron(sides: tuple[int, int, int, int], source: torch.dtype, target: torch.dtype) -> None:
    a, b, c, d = sides
    w, one, two = (
        numbers(0, 2, a * c, b * d).to(source),
        numbers(1, 2, a, b) * 0.3,
        numbers(2, 2, c, d),
    )
    assert fits(w, target, (one, two))
    deltas = [
        np.kron(x, y) for x, y in zip(one.double().numpy(), two.double().numpy(), strict=True)
    ]
    check(w, deltas, -0.7, target, fused(w, (one, two), -0.7, target, kron=True))


@interpreted
@pytest.mark.parametrize(("source", "target"), [(d, d) for d in DTYPES] + [(torch.float32, torch.float16), (torch.float16, torch.bfloat16)])  # fmt: skip
@pytest.mark.parametrize("sides", [(64, 80, 8), (99, 35, 1), (130, 140, 33), (5, 70, 16)], ids=str)
def test_product(sides: tuple[int, int, int], source: torch.dtype, target: torch.dtype) -> None:
    m, n, r = sides
    w, left, right = numbers(0, 3, m, n).to(source), numbers(1, 3, m, r) * 0.2, numbers(2, 3, r, n)
    deltas = [x @ y for x, y in zip(left.double().numpy(), right.double().numpy(), strict=True)]
    check(w, deltas, 0.6, target, fused(w, (left, right), 0.6, target, kron=False))


class Always(Contest):
    """The fused way, whatever it takes."""

    def result(self, kind: object, device: str, plain: object, other: Any) -> Any:
        return other()


@interpreted
@pytest.mark.parametrize("kind", ["lora", "lokr"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_merge_is_the_same_either_way(kind: str, dtype: torch.dtype) -> None:
    w, one, two = numbers(0, 2, 24, 40).to(dtype), numbers(1, 2, 24, 4), numbers(2, 2, 4, 40)
    if kind == "lokr":
        one, two = numbers(1, 2, 4, 4), numbers(2, 2, 6, 10)
    weights = Lora(one, two, 0.5) if kind == "lora" else Lokr(Dense(one), Dense(two), 0.5)
    parts = [(Part(weights, 0, 24, None), -0.8)]
    known = [0.64 * float(delta.double().square().sum()) for delta in weights.delta()]
    plain = merged(w, parts, dtype, known=kind == "lokr")
    other = merged(w, parts, dtype, known=kind == "lokr", contest=Always())
    steps = (plain.out != other.out).float().mean()
    assert float(steps) < 2e-3 or dtype == torch.float32
    torch.testing.assert_close(plain.out, other.out, rtol=2 * EPS[dtype], atol=1e-6)
    for ours, theirs in zip(plain.squares(known), other.squares(known), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3, abs=1e-10)


@pytest.mark.skipif(
    find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs Triton, not interpreted",
)
def test_the_kernels_compile_for_a_gpu_that_is_not_there() -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from adaptkit.linalg.fused import triton_kernels as kernels

    whole = {"m": "i32", "n": "i32", "tiles": "i32", "strength": "fp32", "tile": "constexpr"}
    ours = {"w_ptr": "*bf16", "out_ptr": "*bf16", "sums_ptr": "*fp32", **whole}
    kron = {"one_ptr": "*fp32", "two_ptr": "*fp32", "b": "i32", "c": "i32", "d": "i32"}
    product = {"left_ptr": "*fp32", "right_ptr": "*fp32", "r": "i32", "step": "constexpr"}
    for kernel, own, fixed in (
        (kernels.kron_kernel, kron, {"tile": kernels.TILE}),
        (kernels.product_kernel, product, {"tile": kernels.TILE, "step": module.STEP}),
    ):
        names = {name: {**ours, **own}[name] for name in kernel.arg_names}
        made = compile(ASTSource(kernel, names, fixed), target=GPUTarget("cuda", 90, 32))
        assert made.asm["cubin"]


def test_what_does_not_fit() -> None:
    w, pair = numbers(0, 1, 8, 8), (numbers(1, 1, 8, 2), numbers(2, 1, 2, 8))
    assert fits(w, torch.float16, pair) == (find_spec("triton") is not None)
    assert not fits(w.double(), torch.float16, pair)
    assert not fits(w, torch.float64, pair)
    assert not fits(w.mT, torch.float16, pair)
    assert not fits(w, torch.float16, (pair[0].half(), pair[1]))
    assert not fits(w[:0], torch.float16, pair)


@pytest.mark.parametrize(
    ("ours", "theirs", "wins"), [(1.0, 1.3, True), (1.0, 1.1, False), (2.0, 1.0, False)]
)
def test_the_faster_way_is_used_and_measured_once(
    ours: float, theirs: float, wins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, calls = [0.0], []

    def way(name: str, took: float) -> str:
        clock[0] += took
        calls.append(name)
        return name

    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    contest = Contest()
    for _ in range(4):
        found = contest.result(
            "kind", "cpu", lambda: way("plain", theirs), lambda: way("other", ours)
        )
        assert found == ("other" if wins else "plain")
    assert len(calls) == 2 * module.TURNS + 4


def test_a_way_that_fails_is_not_taken_and_no_memory_is_told() -> None:
    def broken() -> str:
        raise RuntimeError("no compiler")

    def full() -> str:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert Contest().result("kind", "cpu", lambda: "plain", broken) == "plain"
    with pytest.raises(torch.OutOfMemoryError):
        Contest().result("kind", "cpu", lambda: "plain", full)
