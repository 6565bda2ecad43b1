"""Choose the form and rank of every layer, over all layers at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise, takewhile
from typing import TYPE_CHECKING

from adaptkit.algorithms.contract import Ladder, Stated
from adaptkit.errors import NotRepresentable
from adaptkit.ops.adapter_file.size import module_size
from adaptkit.ops.ranks.knapsack import SPARE, RankCurve, least_bytes, least_error

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from adaptkit.algorithms.contract import Weights
    from adaptkit.ops.ranks.rules.contract import Policy

__all__ = ["EXPLAINED", "Fitted", "Form", "Layer", "Pick", "Picks", "choose", "choose_any"]

ROUNDS = 16  # budgets tried until the file fits its size
# times the noise that rounding is expected to leave: a smaller residual is noise
EXPLAINED = 1.1


@dataclass(frozen=True)
class Pick:
    """A form at a rank; 0 if it has none to choose."""

    form: Form
    rank: int

    @property
    def error(self) -> float:
        """‖Δ − stored‖²."""
        return self.form.error(self.rank)

    @property
    def alpha(self) -> float:
        """Alpha as it is stored; for a ladder, the rank chosen."""
        if self.form.ladder:
            return float(self.rank)
        return 0.0 if self.form.alpha is None else self.form.alpha

    @property
    def scale(self) -> float:
        """What a reader multiplies the stored product by."""
        alpha = None if self.form.alpha is None else Stated(self.alpha)
        return self.form.kind.facts(self.form.shapes(self.rank), alpha).scale

    @property
    def stored_rank(self) -> int | None:
        """The rank that a reader finds in the stored shapes."""
        return self.form.kind.facts(self.form.shapes(self.rank)).rank


@dataclass(frozen=True)
class Layer:
    """A layer that differs. Its keys begin with `stem`.

    `alpha` tells whether the format stores alpha, `convolution` whether `--conv-rank` applies.
    """

    fitted: Fitted
    stem: str
    alpha: bool
    convolution: bool

    def _bytes(self, form: Form, rank: int) -> int:
        """The bytes that a form takes in the file."""
        alpha = self.alpha and form.alpha is not None
        return module_size(form.numbers(rank), form.dtype, self.stem, len(form.stored), alpha=alpha)

    def rungs(self, *, trimmed: bool = False) -> list[tuple[Pick, int]]:
        """Every form and rank with its bytes in the file.

        With `trimmed`, only those that hold more than rounding noise.
        """
        found = []
        for form in self.fitted.forms:
            ranks = form.ranks[: form.signal] if trimmed and form.ladder else form.ranks
            found += [(Pick(form, rank), self._bytes(form, rank)) for rank in ranks]
        if not trimmed:
            return found
        # the smallest form that leaves only noise: any larger one would store noise
        enough = min(
            (size for pick, size in found if pick.error <= EXPLAINED * self.fitted.noise),
            default=math.inf,
        )
        return [(pick, size) for pick, size in found if size <= enough]


@dataclass(frozen=True)
class Picks:
    """The pick of every layer (None: left out), and the gap to the best error that is possible.

    With `all_signal`, only rounding noise is left to store.
    """

    picks: tuple[Pick | None, ...]
    gap: float | None = None
    all_signal: bool = False


Rungs = list[tuple[Pick, int]]


def _ladders(layers: Sequence[Layer], *, trimmed: bool) -> list[Rungs]:
    """The rungs of every layer; not trimmed if that left nothing of any layer."""
    if trimmed:
        found = [layer.rungs(trimmed=True) for layer in layers]
        if any(found):
            return found
    return [layer.rungs() for layer in layers]


def _all_signal(
    layers: Sequence[Layer], ladders: Sequence[Rungs], picks: Sequence[Pick | None]
) -> bool:
    """Whether every layer has the best of its trimmed rungs, and some were trimmed off."""
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
) -> Picks:
    """Choose by a rank rule, over the ladders of one kind.

    `rest` is ‖·‖² of the tensors that no adapter holds; every error contains it. A size is not
    filled with rounding noise; the other rules do not know noise. NotRepresentable if no ranks
    reach the error or the size asked for.
    """
    ladders = _ladders(layers, trimmed=policy.most_bytes is not None)
    modules = [_module(layer, ladder) for layer, ladder in zip(layers, ladders, strict=True)]
    if policy.most_error is not None:
        modules.append(RankCurve((), rest, (0,)))

    def picked(ranks: Sequence[int]) -> list[Pick | None]:
        return [
            ladder[rank - 1][0] if rank else None
            for ladder, rank in zip(ladders, ranks, strict=False)
        ]

    picks = picked(policy.choose(modules, lambda ranks: measure(picked(ranks))))
    if policy.most_error is not None:
        _check_error(layers, picks, rest, policy.most_error)
    return Picks(tuple(picks), all_signal=_all_signal(layers, ladders, picks))


def _module(layer: Layer, ladder: Sequence[tuple[Pick, int]]) -> RankCurve:
    errors = [layer.fitted.norm, *(pick.error for pick, _ in ladder)]
    energies = [before - after for before, after in pairwise(errors)]
    sizes = [0, *(size for _, size in ladder)]
    return RankCurve(energies, layer.fitted.norm, sizes, layer.convolution)


def choose_any(
    layers: Sequence[Layer],
    rest: float,
    limits: tuple[int | None, float | None],
    measure: Callable[[Sequence[Pick | None]], int],
) -> Picks:
    """Choose among all forms of every layer, and none: a multiple-choice knapsack.

    `limits` are (bytes, error): the least error within a size, or the fewest bytes within an
    error. The `gap` compares it with the linear relaxation. A size is not filled with rounding
    noise.
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
        return Picks(
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
) -> Picks:
    """Search the budget of the layers: only a choice tells what the file takes beyond them."""
    least, exceeds, budget = 0, 2 * size, size
    best: Picks | None = None
    for _ in range(ROUNDS):
        found = least_error(options, budget)
        picks = picked(found.chosen)
        taken = measure(picks) if any(picks) else size + 1
        if taken <= size:
            bound = math.sqrt(max(0.0, found.bound) + rest)
            reached = math.sqrt(found.error + rest)
            best, least = (
                Picks(tuple(picks), max(0.0, 1 - bound / reached) if reached else 0.0),
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
            f"no adapter of this difference fits in {size} bytes",
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
        share = math.sqrt(rest / total)
        out = f", of which {share:.3g} are biases, norms and others left out" if rest else ""
        least = math.sqrt(left / total)
        raise NotRepresentable(
            f"no ranks reach a relative error of {asked:g}: the least is {least:.6g}{out}",
            hint=f"--error {_above(least)} can be reached; "
            + (
                "--skip leaves layers out of the figures"
                if rest
                else "a higher --max-rank comes closer"
            ),
        )


def _above(error: float) -> str:
    """An error in three digits that is no smaller than this one."""
    step = 10.0 ** (math.floor(math.log10(error)) - 2)
    return f"{math.ceil(error / step * (1 + 1e-6)) * step:.3g}"


@dataclass
class Form(Ladder):
    """A layer as it would be stored: rounded tensors by role and ‖Δ − stored‖² (`errors[-1]`).

    With a ladder, `errors[k]` belongs to the leading k ranks, `errors[0]` to nothing stored.
    Ranks that take away no more than `edge` of the squared error may be noise of rounding. With
    `later`, the tensors are made once the form is chosen, since they are as large as the layer.
    """

    kind: type[Weights]
    dtype: str
    stored: Mapping[str, tuple[int, ...]]
    errors: tuple[float, ...]
    ladder: bool = False
    alpha: float | None = None
    later: bool = False
    edge: float = 0.0
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """The stored shapes at a rank."""
        if not self.ladder:
            return dict(self.stored)
        return self.kind.truncated_shapes(self.stored, rank)

    def cut(self, role: str, tensor: Tensor, rank: int) -> Tensor:
        """A tensor of this form at a rank."""
        return self.kind.truncated(role, tensor, rank) if self.ladder else tensor

    @property
    def ranks(self) -> range:
        """The ranks to choose from; a form without a ladder has the one rank 0."""
        return range(1, len(self.errors)) if self.ladder else range(1)

    @cached_property
    def signal(self) -> int:
        """The number of leading ranks that stand out of the rounding noise."""
        gains = (before - after for before, after in pairwise(self.errors))
        return sum(1 for _ in takewhile(lambda gain: gain > self.edge, gains))

    def error(self, rank: int) -> float:
        """‖Δ − stored‖² at one of `ranks`."""
        return self.errors[rank] if self.ladder else self.errors[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass
class Fitted:
    """One layer as measured: ‖Δ‖² and the forms that it may take.

    `noise` is the share of ‖Δ‖² that rounding is expected to leave, 0 if it is not known; only
    measured with a ladder. `lora` is the energy that a LoRA of as many numbers keeps.
    """

    norm: float
    noise: float = 0.0
    forms: list[Form] = field(default_factory=list)
    lora: float | None = None
