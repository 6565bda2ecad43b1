"""Verification of a merged checkpoint: compare its tensors with base + ΔW in float64.

Unchanged tensors are compared byte by byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from adaptkit import engine
from adaptkit.checkpoint import exchanged
from adaptkit.errors import AdaptkitError, CorruptFile
from adaptkit.files.header import nbytes
from adaptkit.files.tensors import tensor_bytes
from adaptkit.keymap.kinds import applied
from adaptkit.ops.merge.cutting import WHOLE, part_of, whole_slot
from adaptkit.ops.merge.output import gathered
from adaptkit.ops.merge.requantise import widened
from adaptkit.ops.merge.steps import VERIFIED as BLOCK
from adaptkit.ops.merge.steps import turned

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from adaptkit.algorithms.contract import Weights
    from adaptkit.files.source import TensorSource
    from adaptkit.keymap import Place
    from adaptkit.ops.merge.layout import Volume
    from adaptkit.ops.merge.plan import Contribution, Plan, TensorMerge

__all__ = ["Verified", "verify"]

CHUNK = 8 << 20
# share of the largest |ΔW| (and a 16th of it of |W|): error of float32 sums besides the rounding
SLACK = 2.0**-18
RULE = "within one rounding of base + ΔW (float64)"
UNTOUCHED = "an unchanged tensor differs from the base"


@dataclass(frozen=True)
class Verified:
    """Numbers of verified tensors; `largest` is the greatest error in units of the allowed one."""

    merged: int
    copied: int
    bytes: int
    largest: float

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON document."""
        return {
            "merged": self.merged,
            "copied": self.copied,
            "bytes": self.bytes,
            "largest_error": self.largest,
            "rule": RULE,
        }


def verify(plan: Plan, at: Callable[[str], Path], tell: Callable[[int], None]) -> Verified:
    """Read every file of the output; raise CorruptFile for the first wrong tensor.

    `tell` is called with the bytes of every tensor compared.
    """
    from adaptkit.files.open import open_source

    opened: list[tuple[Volume, TensorSource]] = []
    try:
        for volume in plan.layout.volumes:
            opened.append((volume, open_source(at(volume.path))))
        return _Verifier(plan, opened, tell).run()
    except AdaptkitError as error:
        if error.file is not None and error.file in {str(source.path) for _, source in opened}:
            error.file = str(plan.output)
        raise
    finally:
        for _, source in opened:
            source.close()


