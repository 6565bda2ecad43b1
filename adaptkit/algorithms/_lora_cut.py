"""Truncate LoRAs: decompose, choose, keep; one by one or as a stack."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from adaptkit.algorithms._record import record
from adaptkit.algorithms.contract import (
    Decomposition,
    FitSpec,
    KeptStack,
    Weights,
)
from adaptkit.errors import NotRepresentable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from adaptkit.linalg.factored import Core

    # LoRA of up (..., m, r), down (..., r, n·K) and a kernel, of scale 1
    Make = Callable[[Tensor, Tensor, tuple[int, ...]], Weights]

__all__ = ["NOTHING", "SingularValues", "by_cores", "by_singular_values", "cut_stack"]

# share of the first energy: smaller ones are the rounding of float64, not a rank
NOTHING = 1e-14


@record
class SingularValues(Decomposition):
    """LoRAs of `rows` × `columns`. A core that is held saves a second decomposition."""

    energies: tuple[float, ...]
    norm: float
    rows: int
    columns: int
    spec: FitSpec
    core: Core | None
    make: Make

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        kernel = self.spec.kernel
        inputs = self.columns // math.prod(kernel)
        return {"up": (self.rows, rank, *(1 for _ in kernel)), "down": (rank, inputs, *kernel)}

    def numbers(self, rank: int) -> int:
        return rank * (self.rows + self.columns)

    def keep(self, weights: Weights, rank: int) -> Weights:
        thin = None if self.core is None else weights.thin_factors()
        if self.core is None or thin is None:
            up, down = weights.widened().svd(rank, self.spec.svd).balanced()
        else:
            # float32 is as precise as the core
            up, down = self.core.kept(thin[0].float(), thin[1].float(), rank)
        return self.make(up, down, self.spec.kernel)

    def lighter(self) -> Decomposition:
        return replace(self, core=None)


def by_cores(weights: Weights, spec: FitSpec, make: Make) -> list[Decomposition]:
    """The cores of a whole stack at once, as one decomposition per member."""
    from adaptkit.linalg.factored import factored_core

    thin = None if weights.kron_factors() is not None else weights.thin_factors()
    if thin is None:
        raise NotRepresentable(f"a stack of {weights.name} without thin factors")
    core = factored_core(*thin)
    squares = core.s.double().square()
    values = squares.tolist()
    totals = [math.fsum(energies) for energies in values]
    real = (squares > NOTHING * squares[:, :1]).sum(-1).clamp_min(1).tolist()
    core = core.head(core.s.shape[-1] if spec.rank is None else spec.rank)
    sides = thin[0].shape[-2], thin[1].shape[-1]
    return [
        SingularValues(tuple(energies[:count][: spec.rank]), total, *sides, spec, own, make)
        for energies, count, total, own in zip(values, real, totals, core.members(), strict=True)
    ]


@record
class _KeptLoras(KeptStack):
    """LoRAs cut through their core. Their factors, whole and kept, are in float32."""

    exact: Weights
    numbers: Sequence[int]
    core: Core
    factors: tuple[Tensor, Tensor]
    kept: tuple[Tensor, Tensor]
    kernel: tuple[int, ...]
    make: Make

    @property
    def weights(self) -> Weights:
        return self.make(*self.kept, self.kernel)

    def changes(self, stored: Weights) -> tuple[Tensor, ...]:
        return self.core.changes(self.factors, self.kept, stored.factors())

    def told(self, stored: Weights, changes: Sequence[Tensor]) -> list[float]:
        import torch

        from adaptkit.linalg.precision import one_by_one
        from adaptkit.linalg.products import product_distance

        found = self.core.told(changes)
        if not bool(torch.isfinite(found).all()):
            if one_by_one(self.factors[0]):
                return [
                    one if math.isfinite(one) else self._distance(n, stored)
                    for n, one in enumerate(found.tolist())
                ]
            whole, theirs = self.exact.widened().factors(), stored.factors()
            dtype = whole[0].dtype
            found = product_distance(whole, (theirs[0].to(dtype), theirs[1].to(dtype)))
        listed: list[float] = found.tolist()
        return listed

    def _distance(self, n: int, stored: Weights) -> float:
        exact = self.exact.member(self.numbers[n]).widened()
        return exact.distance_squared(stored.member(n))


@record
class _KeptByRank(KeptStack):
    """A stack in parts of equal ranks.

    BLAS may sum in another order over more columns, even if the added ones are zeros.
    """

    parts: Sequence[_KeptLoras]

    @property
    def weights(self) -> Weights:
        import torch

        most, pad = max(part.kept[0].shape[-1] for part in self.parts), torch.nn.functional.pad
        missing = [most - part.kept[0].shape[-1] for part in self.parts]
        pairs = list(zip(self.parts, missing, strict=True))
        order = torch.tensor([n for part in self.parts for n in part.numbers]).argsort()
        up = torch.cat([pad(part.kept[0], (0, more)) for part, more in pairs])
        down = torch.cat([pad(part.kept[1], (0, 0, 0, more)) for part, more in pairs])
        return self.parts[0].make(up[order], down[order], self.parts[0].kernel)

    def distances(self, stored: Weights) -> list[float]:
        up, down = stored.factors()
        found: dict[int, float] = {}
        for part in self.parts:
            chosen, rank = list(part.numbers), part.kept[0].shape[-1]
            own = part.make(up[chosen, :, :rank], down[chosen, :rank], part.kernel)
            found |= zip(chosen, part.distances(own), strict=True)
        return [found[n] for n in range(len(found))]


def cut_stack(
    weights: Weights, found: Sequence[Decomposition], ranks: Sequence[int], make: Make
) -> KeptStack:
    """Each member of a stack, cut to its rank through the core that its decomposition holds."""
    from adaptkit.linalg.factored import Core
    from adaptkit.linalg.precision import one_by_one

    cores = [core for one in found if (core := getattr(one, "core", None)) is not None]
    thin = weights.thin_factors()
    if thin is None or len(cores) < len(found):
        raise NotRepresentable("a stack whose cores are not held")
    factors = thin[0].float(), thin[1].float()
    kernel = found[0].spec.kernel  # type: ignore[attr-defined]

    def cut(chosen: list[int]) -> _KeptLoras:
        own = factors if len(chosen) == len(ranks) else (factors[0][chosen], factors[1][chosen])
        most = [ranks[n] for n in chosen]
        core = Core.stack([cores[n] for n in chosen], most)
        return _KeptLoras(weights, chosen, core, own, core.kept(*own, max(most)), kernel, make)

    everyone = range(len(ranks))
    if len(set(ranks)) == 1 or not one_by_one(factors[0]):
        return cut(list(everyone))
    return _KeptByRank([cut([n for n in everyone if ranks[n] == k]) for k in sorted(set(ranks))])


def by_singular_values(weights: Weights, spec: FitSpec, make: Make) -> Decomposition:
    """ΔW by its singular values, from factors if they are thin."""
    from adaptkit.linalg.factored import factored_core
    from adaptkit.linalg.lowrank import SvdSpec, energies

    norm, core = None, None
    if (kron := weights.kron_factors()) is not None:
        values = weights.spectrum()
        sides = kron[0].shape[-2] * kron[1].shape[-2], kron[0].shape[-1] * kron[1].shape[-1]
    elif (thin := weights.thin_factors()) is not None:
        core = factored_core(*thin)
        values, sides = core.s, (thin[0].shape[-2], thin[1].shape[-1])
        core = core.head(len(values) if spec.rank is None else spec.rank)
    else:
        delta = weights.delta()
        sides = (delta.shape[-2], delta.shape[-1])
        rank = min(sides) if spec.rank is None else min(spec.rank, *sides)
        norm = weights.norm_squared()
        how = SvdSpec(rank, method=spec.svd)  # type: ignore[arg-type]
        values = energies(delta, rank, how).sqrt()
    found = values.double().square()
    total = float(found.sum()) if norm is None else norm
    real = found[: max(1, int((found > NOTHING * found[:1]).sum()))][: spec.rank]
    return SingularValues(tuple(real.tolist()), total, *sides, spec, core, make)
