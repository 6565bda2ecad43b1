"""The laws every algorithm obeys (A1 to A11).

A subclass gives `kind`, `layouts()` and `oracle()`, and states what its kind supports: no law is
skipped because the kind refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch

from adaptkit.algorithms.contract import ALPHA, FitSpec, Stated, Weights
from adaptkit.errors import NotRepresentable
from adaptkit.keymap import algorithms
from tests import oracle

Array = np.ndarray


@dataclass(frozen=True)
class Layout:
    """One stored form: its tensors by role, alpha, and the kernel of the target."""

    name: str
    tensors: Mapping[str, Array]
    alpha: float | None = None
    kernel: tuple[int, ...] = ()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {role: tuple(array.shape) for role, array in self.tensors.items()}

    def stated(self) -> Stated | None:
        return None if self.alpha is None else Stated(self.alpha)

    def torch(self, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
        return {role: torch.from_numpy(array).to(dtype) for role, array in self.tensors.items()}


def random(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def one_sign(delta: torch.Tensor) -> torch.Tensor:
    """The smallest entry with the other sign."""
    wrong = delta.clone()
    wrong.view(-1)[wrong.abs().argmin()] *= -1
    return wrong


# what stands near enough to the truth for a careless tolerance
FAULTS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "computed in float32": lambda delta: delta.float().double(),
    "scaled a little": lambda delta: delta * (1 + 1e-9),
    "one sign": one_sign,
    "rows one further": lambda delta: delta.roll(1, -2),
}


class AlgorithmLaws:
    """Inherited by the test of each algorithm."""

    kind: ClassVar[type[Weights]]
    has_factors: ClassVar[bool]  # whether `factors` is exact, or refused
    has_alpha: ClassVar[bool]  # whether it stores an alpha

    @staticmethod
    def layouts() -> Iterator[Layout]:
        raise NotImplementedError

    @staticmethod
    def oracle(layout: Layout) -> Array:
        """ΔW in its target's shape, float64."""
        raise NotImplementedError

    @staticmethod
    def block(layout: Layout) -> int:
        """How many output rows no cut may part."""
        return 1

    @pytest.fixture
    def each(self) -> list[Layout]:
        found = list(self.layouts())
        assert found
        return found

    def decoded(self, layout: Layout, dtype: torch.dtype = torch.float64) -> Weights:
        return self.kind.decode(
            layout.torch(dtype), self.kind.facts(layout.shapes(), layout.stated())
        )

    def test_a1_delta_equals_the_oracle(self, each: list[Layout]) -> None:
        for layout in each:
            self.compare_float64(layout, self.decoded(layout).delta())

    def test_a1_half_precision_storage_is_computed_in_float32(self, each: list[Layout]) -> None:
        for layout in each:
            self.compare_float32(layout, self.decoded(layout, torch.float16).delta())

    def test_a1_notices_planted_faults(self, each: list[Layout]) -> None:
        """The two comparisons above refuse what a wrong implementation would give, however near."""
        planted: set[str] = set()
        for layout in each:
            right, narrow = self.decoded(layout), self.decoded(layout, torch.float16)
            faults = {name: fault(right.delta()) for name, fault in FAULTS.items()}
            if right.delta().shape[-1] > 1:
                faults["rows for columns"] = right.delta().mT.reshape(right.delta().shape)
            if int(np.prod(layout.kernel)) > 1:
                taps = right.delta().unflatten(-1, (-1, int(np.prod(layout.kernel))))
                faults["kernel before inputs"] = taps.transpose(-1, -2).flatten(-2)
            facts = self.kind.facts(layout.shapes(), layout.stated())
            if layout.alpha is not None and facts.rank:
                undivided = replace(facts, scale=layout.alpha)
                faults["alpha, not alpha / rank"] = self.kind.decode(
                    layout.torch(), undivided
                ).delta()
            for name, wrong in faults.items():
                planted.add(name)
                assert wrong.shape == right.delta().shape
                with pytest.raises(AssertionError):
                    self.compare_float64(layout, wrong)
            with pytest.raises(AssertionError):
                self.compare_float32(layout, narrow.delta().bfloat16().float())
            with pytest.raises(AssertionError):
                self.compare_float32(layout, narrow.delta().double())
        assert planted >= FAULTS.keys() | {"rows for columns", "kernel before inputs"}
        assert ("alpha, not alpha / rank" in planted) == self.has_alpha

    def compare_float64(self, layout: Layout, found: torch.Tensor) -> None:
        assert found.dtype == torch.float64
        np.testing.assert_allclose(
            found.numpy(), self.matrix(layout), rtol=1e-12, atol=1e-12, err_msg=layout.name
        )

    def compare_float32(self, layout: Layout, found: torch.Tensor) -> None:
        """Against the oracle of the tensors as float16 stores them."""
        assert found.dtype == torch.float32, layout.name
        stored = {
            role: tensor.astype(np.float16).astype(np.float64)
            for role, tensor in layout.tensors.items()
        }
        expected = self.matrix(replace(layout, tensors=stored))
        np.testing.assert_allclose(
            found.numpy(), expected, rtol=2e-5, atol=2e-5, err_msg=layout.name
        )

    def test_a2_decode_encode_is_the_identity(self, each: list[Layout]) -> None:
        for layout in each:
            weights = self.decoded(layout)
            stored = weights.encode()
            assert {
                role: tuple(t.shape) for role, t in stored.items() if role != ALPHA
            } == layout.shapes(), layout.name
            for role, tensor in layout.torch().items():
                assert torch.equal(stored[role], tensor), (layout.name, role)
            assert (ALPHA in stored) == self.has_alpha, layout.name
            if self.has_alpha:
                assert stored[ALPHA].dtype == torch.float32
                assert stored[ALPHA].shape == ()
            alpha = Stated(float(stored.pop(ALPHA))) if self.has_alpha else None
            again = self.kind.decode(stored, self.kind.facts(layout.shapes(), alpha))
            np.testing.assert_allclose(
                again.delta().numpy(), self.matrix(layout), rtol=1e-6, err_msg=layout.name
            )

    def test_a3_factors_multiply_to_delta(self, each: list[Layout]) -> None:
        for layout in each:
            weights, dense = self.decoded(layout), self.matrix(layout)
            if not self.has_factors:
                with pytest.raises(NotRepresentable, match="no exact low-rank factors"):
                    weights.factors()
                continue
            left, right = weights.factors()
            np.testing.assert_allclose(
                (left @ right).numpy(), dense, rtol=1e-11, atol=1e-11, err_msg=layout.name
            )
            facts = self.kind.facts(layout.shapes(), layout.stated())
            rank = self.kind.product_rank(layout.shapes(), facts)
            assert np.linalg.matrix_rank(dense) <= rank <= left.shape[-1], layout.name

    def test_a4_part_is_a_cut_of_delta_or_refused(self, each: list[Layout]) -> None:
        for layout in each:
            weights, dense = self.decoded(layout), self.matrix(layout)
            rows, block = len(dense), self.block(layout)
            assert weights.rows == rows
            cuts = {(0, rows // 2), (rows // 2, rows), (1, rows - 1), (block, rows - block)}
            for start, stop in cuts:
                if self.kind.by_rows:
                    np.testing.assert_allclose(
                        weights.computed().some_rows(start, stop).numpy(), dense[start:stop],
                        rtol=1e-12, atol=1e-12,
                    )  # fmt: skip
                if start % block or stop % block:
                    with pytest.raises(NotRepresentable):
                        weights.part(start, stop)
                    continue
                part = weights.part(start, stop)
                assert part.rows == stop - start
                np.testing.assert_allclose(
                    part.delta().numpy(), dense[start:stop], rtol=1e-12, atol=1e-12
                )

    def test_a5_a_batch_equals_its_members(self, each: list[Layout]) -> None:
        for layout in each:
            facts = self.kind.facts(layout.shapes(), layout.stated())
            first, second = layout.torch(), {role: 2 * t + 1 for role, t in layout.torch().items()}
            batch = self.kind.decode(
                {role: torch.stack([first[role], second[role]]) for role in first}, facts
            )
            singles = torch.stack([self.kind.decode(one, facts).delta() for one in (first, second)])
            torch.testing.assert_close(batch.delta(), singles)
            torch.testing.assert_close(batch.member(1).delta(), singles[1])
            base = random(singles.shape)
            torch.testing.assert_close(batch.apply(base.clone(), -0.5), base - 0.5 * singles)

    def test_a6_strength_and_scale_are_linear(self, each: list[Layout]) -> None:
        for layout in each:
            weights, dense = self.decoded(layout), torch.from_numpy(self.matrix(layout))
            base = random(dense.shape)
            applied = weights.apply(base.clone(), 0.25) - base
            torch.testing.assert_close(applied, 0.25 * dense)
            assert torch.equal(weights.apply(base.clone(), 0.0), base)
            if layout.alpha is not None:
                more = replace(layout, alpha=2 * layout.alpha)
                torch.testing.assert_close(
                    self.decoded(more).delta(), torch.from_numpy(self.matrix(more))
                )

    def test_a7_facts_tell_the_size(self, each: list[Layout]) -> None:
        for layout in each:
            facts = self.kind.facts(layout.shapes(), layout.stated())
            expected = self.oracle(layout)
            assert (facts.rows, facts.columns) == (
                expected.shape[0],
                int(np.prod(expected.shape[1:])),
            ), layout.name
            assert facts.kernel is None or facts.kernel == layout.kernel

    def test_a8_spectrum_and_svd_are_those_of_delta(self, each: list[Layout]) -> None:
        for layout in each:
            weights, dense = self.decoded(layout), self.matrix(layout)
            sigma = np.linalg.svd(dense, compute_uv=False)
            found = weights.spectrum().numpy()
            assert found.dtype == np.float64
            assert (np.diff(found) <= 0).all(), layout.name
            count = min(len(found), len(sigma))
            np.testing.assert_allclose(
                found[:count], sigma[:count], atol=1e-6 * sigma[0], err_msg=layout.name
            )
            assert (found[count:] <= 1e-6 * sigma[0]).all()
            assert (sigma[count:] <= 1e-6 * sigma[0]).all(), "the spectrum leaves out energy"
            for rank in {1, max(1, count // 2), count}:
                svd = weights.svd(rank)
                left = np.linalg.norm(dense - ((svd.u * svd.s) @ svd.vh).double().numpy())
                assert left == pytest.approx(
                    oracle.best_rank(dense, rank), rel=1e-5, abs=1e-6 * sigma[0]
                ), layout.name
                assert float(svd.residual) ** 0.5 == pytest.approx(
                    left, rel=1e-4, abs=2e-4 * sigma[0]
                ), layout.name

    def test_a9_a_lora_of_it_is_the_optimum_at_every_rank(self, each: list[Layout]) -> None:
        """Resized error = the dense SVD's, and what the energies say; shapes are as foretold."""
        matrices = [layout for layout in each if self.matrix(layout).shape[1] > 1]
        assert matrices
        for layout in matrices:
            weights, dense = self.decoded(layout), self.matrix(layout)
            size = np.linalg.norm(dense)
            taken = algorithms()["lora"].decompose(weights, FitSpec(None, layout.kernel))
            assert taken.norm == pytest.approx(size**2, rel=1e-6), layout.name
            for rank in {1, (len(taken.energies) + 1) // 2, len(taken.energies)}:
                least = oracle.best_rank(dense, rank)
                for given in (taken, taken.lighter()):
                    kept = given.keep(weights, rank)
                    stored = kept.encode()
                    shapes = {role: tuple(t.shape) for role, t in stored.items() if role != ALPHA}
                    assert shapes == taken.shapes(rank), layout.name
                    assert sum(int(np.prod(s)) for s in shapes.values()) == taken.elements()[rank]
                    error = np.linalg.norm(dense - kept.delta().double().numpy())
                    assert error == pytest.approx(least, rel=1e-5, abs=1e-6 * size), (
                        layout.name,
                        rank,
                    )
                    assert weights.distance_squared(kept) ** 0.5 == pytest.approx(
                        error, rel=1e-6, abs=1e-7 * size
                    )
                told = max(0.0, taken.norm - sum(taken.energies[:rank])) ** 0.5
                assert told == pytest.approx(least, rel=1e-5, abs=1e-6 * size), (layout.name, rank)

    def test_a10_a_number_of_times(self, each: list[Layout]) -> None:
        for layout in each:
            weights = self.decoded(layout)
            for factor in (0.5, -1.0, -0.3, 3.0):
                torch.testing.assert_close(weights.times(factor).delta(), factor * weights.delta())
                stored = weights.times(factor).encode()
                positive = (layout.alpha or 1.0) > 0
                assert not positive or float(stored.get(ALPHA, 1.0)) >= 0, (
                    "a negative alpha is no scale to some readers"
                )

    def test_a11_inner_products_and_distances(self, each: list[Layout]) -> None:
        draw = np.random.default_rng(5)
        for layout in each:
            weights, dense = self.decoded(layout), self.matrix(layout)
            size = np.linalg.norm(dense)
            others = [
                weights.times(0.5),
                algorithms()["full"](torch.from_numpy(draw.standard_normal(dense.shape))),
            ]
            rank = max(1, min(dense.shape) // 3)
            others.append(
                algorithms()["lora"](
                    torch.from_numpy(draw.standard_normal((dense.shape[0], rank))),
                    torch.from_numpy(draw.standard_normal((rank, dense.shape[1]))),
                    0.7,
                )
            )
            assert weights.distance_squared(weights) == 0.0
            for other in others:
                theirs = other.delta().double().numpy()
                for one, two in ((weights, other), (other, weights)):
                    scale = size * np.linalg.norm(theirs)
                    assert one.inner_product(two) == pytest.approx(
                        (dense * theirs).sum(), rel=1e-9, abs=1e-9 * scale
                    )
                    expected = ((dense - theirs) ** 2).sum()
                    assert one.distance_squared(two) == pytest.approx(
                        expected, rel=1e-9, abs=1e-12 * scale
                    )

    def matrix(self, layout: Layout) -> Array:
        found = self.oracle(layout)
        return found.reshape(found.shape[0], -1)