class _Verifier:
    def __init__(
        self,
        plan: Plan,
        opened: Sequence[tuple[Volume, TensorSource]],
        tell: Callable[[int], None],
    ) -> None:
        self.plan, self.opened, self.tell = plan, opened, tell
        self.sizes = {spec.name: nbytes(spec.dtype, spec.shape) for spec in plan.specs}
        self.out = _as_one(plan, opened)
        self.stored = {
            (volume.path, spec.name): source for volume, source in opened for spec in volume.specs
        }
        self.largest = 0.0

    def run(self) -> Verified:
        self._check_names()
        made = {name for merge in self.plan.computed for name in merge.writes()}
        copied = [spec.name for spec in self.plan.specs if spec.name not in made]
        for name in copied:
            self._same_bytes(name)
            self.tell(self.sizes[name])
        engine.run(
            self.plan.verified,
            engine.Work(self._load, self._compare, self._keep),
            engine.Resources.choose("cpu", self.plan.options.memory),
        )
        size = sum(source.size for _, source in self.opened)
        return Verified(len(made), len(copied), size, self.largest)

    def _check_names(self) -> None:
        for volume, source in self.opened:
            promised = {spec.name: (spec.dtype, spec.shape) for spec in volume.specs}
            found = {name: (info.dtype, info.shape) for name, info in source.infos.items()}
            if promised != found:
                wrong = next(
                    name for name in (*promised, *found) if promised.get(name) != found.get(name)
                )
                raise self._wrong(wrong, "the header differs from what was written")

    def _wrong(self, name: str, what: str) -> CorruptFile:
        return CorruptFile(
            f"--verify: {what}; the output was removed",
            hint="run the merge again, and check memory and disk if the error persists",
            file=self.plan.output,
            tensor=name,
        )

    # untouched tensors

    def _same_bytes(self, name: str) -> None:
        base = self.plan.kept
        if self.plan.layout.moves:
            if base.raw(name) != tensor_bytes(self._written(name)):
                raise self._wrong(name, UNTOUCHED)
            return
        out = self.out.stored
        one, two = base.span(name), out.span(name)
        if one is None or two is None:
            same = base.raw(name) == out.raw(name)
        else:
            same = one[2] - one[1] == two[2] - two[1] and all(
                a == b for a, b in zip(_pieces(*one), _pieces(*two), strict=True)
            )
        if not same:
            raise self._wrong(name, UNTOUCHED)

    def _written(self, name: str) -> Tensor:
        """Read a tensor of the output in the layout of the base."""
        moves = self.plan.layout.moves
        if moves:
            return gathered(moves[name], self.plan.base.source.infos[name], self.stored)
        return self.out.read(name)

    # merged tensors

    def _load(self, merge: TensorMerge) -> dict[str, Tensor]:
        base = self.plan.base
        loaded = {"base": base.source.read(merge.name)}
        if (key := base.quantization.scales.get(merge.name)) is not None:
            loaded["scale"] = base.source.read(key)
        loaded["out"] = self._written(merge.name)
        if merge.scale is not None:
            loaded["out scale"] = self._written(merge.scale)
        if merge.packed is not None:
            loaded["allowed"] = self._allowed(merge.name, loaded["out"])
        for n, c in enumerate(merge.contributions):
            if not c.strength:
                continue
            stored = self.plan.adapters[c.adapter].read(c.entry) | whole_slot(base, c)
            for role, tensor in stored.items():
                loaded[f"{n}/{role}"] = tensor
        return loaded

    def _allowed(self, name: str, out: Tensor) -> Tensor:
        """The error that a packed weight may have, by its own scales."""
        found = self.out.packed(name)
        if found is None or found.packing is None:
            raise self._wrong(name, "the weight cannot be unpacked")
        return found.packing.allowed(self.out.parts(found), out).expand_as(out)

    def _compare(self, merges: Sequence[TensorMerge], tensors: dict[str, Tensor]) -> list[float]:
        # on a CPU a bucket is one step
        (merge,) = merges
        if not tensors["out"].numel():
            return [0.0]
        base = _Stored.of(tensors["base"][0], tensors.get("scale"))
        found = _Stored.of(tensors["out"][0], tensors.get("out scale"))
        turn = None
        if merge.packed is not None and merge.packed.packing is not None:
            turn = merge.packed.packing.turn
            found = _Turned(tensors["out"][0], 2 * tensors["allowed"][0])
        place = self.plan.base.places.get(merge.name)
        if place is not None and turned(merge, self.plan.base):
            base, found = base.turned(place), found.turned(place)
        decoded = [
            (c, self._decoded(n, c, tensors))
            for n, c in enumerate(merge.contributions)
            if c.strength
        ]
        additive = all(c.entry.kind.additive for c, _ in decoded)
        parts = [_Added.of(c, weights, base.rows) for c, weights in decoded]
        whole = None if all(part.cuts for part in parts) else _made(base, parts)
        worst = 0.0
        form = tensors["out"].dtype if merge.packed is None else None
        for rows in base.blocks():
            made = _made(base, parts, rows) if whole is None else whole
            expected = made.matrix if whole is None else made.matrix[rows]
            slack = SLACK * made.change + (2.0**-22 if additive else 2.0**-20) * made.size
            error = _excess(expected, found.matrix(rows), found.unit(rows), form, slack, turn)
            if not error <= 1.0:
                raise self._wrong(
                    merge.name,
                    f"differs from base + ΔW by {error:.3g} times the allowed rounding error",
                )
            worst = max(worst, error)
        return [worst]

    def _decoded(self, n: int, c: Contribution, tensors: Mapping[str, Tensor]) -> Weights:
        roles = {role: tensors[f"{n}/{role}"][0].double() for role, _ in c.entry.tensors()}
        weights = c.entry.decode(roles)
        whole = tensors.get(f"{n}/{WHOLE}")
        return part_of(weights, c, None if whole is None else whole[0].double(), self.plan.adapters)

    def _keep(self, merge: TensorMerge, worst: float) -> None:
        self.tell(sum(self.sizes[name] for name in merge.writes()))
        self.largest = max(self.largest, worst)


class _Made(NamedTuple):
    """W + ΔW in float64, the largest |ΔW| of any sum of the first adapters, and the largest |W|."""

    matrix: Tensor
    change: float
    size: float


def _made(base: _Stored, parts: Sequence[_Added], rows: slice | None = None) -> _Made:
    """What the adapters make of these rows of W (None: of all, of which one wide copy is made)."""
    where = slice(0, base.rows) if rows is None else rows
    blocks = base.blocks() if rows is None else [where]
    made = base.matrix(where)
    change = size = 0.0
    # over the parts, since adapters that cancel each other leave float32 errors
    for part in parts:
        part.add(made, where)
        for block in blocks:
            before = base.matrix(block)
            after = made[block.start - where.start : block.stop - where.start]
            change = max(change, float((after - before).abs_().max()))
            size = max(size, float(before.abs_().max()))
    return _Made(made, change, size)


