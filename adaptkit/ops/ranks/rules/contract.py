"""The contract of a rank rule: a policy over lists of numbers, and the option that asks for it.

A rule is a module with an object `RULE`. The option of the commands, the field of their `Options`
and the key of a recipe are all made from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from adaptkit.errors import WrongUsage
from adaptkit.ops.ranks.knapsack import RankCurve, tail_sums

__all__ = [
    "ROUNDING",
    "Local",
    "Measure",
    "Policy",
    "Rule",
    "at_least_one",
    "capped",
    "is_share",
    "keeping",
    "least",
    "smallest",
]

Measure = Callable[[Sequence[int]], int]

ROUNDING = 1e-15  # of a sum: 0.7 + 0.25 may be less than 0.95 by so much


@dataclass(frozen=True, slots=True)
class Rule:
    """One rank rule.

    `name` is its option. `kind` is the type of the value, `low` and `high` are its bounds as
    `--help` shows them; `above` excludes `low`. `bytes` means that the value is a size. `order` is
    the place of the option in `--help`.
    """

    name: str
    policy: Callable[..., Policy]
    help: str
    order: int
    kind: type[int] | type[float] = float
    low: float | None = None
    high: float | None = None
    above: bool = False
    bytes: bool = False
    metavar: str | None = None
    # further options that the policy takes, in order, after the value of the rule
    extras: tuple[str, ...] = ()
    # the ranks do not depend on the weights, so that each module is fitted at its rank at once
    fixed: bool = False
    # a limit for the whole adapter, within which `extract --algo auto` chooses
    total: bool = False

    def make(self, options: Any) -> Policy:
        """The policy that these options ask for; WrongUsage for a value out of range."""
        values = [getattr(options, name) for name in (self.name, *self.extras)]
        return self.policy(*values, max_rank=options.max_rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A way to choose ranks, none of them above `max_rank`."""

    local: ClassVar[bool] = False  # the rank of a module depends on no other module
    max_rank: int | None = None

    def __post_init__(self) -> None:
        at_least_one("--max-rank", self.max_rank)
        self._check()

    def _check(self) -> None:
        """Raise for arguments out of range, naming the option."""

    @property
    def most_bytes(self) -> int | None:
        """The bytes that the file may take; None if they are not limited."""
        return None

    @property
    def most_error(self) -> float | None:
        """The relative error that the whole adapter may have; None if it is not limited."""
        return None

    def choose(self, modules: Sequence[RankCurve], measure: Measure | None = None) -> list[int]:
        """The rank of every module, in their order.

        `measure` gives the exact size in bytes of the whole file at some ranks. Without it that
        size is the sum of the modules'. Only `Size` asks for it, at most 17 times.
        """
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class Local(Policy):
    """Chooses module by module.

    A module without energy gets rank 1, a module without ranks gets 0.
    """

    local: ClassVar[bool] = True

    def choose(self, modules: Sequence[RankCurve], measure: Measure | None = None) -> list[int]:
        """The rank of every module, see `Policy.choose`."""
        cap = math.inf if self.max_rank is None else self.max_rank
        return [int(min(max(self._rank(m), 1), len(m.energies), cap)) for m in modules]

    def _rank(self, module: RankCurve) -> int:
        raise NotImplementedError


def capped(modules: Sequence[RankCurve], max_rank: int | None) -> Sequence[RankCurve]:
    """The same modules without ranks above `max_rank`; `norm` keeps what that cuts off."""
    if max_rank is None:
        return modules
    return [
        RankCurve(m.energies[:max_rank], m.norm, m.sizes[: max_rank + 1], m.convolution)
        for m in modules
    ]


def at_least_one(option: str, rank: int | None) -> None:
    """Refuse a rank below 1."""
    if rank is not None and not rank >= 1:
        raise WrongUsage(f"{option} must be at least 1, not {rank}")


def is_share(option: str, share: float) -> None:
    """Refuse a number that is not above 0 and at most 1."""
    if not 0 < share <= 1:
        raise WrongUsage(f"{option} must be above 0 and at most 1, not {share}")


def keeping(module: RankCurve, share: float) -> int:
    """The least rank that keeps this share of ‖ΔW‖²."""
    total = math.fsum(module.energies)
    rest = max(module.norm - total, 0.0)
    return least(module.energies, (1 - share) * max(module.norm, total) - rest)


def least(values: Sequence[float], allowed: float) -> int:
    """The least k with Σ values[k:] ≤ `allowed`, up to rounding.

    A negative `allowed` counts as 0.
    """
    left = tail_sums(values)
    limit = max(allowed, 0.0) + ROUNDING * left[0]
    return next(k for k, value in enumerate(left) if value <= limit)


def smallest(modules: Sequence[RankCurve]) -> list[int]:
    """Rank 1 for the module that takes the fewest bytes, 0 for all others."""
    ranks = [0] * len(modules)
    able = [n for n, m in enumerate(modules) if m.energies]
    if able:
        ranks[min(able, key=lambda n: modules[n].sizes[1] - modules[n].sizes[0])] = 1
    return ranks
