"""Inner products and distances of factored matrices against dense float64 ones in NumPy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import numpy as np
import pytest
import torch

from adaptkit.linalg.products import (
    Operand,
    balanced,
    compare_kron,
    compare_products,
    distance_squared,
    in_blocks,
    inner,
    kron_norm,
    kron_product_inner,
    product_distance,
    product_inner,
    product_norm,
    rearranged,
)

Factors = tuple[torch.Tensor, torch.Tensor]
ROWS, COLUMNS = 12, 20


def draw(*shapes: tuple[int, int], seed: int = 0) -> list[torch.Tensor]:
    random = np.random.default_rng(seed)
    return [torch.from_numpy(random.standard_normal(shape)) for shape in shapes]


def low(rank: int, seed: int = 0) -> Factors:
    left, right = draw((ROWS, rank), (rank, COLUMNS), seed=seed)
    return left, right


def blocks(rows: int, columns: int, seed: int = 0) -> Factors:
    one, two = draw((rows, columns), (ROWS // rows, COLUMNS // columns), seed=seed)
    return one, two


def dense(factors: Factors) -> np.ndarray:
    return factors[0].numpy() @ factors[1].numpy()


def kron(factors: Factors) -> np.ndarray:
    return np.kron(factors[0].numpy(), factors[1].numpy())


def test_inner_and_distance_of_products() -> None:
    random = np.random.default_rng(3)

    def factors(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(random.standard_normal((40, rank))), torch.from_numpy(
            random.standard_normal((rank, 30))
        )

    one, two = factors(6), factors(9)
    a, b = (one[0] @ one[1]).numpy(), (two[0] @ two[1]).numpy()
    assert float(product_inner(one, two)) == pytest.approx((a * b).sum(), rel=1e-12)
    assert float(product_distance(one, two)) == pytest.approx(((a - b) ** 2).sum(), rel=1e-12)


def test_distance_of_nearly_equal_products_is_not_lost_to_cancellation() -> None:
    random = np.random.default_rng(4)
    left, right = (torch.from_numpy(random.standard_normal(shape)) for shape in ((40, 6), (6, 30)))
    turn = torch.linalg.qr(torch.from_numpy(random.standard_normal((6, 6))))[0]
    norm = float((left @ right).square().sum())
    assert float(product_distance((left, right), (left @ turn, turn.T @ right))) < 1e-28 * norm
    moved = left + 1e-9 * torch.from_numpy(random.standard_normal((40, 6)))
    true = float(((moved - left) @ right).square().sum())
    assert float(product_distance((left, right), (moved, right))) == pytest.approx(
        true, rel=1e-5, abs=0
    )


def test_products_of_one_and_of_two() -> None:
    one, two = low(3), low(5, seed=1)
    a, b = dense(one), dense(two)
    assert product_norm(one) == pytest.approx((a**2).sum(), rel=1e-12)
    found = compare_products(one, two)
    expected = (a**2).sum(), (b**2).sum(), (a * b).sum(), ((a - b) ** 2).sum()
    assert found == pytest.approx(expected, rel=1e-12)


def test_a_distance_of_close_products_keeps_its_digits() -> None:
    one = low(3)
    for step in (1e-6, 1e-10):
        for moved in (
            (one[0] + step * draw((ROWS, 3), seed=2)[0], one[1]),
            (one[0], one[1] + step * draw((3, COLUMNS), seed=2)[0]),
        ):
            expected = ((dense(one) - dense(moved)) ** 2).sum()
            assert compare_products(one, moved).distance == pytest.approx(expected, rel=1e-4)
    assert compare_products(one, one).distance == 0.0
    turned = one[0] * 4096.0, one[1] / 4096.0
    assert compare_products(one, turned).distance < 1e-28 * product_norm(one)


def test_balanced_factors_are_the_same_product() -> None:
    left, right = low(3)
    found = balanced((left * 1e-6, right * 1e6))
    assert 0.5 < float(found[0].norm() / found[1].norm()) < 2.0
    # powers of two are exact
    np.testing.assert_array_equal(dense(found), dense((left * 1e-6, right * 1e6)))
    nothing = balanced((left * 0.0, right))
    assert not nothing[0].any()


@pytest.mark.parametrize(("rows", "columns"), [(3, 4), (4, 2), (1, 1), (12, 20)])
def test_kronecker_products(rows: int, columns: int) -> None:
    one, two = blocks(rows, columns), blocks(rows, columns, seed=1)
    a, b = kron(one), kron(two)
    assert kron_norm(one) == pytest.approx((a**2).sum(), rel=1e-12)
    left, right = rearranged(one)
    assert sorted((left @ right).flatten().tolist()) == pytest.approx(sorted(a.flatten()))
    found = compare_products(rearranged(one), rearranged(two))
    assert found.inner == pytest.approx((a * b).sum(), rel=1e-9)
    assert found.distance == pytest.approx(((a - b) ** 2).sum(), rel=1e-12)


@pytest.mark.parametrize(("rows", "columns"), [(3, 4), (4, 2), (1, 20)])
def test_a_kronecker_product_and_a_product(rows: int, columns: int) -> None:
    one, two = blocks(rows, columns), low(5, seed=1)
    a, b = kron(one), dense(two)
    assert kron_product_inner(one, two) == pytest.approx((a * b).sum(), rel=1e-9)
    found = compare_kron(one, two)
    assert found is not None
    expected = (a**2).sum(), (b**2).sum(), (a * b).sum(), ((a - b) ** 2).sum()
    assert found == pytest.approx(expected, rel=1e-9)


def test_a_kronecker_product_and_itself_as_a_product_are_too_close() -> None:
    one = blocks(3, 4)
    u, s, vh = np.linalg.svd(kron(one))
    rank = int((s > 1e-9 * s[0]).sum())
    same = torch.from_numpy(u[:, :rank] * s[:rank]), torch.from_numpy(vh[:rank])
    assert compare_kron(one, same) is None


def operands() -> dict[str, tuple[Operand, np.ndarray]]:
    def never() -> torch.Tensor:
        raise AssertionError("formed the matrix")

    def norm(matrix: np.ndarray) -> Callable[[], float]:
        return lambda: float((matrix**2).sum())

    found: dict[str, tuple[Operand, np.ndarray]] = {}
    for name, factors in {"product": low(3), "other product": low(4, seed=1)}.items():
        found[name] = Operand(None, factors, never, norm(dense(factors))), dense(factors)
    for name, factors in {"kron": blocks(3, 4), "same blocks": blocks(3, 4, seed=1)}.items():
        found[name] = Operand(factors, None, never, norm(kron(factors))), kron(factors)
    return found


@pytest.mark.parametrize(("one", "two"), list(product(operands(), repeat=2)))
def test_operands_meet_without_being_formed(one: str, two: str) -> None:
    (first, a), (second, b) = operands()[one], operands()[two]
    assert inner(first, second) == pytest.approx((a * b).sum(), rel=1e-9)
    expected = ((a - b) ** 2).sum()
    assert distance_squared(first, second) == pytest.approx(expected, rel=1e-9)
    assert distance_squared(first, second, float((a**2).sum())) == pytest.approx(expected, rel=1e-9)


def cut(matrix: np.ndarray) -> Iterator[torch.Tensor]:
    whole = torch.from_numpy(matrix)
    return in_blocks(len(whole), lambda start, stop: whole[start:stop])


def test_operands_without_a_common_form_are_formed() -> None:
    matrices = [kron(blocks(3, 4)), kron(blocks(4, 2, seed=1))]
    first, second = (
        Operand(factors, None, lambda matrix=matrix: cut(matrix), lambda: 0.0)
        for factors, matrix in zip((blocks(3, 4), blocks(4, 2, seed=1)), matrices, strict=True)
    )
    a, b = matrices
    assert len(list(first.blocks())) > 1
    assert inner(first, second) == pytest.approx((a * b).sum(), rel=1e-12)
    assert distance_squared(first, second) == pytest.approx(((a - b) ** 2).sum(), rel=1e-12)