@dataclass(frozen=True)
class _Stored:
    """A stored weight with an optional scale, read in rows of float64."""

    tensor: Tensor
    scale: Tensor | None

    @classmethod
    def of(cls, tensor: Tensor, scale: Tensor | None) -> _Stored:
        """Make a weight from a tensor and a scale with a batch dimension of one."""
        tensor = tensor if tensor.ndim else tensor.reshape(1)
        return cls(tensor, None if scale is None else scale[0].double())

    def turned(self, place: Place) -> _Stored:
        """Return the decoded weight in the row order of the target."""
        whole = self.matrix(slice(0, self.rows))
        unit = self.unit(slice(0, self.rows))
        if place.transposed:
            whole, unit = whole.T, unit.expand_as(whole).T
        if place.swapped:
            whole, unit = exchanged(whole), exchanged(unit.expand_as(whole))
        return _Turned(whole, unit)

    @property
    def rows(self) -> int:
        return len(self.tensor)

    @property
    def columns(self) -> int:
        return self.tensor[0].numel() if len(self.tensor) else 0

    def blocks(self) -> list[slice]:
        """Return the rows in blocks that stay in the cache."""
        step, rows = max(1, BLOCK // max(1, self.columns)), self.rows
        return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]

    def matrix(self, rows: slice) -> Tensor:
        """Return these rows in float64, as a copy."""
        part = self.tensor[rows]
        if self.scale is None:
            import torch

            return part.to(torch.float64, copy=True).reshape(len(part), -1)
        scale = self._scale(rows)
        return widened(part.unsqueeze(0).double(), None if scale is None else scale.unsqueeze(0))[
            0
        ].reshape(len(part), -1)

    def unit(self, rows: slice) -> Tensor:
        """Return the value of one stored unit, broadcast over `matrix`."""
        import torch

        scale = self._scale(rows)
        if scale is None or scale.numel() == 1:
            return (
                torch.ones(1, 1, dtype=torch.float64)
                if scale is None
                else scale.abs().reshape(1, 1)
            )
        each = scale.abs().reshape(len(self.tensor[rows]), -1)
        return each.repeat_interleave(self.columns // each.shape[1], dim=1)

    def _scale(self, rows: slice) -> Tensor | None:
        by_row = self.scale is not None and self.scale.numel() > 1
        return self.scale[rows] if self.scale is not None and by_row else self.scale


@dataclass(frozen=True)
class _Turned(_Stored):
    """A decoded weight in another order than stored; `scale` holds the unit of each entry."""

    def matrix(self, rows: slice) -> Tensor:
        import torch

        part = self.tensor[rows]
        return part.to(torch.float64, copy=True).reshape(len(part), -1)

    def unit(self, rows: slice) -> Tensor:
        assert self.scale is not None
        part = self.scale[rows]
        return part.double().reshape(len(part), -1)


@dataclass(frozen=True)
class _Added:
    """What one adapter adds, in blocks of rows if it `cuts`."""

    contribution: Contribution
    weights: Weights
    start: int
    stop: int
    cuts: bool

    @classmethod
    def of(cls, c: Contribution, weights: Weights, rows: int) -> _Added:
        """Decide how to add; what no block of rows can be made of is added as a whole."""
        start, stop = c.rows or (0, rows)
        if weights.by_rows:
            return cls(c, weights.computed(), start, stop, cuts=True)
        return cls(c, weights, start, stop, cuts=weights.row_wise)

    def add(self, block: Tensor, rows: slice) -> None:
        """Add to these rows of the weight."""
        first, last = max(rows.start, self.start), min(rows.stop, self.stop)
        if first >= last:
            return
        view = block[first - rows.start : last - rows.start]
        own, strength = (first - self.start, last - self.start), self.contribution.strength
        if self.weights.by_rows:
            view.add_(self.weights.some_rows(*own), alpha=strength)
        else:
            applied(self.weights.part(*own) if self.cuts else self.weights, view, strength)


def _excess(
    expected: Tensor,
    found: Tensor,
    unit: Tensor,
    dtype: Any,
    slack: float,
    turn: Callable[[Tensor], Tensor] | None = None,
) -> float:
    """Return the largest error in units of the allowed one.

    Half a step of the format and the slack of float32 sums are allowed. Without a `dtype`, half a
    step is half a unit, of what `turn` makes of the error.
    """
    import torch

    if not expected.numel():
        return 0.0
    if dtype is None:
        allowed = expected.abs().mul_(2.0**-20).add_(0.5 * unit + slack)
        error = found - expected
        return float((error if turn is None else turn(error)).abs_().div_(allowed).max())
    info = torch.finfo(dtype)
    # half a step is eps/2 of the magnitude at most, and half the least subnormal at the bottom
    least = info.smallest_normal * info.eps / 2
    allowed = expected.abs().mul_(info.eps / 2)
    allowed = torch.maximum(allowed, unit * least).mul_(1 + 2.0**-20)
    allowed.add_(slack).clamp_min_(torch.finfo(torch.float64).tiny)
    # NaN stays NaN, which fails the comparison
    return float((found - expected).abs_().div_(allowed).max())


def _as_one(plan: Plan, opened: Sequence[tuple[Volume, TensorSource]]) -> TensorSource:
    """The files of the output as one, with the names of the base.

    The parts of a packed weight may lie apart. Another layout has other names: those are read file
    by file.
    """
    from adaptkit.files.packed import unpacked
    from adaptkit.files.source import join

    if plan.layout.moves or plan.layout.like is not None:
        return opened[0][1]
    named = ((next(iter(volume.names.items()), ("", "")), source) for volume, source in opened)
    joined = join(plan.output, [(name.removesuffix(own), source) for (name, own), source in named])
    return unpacked(joined) if plan.options.dtype == "keep" else joined


def _pieces(path: Path, start: int, stop: int) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while start < stop:
            piece = file.read(min(CHUNK, stop - start))
            if not piece:
                return
            start += len(piece)
            yield piece
