"""The rank options, and the policy that they ask for."""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass
from functools import cache
from typing import TYPE_CHECKING

from adaptkit.errors import WrongUsage
from adaptkit.ops.shared import Shared
from adaptkit.registry import discover

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adaptkit.ops.ranks.rules.contract import Policy, Rule

__all__ = ["MAX_RANK", "RULES", "Ranked", "asked", "largest", "policy", "rules", "spelled"]

MAX_RANK = 128  # the end of the ladder from which a rule chooses, unless --max-rank is given


@cache
def rules() -> Mapping[str, Rule]:
    """Every rank rule by name, in the order of `--help`."""
    found: Mapping[str, Rule] = discover("adaptkit.ops.ranks.rules", "RULE")
    return dict(sorted(found.items(), key=lambda item: item[1].order))


RULES = tuple(rules())

if TYPE_CHECKING:

    @dataclass(frozen=True)
    class _Rules(Shared):
        rank: int | None = None
        energy: float | None = None
        error: float | None = None
        size: int | None = None
        sv_ratio: float | None = None
        sv_fro: float | None = None
        sv_cumulative: float | None = None

else:
    # a field for every rule that is found; mypy knows those above by their types
    _Rules = make_dataclass(
        "_Rules",
        [(rule.name, rule.kind | None, field(default=None)) for rule in rules().values()],
        bases=(Shared,),
        frozen=True,
        namespace={"__module__": __name__},
    )


@dataclass(frozen=True)
class Ranked(_Rules):
    """The ranks to keep: at most one of the rules, each of which has a field of its name.

    `conv_rank` is the rank of convolutions beside `rank`. `max_rank` bounds the ranks of any rule.
    """

    conv_rank: int | None = None
    max_rank: int | None = None


def asked(options: Ranked) -> str | None:
    """The name of the rule that is asked for; WrongUsage for two rules."""
    given = [name for name in RULES if getattr(options, name) is not None]
    if len(given) > 1:
        names = " and ".join(_option(name) for name in given)
        raise WrongUsage(f"{names} contradict one another", hint="give one of them")
    rule = given[0] if given else None
    if options.conv_rank is not None and rule != "rank":
        raise WrongUsage("--conv-rank goes with --rank", hint="give --rank as well")
    if options.max_rank is not None and options.max_rank < 1:
        raise WrongUsage(f"--max-rank must be at least 1, not {options.max_rank}")
    return rule


def policy(options: Ranked) -> Policy | None:
    """The policy; None without a rule. WrongUsage for a value that the rule does not take."""
    rule = asked(options)
    return None if rule is None else rules()[rule].make(options)


def largest(options: Ranked, *, convolution: bool) -> int | None:
    """The highest rank that a module may get; None if only the module itself bounds it."""
    rank = options.conv_rank if convolution and options.conv_rank is not None else options.rank
    bounds = [bound for bound in (rank, options.max_rank) if bound is not None]
    return min(bounds) if bounds else None


def spelled(options: Ranked) -> str:
    """The rule as a part of a file name: `rank16`, `64MB`, `error0.05`."""
    rule = asked(options)
    if rule is None:
        return "resized"
    value = getattr(options, rule)
    return _bytes(value) if rules()[rule].bytes else f"{rule.replace('_', '-')}{value:g}"


def _bytes(size: int) -> str:
    for unit, factor in (("GB", 1000**3), ("MB", 1000**2), ("KB", 1000)):
        if size >= factor and size * 100 % factor == 0:
            return f"{size / factor:g}{unit}"
    return f"{size}B"


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
