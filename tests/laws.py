"""The laws every algorithm obeys (architecture §5, A1 to A7): a subclass gives `kind`, `layouts()` and `oracle()`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

from adaptkit.algorithms._weights import ALPHA, Stated, Weights
from adaptkit.errors import NotRepresentable

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


class AlgorithmLaws:
    """Inherited by the test of each algorithm."""

    kind: ClassVar[type[Weights]]

    @staticmethod
    def layouts() -> Iterator[Layout]:
        raise NotImplementedError

    @staticmethod
    def oracle(layout: Layout) -> Array:
        """ΔW in its target's shape, float64."""
        raise NotImplementedError

    def pytest_generate_layouts(self) -> list[Layout]:
        return list(self.layouts())

    @pytest.fixture
    def each(self) -> list[Layout]:
        found = list(self.layouts())
        assert found
        return found

    def decoded(self, layout: Layout, dtype: torch.dtype = torch.float64) -> Weights:
        return self.kind.decode(layout.torch(dtype), self.kind.facts(layout.shapes(), layout.stated()))

    def test_a1_delta_equals_the_oracle(self, each: list[Layout]) -> None:
        for layout in each:
            expected = self.oracle(layout)
            expected = expected.reshape(expected.shape[0], -1)
            found = self.decoded(layout).delta()
            assert found.dtype == torch.float64
            np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-12, err_msg=layout.name)
            # T1: a planted wrong answer is told from the right one
            assert np.abs(found.numpy() - 1.001 * expected).max() > 1e-9

    def test_a1_half_precision_storage_is_computed_in_float32(self, each: list[Layout]) -> None:
        for layout in each:
            delta = self.decoded(layout, torch.float16).delta()
            assert delta.dtype == torch.float32, layout.name
            expected = self.oracle(
                Layout(
                    layout.name,
                    {r: t.astype(np.float16).astype(np.float64) for r, t in layout.tensors.items()},
                    layout.alpha,
                    layout.kernel,
                )
            )
            np.testing.assert_allclose(
                delta.numpy(), expected.reshape(delta.shape), rtol=2e-5, atol=2e-5, err_msg=layout.name
            )

    def test_a2_decode_encode_is_the_identity(self, each: list[Layout]) -> None:
        for layout in each:
            weights = self.decoded(layout)
            stored = weights.encode()
            assert {role: tuple(t.shape) for role, t in stored.items() if role != ALPHA} == layout.shapes(), layout.name
            for role, tensor in layout.torch().items():
                assert torch.equal(stored[role], tensor), (layout.name, role)
            if ALPHA in stored:
                assert stored[ALPHA].dtype == torch.float32
                assert stored[ALPHA].shape == ()
            alpha = Stated(float(stored[ALPHA])) if ALPHA in stored else None
            again = self.kind.facts(layout.shapes(), alpha)
            assert again.scale == pytest.approx(weights.scale if hasattr(weights, "scale") else 1.0, rel=1e-6)

    def test_a3_factors_multiply_to_delta(self, each: list[Layout]) -> None:
        for layout in each:
            weights = self.decoded(layout)
            try:
                left, right = weights.factors()
            except NotRepresentable:
                continue
            torch.testing.assert_close(left @ right, weights.delta())

    def test_a4_part_is_a_cut_of_delta_or_refused(self, each: list[Layout]) -> None:
        for layout in each:
            weights = self.decoded(layout)
            rows = weights.delta().shape[0]
            cuts = [(0, rows // 2), (rows // 2, rows), (1, rows - 1)]
            kept = 0
            for start, stop in cuts:
                try:
                    part = weights.part(start, stop)
                except NotRepresentable:
                    continue
                kept += 1
                torch.testing.assert_close(part.delta(), weights.delta()[start:stop])
            assert kept, layout.name

    def test_a5_a_batch_equals_its_members(self, each: list[Layout]) -> None:
        for layout in each:
            facts = self.kind.facts(layout.shapes(), layout.stated())
            first, second = layout.torch(), {role: 2 * t + 1 for role, t in layout.torch().items()}
            batch = self.kind.decode({role: torch.stack([first[role], second[role]]) for role in first}, facts)
            singles = torch.stack([self.kind.decode(one, facts).delta() for one in (first, second)])
            torch.testing.assert_close(batch.delta(), singles)
            torch.testing.assert_close(batch.member(1).delta(), singles[1])
            base = torch.randn(singles.shape, dtype=torch.float64)
            torch.testing.assert_close(batch.apply(base.clone(), -0.5), base - 0.5 * singles)

    def test_a6_strength_and_scale_are_linear(self, each: list[Layout]) -> None:
        for layout in each:
            weights = self.decoded(layout)
            base = torch.randn(weights.delta().shape, dtype=torch.float64)
            applied = weights.apply(base.clone(), 0.25) - base
            torch.testing.assert_close(applied, 0.25 * weights.delta())
            assert torch.equal(weights.apply(base.clone(), 0.0), base)
            if layout.alpha is not None and self.kind.facts(layout.shapes(), layout.stated()).rank:
                doubled = self.kind.decode(layout.torch(), self.kind.facts(layout.shapes(), Stated(2 * layout.alpha)))
                torch.testing.assert_close(doubled.delta(), 2 * weights.delta())

    def test_a7_facts_tell_the_size(self, each: list[Layout]) -> None:
        for layout in each:
            facts = self.kind.facts(layout.shapes(), layout.stated())
            expected = self.oracle(layout)
            assert (facts.rows, facts.columns) == (expected.shape[0], int(np.prod(expected.shape[1:]))), layout.name
            assert facts.kernel is None or facts.kernel == layout.kernel
