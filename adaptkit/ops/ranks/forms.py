"""Which form and rank each layer of a difference is stored at, over all layers at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from adaptkit.errors import NotRepresentable
from adaptkit.ops.ranks.policies import Error, Module, Policy, Size, least_bytes, least_error

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from adaptkit.ops.extract.fit import Fitted, Form

__all__ = ["Choice", "Layer", "Pick", "choose", "choose_any"]

ROUNDS = 16  # budgets tried until the file fits its size
SPARE = 1e-4  # of the size: less is not worth another one
EXPLAINED = (
    1.1  # times the noise that rounding is expected to leave: a residual of no more is noise
)


@dataclass(frozen=True)
class Pick:
    """A form at a rank (0 where it has none to choose)."""

    form: Form
    rank: int

    @property
    def error(self) -> float:
        """‖Δ − stored‖²."""
        return self.form.error(self.rank)


@dataclass(frozen=True)
class Layer:
    """A layer that differs; `overhead`: what a tensor of it takes of the file's header, `convolution`: for `--conv-rank`."""

    fitted: Fitted
    overhead: int
    alpha: int
    convolution: bool

    def rungs(self, *, trimmed: bool = False) -> list[tuple[Pick, int]]:
        """Every form and rank, and its bytes in the file; `trimmed`: of those that hold more than the noise of rounding."""
        found = []
        for form in self.fitted.forms:
            beside = len(form.shapes) * self.overhead + (
                self.alpha if form.alpha is not None else 0
            )
            ranks = form.ranks[: form.signal] if trimmed and form.ladder else form.ranks
            found += [(Pick(form, rank), form.bytes(rank) + beside) for rank in ranks]
        if not trimmed:
            return found
        # what takes more than the smallest form that leaves but noise would spend it on noise
        enough = min(
            (size for pick, size in found if pick.error <= EXPLAINED * self.fitted.noise),
            default=math.inf,
        )
        return [(pick, size) for pick, size in found if size <= enough]


@dataclass(frozen=True)
class Choice:
    """For each layer what is stored of it (None: nothing), and how far from the best the error may be.

    `all_signal`: there is no more to store but noise of rounding.
    """

    picks: tuple[Pick | None, ...]
    gap: float | None = None
    all_signal: bool = False


Ladder = list[tuple[Pick, int]]


def _ladders(layers: Sequence[Layer], *, trimmed: bool) -> list[Ladder]:
    """The rungs of every layer; not trimmed where nothing would be left of any."""
    if trimmed:
        found = [layer.rungs(trimmed=True) for layer in layers]
        if any(found):
            return found
    return [layer.rungs() for layer in layers]


def _all_signal(
    layers: Sequence[Layer], ladders: Sequence[Ladder], picks: Sequence[Pick | None]
) -> bool:
    """Whether every layer has the best of its trimmed rungs, and there are others."""
    shorter = any(
        len(ladder) < len(layer.rungs()) for layer, ladder in zip(layers, ladders, strict=True)
    )
    least = [min((pick.error for pick, _ in ladder), default=math.inf) for ladder in ladders]
    return shorter and all(
        error == math.inf or (pick is not None and pick.error <= error)
        for pick, error in zip(picks, least, strict=True)
    )


def choose(
    layers: Sequence[Layer],
    rest: float,
    policy: Policy,
    measure: Callable[[Sequence[Pick | None]], int],
) -> Choice:
    """By a rank rule, over the ladder of one kind. `rest`: ‖·‖² of what no adapter holds, part of every error.

    A size is not filled with noise of rounding; the other rules are about the difference as it is. NotRepresentable where
    no ranks reach the error asked for, or the size.
    """
    ladders = _ladders(layers, trimmed=isinstance(policy, Size))
    modules = [_module(layer, ladder) for layer, ladder in zip(layers, ladders, strict=True)]
    if isinstance(policy, Error):
        modules.append(Module((), rest, (0,)))

    def picked(ranks: Sequence[int]) -> list[Pick | None]:
        return [
            ladder[rank - 1][0] if rank else None
            for ladder, rank in zip(ladders, ranks, strict=False)
        ]

    picks = picked(policy.choose(modules, lambda ranks: measure(picked(ranks))))
    if isinstance(policy, Error):
        _check_error(layers, picks, rest, policy.error)
    return Choice(tuple(picks), all_signal=_all_signal(layers, ladders, picks))


