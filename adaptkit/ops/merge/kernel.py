"""The kernel of a merge: add all adapters of a weight in float32 and round once.

One pass serves one output or several.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from adaptkit.checkpoint import exchanged
from adaptkit.errors import NonFinite
from adaptkit.files.tensors import finite
from adaptkit.ops.merge.at_once import together
from adaptkit.ops.merge.cutting import WHOLE, Deltas, Part, once, part_of, whole_slot
from adaptkit.ops.merge.requantise import Numbers, repacked, requantised, type_name, widened
from adaptkit.ops.merge.steps import JointMerge, block_rows, by_rows, reused, square
from adaptkit.ops.shared import torch_dtype
from adaptkit.staging.lanes import Later, back

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from adaptkit.files.sink import Pieces
    from adaptkit.linalg.fused import Contest
    from adaptkit.ops.merge.output import Output, Scattered
    from adaptkit.ops.merge.plan import Plan, TensorMerge

__all__ = ["Blender", "Merged", "held"]


@dataclass(frozen=True)
class Merged:
    """Squared norms of W, ΔW and the rounding error of one output tensor.

    `written` are the tensors to write, by name; none if that is done already.
    """

    written: Mapping[str, Tensor]
    weight: float
    delta: float
    rounding: float


_Row = list[Merged | None] | Later[list[Merged | None]]  # of each output


@dataclass(frozen=True)
class _Target:
    """One output of stacked tensors, in blocks of rows.

    `out` is a block as stored, `pieces` the destination of each tensor, `parts` what is added.
    `delta` and `rounding` are the sums ‖ΔW‖² and ‖rounding‖² so far.
    """

    out: Tensor
    pieces: tuple[Pieces | Scattered, ...]
    parts: tuple[tuple[Part, float], ...]
    delta: Tensor
    rounding: Tensor

    def write(self, rows: Tensor, start: int) -> Tensor:
        """Round and write rows (b, k, n) from row `start`; return them as rounded."""
        rounded = self.out[:, : rows.shape[-2]].copy_(rows)
        for pieces, tensor in zip(self.pieces, rounded, strict=True):
            # `_checked` sees what is not finite in the sums of all blocks, before anything appears
            pieces.put(tensor, start * rows.shape[-1], copied=True)
        return rounded


class Blender:
    """Read and merge tensors of one base; a single plan is a batch of one."""

    def __init__(
        self, plans: Sequence[Plan], outputs: Sequence[Output], *, at_once: bool = False
    ) -> None:
        self.at_once = at_once
        self.plans, self.outputs = plans, outputs
        self.base = plans[0].base
        # ‖ΔW‖² of the Kronecker products by tensor and source, on devices
        self.norms: dict[tuple[str, int], float] = {}

    @cached_property
    def contest(self) -> Contest:
        """Which of two ways of a merge is faster on the device."""
        from adaptkit.linalg.fused import Contest

        return Contest()

    def load(self, joint: JointMerge) -> dict[str, Tensor]:
        """Read the weight, its scale, and the factors of every output."""
        loaded = {"base": self.base.source.read(joint.name)}
        if (key := self.base.quantization.scales.get(joint.name)) is not None:
            loaded["scale"] = self.base.source.read(key)
        read: set[int] = set()
        for merge, sources, plan in zip(joint.merges, joint.sources, self.plans, strict=True):
            for c, source in zip(merge.contributions if merge else (), sources, strict=True):
                if c.strength and source not in read:
                    stored = plan.adapters[c.adapter].read(c.entry)
                    if self.at_once and not (c.cut or c.rows or c.columns):
                        weights = c.entry.decode(stored)
                        if weights.kron_factors() is not None or weights.low_rank:
                            self.norms[joint.name, source] = weights.norm_squared()
                    stored |= whole_slot(self.base, c)
                    loaded |= {f"{source}/{role}": tensor for role, tensor in stored.items()}
                    read.add(source)
        return loaded

    def blend(self, joints: Sequence[JointMerge], tensors: dict[str, Tensor]) -> list[_Row]:
        """Apply all adapters in float32 (float64 for a float64 base), then round once.

        The joints have equal shapes and contributions, and their tensors are stacked. Return, for
        each joint, the result of each output.
        """
        stored, scale = tensors.pop("base"), tensors.pop("scale", None)
        found: list[list[Merged | Later[Merged] | None]] = [
            [None] * len(self.plans) for _ in joints
        ]
        whole: list[int] = []
        rows: list[int] = []
        for number, merge in enumerate(joints[0].merges):
            if merge is not None:
                plan = self.plans[number]
                cut = by_rows(merge, plan.base, at_once=self.at_once)
                (rows if cut else whole).append(number)
        for number in whole:
            spent = number == whole[-1] and not rows
            made = self._whole(number, joints, tensors, stored, scale, spent=spent)
            for n, merged in enumerate(made):
                found[n][number] = merged
        if rows:
            merge_all: Callable[..., Any] = self._at_once if self.at_once else self._by_rows
            for number, of_each in zip(rows, merge_all(rows, joints, tensors, stored), strict=True):
                for n, merged in enumerate(of_each):
                    found[n][number] = merged
        return [together(row, held(row)) for row in found]

    def _parts(
        self, number: int, joint: JointMerge, tensors: Mapping[str, Tensor], rows: int
    ) -> Iterator[tuple[Part, float]]:
        """Yield what an output adds, with factors in the compute dtype, and the strength."""
        from adaptkit.linalg.precision import upcast

        for c, source in zip(
            _present(joint.merges[number]).contributions, joint.sources[number], strict=True
        ):
            if c.strength:
                weights = c.entry.decode(
                    {role: upcast(tensors[f"{source}/{role}"]) for role, _ in c.entry.tensors()}
                )
                whole = tensors.get(f"{source}/{WHOLE}")
                whole = None if whole is None else upcast(whole)
                weights = part_of(weights, c, whole, self.plans[number].adapters)
                start, stop = c.rows or (0, rows)
                yield Part(weights, start, stop, (source, c.cut, c.rows)), c.strength

    # tensors in blocks of rows

    def _by_rows(
        self,
        numbers: Sequence[int],
        joints: Sequence[JointMerge],
        tensors: Mapping[str, Tensor],
        stored: Tensor,
    ) -> list[list[Merged]]:
        """Merge block by block and write every rounded block; return the results per output."""
        import torch

        from adaptkit.linalg.precision import compute_dtype, empty, norm_squared

        # a tensor may be empty
        flat = stored.reshape(*stored.shape[:2], math.prod(stored.shape[2:]))
        batch, m, n = flat.shape
        # cut by the tensor's shape alone: BLAS may round another number of rows otherwise, and
        # a merge has the same bits beside any other
        k = block_rows(m, n)
        targets = self._targets(numbers, joints, tensors, flat, k)
        old, new, spare = (
            empty((batch, k, n), compute_dtype(stored), flat.device) for _ in range(3)
        )
        weight = torch.zeros(batch, dtype=torch.float64)
        deltas = Deltas(part for target in targets for part, _ in target.parts)
        for start in range(0, m, k):
            stop = min(m, start + k)
            before, after, rest = (block[:, : stop - start] for block in (old, new, spare))
            before.copy_(flat[:, start:stop])
            weight += norm_squared(before).cpu()
            for target in targets:
                target.delta.add_(_blended(target, deltas, start, before, after, rest))
                target.rounding.add_(
                    norm_squared(rest.copy_(target.write(after, start)).sub_(after)).cpu()
                )
            deltas.clear()
        return [
            [
                self._checked(number, joint, pieces, weight[i], target.delta[i], target.rounding[i])
                for i, (joint, pieces) in enumerate(zip(joints, target.pieces, strict=True))
            ]
            for number, target in zip(numbers, targets, strict=True)
        ]

    def _targets(
        self,
        numbers: Sequence[int],
        joints: Sequence[JointMerge],
        tensors: Mapping[str, Tensor],
        flat: Tensor,
        rows: int,
    ) -> list[_Target]:
        import torch

        from adaptkit.linalg.precision import empty

        targets = []
        known: dict[Hashable, Part] = {}
        for number in numbers:
            dtype = torch_dtype(_present(joints[0].merges[number]).dtype)
            shape = self.base.source.infos[joints[0].name].shape
            pieces = tuple(
                self.outputs[number].pieces(joint.name, dtype, shape) for joint in joints
            )
            parts = self._parts(number, joints[0], tensors, flat.shape[1])
            same = tuple((once(known, part), strength) for part, strength in parts)
            out = empty((len(flat), rows, flat.shape[2]), dtype, flat.device)
            delta, rounding = torch.zeros(2, len(flat), dtype=torch.float64)
            targets.append(_Target(out, pieces, same, delta, rounding))
        return targets

    def _checked(
        self, number: int, joint: JointMerge, pieces: Pieces | Scattered, *sums: Tensor
    ) -> Merged:
        found = self._merged(
            number, _present(joint.merges[number]), {}, *(float(value) for value in sums)
        )
        pieces.close()
        return found

    # stacks on a device

    def _at_once(
        self,
        numbers: Sequence[int],
        joints: Sequence[JointMerge],
        tensors: Mapping[str, Tensor],
        stored: Tensor,
    ) -> list[list[Later[Merged]]]:
        """Merge a whole stack in few launches; nothing waits for the device."""
        from adaptkit.ops.merge.at_once import widened_factors

        tensors = widened_factors(tensors)
        flat = stored.reshape(*stored.shape[:2], math.prod(stored.shape[2:]))
        return [self._one_output(number, joints, tensors, flat) for number in numbers]

    def _one_output(
        self,
        number: int,
        joints: Sequence[JointMerge],
        tensors: Mapping[str, Tensor],
        flat: Tensor,
    ) -> list[Later[Merged]]:
        from adaptkit.ops.merge.at_once import coming, merged

        parts = list(self._parts(number, joints[0], tensors, flat.shape[1]))
        deltas = [self._known(number, joint) for joint in joints]
        dtype = torch_dtype(_present(joints[0].merges[number]).dtype)
        contest = self.contest if flat.device.type == "cuda" else None
        made = merged(flat, parts, dtype, known=None not in deltas, contest=contest)
        told = [known * parts[0][1] ** 2 for known in deltas if known is not None]
        shape = self.base.source.infos[joints[0].name].shape

        def settle(n: int, out: Tensor, *squares: float) -> Merged:
            merge = _present(joints[n].merges[number])
            return self._merged(number, merge, {merge.name: out}, *squares)

        return coming(made, shape, told, settle)

    def _known(self, number: int, joint: JointMerge) -> float | None:
        """‖ΔW‖² of the only module that is added, if it was told when that was read."""
        sources = joint.sources[number]
        return self.norms.get((joint.name, sources[0])) if len(sources) == 1 else None

    def _merged(
        self, number: int, merge: TensorMerge, written: Mapping[str, Tensor], *squares: float
    ) -> Merged:
        weight, delta, rounding = squares
        if not (math.isfinite(weight) and math.isfinite(delta)):
            raise self._non_finite(number, merge)
        if not math.isfinite(rounding):
            raise self._too_large(number, merge)
        return Merged(written, weight, delta, rounding)

    # tensors as a whole

    def _whole(
        self,
        number: int,
        joints: Sequence[JointMerge],
        tensors: Mapping[str, Tensor],
        stored: Tensor,
        scale: Tensor | None,
        *,
        spent: bool,
    ) -> list[Merged]:
        """Merge into a wide copy of W. If W is `spent`, the output may take its place."""
        # a packed weight was decoded as it was read, and is decoded once more to be measured
        packed = _present(joints[0].merges[number]).packed is not None
        wide = stored if spent and packed else widened(stored, scale)
        matrix = wide.reshape(*wide.shape[:2], -1) if wide.ndim > 1 else wide.reshape(-1, 1, 1)
        self._add(number, joints[0], matrix, tensors)
        scales = [None] * len(joints) if scale is None else list(scale)
        merges = [_present(joint.merges[number]) for joint in joints]
        spent = spent and reused(merges[0], self.base)
        return [
            self._finished(number, merge, wide[n], Numbers(stored[n], scales[n]), spent)
            for n, merge in enumerate(merges)
        ]

    def _add(
        self, number: int, joint: JointMerge, matrix: Tensor, tensors: Mapping[str, Tensor]
    ) -> None:
        place = self.base.places.get(joint.name)
        if place is None:
            return
        view = matrix.transpose(-1, -2) if place.transposed else matrix
        view = exchanged(matrix, -2) if place.swapped else view
        for part, strength in self._parts(number, joint, tensors, view.shape[-2]):
            part.add(view, strength)
        if place.swapped:
            matrix.copy_(exchanged(view, -2))

    def _finished(
        self,
        number: int,
        merge: TensorMerge,
        merged: Tensor,
        before: Numbers,
        spent: bool,  # the output may take the place of W as it was read
    ) -> Merged:
        if merge.packed is not None:
            return self._packed(number, merge, merged)
        written, after = {merge.name: before.stored}, before
        if not spent:
            written, after = self._rounded(number, merge, merged, before)
        weight, delta, rounding = 0.0, 0.0, 0.0
        for place in before.places():
            old, new = before.at(place, merged.dtype), merged.reshape(-1)[place]
            weight += square(old)
            delta += square(new - old)
            if spent:
                after.stored.view(-1)[place].copy_(new)
            rounding += square(after.at(place, new.dtype) - new)
        host = {name: back(tensor) for name, tensor in written.items()}
        return self._merged(number, merge, host, weight, delta, rounding)

    def _packed(self, number: int, merge: TensorMerge, merged: Tensor) -> Merged:
        assert merge.packed is not None
        if not finite(merged):
            raise self._non_finite(number, merge)
        written, *squares = repacked(self.base.source, merge.packed, merged)
        host = {name: back(tensor) for name, tensor in written.items()}
        return self._merged(number, merge, host, *squares)

    def _rounded(
        self,
        number: int,
        merge: TensorMerge,
        merged: Tensor,
        before: Numbers,
    ) -> tuple[dict[str, Tensor], Numbers]:
        """Return the tensors to write, and the numbers that they stand for."""
        from adaptkit.linalg.precision import cast

        if merge.scale is not None and before.scale is not None:
            return requantised(merge, merged, before)
        target = torch_dtype(merge.dtype)
        # torch clamps to fp8 silently, so `cast` checks; other overflows show in the sums
        try:
            rounded = cast(merged, target) if target.itemsize == 1 else merged.to(target)
        except NonFinite:
            raise self._too_large(number, merge) from None
        return {merge.name: rounded}, Numbers(rounded)

    # errors

    def _too_large(self, number: int, merge: TensorMerge) -> NonFinite:
        return NonFinite(
            f"the merged weight does not fit {type_name(merge)}",
            hint="lower the strength, or write with --dtype bf16 or fp32",
            file=self.plans[number].output,
            tensor=merge.name,
        )

    def _non_finite(self, number: int, merge: TensorMerge) -> NonFinite:
        """Read the inputs again to find the tensor with NaN or infinity."""
        plan = self.plans[number]
        if not finite(self.base.source.read(merge.name)):
            return NonFinite("holds NaN or infinity", file=self.base.source.path, tensor=merge.name)
        for c in merge.contributions:
            adapter = plan.adapters[c.adapter]
            for _, key in c.entry.tensors():
                if not finite(adapter.source.read(key)):
                    return NonFinite("holds NaN or infinity", file=adapter.source.path, tensor=key)
        return NonFinite("the merged weight overflows", file=plan.output, tensor=merge.name)


def _blended(
    target: _Target, deltas: Deltas, start: int, before: Tensor, after: Tensor, spare: Tensor
) -> Tensor:
    """Put W + Σ strength·ΔW of a block of rows into `after`; return ‖after − before‖²."""
    import torch

    from adaptkit.linalg.precision import norm_squared

    stop = start + before.shape[-2]
    if len(target.parts) == 1 and target.parts[0][0].weights.by_rows:
        part, strength = target.parts[0]
        if part.within(start, stop) == (start, stop):
            delta, norm = deltas.of(part, start, stop)
            torch.add(before, delta, alpha=strength, out=after)
            return norm * strength**2
    after.copy_(before)
    for part, strength in target.parts:
        first, last = part.within(start, stop)
        if first >= last:
            continue
        rows = after[:, first - start : last - start]
        if part.weights.by_rows:
            rows.add_(deltas.of(part, first, last)[0], alpha=strength)
        else:
            part.change(rows, first, last, strength)
    return norm_squared(torch.sub(after, before, out=spare)).cpu()


def held(results: Iterable[Merged | Later[Merged] | None]) -> int:
    """The bytes of the tensors that are there."""
    there = (one.written.values() for one in results if isinstance(one, Merged))
    return sum(tensor.nbytes for each in there for tensor in each)


def _present(merge: TensorMerge | None) -> TensorMerge:
    assert merge is not None
    return merge
