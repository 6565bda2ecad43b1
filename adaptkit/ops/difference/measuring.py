"""Measure the layers of a difference for `advise`: one by one, or equal ones together."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from adaptkit.errors import NonFinite
from adaptkit.ops.difference.look import Look, look, read_difference

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from adaptkit.checkpoint import Checkpoint
    from adaptkit.linalg.kron.scan import KronScan
    from adaptkit.linalg.noise import RoundingNoise
    from adaptkit.ops.difference.looking import Looker
    from adaptkit.ops.difference.pairing import Pair
    from adaptkit.steps import Step

__all__ = ["Layer", "Measurer"]


@dataclass(frozen=True)
class Layer:
    """One layer as measured. `captured` is (energy, numbers stored) by factor."""

    job: Pair
    norm: float
    energies: tuple[float, ...] = ()
    captured: Mapping[int, tuple[float, int]] = field(default_factory=dict)
    seen: Look | None = None


class Measurer:
    """Load and measure layers: energies up to `rank`, a Kronecker scan, and a look."""

    def __init__(self, base: Checkpoint, tuned: Checkpoint, rank: int) -> None:
        self.base, self.tuned, self.rank = base, tuned, rank
        self.looker: Looker | None = None

    def steps(self, jobs: Sequence[Pair], device: str) -> Sequence[Step[Pair]] | None:
        """The steps of stacks on an accelerator; None elsewhere."""
        from adaptkit.linalg.precision import works_on_stacks
        from adaptkit.ops.difference.looking import Looker

        if not works_on_stacks(device):
            return None
        self.looker = Looker(self.base, self.tuned, self.rank)
        return [self.looker.step(job) for job in jobs]

    def load(self, job: Pair) -> dict[str, Tensor]:
        """The difference as it is read, or for stacks both weights."""
        if self.looker is not None:
            return self.looker.load(job)
        return read_difference(self.base, self.tuned, job)

    def stack(self, jobs: Sequence[Pair], tensors: dict[str, Tensor]) -> list[Layer]:
        """Equal layers at once, on an accelerator."""
        assert self.looker is not None
        found = []
        for job, one in zip(jobs, self.looker.looks(jobs, tensors), strict=True):
            self._check(job, one.norm)
            if one.norm == 0.0 or job.algorithm is None:
                found.append(Layer(job, one.norm))
            else:
                captured = _by_factor(one.scan, one.captured)
                found.append(Layer(job, one.norm, one.energies, captured, one.look))
        return found

    def single(self, jobs: Sequence[Pair], tensors: dict[str, Tensor]) -> list[Layer]:
        """One layer, from its difference."""
        from adaptkit.linalg.noise import RoundingNoise

        (job,) = jobs
        noise = RoundingNoise(tensors["rows"][0], tensors["columns"][0])
        return [self._layer(job, tensors.pop("delta")[0], float(tensors["norm"]), noise)]

    def _check(self, job: Pair, norm: float) -> None:
        if not math.isfinite(norm):
            raise NonFinite(
                "holds NaN or infinity", file=self.tuned.source.path, tensor=job.tuned[0].name
            )

    def _layer(self, job: Pair, delta: Tensor, norm: float, noise: RoundingNoise) -> Layer:
        from adaptkit.linalg.kron.scan import FACTORS, scan_kron
        from adaptkit.linalg.lowrank import SvdSpec, energies

        self._check(job, norm)
        if norm == 0.0 or job.algorithm is None:
            return Layer(job, norm)
        rank = min(self.rank, *delta.shape)
        kept = tuple(energies(delta, rank, SvdSpec(rank)).tolist())
        scan = scan_kron(
            delta, math.prod(job.shape[2:]), [factor for factor in FACTORS if factor > 0]
        )
        captured = _by_factor(scan, scan.captured.tolist())
        return Layer(job, norm, kept, captured, look(job, delta, norm, noise, scan))


def _by_factor(scan: KronScan, captured: Sequence[float]) -> dict[int, tuple[float, int]]:
    """(energy, numbers stored) of each factor of a scan."""
    return {
        factor: (energy, split.parameters)
        for split, energy in zip(scan.splits, captured, strict=True)
        for factor in split.factors
    }