def _module(layer: Layer, ladder: Sequence[tuple[Pick, int]]) -> Module:
    errors = [layer.fitted.norm, *(pick.error for pick, _ in ladder)]
    energies = [before - after for before, after in pairwise(errors)]
    sizes = [0, *(size for _, size in ladder)]
    return Module(energies, layer.fitted.norm, sizes, layer.convolution)


def choose_any(
    layers: Sequence[Layer],
    rest: float,
    limits: tuple[int | None, float | None],
    measure: Callable[[Sequence[Pick | None]], int],
) -> Choice:
    """For each layer the best of nothing and all its forms: the least error within a size, or the fewest bytes within an error.

    A multiple-choice knapsack; `gap` is how much less than the chosen error (or size) the linear relaxation allows, of
    forms that hold more than noise of rounding where a size is asked for.
    """
    rungs = _ladders(layers, trimmed=limits[0] is not None)
    ladders: list[list[tuple[Pick | None, int]]] = [[(None, 0), *found] for found in rungs]
    options = [
        [(size, layer.fitted.norm if pick is None else pick.error) for pick, size in ladder]
        for layer, ladder in zip(layers, ladders, strict=True)
    ]

    def picked(chosen: Sequence[int]) -> list[Pick | None]:
        return [ladder[n][0] for ladder, n in zip(ladders, chosen, strict=True)]

    size, error = limits
    if size is None:
        assert error is not None
        total = sum(layer.fitted.norm for layer in layers) + rest
        try:
            found = least_bytes(options, error**2 * total - rest)
        except NotRepresentable:
            best = [min((p for p, _ in ladder if p), key=lambda p: p.error) for ladder in ladders]
            _check_error(layers, best, rest, error)
            raise
        return Choice(
            tuple(picked(found.chosen)), 1 - found.bound / found.bytes if found.bytes else 0.0
        )
    choice = _within(options, picked, size, rest, measure)
    return replace(choice, all_signal=_all_signal(layers, rungs, choice.picks))


def _within(
    options: Sequence[Sequence[tuple[int, float]]],
    picked: Callable[[Sequence[int]], list[Pick | None]],
    size: int,
    rest: float,
    measure: Callable[[Sequence[Pick | None]], int],
) -> Choice:
    """What the file takes beyond its layers is known only for a choice, so that their budget is searched."""
    least, exceeds, budget = 0, 2 * size, size
    best: Choice | None = None
    for _ in range(ROUNDS):
        found = least_error(options, budget)
        picks = picked(found.chosen)
        taken = measure(picks) if any(picks) else size + 1
        if taken <= size:
            bound = math.sqrt(max(0.0, found.bound) + rest)
            reached = math.sqrt(found.error + rest)
            best, least = (
                Choice(tuple(picks), max(0.0, 1 - bound / reached) if reached else 0.0),
                budget,
            )
            if size - taken <= SPARE * size:
                break
            budget = min(found.bytes + size - taken, exceeds - 1)
        else:
            exceeds = budget
            budget = (
                max(found.bytes - (taken - size), least + 1)
                if any(picks)
                else (least + exceeds) // 2
            )
        if not least < budget < exceeds:
            budget = (least + exceeds) // 2
            if budget <= least:
                break
    if best is None:
        raise NotRepresentable(
            f"nothing of this difference fits {size} bytes",
            hint="ask for a larger --size, or for fewer layers with --only",
        )
    return best


def _check_error(
    layers: Sequence[Layer], picks: Sequence[Pick | None], rest: float, asked: float
) -> None:
    total = sum(layer.fitted.norm for layer in layers) + rest
    left = rest + sum(
        layer.fitted.norm if pick is None else pick.error
        for layer, pick in zip(layers, picks, strict=True)
    )
    if left > asked**2 * total * (1 + 1e-9):
        out = (
            f", of which {math.sqrt(rest / total):.3g} are biases, norms and others left out"
            if rest
            else ""
        )
        raise NotRepresentable(
            f"no ranks reach a relative error of {asked:g}: the least is {math.sqrt(left / total):.6g}{out}",
            hint="raise --max-rank, carry biases and norms with --vectors, or use --algo auto or full",
        )
