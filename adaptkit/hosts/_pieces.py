"""The modules of an adapter as a host finds them.

Reads headers only.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from functools import cache
from typing import TYPE_CHECKING

from adaptkit.algorithms.contract import ALPHA
from adaptkit.detect import formats
from adaptkit.errors import NotRepresentable
from adaptkit.families.contract import Kind
from adaptkit.formats.contract import Alpha
from adaptkit.hosts.contract import Piece
from adaptkit.keymap import algorithms, compile_keys, keys_for
from adaptkit.keymap.kinds import low_rank_kind
from adaptkit.meaning import Meaning, states_alpha
from adaptkit.names import WEIGHT, Slot, Target

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from adaptkit.adapter import Adapter
    from adaptkit.algorithms.contract import Weights
    from adaptkit.entries import Entry
    from adaptkit.hosts.contract import Recipe
    from adaptkit.keymap import KeyMap

__all__ = ["common_alphas", "examples", "pieces_as", "pieces_of"]


FLAT = 2  # dimensions of a tensor that shows no window
_INDEX = re.compile(r"\{\w+:\d+\}")


def pieces_of(adapter: Adapter) -> tuple[Piece, ...]:
    """The modules of a file that its family's table names: no host was tried with others."""
    own = set(adapter.own)
    return tuple(
        _found(adapter, entry) for slot, entry in adapter.entries.items() if slot not in own
    )


def _found(adapter: Adapter, entry: Entry) -> Piece:
    parsed = [adapter.keys.parse(key) for _, key in entry.tensors()]
    modules = [found.module for found in parsed if found is not None]
    scaled = entry.facts.scale != 1.0 and not entry.kind.bounded
    stated = scaled and entry.alpha_source == "metadata"
    rank = entry.facts.rank
    return Piece(
        slot=entry.slot,
        stem=_stem(entry, parsed[0].spelled) if parsed and parsed[0] is not None else "",
        label=adapter.label(entry.slot),
        algorithm=entry.kind.name,
        names=_names(adapter.keys, entry.slot, modules[0]) if modules else (),
        kernel=_kernel(adapter, adapter.keys, entry.slot, entry),
        columns=entry.facts.columns,
        suffixes=tuple(found.spelled for found in parsed if found is not None),
        alpha=entry.alpha if entry.alpha is not None or rank is None else float(rank),
        rank=rank or 0,
        told=ALPHA in entry.keys and not entry.kind.bounded,
        stated=stated,
        loose=stated and _loose(adapter, entry.slot.component),
        axis=_axis(adapter, entry),
        keys=len(entry.keys),
    )


def _loose(adapter: Adapter, component: str) -> bool:
    """Whether the metadata state an alpha where neither PEFT nor diffusers reads it."""
    parts = Meaning.of(adapter.metadata, None).configs
    return component not in parts and ("" in parts or any(map(states_alpha, adapter.metadata)))


def _stem(entry: Entry, suffix: str) -> str:
    return next(iter(entry.tensors()))[1].removesuffix(f".{suffix}")


def pieces_as(
    adapter: Adapter, recipe: Recipe, algorithm: str | None
) -> tuple[tuple[Piece, ...], int]:
    """The modules as `convert` writes them.

    Also the number of modules the format has no place for.
    """
    keys = keys_for(adapter.family, formats()[recipe.format], recipe.dialect)
    own = set(adapter.own)
    fold = recipe.fold_alpha or keys.format.alpha is Alpha.NONE
    made: dict[Slot, Piece] = {}
    homeless = 0
    for entry in adapter.entries.values():
        try:
            for slot in _written(keys, entry.slot):
                if entry.slot not in own:
                    made.setdefault(slot, _made(adapter, keys, slot, entry, fold, algorithm))
        except NotRepresentable:
            homeless += 1
    return tuple(made.values()), homeless


def _written(keys: KeyMap, slot: Slot) -> tuple[Slot, ...]:
    """The slots of a format for a slot: itself, parts, or its whole."""
    whole = tuple(s._replace(target=slot.target) for s in keys.slots(slot.target))
    if not whole:
        raise NotRepresentable(f"the {keys.format.name} format has no place for {slot}")
    return (slot,) if slot in whole else whole


