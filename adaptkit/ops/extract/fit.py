"""What a layer that differs may be stored as: fitted on the device, rounded as it will be written, and measured."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from adaptkit.algorithms.contract import ALPHA, FitSpec, Stated
from adaptkit.errors import NonFinite
from adaptkit.keymap import algorithms
from adaptkit.ops.difference.probe import as_rounded
from adaptkit.ops.ranks.forms import CUT, Fitted, Form
from adaptkit.ops.shared import torch_dtype

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from adaptkit.algorithms.contract import Weights
    from adaptkit.checkpoint import Checkpoint
    from adaptkit.ops.difference.pairing import Pair

__all__ = ["FitRecipe", "Fitter"]

ROUGH = 5e-3  # of the error of a LoRA that is only held beside a LoKr: three digits are shown


@dataclass(frozen=True)
class FitRecipe:
    """How one layer is to be fitted: `kind` at `rank` (None: its fullest form).

    `ladder`: so that any lower rank may be chosen afterwards. `alpha` is stored instead of the rank; `quantile`: factors are
    clamped to this quantile of their magnitudes, as kohya's scripts do.
    """

    kind: str
    rank: int | None = None
    ladder: bool = False
    factor: int = 8
    svd: str = "auto"
    both: bool = False
    alpha: float | None = None
    quantile: float | None = None


class Fitter:
    """Loads and fits layers; `recipes` says how, by the number of the pair (none: the layer is only compared)."""

    def __init__(
        self,
        pair: tuple[Checkpoint, Checkpoint],
        recipes: Mapping[int, Sequence[FitRecipe]],
        output: Path,
        *,
        on_cpu: bool = True,
    ) -> None:
        self.base, self.tuned = pair
        self.recipes, self.output, self.on_cpu = recipes, output, on_cpu

    def load(self, job: Pair) -> dict[str, Tensor]:
        """Both weights, for a device that subtracts them; on the CPU ΔW, as it is read: the weights are not held then.

        The tuned weight stays where a ladder asks what of ΔW its rounding left.
        """
        if not self.on_cpu:
            return {"base": self.base.read(job.base), "tuned": self.tuned.read(job.tuned)}
        from adaptkit.linalg.precision import STREAM, streamed_difference

        found: dict[str, Tensor] = {}
        step = max(1, STREAM // max(1, job.matrix[1]))
        theirs: Iterable[Tensor] = self.tuned.blocks(job.tuned, step)
        if self._ladder(job):
            found["tuned"] = tuned = self.tuned.read(job.tuned)
            theirs = (tuned[start : start + step] for start in range(0, len(tuned), step))
        pairs = zip(theirs, self.base.blocks(job.base, step), strict=True)
        found["delta"], found["norm"] = streamed_difference(pairs, job.matrix)
        return found

    def announce(self, job: Pair) -> None:
        """Both weights of a layer will be read soon."""
        self.base.announce(job.base)
        self.tuned.announce(job.tuned)

    def _ladder(self, job: Pair) -> bool:
        return any(recipe.ladder for recipe in self.recipes.get(job.number, ()))

    def _difference(self, tensors: dict[str, Tensor]) -> tuple[Tensor, list[float]]:
        """ΔW of each (B, m, n), and ‖ΔW‖². In float32: in bf16 one entry in nine would change."""
        from adaptkit.linalg.precision import difference, norm_squared

        delta = (
            tensors.pop("delta")
            if self.on_cpu
            else difference(tensors["tuned"], tensors.pop("base"))
        )
        norms: list[float] = (tensors.pop("norm") if self.on_cpu else norm_squared(delta)).tolist()
        return delta, norms

    def fit(self, jobs: Sequence[Pair], tensors: dict[str, Tensor]) -> list[Fitted]:
        """ΔW of a stack of equal layers, and every form of it."""
        delta, norms = self._difference(tensors)
        for job, norm in zip(jobs, norms, strict=True):
            if not math.isfinite(norm):
                raise self._non_finite(job)
        recipes = self.recipes.get(jobs[0].number, ())
        tuned = tensors.pop("tuned", None)
        noise = [0.0] * len(jobs)
        if tuned is not None and self._ladder(jobs[0]):
            noise = _noise(as_rounded(self.tuned, jobs[0], tuned), delta)
        del tuned
        results = [Fitted(*told) for told in zip(norms, noise, strict=True)]
        changed = [n for n, norm in enumerate(norms) if norm > 0 and recipes]
        if not changed:
            return results
        # a copy is made only of a stack in which some layers did not change
        part = delta if len(changed) == len(jobs) else delta[changed]
        fits = [(recipe, weights) for recipe in recipes for weights in _fits(part, jobs[0], recipe)]
        for number, (recipe, weights) in enumerate(fits):
            last = number + 1 == len(fits)
            sized = recipe.kind == "lokr" and not recipe.ladder
            lora = _lora_of_size(jobs[0], part, weights.member(0)) if sized else None
            for place, n in enumerate(changed):
                if lora is not None:
                    results[n].lora = float(lora[place])
                # the last form may use up the difference
                own = part[place] if last else part[place].clone()
                form = self._form(jobs[n], recipe, weights.member(place), own)
                form.edge = _edge(form, noise[n] / own.numel())
                results[n].forms.append(form)
        return results

    def _form(self, job: Pair, recipe: FitRecipe, weights: Weights, delta: Tensor) -> Form:
        """Round to what is written, and measure what that leaves of `delta`, which it overwrites."""
        from adaptkit.linalg.precision import cast

        dtype = torch_dtype(job.dtype)
        if recipe.kind == "full":
            weights = replace(weights, role=job.role, vector=len(job.shape) == 1)  # type: ignore[type-var]
        try:
            encoded = {
                role: t if role == ALPHA else cast(t, dtype) for role, t in weights.encode().items()
            }
        except NonFinite as error:
            error.hint = "write with --dtype bf16 or fp32"
            raise error.at(file=self.output, tensor=job.label) from None
        shapes = {role: tuple(t.shape) for role, t in encoded.items() if role != ALPHA}
        alpha = float(encoded[ALPHA]) if ALPHA in encoded else None
        facts = type(weights).facts(shapes, None if alpha is None else Stated(alpha))
        rounded = type(weights).decode({role: encoded[role] for role in shapes}, facts)
        ladder = recipe.ladder and set(CUT.get(recipe.kind, ("",))) <= shapes.keys()
        errors = _ladder(rounded, delta) if ladder else (_left(rounded, delta),)
        tensors = {role: encoded[role].cpu().contiguous() for role in shapes}
        later = recipe.kind == "full" and recipe.ladder
        return Form(
            recipe.kind,
            job.dtype,
            shapes,
            errors,
            ladder,
            alpha,
            later=later,
            tensors={} if later else tensors,
        )

    def _non_finite(self, job: Pair) -> NonFinite:
        import torch

        for checkpoint, pieces in ((self.base, job.base), (self.tuned, job.tuned)):
            if not bool(torch.isfinite(checkpoint.read(pieces)).all()):
                return NonFinite(
                    "holds NaN or infinity", file=checkpoint.source.path, tensor=pieces[0].name
                )
        return NonFinite(
            "the difference of the two checkpoints overflows",
            file=self.tuned.source.path,
            tensor=job.label,
        )


def _noise(rounded: Tensor, delta: Tensor) -> list[float]:
    """Of each difference (B, m, n) the expected ‖·‖² of rounding; 0 for one that lies within the grid of its file."""
    from adaptkit.linalg.noise import WEAK, rounding_noise, zero_share

    floors = rounding_noise(rounded).floor.tolist()
    return [
        floor if share < WEAK else 0.0
        for floor, share in zip(floors, zero_share(delta).tolist(), strict=True)
    ]


def _edge(form: Form, variance: float) -> float:
    """The energy up to which a rank of this form may be noise of this variance: of ΔW, or of a LoKr's second factor."""
    from adaptkit.linalg.noise import noise_edge

    if not form.ladder:
        return 0.0
    left, right = (form.shapes[role] for role in CUT[form.kind])
    return variance * noise_edge(left[0], math.prod(right[1:]))


