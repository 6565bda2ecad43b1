"""What made a difference: some of its layers are looked at first, for rounding noise and for a LoRA or LoKr that was merged."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adaptkit import engine
from adaptkit.engine import Step
from adaptkit.files.quantized import FP8
from adaptkit.ops.shared import torch_dtype

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from adaptkit.checkpoint import Checkpoint
    from adaptkit.linalg.kronscan import KronScan, Split
    from adaptkit.ops.difference.pairing import Pair

__all__ = ["Look", "Probe", "as_rounded", "look", "made_by", "probe", "sample"]

SAMPLE = 12  # layers; changed ones are found among twice as many
HANDY = 1 << 21  # entries: larger layers are looked at only where there are too few others
MOST = 0.5  # of the layers: as many have to agree before a difference is called an adapter's


@dataclass(frozen=True)
class Look:
    """Of one layer: ‖Δ‖², what of it rounding left, its rank if it is that and rounding, its split if it is a product.

    `noise` is `floor` too, but 0 where the difference lies within the grid of its file, and nothing can be told from noise.
    """

    norm: float
    floor: float = 0.0
    rank: int | None = None
    split: Split | None = None
    noise: float = 0.0


@dataclass(frozen=True)
class Probe:
    """`floor`: rounding relative to ‖ΔW‖; `made`: the merged adapter that the difference is, None where it is none."""

    floor: float = 0.0
    made: Mapping[str, Any] | None = None

    @property
    def factor(self) -> int | None:
        """Of the LoKr it is."""
        return None if self.made is None else self.made.get("factor")

    @property
    def rank(self) -> int | None:
        """Of the LoRA it is."""
        return None if self.made is None else self.made.get("rank")

    def notes(self) -> list[str]:
        """What a user should know of it."""
        if self.made is None:
            return []
        if self.rank is not None:
            return [
                f"this difference is a rank-{self.rank} LoRA: --rank {self.rank} keeps all of it but rounding."
            ]
        return [
            f"this difference is a LoKr: --algo lokr --factor {self.factor} keeps all of it but rounding."
        ]


def as_rounded(tuned: Checkpoint, pair: Pair, tensor: Tensor) -> Tensor:
    """A weight in the dtype it was rounded to: plain fp8 is read as float32. Of scaled fp8 only that is known."""
    dtypes = tuned.dtypes(pair.tuned)
    scaled = any(piece.name in tuned.quantization.scales for piece in pair.tuned)
    return tensor.to(torch_dtype(min(dtypes))) if dtypes <= set(FP8) and not scaled else tensor


def look(
    pair: Pair, delta: Tensor, norm: float, rounded: Tensor, scan: KronScan | None = None
) -> Look:
    """At one difference (m, n) of norm² > 0, `rounded` being the tuned weight in its own dtype."""
    from adaptkit.linalg.kronscan import FACTORS, scan_kron
    from adaptkit.linalg.noise import WEAK, rank_above_noise, rounding_noise, zero_share

    noise = rounding_noise(rounded)
    scan = scan or scan_kron(
        delta, math.prod(pair.shape[2:]), [factor for factor in FACTORS if factor > 0]
    )
    which = int(scan.recognised(noise.floor))
    told = float(zero_share(delta)) < WEAK
    found = rank_above_noise(delta, noise) if told else None
    low = found is not None and bool(found.low_rank)
    return Look(
        norm,
        min(float(noise.floor), norm),
        int(found.rank) if found is not None and low else None,
        scan.splits[which] if which >= 0 else None,
        float(noise.floor) if told else 0.0,
    )


def made_by(looks: Sequence[Look]) -> dict[str, Any] | None:
    """Which adapter was merged, where most layers agree: its kind and rank or factor, and how many say so."""
    from adaptkit.linalg.noise import vote

    # a factor is a vote of its own where layers of one size cannot tell it from another
    factors = [factor for one in looks if one.split for factor in one.split.factors]
    if factors:
        best = vote(factors)
        if best.agree > MOST * len(looks):
            return {
                "algorithm": "lokr",
                "factor": best.value,
                "layers": best.agree,
                "of": len(looks),
            }
    ranks = [one.rank for one in looks if one.rank]
    if ranks:
        best = vote(ranks)
        if best.agree > MOST * len(looks):
            return {"algorithm": "lora", "rank": best.value, "layers": best.agree, "of": len(looks)}
    return None


def sample(pairs: Sequence[Pair]) -> list[Pair]:
    """Twice as many layers as are needed, evenly spread, handy ones first: some may not have changed."""
    matrices = [
        pair
        for pair in pairs
        if pair.algorithm is not None and pair.role == "diff" and min(pair.matrix) > 1
    ]
    handy = [pair for pair in matrices if math.prod(pair.matrix) <= HANDY]
    chosen = handy if len(handy) >= SAMPLE else matrices
    count = min(2 * SAMPLE, len(chosen))
    return [chosen[n * len(chosen) // count] for n in range(count)]


def probe(
    base: Checkpoint, tuned: Checkpoint, pairs: Sequence[Pair], resources: engine.Resources
) -> Probe:
    """Look at a sample of the layers."""
    looks: list[Look] = []
    steps = [_step(pair, base, tuned) for pair in sample(pairs)]

    def load(pair: Pair) -> dict[str, Tensor]:
        return {"base": base.read(pair.base), "tuned": tuned.read(pair.tuned)}

    def kernel(payloads: Sequence[Pair], tensors: dict[str, Tensor]) -> list[Look | None]:
        return [
            _one(tuned, pair, tensors["base"][n], tensors["tuned"][n], enough=len(looks) >= SAMPLE)
            for n, pair in enumerate(payloads)
        ]

    def store(pair: Pair, found: Look | None) -> None:  # noqa: ARG001
        if found is not None and len(looks) < SAMPLE:
            looks.append(found)

    engine.run(steps, engine.Work(load, kernel, store, held=lambda _: 0), resources)
    whole = sum(one.norm for one in looks)
    floor = math.sqrt(sum(one.floor for one in looks) / whole) if whole else 0.0
    return Probe(floor, made_by(looks))


def _one(
    tuned: Checkpoint, pair: Pair, ours: Tensor, theirs: Tensor, *, enough: bool
) -> Look | None:
    from adaptkit.linalg.precision import difference, norm_squared

    if enough:
        return None
    delta = difference(theirs, ours)
    norm = float(norm_squared(delta))
    # what is not finite is named when it is fitted
    return look(pair, delta, norm, as_rounded(tuned, pair, theirs)) if 0 < norm < math.inf else None


def _step(pair: Pair, base: Checkpoint, tuned: Checkpoint) -> Step[Pair]:
    rows, columns = pair.matrix
    size = base.nbytes(pair.base) + tuned.nbytes(pair.tuned) + 5 * 4 * rows * columns
    return Step(pair, pair.number, size, tuned.source.order(pair.tuned[0].name))
