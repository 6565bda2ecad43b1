"""Probe of a difference: sample layers for rounding noise and for a merged LoRA or LoKr."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adaptkit import engine
from adaptkit.files.quantized import FP8
from adaptkit.ops.shared import torch_dtype
from adaptkit.ops.stages import counting
from adaptkit.steps import Step

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from adaptkit.checkpoint import Checkpoint
    from adaptkit.linalg.kronscan import KronScan, Split
    from adaptkit.linalg.noise import RoundingNoise
    from adaptkit.ops.difference.pairing import Pair
    from adaptkit.ops.stages import Progress

__all__ = [
    "BLOCKS",
    "Look",
    "Probe",
    "as_rounded",
    "look",
    "looking_bytes",
    "made_by",
    "probe",
    "read_difference",
    "reading_bytes",
    "sample",
    "steps_of",
]

# layers in the sample; twice as many are tried, as some may be unchanged
SAMPLE = 12
# entries; larger layers are sampled only if there are too few smaller ones
HANDY = 1 << 21
# share of the layers that must agree on a merged adapter
MOST = 0.5
BLOCKS = 6_000_000  # bytes that reading a weight in blocks of rows takes
KRYLOV = 448  # directions of a space in which ranks up to 64 are counted


@dataclass(frozen=True)
class Look:
    """Findings on one layer: ‖Δ‖², its rounding noise, its rank, its Kronecker split.

    `rank` is None unless Δ is of low rank up to rounding, `split` unless Δ is a Kronecker product.
    `noise` equals `floor`, but is 0 if Δ cannot be distinguished from the rounding grid.
    """

    norm: float
    floor: float = 0.0
    rank: int | None = None
    split: Split | None = None
    noise: float = 0.0


@dataclass(frozen=True)
class Probe:
    """Findings on a difference: `floor` is its rounding relative to ‖ΔW‖.

    `made` describes the merged adapter that the difference consists of, or is None.
    """

    floor: float = 0.0
    made: Mapping[str, Any] | None = None

    @property
    def factor(self) -> int | None:
        """Return the factor of the merged LoKr, or None."""
        return None if self.made is None else self.made.get("factor")

    @property
    def rank(self) -> int | None:
        """Return the rank of the merged LoRA, or None."""
        return None if self.made is None else self.made.get("rank")

    def notes(self) -> list[str]:
        """Return notes for the user. They claim no more than the sample shows."""
        if self.made is None:
            return []
        sampled = f"{self.made['layers']} of {self.made['of']} sampled layers"
        if self.rank is not None:
            return [f"{sampled} are a rank-{self.rank} LoRA and rounding: see --rank {self.rank}."]
        return [
            f"{sampled} are a LoKr of factor {self.factor} and rounding: "
            f"see --algo lokr --factor {self.factor}."
        ]


def as_rounded(tuned: Checkpoint, pair: Pair, tensor: Tensor) -> Tensor:
    """Return a weight in the dtype it was rounded to; scaled fp8 stays float32."""
    dtypes = tuned.dtypes(pair.tuned)
    scaled = any(piece.name in tuned.quantization.scales for piece in pair.tuned)
    return tensor.to(torch_dtype(min(dtypes))) if dtypes <= set(FP8) and not scaled else tensor


def read_difference(base: Checkpoint, tuned: Checkpoint, pair: Pair) -> dict[str, Tensor]:
    """Read Δ and ‖Δ‖² of a layer, and the noise (`rows`, `columns`) of the tuned one's rounding.

    The base is never in memory as a whole, and the tuned weight only meanwhile.
    """
    from adaptkit.linalg.noise import rounding_noise
    from adaptkit.linalg.precision import STREAM, streamed_difference

    step = max(1, STREAM // max(1, pair.matrix[1]))
    whole = tuned.read(pair.tuned)
    noise = rounding_noise(as_rounded(tuned, pair, whole))
    theirs = (whole[start : start + step] for start in range(0, len(whole), step))
    delta, norm = streamed_difference(
        zip(theirs, base.blocks(pair.base, step), strict=True), pair.matrix
    )
    return {"delta": delta, "norm": norm, "rows": noise.rows, "columns": noise.columns}


def reading_bytes(base: Checkpoint, tuned: Checkpoint, pair: Pair) -> int:
    """Return the memory that `read_difference` takes, Δ included."""
    rows, columns = pair.matrix
    whole = base.nbytes(pair.base)
    ours = min(whole, BLOCKS) if base.streams(pair.base) else whole
    scratch = min(4 * rows * columns, BLOCKS // 2)
    return 4 * rows * columns + tuned.nbytes(pair.tuned) + ours + scratch


def look(
    pair: Pair, delta: Tensor, norm: float, noise: RoundingNoise, scan: KronScan | None = None
) -> Look:
    """Examine a difference (m, n) with norm² > 0, whose memory is used; `noise` is its rounding."""
    from adaptkit.linalg.kronscan import FACTORS, scan_kron
    from adaptkit.linalg.noise import WEAK, rank_above_noise, zero_share

    scan = scan or scan_kron(
        delta, math.prod(pair.shape[2:]), [factor for factor in FACTORS if factor > 0]
    )
    which = int(scan.recognised(noise.floor))
    told = float(zero_share(delta)) < WEAK
    found = rank_above_noise(delta, noise, overwrite=True) if told else None
    low = found is not None and bool(found.low_rank)
    return Look(
        norm,
        min(float(noise.floor), norm),
        int(found.rank) if found is not None and low else None,
        scan.splits[which] if which >= 0 else None,
        float(noise.floor) if told else 0.0,
    )


def looking_bytes(pair: Pair) -> int:
    """Return the memory that `look` takes: Δ, its blocks rearranged, or a Krylov space."""
    rows, columns = pair.matrix
    space = 4 * (rows + columns + min(rows, columns)) * min(rows, columns, KRYLOV)
    return 4 * rows * columns + max(4 * rows * columns, space)


def made_by(looks: Sequence[Look]) -> dict[str, Any] | None:
    """Return the merged adapter that most layers agree on: algorithm, rank or factor, votes."""
    from adaptkit.linalg.noise import vote

    # a layer that fits several factors votes for each of them
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
    """Choose twice the needed layers, evenly spread and preferably small."""
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
    base: Checkpoint,
    tuned: Checkpoint,
    pairs: Sequence[Pair],
    resources: engine.Resources,
    progress: Progress | None = None,
) -> Probe:
    """Examine a sample of the layers."""
    looks: list[Look] = []

    def load(pair: Pair) -> dict[str, Tensor]:
        return {} if len(looks) >= SAMPLE else read_difference(base, tuned, pair)

    def kernel(pairs: Sequence[Pair], tensors: dict[str, Tensor]) -> list[Look | None]:
        return [_one(pairs[0], tensors)]

    def store(pair: Pair, found: Look | None) -> None:  # noqa: ARG001
        if found is not None and len(looks) < SAMPLE:
            looks.append(found)

    on_cpu = resources.on_cpu
    announce = (lambda pair: tuned.announce(pair.tuned)) if on_cpu else None
    work = engine.Work(load, kernel, store, held=lambda _: 0, announce=announce)
    steps = steps_of(base, tuned, pairs)
    engine.run(steps, work, resources, counting(progress, "reading", len(steps), "layers"))
    whole = sum(one.norm for one in looks)
    floor = math.sqrt(sum(one.floor for one in looks) / whole) if whole else 0.0
    return Probe(floor, made_by(looks))


def _one(pair: Pair, tensors: dict[str, Tensor]) -> Look | None:
    """What is seen of one layer; None of those beyond the sample, and of those without a norm."""
    from torch.linalg import LinAlgError  # type: ignore[attr-defined]

    from adaptkit.linalg.noise import RoundingNoise

    if not tensors:
        return None
    norm, delta = float(tensors["norm"]), tensors.pop("delta")[0]
    # fitting reports a difference that is not finite, or whose squares are not
    if not 0 < norm < math.inf:
        return None
    with suppress(LinAlgError):
        return look(pair, delta, norm, RoundingNoise(tensors["rows"][0], tensors["columns"][0]))
    return None


def _step(pair: Pair, base: Checkpoint, tuned: Checkpoint) -> Step[Pair]:
    size = max(reading_bytes(base, tuned, pair), looking_bytes(pair))
    return Step(pair, pair.number, size, tuned.source.order(pair.tuned[0].name))


def steps_of(base: Checkpoint, tuned: Checkpoint, pairs: Sequence[Pair]) -> list[Step[Pair]]:
    """Return the steps of a probe, which a plan counts too."""
    return [_step(pair, base, tuned) for pair in sample(pairs)]
