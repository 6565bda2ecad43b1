"""What a LoRA of as many numbers would keep, beside kinds that a difference may be far from."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from adaptkit.ops.difference.pairing import Pair
    from adaptkit.ops.ranks.forms import Fitted, Pick

__all__ = ["SameSize", "about_size", "looked_at", "many", "rank_of_size", "same_size"]

ALL = 100_000_000  # numbers: layers of so many in all take a second or two, and are all looked at
SHARE = 8  # of more, one in so many of each shape: a look takes as long as a LoRA of the layer
# of ‖ΔW‖²: a LoKr that keeps less is far from the difference
LITTLE = 0.5


class SameSize(NamedTuple):
    """Shares of ‖ΔW‖² that the adapter and a LoRA of as many numbers keep.

    The LoRA's is that of the `looked` of `layers`, each shape weighed by all of its layers.
    """

    kept: float
    lora: float
    looked: int
    layers: int

    @property
    def partial(self) -> bool:
        """Whether some layers were not looked at."""
        return self.looked < self.layers


def many(jobs: Iterable[Pair]) -> bool:
    """Whether these layers are so large together that not all are looked at."""
    return sum(math.prod(job.matrix) for job in jobs) > ALL


def rank_of_size(job: Pair, numbers: int) -> int:
    """The rank of a LoRA of so many numbers; 0 if they are too few for any."""
    return min(numbers // sum(job.matrix), *job.matrix)


def looked_at(stored: Iterable[tuple[Pair, Fitted, Pick]]) -> dict[int, int]:
    """The layers to look at, of those that differ, by number: the rank of a LoRA of their size."""
    ranks: dict[tuple[int, int], dict[int, int]] = defaultdict(dict)
    jobs = []
    for job, _, pick in stored:
        if pick.form.kind.against_low_rank:
            ranks[job.matrix][job.number] = rank_of_size(job, pick.form.numbers(pick.rank))
            jobs.append(job)
    share = SHARE if many(jobs) else 1
    return dict(one for some in ranks.values() for one in list(some.items())[::share])


def same_size(stored: Iterable[tuple[Pair, Fitted, Pick]]) -> SameSize | None:
    """Over the layers whose kind is compared with a LoRA; None if none was looked at."""
    shapes: dict[tuple[int, int], list[tuple[Fitted, float]]] = defaultdict(list)
    for job, found, pick in stored:
        if pick.form.kind.against_low_rank:
            shapes[job.matrix].append((found, pick.error))
    whole = left = lora = 0.0
    looked = layers = 0
    for some in shapes.values():
        seen = [found for found, _ in some if found.lora is not None]
        norm = sum(found.norm for found in seen)
        if not norm:
            continue
        own = sum(found.norm for found, _ in some)
        whole, left = whole + own, left + sum(error for _, error in some)
        lora += own * sum(found.lora or 0.0 for found in seen) / norm
        looked, layers = looked + len(seen), layers + len(some)
    if not whole:
        return None
    return SameSize(max(0.0, 1.0 - left / whole), lora / whole, looked, layers)


def about_size(title: str, found: SameSize) -> Iterator[str]:
    """A note if a LoRA of the same size would keep more."""
    kept, lora = found.kept, found.lora
    if lora <= kept:
        return
    share = f"about {lora:.0%}" if found.partial else f"{lora:.1%}"
    told = f" (measured on {found.looked} of {found.layers} layers)" if found.partial else ""
    if kept < LITTLE:
        yield (
            f"This {title} keeps only {kept:.1%} of the difference, a LoRA of the same size would "
            f"keep {share}{told}: a difference that no {title} made is usually far from any "
            f"{title}. Use --algo lora here."
        )
    else:
        yield (
            f"This {title} keeps {kept:.1%} of the difference, a LoRA of the same size would keep "
            f"{share}{told}."
        )
