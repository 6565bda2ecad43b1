"""Run an extraction: probe, fit, choose the ranks, write."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from adaptkit import engine
from adaptkit.ops.adapter_file.verdict import loading
from adaptkit.ops.difference.probe import Probe, probe
from adaptkit.ops.extract.fit import Fitter
from adaptkit.ops.extract.output import spool_key
from adaptkit.ops.extract.plan import Plan, recipes_of, step_of
from adaptkit.ops.extract.result import Report, Result
from adaptkit.ops.extract.same_size import looked_at, many
from adaptkit.ops.extract.verify import Verifier
from adaptkit.ops.ranks.forms import Fitted, Form, Pick
from adaptkit.ops.stages import counting

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from adaptkit.files.spool import Spool
    from adaptkit.ops.difference.pairing import Pair
    from adaptkit.ops.extract.recipe import FitRecipe
    from adaptkit.ops.stages import Progress
    from adaptkit.steps import Step

__all__ = ["run"]

SPOOL = 64_000_000  # bytes of results held in memory before they go to a temporary file


def run(plan: Plan, progress: Progress | None = None) -> Report:
    """Fit every changed slot, choose the ranks and write the adapter.

    This is the only part that reads weights.
    """
    from adaptkit.files.spool import Spool

    started = time.perf_counter()
    resources = engine.Resources.choose(plan.options.device, plan.options.memory)
    looked = probe(plan.base, plan.tuned, plan.jobs, resources, progress)
    with Spool(SPOOL, plan.output) as spool:
        fitting = _Fitting(plan, looked, spool, resources)
        fitting.run(progress)
        result = Result(plan, looked, [(job, fitting.found[job.number]) for job in plan.jobs])
        told = counting(progress, "choosing", len(plan.jobs), "layers")
        result.choose()
        if told is not None:
            told(len(plan.jobs))
        fitting.finish(result, progress)
        fitting.compare(result, progress)
        draft = result.report()
        stored = frozenset(job.number for job, _, _ in result.stored())
        verifier = None
        if plan.options.verify:
            verifier = Verifier(plan, stored, result.relative_error, progress)
        size = result.output().write(spool, verifier, progress)
    measured = None if verifier is None else verifier.measured
    seconds = time.perf_counter() - started
    family = plan.base.family.name if plan.base.known else None
    verdict = loading(plan.output, family)
    notes = (*draft.notes, *dict.fromkeys(fitting.notes))
    return replace(draft, bytes=size, seconds=seconds, measured=measured, notes=notes, **verdict)


class _Fitting:
    """Run the fitter over layers. Their tensors go to the spool, see `spool_key`."""

    def __init__(
        self, plan: Plan, looked: Probe, spool: Spool, resources: engine.Resources
    ) -> None:
        self.plan, self.spool, self.resources = plan, spool, resources
        self.recipes = {job.number: recipes_of(job, plan.options, looked) for job in plan.jobs}
        # stacks of a device take the look with others
        self.later = resources.on_cpu and self._put_off()
        self.found: dict[int, Fitted] = {}
        self.notes: tuple[str, ...] = ()
        self.steps: Sequence[Step[Pair]] = plan.steps
        if not resources.on_cpu:  # a device gets both weights whole
            self.steps = [
                step_of(job, plan.base, plan.tuned, plan.options, streamed=False)
                for job in plan.jobs
            ]

    def _put_off(self) -> bool:
        """Leave the looks at LoRAs of the same size for the end, if there are many."""
        told = [
            job
            for job in self.plan.jobs
            if any(one.kind.against_low_rank for one in self.recipes[job.number])
        ]
        if not many(told):
            return False
        for job in told:
            looks = (replace(one, looked=False) for one in self.recipes[job.number])
            self.recipes[job.number] = tuple(looks)
        return True

    def run(self, progress: Progress | None) -> None:
        told = counting(progress, "fitting", len(self.steps), "layers")
        self._run(self.steps, self.recipes, self._keep, told)

    def finish(self, result: Result, progress: Progress | None) -> None:
        """Fit once more at the ranks chosen: forms left for later, and kinds that gain by it."""
        recipes = {
            job.number: again
            for job, pick in result.picked()
            if pick and (again := self._again(job, pick))
        }
        steps = [step for step in self.steps if step.payload.number in recipes]
        if steps:
            told = counting(progress, "refitting", len(steps), "layers")
            self._run(steps, recipes, lambda job, fitted: self._complete(result, job, fitted), told)

    def compare(self, result: Result, progress: Progress | None) -> None:
        """Look at LoRAs of the same size, if that was left: for some layers that differ."""
        ranks = looked_at(result.stored()) if self.later else {}
        steps = [
            replace(step, shape=(step.shape, ranks[step.payload.number]))
            for step in self.steps
            if step.payload.number in ranks
        ]
        if not steps:
            return
        fitter = Fitter((self.plan.base, self.plan.tuned), {}, self.plan.output)

        def look(jobs: Sequence[Pair], tensors: dict[str, Tensor]) -> list[float]:
            return fitter.energies(jobs, tensors, ranks[jobs[0].number])

        def keep(job: Pair, energy: float) -> None:
            self.found[job.number].lora = energy

        work = engine.Work(fitter.load, look, keep, lambda _: 1, announce=fitter.announce)
        told = counting(progress, "comparing", len(steps), "layers")
        self.notes += engine.run(steps, work, self.resources, told)

    def _again(self, job: Pair, pick: Pick) -> tuple[FitRecipe, ...]:
        """The recipe to fit a layer once more; empty if its form is final."""
        form = pick.form
        mine = (one for one in self.recipes[job.number] if one.kind is form.kind and one.ladder)
        recipe = next(mine, None)
        if recipe is None or not (form.later or form.kind.refits):
            return ()
        rank = pick.rank if form.ladder else None
        return (replace(recipe, spec=replace(recipe.spec, rank=rank), ladder=False),)

    def _run(self, steps: Sequence[Step[Pair]], recipes: Any, store: Any, report: Any) -> None:
        pair = self.plan.base, self.plan.tuned
        fitter = Fitter(pair, recipes, self.plan.output, on_cpu=self.resources.on_cpu)
        work = engine.Work(
            fitter.load,
            fitter.fit,
            store,
            lambda found: sum(form.nbytes for form in found.forms),
            announce=fitter.announce if fitter.on_cpu else None,
        )
        # layers of one shape may have recipes of their own: ranks and kinds chosen for each
        alike = [
            replace(step, shape=(step.shape, recipes.get(step.payload.number))) for step in steps
        ]
        self.notes += engine.run(alike, work, self.resources, report)

    def _keep(self, job: Pair, fitted: Fitted) -> None:
        for number, form in enumerate(fitted.forms):
            self._spool(job, number, form)
        self.found[job.number] = fitted

    def _complete(self, result: Result, job: Pair, fitted: Fitted) -> None:
        found, pick, (form,) = self.found[job.number], result.picks[job.number], fitted.forms
        assert pick is not None
        found.lora = fitted.lora
        if pick.form.later:
            number = next(n for n, other in enumerate(found.forms) if other is pick.form)
            self._spool(job, number, form)
        elif form.stored == pick.form.shapes(pick.rank) and form.error(0) < pick.error:
            found.forms.append(form)
            self._spool(job, len(found.forms) - 1, form)
            result.picks[job.number] = Pick(form, 0)

    def _spool(self, job: Pair, number: int, form: Form) -> None:
        for role, tensor in form.tensors.items():
            self.spool.append(spool_key(job, number, role), tensor)
        form.tensors = {}
