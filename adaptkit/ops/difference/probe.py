"""Probe of a difference: sample layers for rounding noise and for a merged LoRA or LoKr."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adaptkit import engine
from adaptkit.ops.difference.look import (
    Look,
    look,
    looking_bytes,
    read_difference,
    reading_bytes,
)
from adaptkit.ops.stages import counting
from adaptkit.steps import Step

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from adaptkit.checkpoint import Checkpoint
    from adaptkit.ops.difference.looking import Seen
    from adaptkit.ops.difference.pairing import Pair
    from adaptkit.ops.stages import Progress

__all__ = ["Probe", "made_by", "probe", "sample", "steps_of"]

# layers in the sample; twice as many are tried, as some may be unchanged
SAMPLE = 12
# entries; larger layers are sampled only if there are too few smaller ones
HANDY = 1 << 21
# share of the layers that must agree on a merged adapter
MOST = 0.5


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
    from adaptkit.linalg.precision import works_on_stacks

    seen = _seen_in_stacks if works_on_stacks(resources.device) else _seen_singly
    looks = seen(base, tuned, pairs, resources, progress)
    whole = sum(one.norm for one in looks)
    floor = math.sqrt(sum(one.floor for one in looks) / whole) if whole else 0.0
    return Probe(floor, made_by(looks))


def _seen_singly(
    base: Checkpoint,
    tuned: Checkpoint,
    pairs: Sequence[Pair],
    resources: engine.Resources,
    progress: Progress | None,
) -> list[Look]:
    """The looks of the sample. No more than needed are read."""
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
    return looks


def _seen_in_stacks(
    base: Checkpoint,
    tuned: Checkpoint,
    pairs: Sequence[Pair],
    resources: engine.Resources,
    progress: Progress | None,
) -> list[Look]:
    """The looks of the sample on an accelerator, which takes equal layers together."""
    from adaptkit.ops.difference.looking import Looker

    looker, found = Looker(base, tuned), {}
    steps = sorted(map(looker.step, sample(pairs)), key=lambda step: step.order)

    def store(pair: Pair, one: Seen) -> None:
        found[pair.number] = one.look

    work = engine.Work(looker.load, looker.looks, store, held=lambda _: 0)
    engine.run(steps, work, resources, counting(progress, "reading", len(steps), "layers"))
    # in the order of the file, as a CPU takes them
    looks = [found[step.payload.number] for step in steps]
    return [look for look in looks if look is not None][:SAMPLE]


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