def _made(
    adapter: Adapter, keys: KeyMap, slot: Slot, entry: Entry, fold: bool, algorithm: str | None
) -> Piece:
    changed = algorithm is not None and not entry.facts.vector
    kind = algorithms()[algorithm] if changed and algorithm else entry.kind
    scale, rank = (1.0 if fold else entry.facts.scale), entry.facts.rank
    told = ALPHA in kind.roles and not fold and (
        keys.format.alpha is Alpha.TENSOR or (keys.format.alpha is Alpha.OPTIONAL and scale != 1.0)
    )  # fmt: skip
    suffixes = tuple(_suffixes(keys, slot, entry, kind))
    kernel = _kernel(adapter, keys, slot, entry if kind is entry.kind else None)
    shape = (1,) * (2 + kernel)
    flat = any(keys.flat(suffix, shape) != shape for suffix in suffixes)
    return Piece(
        slot=slot,
        stem=keys.stem(slot),
        label=adapter.label(entry.slot),
        algorithm=kind.name,
        names=_names(keys, slot, keys.module(_weight(slot))),
        kernel=0 if flat else kernel,
        columns=entry.facts.columns,
        suffixes=suffixes,
        alpha=None if rank is None else scale * rank,
        rank=(rank or 0) if kind is entry.kind and slot == entry.slot else 0,
        told=told and not kind.bounded,
        stated=keys.format.alpha is Alpha.CONFIG and scale != 1.0 and not kind.bounded,
        axis=_axis(adapter, entry) if kind is entry.kind else "",
        keys=len(suffixes) + told,
    )


@cache
def examples(family: str, format: str) -> tuple[Piece, ...]:
    """One LoRA module per row of the denoiser that a format can name; alpha = rank.

    Without the layers that only the family's kin have.
    """
    keys = compile_keys(family, format)
    part, kin = keys.family.components[0], keys.family.kin
    targets = (
        Target(part.name, _INDEX.sub("0", row.target))
        for row in part.rows
        if row.kind is Kind.MATRIX and not row.target.startswith(kin)
    )
    return tuple(_example(keys, slot) for target in targets for slot in keys.slots(target))


def _example(keys: KeyMap, slot: Slot) -> Piece:
    lora = low_rank_kind().name
    roles = [keys.spell(slot, lora, role) for role in ("up", "down")] if keys.holds(lora) else []
    return Piece(
        slot=slot,
        stem=keys.stem(slot),
        label=str(slot),
        algorithm=lora if roles else next(iter(keys.format.owns)),
        names=_names(keys, slot, keys.module(slot)),
        kernel=_kernel(None, keys, slot, None),
        suffixes=tuple(key.removeprefix(f"{keys.stem(slot)}.") for key in roles),
        alpha=1.0,
        told=keys.format.alpha is Alpha.TENSOR and bool(roles),
        keys=len(roles) + (keys.format.alpha is Alpha.TENSOR),
    )


def _suffixes(keys: KeyMap, slot: Slot, entry: Entry, kind: type[Weights]) -> Iterator[str]:
    roles = [role for role, _ in entry.tensors()] if kind is entry.kind else sorted(kind.forms[0])
    for role in roles:
        if keys.format.peft and role in kind.cores:
            continue  # multiplied out, see `Weights.unrolled`
        key = keys.spell(slot, kind.name, kind.stored_as(role, peft=keys.format.peft))
        yield key.removeprefix(f"{keys.stem(slot)}.")


def _weight(slot: Slot) -> Slot:
    return slot._replace(target=slot.target._replace(param=WEIGHT))


def _names(keys: KeyMap, slot: Slot, module: str) -> tuple[tuple[str, str], ...]:
    """The (naming, name) pairs under which a slot's module has this name.

    Words are joined as in the format.
    """
    row = keys.row(slot.target)
    found: list[tuple[str, str]] = []
    for naming, names in {} if row is None else row.names.items():
        # a naming without such rows splits the module differently
        name = next((name for name in names if name.rows == slot.rows), None)
        if name is None or name.transposed:  # no adapter is named so
            continue
        if keys.filled(name.module, slot.target) == module:
            found.append((naming, name.module))
    return tuple(found)


def _kernel(adapter: Adapter | None, keys: KeyMap, slot: Slot, entry: Entry | None) -> int:
    """The dimensions of a layer's window, 0 if no tensor of the entry shows them."""
    row = keys.row(slot.target)
    if row is None:
        return 0
    if adapter is not None and entry is not None:
        infos = adapter.source.infos
        if all(len(infos[key].shape) <= FLAT for _, key in entry.tensors()):
            return 0
    return len(row.kernel)


def _axis(adapter: Adapter, entry: Entry) -> str:
    """The axis of DoRA's norm.

    LyCORIS stores [out, 1] or [1, in], PEFT [out] or [1, out, 1, 1].
    """
    if not entry.kind.wrapper:
        return ""
    key = entry.keys.get("magnitude")
    shape = adapter.source.infos[key].shape if key else ()
    return "input" if len(shape) > 1 and shape[0] == 1 and math.prod(shape) > 1 else "output"


def common_alphas(pieces: Sequence[Piece]) -> dict[str, float]:
    """The most common alpha of each component, counted as in diffusers' `get_peft_kwargs`."""
    counts: dict[str, Counter[float]] = {}
    for piece in pieces:
        if piece.told and piece.alpha is not None:
            counts.setdefault(piece.slot.component, Counter())[piece.alpha] += 1
    return {component: found.most_common(1)[0][0] for component, found in counts.items()}
