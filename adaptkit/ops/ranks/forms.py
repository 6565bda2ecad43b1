"""Which form and rank each layer of a difference is stored at, over all layers at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise, takewhile
from typing import TYPE_CHECKING

from adaptkit.errors import NotRepresentable
from adaptkit.keymap import algorithms
from adaptkit.ops.adapter_file.size import module_size
from adaptkit.ops.ranks.knapsack import RankCurve, least_bytes, least_error
from adaptkit.ops.ranks.policies import Error, Policy, Size

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

__all__ = ["EXPLAINED", "Fitted", "Form", "Layer", "Pick", "Picks", "choose", "choose_any"]

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

    @property
    def alpha(self) -> float:
        """Alpha as it is stored: the rank chosen, for a ladder."""
        if self.form.ladder:
            return float(self.rank)
        return 0.0 if self.form.alpha is None else self.form.alpha

    @property
    def stored_rank(self) -> int | None:
        """The rank that a reader finds in the stored shapes."""
        return algorithms()[self.form.kind].facts(self.form.at(self.rank)).rank


@dataclass(frozen=True)
class Layer:
    """A layer that differs. `stem` begins its keys; `alpha`: the format stores one.

    `convolution`: `--conv-rank` applies.
    """

    fitted: Fitted
    stem: str
    alpha: bool
    convolution: bool

    def _bytes(self, form: Form, rank: int) -> int:
        """What a form takes in the file."""
        alpha = self.alpha and form.alpha is not None
        return module_size(form.numbers(rank), form.dtype, self.stem, len(form.shapes), alpha=alpha)

    def rungs(self, *, trimmed: bool = False) -> list[tuple[Pick, int]]:
        """Every form and rank, and its bytes in the file; `trimmed`: of those that hold more than the noise of rounding."""
        found = []
        for form in self.fitted.forms:
            ranks = form.ranks[: form.signal] if trimmed and form.ladder else form.ranks
            found += [(Pick(form, rank), self._bytes(form, rank)) for rank in ranks]
        if not trimmed:
            return found
        # what takes more than the smallest form that leaves but noise would spend it on noise
        enough = min(
            (size for pick, size in found if pick.error <= EXPLAINED * self.fitted.noise),
            default=math.inf,
        )
        return [(pick, size) for pick, size in found if size <= enough]


@dataclass(frozen=True)
class Picks:
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
) -> Picks:
    """By a rank rule, over the ladder of one kind. `rest`: ‖·‖² of what no adapter holds, part of every error.

    A size is not filled with noise of rounding; the other rules are about the difference as it is. NotRepresentable where
    no ranks reach the error asked for, or the size.
    """
    ladders = _ladders(layers, trimmed=isinstance(policy, Size))
    modules = [_module(layer, ladder) for layer, ladder in zip(layers, ladders, strict=True)]
    if isinstance(policy, Error):
        modules.append(RankCurve((), rest, (0,)))

    def picked(ranks: Sequence[int]) -> list[Pick | None]:
        return [
            ladder[rank - 1][0] if rank else None
            for ladder, rank in zip(ladders, ranks, strict=False)
        ]

    picks = picked(policy.choose(modules, lambda ranks: measure(picked(ranks))))
    if isinstance(policy, Error):
        _check_error(layers, picks, rest, policy.error)
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
    """What the file takes beyond its layers is known only for a choice, so that their budget is searched."""
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


CUT = {
    "lora": ("up", "down"),
    "lokr": ("w2_a", "w2_b"),
}  # by kind: the roles that share a rank, last and first axis


@dataclass
class Form:
    """A layer as it would be stored: rounded tensors by role, and ‖Δ − stored‖² (`errors[-1]`).

    With a ladder `errors[k]` belongs to the leading k of the rank; `errors[0]` to nothing stored. `later`: the tensors are
    made when the form is chosen, since they are as large as the layer. Of a ladder, ranks that take away no more than `edge`
    of the squared error may be noise of rounding.
    """

    kind: str
    dtype: str
    shapes: Mapping[str, tuple[int, ...]]
    errors: tuple[float, ...]
    ladder: bool = False
    alpha: float | None = None
    later: bool = False
    edge: float = 0.0
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def at(self, rank: int) -> dict[str, tuple[int, ...]]:
        """The stored shapes at a rank of the ladder."""
        if not self.ladder:
            return dict(self.shapes)
        left, right = CUT[self.kind]
        found = dict(self.shapes)
        found[left] = (found[left][0], rank, *found[left][2:])
        found[right] = (rank, *found[right][1:])
        return found

    def cut(self, role: str, tensor: Tensor, rank: int) -> Tensor:
        """A tensor of this form at a rank."""
        if not self.ladder or role not in CUT[self.kind]:
            return tensor
        return (tensor[:, :rank] if role == CUT[self.kind][0] else tensor[:rank]).contiguous()

    @property
    def ranks(self) -> range:
        """What may be chosen: ranks of the ladder, or the form as it is."""
        return range(1, len(self.errors)) if self.ladder else range(1)

    @cached_property
    def signal(self) -> int:
        """How many leading ranks of the ladder stand out of the noise of rounding."""
        gains = (before - after for before, after in pairwise(self.errors))
        return sum(1 for _ in takewhile(lambda gain: gain > self.edge, gains))

    def error(self, rank: int) -> float:
        """‖Δ − stored‖² at one of `ranks`."""
        return self.errors[rank] if self.ladder else self.errors[-1]

    def numbers(self, rank: int) -> int:
        """How many numbers are stored, alpha aside."""
        return sum(math.prod(shape) for shape in self.at(rank).values())

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass
class Fitted:
    """What the engine found for one layer: ‖Δ‖², the forms it may take, and (LoKr) what of ‖Δ‖² a LoRA of its size keeps.

    `noise`: with a ladder what rounding is expected to have left of ‖Δ‖²; 0 where that cannot be told.
    """

    norm: float
    noise: float = 0.0
    forms: list[Form] = field(default_factory=list)
    lora: float | None = None
