"""compare: distance of two checkpoints, layer by layer."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from adaptkit import engine
from adaptkit.adapter import open_adapter_source
from adaptkit.checkpoint import Piece
from adaptkit.detect import formats, is_adapter
from adaptkit.errors import AdaptkitError, NonFinite, NothingToDo
from adaptkit.hosts import usual_format
from adaptkit.keymap.kinds import dense_kind
from adaptkit.ops.compare.distance import Numbers
from adaptkit.ops.difference.pairing import Pairing, Wanted, open_pair
from adaptkit.ops.shared import FLOATS, Closing, Shared, Unused
from adaptkit.ops.stages import Progress, counting, logged
from adaptkit.steps import Step, check_memory

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from adaptkit.checkpoint import Checkpoint
    from adaptkit.ops.compare.inputs import Argument

__all__ = ["Found", "Layer", "Plan", "both_checkpoints", "measured", "plan"]

BLOCK = 1 << 18  # entries compared at a time: two megabytes in float64
WHERE = {"not in the base checkpoint": "a", "not in the tuned checkpoint": "b"}


class Layer(NamedTuple):
    """A layer of A, of B, or of both, with the places of its numbers."""

    label: str
    a: tuple[Piece, ...]
    b: tuple[Piece, ...]
    columns: int
    number: int = 0


class Found(NamedTuple):
    """A layer with its numbers."""

    layer: Layer
    numbers: Numbers


@dataclass(frozen=True, repr=False)
class Plan(Closing):
    """The state of a comparison of two checkpoints before any weight is read."""

    a: Checkpoint
    b: Checkpoint
    options: Shared
    steps: tuple[Step[Layer], ...]
    unused: tuple[Unused, ...]
    tolerance: float | None = None

    def close(self) -> None:
        """Close both checkpoints."""
        self.a.close()
        self.b.close()

    def described(self) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """What a report says of A and of B."""
        one, two = ({"path": str(c.source.path), "kind": "checkpoint"} for c in (self.a, self.b))
        return one, two


def both_checkpoints(a: Argument, b: Argument) -> bool:
    """Whether neither file is an adapter."""
    with ExitStack() as opened:
        for argument in (a, b):
            source, _ = open_adapter_source(Path(_path(argument)))
            opened.callback(source.close)
            if is_adapter(source.infos):
                return False
    return True


def _path(argument: Argument) -> Any:
    return argument[0] if isinstance(argument, tuple) else argument


def plan(a: Argument, b: Argument, options: Shared, tolerance: float | None = None) -> Plan:
    """Pair the layers; read headers only, and report all errors here."""
    first, second = (Path(_path(argument)) for argument in (a, b))
    for argument in (a, b):
        if isinstance(argument, tuple) and argument[1] != 1.0:
            raise AdaptkitError("a checkpoint takes no strength", file=_path(argument))
    two, one = open_pair(second, first, options.family)
    try:
        return _planned(one, two, options, tolerance)
    except AdaptkitError:
        one.close()
        two.close()
        raise


def _planned(a: Checkpoint, b: Checkpoint, options: Shared, tolerance: float | None) -> Plan:
    keys = b.keys(formats()[usual_format(b.family.name)])
    wanted = Wanted(dense_kind().name, True, options)
    pairing = Pairing(b, a, keys, wanted)
    layers = [Layer(p.label, p.tuned, p.base, p.matrix[1]) for p in pairing.pairs()]
    pairing.selection.check("these checkpoints")
    if not layers:
        raise NothingToDo("these checkpoints have no layer in common")
    unused = []
    for item in (*pairing.lost, *pairing.left):
        side = WHERE.get(item.reason)
        if side is not None and (layer := _alone(a if side == "a" else b, item.key, side)):
            layers.append(layer)
        else:
            unused.append(Unused(item.key, _reason(item.reason)))
    steps = tuple(_step(layer._replace(number=n), a, b) for n, layer in enumerate(layers))
    check_memory(steps, options.memory)
    return Plan(a, b, options, steps, tuple(unused), tolerance)


def _alone(checkpoint: Checkpoint, name: str, side: str) -> Layer | None:
    """A layer of one side, whose norm counts in full."""
    info = checkpoint.source.infos.get(name)
    if info is None or info.dtype not in FLOATS:
        return None
    columns = info.numel // info.shape[0] if info.shape and info.shape[0] else 1
    piece = (Piece(name),)
    return Layer(name, piece, (), columns) if side == "a" else Layer(name, (), piece, columns)


def _reason(reason: str) -> str:
    """A reason in the words of a comparison: the base is B."""
    for word, letter in (
        ("the base checkpoint", "B"),
        ("the tuned checkpoint", "A"),
        ("the base", "B"),
    ):
        reason = reason.replace(word, letter)
    return reason


def _step(layer: Layer, a: Checkpoint, b: Checkpoint) -> Step[Layer]:
    size = 4 * 8 * max(BLOCK, layer.columns)
    for checkpoint, pieces in ((a, layer.a), (b, layer.b)):
        if pieces and not checkpoint.streams(pieces):
            size += checkpoint.nbytes(pieces)
    where = a.source.order(layer.a[0].name) if layer.a else b.source.order(layer.b[0].name)
    return Step(layer, layer.label, size, where)


def measured(plan: Plan, progress: Progress | None = None) -> tuple[list[Found], tuple[str, ...]]:
    """The numbers of every layer, and notes. Weights are read in blocks, in float64, on the CPU."""
    found: dict[int, Found] = {}

    def announce(layer: Layer) -> None:
        for checkpoint, pieces in ((plan.a, layer.a), (plan.b, layer.b)):
            checkpoint.announce(pieces)

    def store(layer: Layer, numbers: Numbers) -> None:
        found[layer.number] = Found(layer, numbers)

    work: engine.Work[Layer, Numbers] = engine.Work(
        lambda layer: _sums(plan, layer),
        lambda _, tensors: [Numbers(*tensors["sums"][0].tolist())],
        store,
        held=lambda _: 0,
        announce=announce,
    )
    try:
        with logged("compare", progress) as told:
            resources = engine.Resources.choose("cpu", plan.options.memory)
            counted = counting(told, "comparing", len(plan.steps), "layers")
            notes = engine.run(plan.steps, work, resources, counted)
    finally:
        plan.close()
    return [found[step.payload.number] for step in plan.steps], notes


def _sums(plan: Plan, layer: Layer) -> dict[str, Tensor]:
    """‖A‖², ‖B‖², ⟨A, B⟩ and ‖A − B‖² of a layer, as one tensor (4,) in float64."""
    import torch

    sums = torch.zeros(4, dtype=torch.float64)
    for x, y in _blocks(plan, layer):
        sums[0] += x.square().sum()
        sums[1] += y.square().sum()
        sums[2] += (x * y).sum()
        sums[3] += (x - y).square().sum()
    if not torch.isfinite(sums).all():
        raise NonFinite("a weight is not finite, or too large to be squared", tensor=layer.label)
    return {"sums": sums}


def _blocks(plan: Plan, layer: Layer) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of rows of both sides in float64; zeros for a side that lacks the layer."""
    rows = max(1, BLOCK // max(1, layer.columns))
    sides = ((plan.a, layer.a), (plan.b, layer.b))
    both = [checkpoint.blocks(pieces, rows) for checkpoint, pieces in sides if pieces]
    for blocks in zip(*both, strict=True):
        wide = [block.double() for block in blocks]
        if len(wide) == 2:
            yield wide[0], wide[1]
        else:
            zero = wide[0].new_zeros(())
            yield (wide[0], zero) if layer.a else (zero, wide[0])
