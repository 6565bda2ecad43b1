"""Fit the forms of a layer that differs, rounded as written and measured."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from adaptkit.algorithms.contract import ALPHA
from adaptkit.checkpoint import exchanged
from adaptkit.errors import NonFinite
from adaptkit.files.tensors import finite
from adaptkit.meaning import as_read
from adaptkit.ops.difference.look import as_rounded
from adaptkit.ops.extract.stacked import ROUGH, Stack, edge, fit_stack, rank_beside
from adaptkit.ops.ranks.forms import Fitted, Form
from adaptkit.ops.shared import torch_dtype
from adaptkit.staging.lanes import back

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from adaptkit.algorithms.contract import Weights
    from adaptkit.checkpoint import Checkpoint
    from adaptkit.ops.difference.pairing import Pair
    from adaptkit.ops.extract.recipe import FitRecipe

__all__ = ["Fitter"]


class Fitter:
    """Load and fit layers. `recipes` holds the recipes of each, by the number of its pair.

    A layer without recipes is only compared.
    """

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
        """Read both weights, or on the CPU ΔW: it is subtracted while it is read.

        With a ladder, the tuned weight is kept: its rounding noise is measured.
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
        """Tell both checkpoints that a layer will be read soon."""
        self.base.announce(job.base)
        self.tuned.announce(job.tuned)

    def _ladder(self, job: Pair) -> bool:
        return any(recipe.ladder for recipe in self.recipes.get(job.number, ()))

    def _difference(self, tensors: dict[str, Tensor], swapped: bool) -> tuple[Tensor, list[float]]:
        """ΔW (B, m, n) in float32, and ‖ΔW‖² of each; bf16 would change one entry in nine."""
        from adaptkit.linalg.precision import difference, norm_squared

        if "delta" in tensors:
            delta, norm = tensors.pop("delta"), tensors.pop("norm")
        else:
            delta = difference(tensors["tuned"], tensors.pop("base"))
            norm = norm_squared(delta)
        norms: list[float] = norm.tolist()
        # fitted and measured in the order of rows that the reader of the file expects
        return exchanged(delta, -2) if swapped else delta, norms

    def energies(self, jobs: Sequence[Pair], tensors: dict[str, Tensor], rank: int) -> list[float]:
        """What a LoRA of this rank would keep of each difference of equal layers."""
        delta, _ = self._difference(tensors, jobs[0].swapped)
        found: list[float] = _lora_of_rank(delta, rank).tolist()
        return found

    def fit(self, jobs: Sequence[Pair], tensors: dict[str, Tensor]) -> list[Fitted]:
        """Subtract a stack of equal layers and fit every form of the differences."""
        found = self._at_once(jobs, tensors)
        return self._with_care(jobs, tensors) if found is None else found

    def _at_once(self, jobs: Sequence[Pair], tensors: dict[str, Tensor]) -> list[Fitted] | None:
        """On an accelerator, with one look at all numbers; None elsewhere, and if any is odd."""
        import torch
        from torch.linalg import LinAlgError  # type: ignore[attr-defined]

        from adaptkit.linalg.looks import noise_of_stack, zeros_of_stack
        from adaptkit.linalg.precision import difference, norm_squared, works_on_stacks

        if "delta" in tensors or not works_on_stacks(tensors["base"].device):
            return None
        delta = difference(tensors["tuned"], tensors["base"])
        norm = norm_squared(delta)
        delta = exchanged(delta, -2) if jobs[0].swapped else delta
        noise = None
        if self._ladder(jobs[0]):
            rounded = as_rounded(self.tuned, jobs[0], tensors["tuned"])
            noise = torch.stack((noise_of_stack(rounded).floor, zeros_of_stack(delta)), -1)
        recipes = self.recipes.get(jobs[0].number, ())
        try:
            return fit_stack(Stack(jobs, recipes, delta, norm, noise))
        except LinAlgError:
            return None

    def _with_care(self, jobs: Sequence[Pair], tensors: dict[str, Tensor]) -> list[Fitted]:
        """With a look after every step, which names the layer and the tensor at fault."""
        from torch.linalg import LinAlgError  # type: ignore[attr-defined]

        delta, norms = self._difference(tensors, jobs[0].swapped)
        for job, norm in zip(jobs, norms, strict=True):
            if not math.isfinite(norm):
                raise self._non_finite(job)
        noise = self._noise(jobs, tensors.pop("tuned", None), delta)
        results = [Fitted(*told) for told in zip(norms, noise, strict=True)]
        recipes = self.recipes.get(jobs[0].number, ())
        changed = [n for n, norm in enumerate(norms) if norm > 0 and recipes]
        if changed:
            # a copy is made only of a stack in which some layers did not change
            part = delta if len(changed) == len(jobs) else delta[changed]
            try:
                self._forms([jobs[n] for n in changed], part, [results[n] for n in changed])
            except LinAlgError:
                # the squares of numbers near the end of float32 overflow
                raise self._non_finite(jobs[changed[0]]) from None
        return results

    def _noise(self, jobs: Sequence[Pair], tuned: Tensor | None, delta: Tensor) -> list[float]:
        """The expected ‖·‖² of rounding in each difference; only a ladder asks for it."""
        if tuned is None or not self._ladder(jobs[0]):
            return [0.0] * len(jobs)
        return _noise(as_rounded(self.tuned, jobs[0], tuned), delta)

    def _forms(self, jobs: Sequence[Pair], delta: Tensor, results: Sequence[Fitted]) -> None:
        """Add every form of these differences, all not zero, to `results`."""
        kernel = jobs[0].shape[2:]
        fits = [
            (recipe, weights)
            for recipe in self.recipes[jobs[0].number]
            for weights in recipe.kind.candidates(
                delta, replace(recipe.spec, kernel=kernel), ladder=recipe.ladder
            )
        ]
        for recipe, weights in fits:
            if recipe.compared:
                rank = rank_beside(jobs[0], weights.member(0))
                for found, energy in zip(results, _lora_of_rank(delta, rank), strict=True):
                    found.lora = float(energy)
            for place, (job, found) in enumerate(zip(jobs, results, strict=True)):
                own = delta[place]
                form = self._form(job, recipe, weights.member(place), own, found.norm)
                if not all(map(math.isfinite, form.errors)):
                    raise self._non_finite(job)
                form.edge = edge(form, found.noise / own.numel())
                found.forms.append(form)

    def _form(
        self, job: Pair, recipe: FitRecipe, weights: Weights, delta: Tensor, norm: float
    ) -> Form:
        """Round to what is written and measure the error against `delta`, of ‖·‖² `norm`."""
        weights = weights.placed(job.role, vector=len(job.shape) == 1)
        encoded = self._encoded(job, weights)
        rounded, _, shapes, alpha = as_read(recipe.kind, encoded)
        ladder = recipe.ladder and recipe.kind.laddered(shapes)
        errors = rounded.ladder_errors(delta) if ladder else (_left(rounded, delta, norm),)
        later = recipe.kind.dense and recipe.ladder
        tensors = {} if later else {r: back(encoded[r].contiguous()) for r in shapes}
        return Form(
            recipe.kind, job.dtype, shapes, errors, ladder, alpha, later=later, tensors=tensors
        )

    def _encoded(self, job: Pair, weights: Weights) -> dict[str, Tensor]:
        from adaptkit.linalg.precision import cast

        dtype = torch_dtype(job.dtype)
        try:
            return {r: t if r == ALPHA else cast(t, dtype) for r, t in weights.encode().items()}
        except NonFinite as error:
            error.hint = "write with --dtype bf16 or fp32"
            raise error.at(file=self.output, tensor=job.label) from None

    def _non_finite(self, job: Pair) -> NonFinite:
        for checkpoint, pieces in ((self.base, job.base), (self.tuned, job.tuned)):
            if not finite(checkpoint.read(pieces)):
                return NonFinite(
                    "holds NaN or infinity", file=checkpoint.source.path, tensor=pieces[0].name
                )
        return NonFinite(
            "the difference of the two checkpoints overflows",
            file=self.tuned.source.path,
            tensor=job.label,
        )


