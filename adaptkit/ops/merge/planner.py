"""Planner of a merge: locate every adapter module in the base (headers only)."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from adaptkit.adapter import Adapter
from adaptkit.checkpoint import PLAIN_BASE, Checkpoint, Piece
from adaptkit.errors import NothingToDo, NotRepresentable, ShapeMismatch
from adaptkit.files.dtypes import UNREAD
from adaptkit.files.header import TensorSpec
from adaptkit.names import BIAS, Slot
from adaptkit.ops.block_weights import Blocks
from adaptkit.ops.merge.layout import GGUF, as_gguf, as_single, plan_layout
from adaptkit.ops.merge.plan import Contribution, Options, Plan, TensorMerge, kept
from adaptkit.ops.merge.relayout import Relayout, wanted
from adaptkit.ops.merge.steps import step_of, verifying
from adaptkit.ops.selecting import Selection
from adaptkit.ops.shared import (
    Unused,
    check_output,
    default_output,
    refuse_unused,
    stored_dtype,
)
from adaptkit.steps import check_memory

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from os import PathLike

    from adaptkit.entries import Entry
    from adaptkit.ops.merge.layout import Layout

__all__ = ["plan"]


def plan(
    base: str | PathLike[str],
    adapters: Sequence[tuple[str | PathLike[str], float]],
    options: Options,
) -> Plan:
    """Locate every adapter module in the base; read headers only, and report all errors here."""
    base = Path(base)
    with ExitStack() as failing:
        checkpoint = failing.enter_context(
            Checkpoint.open(base, family=options.family, strangers=True)
        )
        opened = []
        for path, _ in adapters:
            opened.append(_open_adapter(checkpoint, Path(path), options))
            failing.callback(opened[-1].close)
        made = _planned(
            base, checkpoint, tuple(opened), tuple(strength for _, strength in adapters), options
        )
        failing.pop_all()
        return made


def _planned(
    path: Path,
    base: Checkpoint,
    adapters: tuple[Adapter, ...],
    strengths: tuple[float, ...],
    options: Options,
) -> Plan:
    other = "--layout" if options.layout else "--shard-size" if options.shard_size else None
    gguf = as_gguf(base.source, options.output, options.dtype, other)
    single = gguf or as_single(base.source, options.output, options.shard_size, options.layout)
    renamed = wanted(base, options.layout)
    output = options.output or default_output(path, "merged", folder=not single)
    if gguf and options.output is None:
        output = output.with_suffix(GGUF)
    if single:
        check_output(output, options.overwrite)
    places = _Places(base, adapters, strengths, options)
    merges = places.merges()
    places.selection.check("these adapters" if len(adapters) > 1 else "this adapter")
    for adapter, lost in zip(adapters, places.unused, strict=True):
        refuse_unused(lost, options.allow_unused, adapter.source.path)
    if not merges:
        raise NothingToDo(
            "no module of these adapters applies to this checkpoint",
            hint="check --only and --skip",
            file=path,
        )
    places.blocks.check()
    computed = _computed(base, merges, options)
    specs = tuple(_specs(base, {merge.name: merge for merge in computed}, options))
    if renamed:
        made = _relayout(base, specs, options)
        specs, layout = (
            tuple(spec for spec in specs if spec.name in made.moves),
            made.layout(options.shard_size),
        )
        places.unused.append(made.lost)
    else:
        touched = {name for merge in computed for name in merge.writes()}
        layout = plan_layout(kept(base, options), specs, touched, single, options.shard_size)
        layout = replace(layout, like=base.source.path if gguf else None)
    if layout.folder:
        _check_folder(output, layout, options)
    steps = tuple(step_of(merge, base, adapters) for merge in computed)
    compared = steps if options.verify else ()
    verified = tuple(verifying(step, base, adapters) for step in compared)
    check_memory((*steps, *verified), options.memory)
    unused = tuple(item for items in places.unused for item in items)
    rules = tuple(places.blocks.records())
    return Plan(
        base,
        adapters,
        strengths,
        options,
        output,
        merges,
        specs,
        unused,
        steps,
        layout,
        rules,
        places.selection.left_out,
        verified,
    )


def _relayout(base: Checkpoint, specs: Sequence[TensorSpec], options: Options) -> Relayout:
    """Plan the other layout; tensors that it cannot hold fail the run unless allowed."""
    assert options.layout is not None
    scaled = [spec.name for spec in specs if spec.name in base.quantization.extras]
    if options.dtype == "keep":
        scaled += [name for name in base.source.infos if base.source.packed(name) is not None]
    if scaled:
        raise NotRepresentable(
            f"--layout {options.layout}: the layout cannot hold scaled weights",
            hint="also pass --dtype bf16",
            file=base.source.path,
            tensor=scaled[0],
        )
    made = Relayout(base, specs, options.layout)
    refuse_unused(made.refused, options.allow_unused, base.source.path)
    return made


def _check_folder(output: Path, layout: Layout, options: Options) -> None:
    from adaptkit.files.publish import check_folder

    check_folder(output, layout.top, options.overwrite)


def _computed(
    base: Checkpoint, merges: Sequence[TensorMerge], options: Options
) -> tuple[TensorMerge, ...]:
    """Return the merges that change a tensor, in the order of the base.

    A tensor without contributions may still change its dtype.
    """
    placed = {merge.name: merge for merge in merges}
    if options.dtype != "keep" and base.quantization.refused:
        name, scheme = next(iter(base.quantization.refused.items()))
        raise NotRepresentable(
            f"stored as {scheme}, which cannot be converted",
            hint="omit --dtype",
            file=base.source.path,
            tensor=name,
        )
    found = []
    for info in base.source.infos.values():
        if options.dtype != "keep":
            _check_plain(base, info.name)
        merge = placed.get(info.name)
        if merge is not None and merge.changes:
            found.append(merge)
        elif options.dtype != "keep" and info.name not in base.quantization.extras:
            dtype = _new_dtype(base, info.name, options)
            if dtype != info.dtype or info.name in base.quantization.scales:
                found.append(TensorMerge(info.name, dtype, ()))
    return tuple(found)


def _check_plain(base: Checkpoint, name: str) -> None:
    """Refuse weights that cannot be written as plain numbers."""
    packed = base.source.packed(name)
    if packed is None or (packed.plain and packed.dtype not in UNREAD):
        return
    raise NotRepresentable(
        f"stored as {packed.dtype}, which cannot be converted",
        hint="merge into the plain model that it was made from; what loads this file loads a LoRA "
        "beside it",
        file=base.source.path,
        tensor=name,
    )


def _new_dtype(base: Checkpoint, name: str, options: Options) -> str:
    """Return the new dtype of a tensor; integers and unreadable formats keep theirs."""
    info = base.source.infos[name]
    return (
        info.dtype if base.quantization.refusal(info) else stored_dtype(options.dtype, info.dtype)
    )


def _specs(
    base: Checkpoint, computed: Mapping[str, TensorMerge], options: Options
) -> Iterator[TensorSpec]:
    """Yield the tensors of the output in the order of the base.

    A new dtype removes the tensors that describe scaled weights.
    """
    stored = base.quantization
    dropped = stored.extras if options.dtype != "keep" else frozenset[str]()
    for info in kept(base, options).infos.values():
        if info.name not in dropped:
            merge = computed.get(info.name)
            plain = merge is not None and merge.packed is None
            yield TensorSpec(info.name, merge.dtype if merge and plain else info.dtype, info.shape)


def _open_adapter(base: Checkpoint, path: Path, options: Options) -> Adapter:
    if not base.known:
        return Adapter.open_as(path, base.family, format=options.format, alpha=options.alpha_in)
    adapter = Adapter.open(path, format=options.format, alpha=options.alpha_in)
    family = base.family.name
    stated = options.family is not None  # what the user says counts for both files
    if adapter.family.name != family and (stated or family in adapter.detection.alternatives):
        adapter.close()
        adapter = Adapter.open(path, family=family, format=options.format, alpha=options.alpha_in)
    if adapter.family.name != family:
        adapter.close()
        raise ShapeMismatch(
            f"this adapter is for {adapter.family.title}, but the checkpoint is "
            f"{base.family.title}",
            hint="see `adaptkit inspect` on both",
            file=path,
        )
    return base.adapted(adapter)


class _Places:
    """Locate each entry in the base; collect unmatched keys per adapter in `unused`."""

    def __init__(
        self,
        base: Checkpoint,
        adapters: Sequence[Adapter],
        strengths: Sequence[float],
        options: Options,
    ) -> None:
        self.base, self.adapters, self.strengths, self.options = base, adapters, strengths, options
        self.blocks = Blocks(options.blocks, base.family)
        self.selection = Selection(options.only, options.skip, base.family)
        self.held = base.targets()
        self.unused: list[list[Unused]] = [
            [Unused(key, reason) for key, reason in adapter.unclaimed.items()]
            for adapter in adapters
        ]
        self.found: dict[str, list[Contribution]] = {}

    def _padded(self, entry: Entry, pieces: tuple[Piece, ...]) -> int:
        """The columns of a layer that has more inputs than its adapter, if that is allowed.

        Fill, Control and inpainting models are the same models with more channels at the end of
        the first layer. ComfyUI (`comfy/lora.py: pad_tensor_to_shape`) and diffusers
        (`FluxLoraLoaderMixin._maybe_expand_lora_state_dict`) fill up with zeros too.
        """
        wider = self._wider(entry, pieces)
        return wider if self.options.pad_inputs and entry.kind.additive else 0

    def _wider(self, entry: Entry, pieces: tuple[Piece, ...]) -> int:
        """The columns of a layer with as many rows and more input channels than its adapter."""
        rows, *inputs = self.base.slot_shape(pieces)
        columns, window = math.prod(inputs), math.prod(inputs[1:])
        own = entry.facts.columns
        wider = 0 < own < columns and own % window == 0 and entry.facts.rows == rows
        return columns if wider else 0

    def _narrower(self, entry: Entry, pieces: tuple[Piece, ...]) -> bool:
        """Whether a layer has as many rows and half the inputs, as FLUX.1 beside its Control."""
        rows, *inputs = self.base.slot_shape(pieces)
        return (entry.facts.rows, entry.facts.columns) == (rows, 2 * math.prod(inputs))

    def _whole(self, entry: Entry, pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
        """The pieces of a slot if one of them depends on all and none is changed before."""
        apart = entry.kind.additive or len(pieces) == 1
        return () if apart or any(piece.name in self.found for piece in pieces) else pieces

    def merges(self) -> tuple[TensorMerge, ...]:
        for number, adapter in enumerate(self.adapters):
            for slot, entry in adapter.entries.items():
                if self.selection(slot, adapter.label(slot)):
                    self._entry(number, adapter, slot, entry)
        order = self.base.source.infos
        return tuple(self._merge(name, self.found[name]) for name in order if name in self.found)

    def _merge(self, name: str, contributions: Sequence[Contribution]) -> TensorMerge:
        info, stored = self.base.source.infos[name], self.base.quantization
        packed = self.base.source.packed(name)
        if packed is not None and not packed.plain:
            _check_plain(self.base, name)
        if (reason := stored.refusal(info)) is not None:
            raise NotRepresentable(
                f"stored as {reason}, which adapters cannot be added to",
                hint=PLAIN_BASE,
                file=self.base.source.path,
                tensor=name,
            )
        dtype = stored_dtype(self.options.dtype, info.dtype)
        if self.options.dtype != "keep":
            return TensorMerge(name, dtype, tuple(contributions))
        if packed is not None and packed.packing is None and any(c.strength for c in contributions):
            raise NotRepresentable(
                f"stored as {dtype}, which is read and not written",
                hint="--dtype bf16 writes plain numbers",
                file=self.base.source.path,
                tensor=name,
            )
        return TensorMerge(name, dtype, tuple(contributions), stored.scales.get(name), packed)

    def _entry(self, number: int, adapter: Adapter, slot: Slot, entry: Entry) -> None:
        label = adapter.label(slot)
        pieces = self.base.locate(slot, self.held.get(slot.target, {}))
        if pieces is None:
            reason = f"the checkpoint has no {label}"
            self.unused[number].extend(Unused(key, reason) for key in entry.keys.values())
            return
        columns = self._padded(entry, pieces)
        size = entry.facts.rows, columns or entry.facts.columns
        try:
            self.base.check_size(pieces, size, label, adapter.source.path)
        except ShapeMismatch as error:
            if self._wider(entry, pieces):
                error.hint = (
                    "if the checkpoint is a Fill, Control or inpainting model, --pad-inputs leaves "
                    "the last inputs of this layer as they are"
                )
            elif self._narrower(entry, pieces):
                error.hint = (
                    "a Control LoRA reads more inputs than the plain model has: merge it into the "
                    "Control or Fill model; no plain LoRA can stand for it"
                )
            raise
        strength = self.strengths[number] * self.blocks.weight(slot)
        whole = self._whole(entry, pieces)
        made = Contribution(number, entry, None, None, label, strength, whole, columns)
        self._place(made, pieces)
        if entry.kind.changes_bias(entry.facts):
            bias = Slot(slot.target._replace(param=BIAS), slot.rows)
            held = self.base.locate(bias, self.held.get(bias.target, {}))
            self._place(replace(made, slot=pieces, columns=0, bias=True), held or ())

    def _place(self, made: Contribution, pieces: tuple[Piece, ...]) -> None:
        for piece, cut in _cuts(self.base, pieces):
            self.found.setdefault(piece.name, []).append(replace(made, rows=piece.rows, cut=cut))


def _cuts(
    base: Checkpoint, pieces: tuple[Piece, ...]
) -> Iterator[tuple[Piece, tuple[int, int] | None]]:
    """Yield each piece with its rows of the entry (None: all)."""
    if len(pieces) == 1:
        yield pieces[0], None
        return
    start = 0
    for piece in pieces:
        rows = base.shape(piece.name)[0]
        yield piece, (start, start + rows)
        start += rows
