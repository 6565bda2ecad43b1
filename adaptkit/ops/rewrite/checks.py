"""Refuse inputs that cannot be put together: sizes, families, and biases beside DoRA."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.adapter import Adapter
from adaptkit.detect import formats
from adaptkit.errors import AmbiguousAdapter, NotRepresentable, ShapeMismatch, Unclaimed
from adaptkit.formats.contract import Alpha
from adaptkit.keymap import Dialect, keys_for
from adaptkit.names import BIAS
from adaptkit.ops.shared import biased
from adaptkit.respelling import Respelling
from adaptkit.unknown import joint

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adaptkit.algorithms.contract import Weights
    from adaptkit.checkpoint import Checkpoint, Piece
    from adaptkit.keymap import KeyMap
    from adaptkit.ops.rewrite.plan import RecastOptions, Task
    from adaptkit.ops.shared import Unused
    from adaptkit.respelling import Assembly

__all__ = [
    "bias_notes",
    "check_base",
    "check_biases",
    "check_family",
    "check_layout",
    "check_names",
    "check_shared",
    "check_sizes",
    "keys_of",
    "scales_biases",
]


def check_sizes(task: Task) -> None:
    """ShapeMismatch if two inputs adapt a layer of different sizes; 0 is a size not known."""
    first, *others = task.terms
    for term in others:
        _same_size(task, term.job, _size(first.job), first.job.adapter.source.path.name)


def check_base(task: Task, base: Checkpoint, pieces: tuple[Piece, ...]) -> None:
    """ShapeMismatch if a layer has another size in the base than in an input."""
    for term in task.terms:
        base.check_size(pieces, _size(term.job), task.label, term.job.adapter.source.path)


def _same_size(task: Task, job: Assembly, size: tuple[int, int], name: str) -> None:
    own = _size(job)
    if any(a and b and a != b for a, b in zip(size, own, strict=True)):
        here, there = ("{} × {}".format(*(n or "?" for n in s)) for s in (own, size))
        raise ShapeMismatch(
            f"{task.label} is {here} in this adapter, {there} in {name}",
            hint="their models differ in size; see `adaptkit inspect --modules`",
            file=job.adapter.source.path,
        )


def _size(job: Assembly) -> tuple[int, int]:
    """(rows, columns) that an adapter gives to a slot; 0 if its tensors do not tell."""
    heights = [
        part.rows
        if part.entry is None
        else part.cut[1] - part.cut[0]
        if part.cut
        else part.entry.facts.rows
        for part in job.parts
    ]
    columns = {entry.facts.columns for entry in job.entries}
    return (sum(heights) if all(heights) else 0), (columns.pop() if len(columns) == 1 else 0)


def keys_of(adapters: Sequence[Adapter], format: str, dialect: Dialect | None = None) -> KeyMap:
    """The names of the family of adapters in a format, with those that only some of them have."""
    first = adapters[0]
    # names of an unknown family mean the same only in the same format
    alike = first.known or all(one.format is first.format for one in adapters)
    family = joint([one.family for one in adapters]) if alike else first.family
    return keys_for(family, formats()[format], dialect)


def check_family(
    adapter: Adapter, format: str, tasks: Sequence[Task], options: RecastOptions
) -> None:
    """Refuse an adapter that may be of two families, if those give other names."""
    if options.family is not None or format == adapter.format.name:
        return
    keys = keys_of([adapter], format)
    ours = [keys.stem(task.slot) for task in tasks]
    for name in adapter.detection.alternatives:
        other = Adapter.understand(adapter.source, None, family=name, format=adapter.format.name)
        respelled = Respelling(other, keys_of([other], format))
        theirs = [respelled.keys.stem(job.slot) for job in respelled.jobs(other.entries)]
        if theirs != ours:
            raise AmbiguousAdapter(
                f"this may be {adapter.family.title} or {other.family.title}, "
                "and the names to write differ",
                hint=f"say which: --family {adapter.family.name} or --family {name}",
                file=adapter.source.path,
            )


def check_layout(task: Task, kind: type[Weights], keys: KeyMap) -> None:
    """NotRepresentable if the format has no layout for a tensor that the output keeps.

    Of a task whose rank is not chosen: others are decomposed into plain factors.
    """
    if kind.peft_only and keys.format.alpha is not Alpha.CONFIG:
        base = "" if kind.additive else " with --base CHECKPOINT"
        raise NotRepresentable(
            f"{kind.title} is written as a folder of PEFT alone (--to peft): readers of "
            f"{keys.format.name} keys do not load it",
            hint=f"--algo lora{base} writes what it changes",
        )
    for entry in task.entries:
        if entry.kind is kind:
            infos = task.terms[0].job.adapter.source.infos
            for role, key in entry.tensors():
                if role in kind.cores:
                    continue  # multiplied out where the layout does not hold it
                shape = infos[key].shape if key in infos else ()
                kind.laid_out(role, shape, entry.facts, peft=keys.format.peft)


def check_shared(tasks: Sequence[Task]) -> None:
    """NotRepresentable for a part of the modules that share tensors, or for parts of one of them.

    The shared tensors are as large as the largest layer, and drawn in that size.
    """
    for task in tasks:
        kind, adapter = task.kind, task.terms[0].job.adapter
        if not kind.drawn_whole or task.entries[0].kind is not kind:
            continue
        whole = sum(entry.kind is kind for entry in adapter.entries.values())
        kept = sum(one.kind is kind and one.terms[0].job.adapter is adapter for one in tasks)
        if kept < whole or task.changes & {"split", "fused", "swapped"}:
            base = "" if kind.additive else " with --base CHECKPOINT"
            raise NotRepresentable(
                f"all modules of a {kind.title} share projections as large as the largest layer: "
                "a part of them is another adapter",
                hint=f"--algo lora{base} writes what it changes",
                file=adapter.source.path,
                tensor=task.label,
            )


def check_names(adapter: Adapter, unused: Sequence[Unused], keys: KeyMap) -> None:
    """Unclaimed if a format has no name for any module because the family is unknown.

    What helps then is to tell the family, not to allow the loss of everything.
    """
    if adapter.known or not unused:
        return
    nearest = adapter.detection.nearest
    family = f"--family {nearest.family}" if nearest else "--family"
    raise Unclaimed(
        f"the model family is unknown, and the {keys.format.name} format has no name for any of "
        f"its {len(unused)} keys, the first of which is {unused[0].key}",
        hint=f"{family} tells the names of its modules, --base CHECKPOINT the dots in them",
        file=adapter.source.path,
    )


def check_biases(keys: KeyMap, tasks: Sequence[Task]) -> None:
    """NotRepresentable for a bias beside magnitudes in a format whose readers have no such layer.

    PEFT's LoraConfig refuses `lora_bias` with `use_dora`, and diffusers makes one of both.
    """
    bias = next((task for task in tasks if keys.beside_lora(task.slot)), None)
    if bias is not None and any(task.kind.wrapper for task in tasks):
        raise NotRepresentable(
            f"the {keys.format.name} format holds no bias in a file with DoRA",
            hint="--skip '*.bias' leaves the biases out",
            file=bias.terms[0].job.adapter.source.path,
            tensor=bias.label,
        )


def bias_notes(tasks: Sequence[Task]) -> list[str]:
    """What is lost of kinds that change the bias of a layer beside its weight."""
    changed = [task for task in tasks if task.ready is None]
    return biased(e for task in changed for e in task.entries if e.kind is not task.kind)


def scales_biases(adapters: Sequence[Adapter], keys: KeyMap) -> bool:
    """Whether the reader of the new format would multiply biases by the scale of their LoRA."""
    return keys.format.alpha is Alpha.CONFIG and any(
        slot.param == BIAS for adapter in adapters for slot in adapter.entries
    )
