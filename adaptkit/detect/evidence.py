"""What the names and sizes in a file say of a family that claims its keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from adaptkit.detect.sizes import Fit, Module, Size, Sizes, fit
from adaptkit.errors import NotRepresentable
from adaptkit.files.quantized import FLOATS, FP8
from adaptkit.keymap import compile_checkpoint, compile_keys, find_row, prefixes
from adaptkit.names import WEIGHT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from adaptkit.families.contract import ModelFamily
    from adaptkit.files.header import TensorInfo
    from adaptkit.keymap import CheckpointMap, KeyMap, Reading

__all__ = ["SAMPLE", "AdapterFile", "CheckpointFile", "File"]

SAMPLE = 48  # names that every family is tried on first


class File(Protocol):
    """A file's header, measured against families that claim keys of it."""

    def fit(self, family: str, format: str | None, /) -> Fit:
        """How well names and sizes fit."""

    def runs(self, family: str, format: str | None, /) -> int:
        """Count the complete runs of blocks (FLUX.1: 19 double, 38 single).

        A run counts if its first and its last block are in the file.
        """

    def spelled(self, family: str, format: str | None, /) -> float:
        """The share of the names that adaptkit would write so for this family."""


class AdapterFile:
    """An adapter's header; `stems` are its keys without suffixes, each with its number of keys."""

    def __init__(self, infos: Mapping[str, TensorInfo], stems: Mapping[str, int]) -> None:
        self._sizes = Sizes(infos)
        self._stems = stems
        self._fits: dict[tuple[str, str | None], Fit] = {}

    def fit(self, family: str, format: str | None) -> Fit:
        """See `File`."""
        if (family, format) not in self._fits:
            keys = compile_keys(family, format or "")

            def module(stem: str) -> Module | None:
                slot = keys.slot(stem)
                row = None if slot is None else keys.row(slot.target)
                return Module(slot, row, self._sizes[stem]) if slot and row else None

            names = self._of(keys)
            self._fits[family, format] = fit(keys.family, names, keys.reading, module)
        return self._fits[family, format]

    def _of(self, keys: KeyMap) -> Mapping[str, int]:
        """The stems without those of other parts of the model, such as a text encoder."""
        beside = [stem for stem in self._stems if not keys.claims(stem)]
        if not beside:
            return self._stems
        held = {found.component for stem in self._stems if (found := keys.reading(stem))}
        parts = [part for part in keys.family.components if part.name in held]
        starts = tuple(start for part in parts for start in prefixes(part, keys.format))
        others = {stem for stem in beside if not stem.startswith(starts)}
        return {stem: n for stem, n in self._stems.items() if stem not in others}

    def runs(self, family: str, format: str | None) -> int:
        """See `File`."""
        keys = compile_keys(family, format or "")
        slots = (slot for stem in self._stems if (slot := keys.slot(stem)) is not None)
        edges = {edge for slot in slots for edge in keys.edges(slot.target)}
        return sum((run, not last) in edges for run, last in edges if last)

    def spelled(self, family: str, format: str | None) -> float:
        """See `File`."""
        keys = compile_keys(family, format or "")
        sample = list(self._stems)[:: max(1, len(self._stems) // SAMPLE)]
        return sum(_spells(keys, stem) for stem in sample) / len(sample)


def _spells(keys: KeyMap, stem: str) -> bool:
    """Whether a format spells a stem's slot as the file does."""
    slot = keys.slot(stem)
    try:
        return slot is not None and keys.stem(slot) == stem
    except NotRepresentable:
        return False


class CheckpointFile:
    """A checkpoint's header; `own` are the keys outside VAE and averages."""

    def __init__(self, infos: Mapping[str, TensorInfo], own: Sequence[str]) -> None:
        self._infos = infos
        self._matrices = [name for name in own if len(infos[name].shape) > 1]
        self._fits: dict[str, Fit] = {}

    def fit(self, family: str, _format: str | None) -> Fit:
        """See `File`."""
        if family not in self._fits:
            keys = compile_checkpoint(family)
            read = {name: keys.reading(name) for name in self._matrices}
            held = _prefixes_of(keys.family, (name for name, found in read.items() if found))
            # text encoders of other names, training state and the like are beside the model
            names = {name: 1 for name, found in read.items() if found or name.startswith(held)}
            self._fits[family] = (
                fit(keys.family, names, read.get, self._module(keys))
                if _has_needed(keys.family, read.values())
                else Fit(0.0, None, None)
            )
        return self._fits[family]

    def _module(self, keys: CheckpointMap) -> Callable[[str], Module | None]:
        def module(name: str) -> Module | None:
            place = keys.parse(name)
            row = None if place is None else find_row(keys.family, *place.slot.target[:2])
            if place is None or row is None or place.slot.param != WEIGHT:
                return None
            return Module(place.slot, row[0], _stored(self._infos[name], place.transposed))

        return module

    def runs(self, _family: str, _format: str | None) -> int:
        """See `File`."""
        return 0  # a checkpoint has all blocks

    def spelled(self, _family: str, _format: str | None) -> float:
        """See `File`."""
        return 0.0


def _has_needed(family: ModelFamily, read: Iterable[Reading | None]) -> bool:
    """Whether a checkpoint has one of the modules without which it is another model's."""
    needs = family.needs
    return not needs or any(found is not None and found.target in needs for found in read)


def _stored(info: TensorInfo, transposed: bool) -> Size | None:
    """The size of a stored matrix; None for packed numbers, whose shape is another."""
    if info.dtype not in (*FLOATS, *FP8, "I8"):
        return None
    rows, columns = info.shape[:2]
    return Size(columns, rows, ()) if transposed else Size(rows, columns, info.shape[2:])


def _prefixes_of(family: ModelFamily, keys: Iterable[str]) -> tuple[str, ...]:
    """The prefixes of a family's components that checkpoint keys have, the longest of each."""
    known = {p for part in family.components for found in part.checkpoints.values() for p in found}
    longest = sorted(known, key=len, reverse=True)
    return tuple({next((p for p in longest if key.startswith(p)), ""): None for key in keys})
