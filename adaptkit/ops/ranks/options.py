"""The rank options, and the policy that they ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from adaptkit.errors import WrongUsage
from adaptkit.ops.shared import Shared

if TYPE_CHECKING:
    from collections.abc import Callable

    from adaptkit.ops.ranks.policies import Policy

__all__ = ["Ranked", "asked", "largest", "policy"]

RULES = ("rank", "energy", "error", "size", "sv_ratio", "sv_fro", "sv_cumulative")


@dataclass(frozen=True)
class Ranked(Shared):
    """Which ranks to keep: exactly one of the rules, with `max_rank` as a bound on any of them.

    `rank` N everywhere (`conv_rank` for convolutions) · `energy` the least per module that keeps this share of ‖ΔW‖² · `error`
    the cheapest over the whole adapter · `size` the best within these bytes · `sv_*` as in other tools.
    """

    rank: int | None = None
    conv_rank: int | None = None
    max_rank: int | None = None
    energy: float | None = None
    error: float | None = None
    size: int | None = None
    sv_ratio: float | None = None
    sv_fro: float | None = None
    sv_cumulative: float | None = None


def asked(options: Ranked) -> str | None:
    """The name of the rule that is asked for; WrongUsage where there are two."""
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
    """The policy; None where no rule is given. WrongUsage for a value that a rule does not take."""
    from adaptkit.ops.ranks import policies

    rule = asked(options)
    if rule is None:
        return None
    if rule == "rank":
        assert options.rank is not None
        return policies.Rank(options.rank, options.conv_rank, max_rank=options.max_rank)
    kinds: dict[str, Callable[..., Policy]] = {
        "energy": policies.Energy,
        "error": policies.Error,
        "size": policies.Size,
        "sv_ratio": policies.SvRatio,
        "sv_fro": policies.SvFro,
        "sv_cumulative": policies.SvCumulative,
    }
    return kinds[rule](getattr(options, rule), max_rank=options.max_rank)


def largest(options: Ranked, *, convolution: bool) -> int | None:
    """No module gets a higher rank than this; None where only the module itself bounds it."""
    rank = options.conv_rank if convolution and options.conv_rank is not None else options.rank
    bounds = [bound for bound in (rank, options.max_rank) if bound is not None]
    return min(bounds) if bounds else None


def spelled(options: Ranked) -> str:
    """The rule as a part of a file name: `rank16`, `64MB`, `error0.05`."""
    rule = asked(options)
    if rule is None:
        return "resized"
    value = getattr(options, rule)
    return _bytes(value) if rule == "size" else f"{rule.replace('_', '-')}{value:g}"


def _bytes(size: int) -> str:
    for unit, factor in (("GB", 1000**3), ("MB", 1000**2), ("KB", 1000)):
        if size >= factor and size * 100 % factor == 0:
            return f"{size / factor:g}{unit}"
    return f"{size}B"


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
