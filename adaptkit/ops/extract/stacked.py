"""Fit equal layers on an accelerator: errors, norms and checks stay there until one look at all.

What is unusual (NaN, an overflow) is not named here: the layers are then fitted with care.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from adaptkit.algorithms.contract import ALPHA
from adaptkit.meaning import as_read
from adaptkit.ops.extract.same_size import rank_of_size
from adaptkit.ops.ranks.forms import Fitted, Form
from adaptkit.ops.shared import torch_dtype
from adaptkit.staging.lanes import back

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from adaptkit.algorithms.contract import Weights
    from adaptkit.linalg.stacks import Asked
    from adaptkit.ops.difference.pairing import Pair
    from adaptkit.ops.extract.recipe import FitRecipe

__all__ = ["ROUGH", "Stack", "edge", "fit_stack", "rank_beside"]

ROUGH = 5e-3  # of the error of a LoRA that is only compared: three digits are shown


@dataclass(frozen=True)
class Stack:
    """Differences (B, m, n) of `jobs`, all to be fitted by `recipes`, and their ‖·‖² (B,).

    `noise` is (B, 2): the expected ‖·‖² of rounding and the share of exact zeros; None if no
    recipe asks for it.
    """

    jobs: Sequence[Pair]
    recipes: Sequence[FitRecipe]
    delta: Tensor
    norm: Tensor
    noise: Tensor | None


@dataclass(frozen=True)
class _Fit:
    """One form of all layers: stored tensors, and numbers that are still on the device.

    errors: (B,) or (B, r + 1)   sizes: (B, roles), the largest magnitudes
    lora: what tells the energies that a LoRA of the same size keeps, or None
    """

    recipe: FitRecipe
    encoded: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    alpha: float | None
    ladder: bool
    errors: Tensor
    sizes: Tensor
    lora: Asked | None

    @property
    def numbers(self) -> tuple[Tensor, ...]:
        """What the host looks at."""
        return (self.errors, self.sizes, *(self.lora.numbers if self.lora else ()))


def fit_stack(stack: Stack) -> list[Fitted] | None:
    """Every form of every layer; None if any number is odd. The differences are used up."""
    from adaptkit.linalg.hosted import fetched
    from adaptkit.linalg.noise import WEAK

    fits = list(_fits(stack))
    told = [stack.norm] if stack.noise is None else [stack.norm, stack.noise]
    norms, *rest = fetched(*told, *(part for fit in fits for part in fit.numbers))
    noise = norms.new_zeros(len(norms), 2) if stack.noise is None else rest.pop(0)
    seen = [_Seen.take(fit, norms, rest) for fit in fits]
    if not all(map(math.isfinite, norms.tolist())) or not all(one.plain(norms) for one in seen):
        return None
    floors = [floor if zeros < WEAK else 0.0 for floor, zeros in noise.tolist()]
    results = [Fitted(*one) for one in zip(norms.tolist(), floors, strict=True)]
    for one in seen:
        _share(one, stack, results)
    return results


def rank_beside(job: Pair, weights: Weights) -> int:
    """The rank of a LoRA of as many numbers as these weights; 0 if they are too few for any."""
    numbers = sum(t.numel() for role, t in weights.encode().items() if role != ALPHA)
    return rank_of_size(job, numbers)


def _fits(stack: Stack) -> Iterator[_Fit]:
    from adaptkit.linalg.lowrank import SvdSpec, energies_asked

    first = stack.jobs[0]
    found = [
        (recipe, weights)
        for recipe in stack.recipes
        for weights in recipe.kind.candidates(
            stack.delta, replace(recipe.spec, kernel=first.shape[2:]), ladder=recipe.ladder
        )
    ]
    for number, (recipe, weights) in enumerate(found):
        lora = None
        if recipe.compared and (rank := rank_beside(first, weights.member(0))):
            lora = energies_asked(stack.delta, SvdSpec(rank, tol=ROUGH))
        # the last form may use up the differences, unless it shares their memory
        last = number + 1 == len(found) and not recipe.kind.dense
        own = stack.delta if last else stack.delta.clone()
        yield _fitted(first, recipe, weights, own, lora)


def _fitted(
    job: Pair, recipe: FitRecipe, weights: Weights, delta: Tensor, lora: Asked | None
) -> _Fit:
    """Round to what is written, and measure the errors against `delta`, which is overwritten."""
    import torch

    from adaptkit.linalg.precision import norm_squared

    dtype = torch_dtype(job.dtype)
    whole = weights.placed(job.role, vector=len(job.shape) == 1).encode()
    encoded = {role: t if role == ALPHA else t.to(dtype) for role, t in whole.items()}
    sizes = [
        torch.linalg.vector_norm(t, float("inf"), dim=tuple(range(1, t.ndim)))
        for role, t in whole.items()
        if role != ALPHA
    ]
    rounded, _, shapes, alpha = as_read(recipe.kind, encoded, batch=1)
    ladder = recipe.ladder and recipe.kind.laddered(shapes)
    errors = (
        rounded.ladder_errors_of_stack(delta)
        if ladder
        else norm_squared(rounded.apply(delta, -1.0))
    )
    return _Fit(recipe, encoded, shapes, alpha, ladder, errors, torch.stack(sizes, -1), lora)


@dataclass(frozen=True)
class _Seen:
    """A form, and its numbers on the host."""

    fit: _Fit
    errors: Tensor
    sizes: Tensor
    lora: Tensor | None

    @classmethod
    def take(cls, fit: _Fit, norms: Tensor, numbers: list[Tensor]) -> _Seen:
        """Take the numbers of a form from the front of a list."""
        errors, sizes, *asked = (numbers.pop(0) for _ in fit.numbers)
        lora = fit.lora.told(norms, *asked).sum(-1) if fit.lora else None
        return cls(fit, errors.reshape(len(errors), -1), sizes, lora)

    def plain(self, norms: Tensor) -> bool:
        """Whether all that differs was fitted, and fits the dtype it is written in."""
        import torch

        from adaptkit.linalg.precision import overflow

        dtypes = [t.dtype for role, t in self.fit.encoded.items() if role != ALPHA]
        limits = self.sizes.new_tensor([overflow(dtype) for dtype in dtypes])
        good = torch.isfinite(self.errors).all(-1) & (self.sizes < limits).all(-1)
        if self.lora is not None:
            good &= torch.isfinite(self.lora)
        return bool((good | (norms == 0)).all())


def _share(one: _Seen, stack: Stack, results: Sequence[Fitted]) -> None:
    """Give every layer that differs its form, its tensors on the host."""
    fit, kind = one.fit, one.fit.recipe.kind
    later = kind.dense and fit.recipe.ladder
    differ = any(found.norm for found in results)
    host = {r: back(fit.encoded[r]) for r in fit.shapes} if differ and not later else {}
    for n, (job, found) in enumerate(zip(stack.jobs, results, strict=True)):
        if not found.norm:
            continue
        tensors = {role: tensor[n] for role, tensor in host.items()}
        errors = tuple(one.errors[n].tolist())
        form = Form(
            kind, job.dtype, fit.shapes, errors, fit.ladder, fit.alpha, later=later, tensors=tensors
        )
        form.edge = edge(form, found.noise / math.prod(job.matrix))
        found.forms.append(form)
        if fit.recipe.compared:  # of too few numbers for any LoRA: it would keep nothing
            found.lora = 0.0 if one.lora is None else float(one.lora[n])


def edge(form: Form, variance: float) -> float:
    """The energy up to which a rank of this form may be noise of this variance."""
    from adaptkit.linalg.noise import noise_edge

    return variance * noise_edge(*form.kind.ladder_sides(form.stored)) if form.ladder else 0.0