def _fits(delta: Tensor, job: Pair, recipe: FitRecipe) -> list[Any]:
    """The weights of a recipe: one kind, but a ladder of LoKr ends in a second factor that is full."""
    kind = algorithms()[recipe.kind]
    spec = FitSpec(recipe.rank, job.shape[2:], recipe.factor, recipe.svd, both=recipe.both)
    if recipe.kind != "lokr" or not recipe.ladder:
        found = kind.fit(delta, spec)
        if recipe.quantile is not None:
            found = _clamped(found, recipe.quantile)
        return [found if recipe.alpha is None else _with_alpha(found, recipe.alpha)]
    full = kind.fit(delta, replace(spec, rank=None))
    return [*_truncatable(full, recipe.rank), full]


def _truncatable(full: Any, rank: int | None) -> list[Any]:
    """A LoKr with its second factor as a product, of as high a rank as is smaller than full."""
    from adaptkit.algorithms.contract import Product
    from adaptkit.algorithms.lokr import full_from
    from adaptkit.linalg.lowrank import SvdSpec, truncated_svd

    dense = full.w2.dense()
    rows, columns = dense.shape[-2:]
    most = min(full_from(rows, columns, full.kernel) - 1, (rows * columns - 1) // (rows + columns))
    most = most if rank is None else min(rank, most)
    if most < 1:
        return []
    svd = truncated_svd(dense, SvdSpec(most))
    return [replace(full, w2=Product(*svd.balanced()))]


def _with_alpha(weights: Any, alpha: float) -> Any:
    """The same ΔW at another alpha: what the scale alpha / rank takes away stands in the first factor."""
    rank = weights.down.shape[-2]
    return replace(weights, up=weights.up * (rank / alpha), scale=alpha / rank)


def _clamped(weights: Any, quantile: float) -> Any:
    """Factors clamped to a quantile of both: as the usual extraction scripts do, at the price of an error."""
    import torch

    both = torch.cat([weights.up.flatten(-2), weights.down.flatten(-2)], -1).abs()
    # torch's quantile takes 16 million numbers at most
    place = max(1, math.ceil(quantile * both.shape[-1]))
    most = both.kthvalue(place, dim=-1).values[..., None, None]
    return replace(weights, up=weights.up.clamp(-most, most), down=weights.down.clamp(-most, most))


def _left(rounded: Weights, delta: Tensor) -> float:
    """‖Δ − stored‖²; overwrites Δ."""
    from adaptkit.linalg.precision import norm_squared

    return float(norm_squared(rounded.apply(delta, -1.0)))


def _ladder(rounded: Any, delta: Tensor) -> tuple[float, ...]:
    """‖Δ − stored‖² at every rank, 0 first."""
    from adaptkit.linalg.kron import rearrange
    from adaptkit.linalg.lowrank import truncation_errors
    from adaptkit.linalg.precision import norm_squared

    if rounded.name == "lora":
        up, down = rounded.factors()
        return tuple(truncation_errors(delta, up, down).tolist())
    # with M the best second factor for this w1, what M leaves is orthogonal to all that a rank of it takes away
    w1, size = rounded.w1.dense(), float(norm_squared(rounded.w1.dense()))
    if not size:
        return (float(norm_squared(delta)),)
    left, right = rounded.w2.left, rounded.w2.right
    r = rearrange(delta, *w1.shape[-2:])
    best = (w1.reshape(1, -1) @ r / size).reshape(left.shape[-2], right.shape[-1])
    rest = float(norm_squared(r.sub_(w1.reshape(-1, 1) * best.reshape(1, -1))))
    scale = rounded.scale
    return tuple((rest + size * truncation_errors(best, left * scale, right)).tolist())


def _lora_of_size(job: Pair, delta: Tensor, weights: Weights) -> Tensor:
    """The energies (B,) that the best LoRA with as many parameters as this LoKr keeps of each delta (B, m, n)."""
    from adaptkit.linalg.lowrank import SvdSpec, energies

    parameters = sum(t.numel() for role, t in weights.encode().items() if role != ALPHA)
    rank = min(parameters // sum(job.matrix), *job.matrix)
    return (
        delta.new_zeros(len(delta))
        if rank == 0
        else energies(delta, rank, SvdSpec(rank, tol=ROUGH)).sum(-1)
    )
