"""Look at equal layers together, on an accelerator: norms, Kronecker scans, ranks, energies."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from adaptkit.ops.difference.look import Look, as_rounded, look, looking_bytes
from adaptkit.steps import Step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from adaptkit.checkpoint import Checkpoint
    from adaptkit.linalg.kron.scan import KronScan
    from adaptkit.linalg.noise import RoundingNoise
    from adaptkit.ops.difference.pairing import Pair

__all__ = ["Looker", "Seen"]


class Seen(NamedTuple):
    """What was seen of a layer; `look` is None for one that does not differ, or is not finite.

    `captured` is that of a Kronecker scan, one number for each of its splits.
    """

    norm: float
    look: Look | None
    energies: tuple[float, ...]
    captured: tuple[float, ...]
    scan: KronScan


class Looker:
    """Load and look at layers. `rank` leading energies are computed too, if it is given."""

    def __init__(self, base: Checkpoint, tuned: Checkpoint, rank: int | None = None) -> None:
        self.base, self.tuned, self.rank = base, tuned, rank

    def step(self, pair: Pair) -> Step[Pair]:
        """The step of a layer, which may be stacked with those that are stored alike."""
        sides = (self.base, pair.base), (self.tuned, pair.tuned)
        stored = sum(checkpoint.nbytes(pieces) for checkpoint, pieces in sides)
        alike = (c.likeness(pieces) for c, pieces in sides)
        size = stored + looking_bytes(pair)
        order = self.tuned.source.order(pair.tuned[0].name)
        return Step(pair, (pair.shape, pair.algorithm is None, *alike), size, order)

    def load(self, pair: Pair) -> dict[str, Tensor]:
        """Both weights as they are stored: the device subtracts them."""
        return {"base": self.base.read(pair.base), "tuned": self.tuned.read(pair.tuned)}

    def looks(self, pairs: Sequence[Pair], tensors: dict[str, Tensor]) -> list[Seen]:
        """Look at a stack: three waits at most, but for layers that need a look of their own."""
        from adaptkit.linalg.kron.scan import FACTORS
        from adaptkit.linalg.looks import (
            noise_of_stack,
            ranks_of_stack,
            scan_stack,
            zeros_of_stack,
        )
        from adaptkit.linalg.lowrank import SvdSpec, energies_of_stack
        from adaptkit.linalg.noise import WEAK
        from adaptkit.linalg.precision import LEAST, MOST, difference, norm_squared

        delta = difference(tensors["tuned"], tensors["base"])
        noise = noise_of_stack(as_rounded(self.tuned, pairs[0], tensors["tuned"]))
        factors = [factor for factor in FACTORS if factor > 0]
        told = noise.floor, zeros_of_stack(delta)
        window = math.prod(pairs[0].shape[2:])
        scan, (floors, zeros) = scan_stack(delta, norm_squared(delta), window, factors, told)
        values: list[list[float]] = [[] for _ in pairs]
        if self.rank is not None:
            spec = SvdSpec(min(self.rank, *delta.shape[-2:]))
            values = energies_of_stack(delta, spec).tolist()
        ranks, which = ranks_of_stack(delta, noise), scan.recognised(floors)
        found = []
        for n, pair in enumerate(pairs):
            norm, floor, rank = float(scan.total[n]), float(floors[n]), ranks[n]
            plain, clear = LEAST < norm < MOST, float(zeros[n]) < WEAK
            seen: Look | None = None
            if plain and not (clear and rank is None):
                low = rank.rank if clear and rank is not None and rank.low_rank else None
                split = scan.splits[int(which[n])] if int(which[n]) >= 0 else None
                seen = Look(norm, min(floor, norm), low, split, floor if clear else 0.0)
            elif 0 < norm < math.inf:
                seen = self._alone(pair, n, tensors, noise, norm)
            captured = tuple(scan.captured[n].tolist())
            found.append(Seen(norm, seen, tuple(values[n]), captured, scan))
        return found

    def _alone(
        self, pair: Pair, n: int, tensors: dict[str, Tensor], noise: RoundingNoise, norm: float
    ) -> Look | None:
        """Look at one layer by itself, as often as that takes."""
        from torch.linalg import LinAlgError  # type: ignore[attr-defined]

        from adaptkit.linalg.noise import RoundingNoise
        from adaptkit.linalg.precision import difference

        delta = difference(tensors["tuned"][n], tensors["base"][n])
        with suppress(LinAlgError):
            return look(pair, delta, norm, RoundingNoise(noise.rows[n], noise.columns[n]))
        return None
