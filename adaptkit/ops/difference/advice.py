"""What to extract from a difference, by the curves of what each choice would lose."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Advice", "Point", "recommend"]

# of the error at half the size: twice the bytes that save less are not worth it
FLAT = 0.9
# of the error of a LoRA of the same size: another algorithm that saves less is not worth it
BETTER = 0.97


@dataclass(frozen=True)
class Point:
    """One way to store the difference: about `bytes`, losing `relative_error` of ‖ΔW‖.

    The error is that before stored numbers are rounded. `mix` counts the layers by kind. `gap` is
    the share of the error by which a better choice might exist.
    """

    bytes: int
    relative_error: float
    mix: Mapping[str, int] = field(default_factory=dict)
    gap: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        found: dict[str, Any] = {"bytes": self.bytes, "relative_error": self.relative_error}
        return found | ({"mix": dict(self.mix), "gap": self.gap} if self.mix else {})


@dataclass(frozen=True)
class Advice:
    """Options of `extract`, and what they give; not `exact`: the file loses no more than that."""

    options: tuple[str, ...]
    point: Point
    exact: bool = True

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"options": list(self.options), "exact": self.exact, **self.point.to_dict()}


def recommend(
    rank: Mapping[int, Point],
    size: Mapping[int, Point],
    auto: Mapping[int, Point],
    lokr: Mapping[int, Point],
    made_by: Mapping[str, Any] | None,
) -> Advice | None:
    """The adapter that the difference was made with; else the size where its curve flattens."""
    made = made_by or {}
    factor = made.get("factor")
    if factor is not None and factor in lokr:
        return Advice(("--algo", "lokr", "--factor", str(factor)), lokr[factor])
    if (wanted := made.get("rank")) is not None:
        # the next lower rank of the table bounds the error of this one
        held = max((k for k in rank if k <= wanted), default=min(rank))
        return Advice(("--rank", str(wanted)), rank[held], exact=held == wanted)
    if not size:
        return None
    at = next(
        (
            less
            for less, more in pairwise(size)
            if size[more].relative_error > FLAT * size[less].relative_error
        ),
        max(size),
    )
    if auto[at].relative_error < BETTER * size[at].relative_error:
        return Advice(("--algo", "auto", "--size", _written(auto[at].bytes)), auto[at])
    return Advice(("--size", _written(size[at].bytes)), size[at])


def _written(size: int) -> str:
    """A size as `--size` takes it, rounded up."""
    if size < 10_000_000:
        return f"{math.ceil(size / 1000)}KB"
    return f"{math.ceil(size / 1_000_000)}MB"