def _noise(rounded: Tensor, delta: Tensor) -> list[float]:
    """The expected ‖·‖² of rounding in each difference (B, m, n).

    0 for a difference within the grid of its file, which cannot be told from noise.
    """
    from adaptkit.linalg.noise import WEAK, rounding_noise, zero_share

    floors = rounding_noise(rounded).floor.tolist()
    return [
        floor if share < WEAK else 0.0
        for floor, share in zip(floors, zero_share(delta).tolist(), strict=True)
    ]


def _left(rounded: Weights, delta: Tensor, norm: float) -> float:
    """‖Δ − stored‖²; `norm` is ‖Δ‖². A kind that is made by rows needs no second Δ."""
    from adaptkit.linalg.kron.blocks import kron_distance
    from adaptkit.linalg.lowrank import product_distance
    from adaptkit.linalg.precision import norm_squared, row_blocks

    thin = rounded.thin_factors() if rounded.low_rank else None
    if thin is not None and (found := product_distance(delta, *thin, norm)) is not None:
        return found
    pair = rounded.kron_factors()
    if pair is not None and (found := kron_distance(delta, *pair, norm)) is not None:
        return found
    if not rounded.by_rows:
        return float(norm_squared(delta - rounded.delta()))
    made = rounded.computed()
    each = [
        norm_squared(delta[rows] - made.some_rows(rows.start, rows.stop))
        for rows in row_blocks(delta)
    ]
    return float(sum(each)) if each else 0.0


def _lora_of_rank(delta: Tensor, rank: int) -> Tensor:
    """The energies (B,) that the best LoRA of this rank keeps of each delta (B, m, n)."""
    from adaptkit.linalg.lowrank import SvdSpec, energies

    if rank == 0:
        return delta.new_zeros(len(delta))
    return energies(delta, rank, SvdSpec(rank, tol=ROUGH)).sum(-1)
