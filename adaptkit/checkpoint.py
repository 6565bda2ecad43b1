"""A base model's checkpoint: which tensor, or which rows of one, holds a slot."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adaptkit.detect import Detection, detect_checkpoint, families
from adaptkit.errors import AdaptkitError, UnknownAdapter
from adaptkit.files.source import open_source
from adaptkit.keymap import Place, compile_checkpoint, label
from adaptkit.names import Slot

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from adaptkit.families._family import ModelFamily
    from adaptkit.files.source import TensorSource
    from adaptkit.names import Target

__all__ = ["Checkpoint", "Piece", "exchanged"]


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of one tensor: all of it where `rows` is None.

    `transposed`: the file stores the target's transpose; `swapped`: it has the two halves of the rows exchanged.
    """

    name: str
    rows: tuple[int, int] | None = None
    transposed: bool = False
    swapped: bool = False


def exchanged(tensor: Tensor, dim: int = 0) -> Tensor:
    """A copy with the two halves of a dimension exchanged; its own inverse."""
    import torch

    return torch.cat(tensor.tensor_split(2, dim)[::-1], dim)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, understood. `others` maps keys that no adapter holds to their part (`vae`) or to `unknown`."""

    source: TensorSource
    family: ModelFamily
    places: Mapping[str, Place]
    others: Mapping[str, str]
    detection: Detection

    @classmethod
    def open(cls, path: str | Path, *, family: str | None = None) -> Checkpoint:
        """Read the header of a checkpoint; UnknownAdapter where no family fits."""
        source = open_source(path)
        try:
            return cls.understand(source, family=family)
        except AdaptkitError as error:
            source.close()
            raise error.at(file=path) from None

    @classmethod
    def understand(cls, source: TensorSource, *, family: str | None = None) -> Checkpoint:
        """The checkpoint in an open source."""
        found = detect_checkpoint(source.infos, source.metadata, family=family)
        if found.family is None:
            raise UnknownAdapter(
                "not a checkpoint of a family adaptkit knows",
                hint=f"known families: {', '.join(families())}",
            )
        keys = compile_checkpoint(found.family)
        places = {name: place for name in source.infos if (place := keys.parse(name)) is not None}
        others = {name: keys.other(name) or "unknown" for name in source.infos if name not in places}
        return cls(source, families()[found.family], places, others, found)

    def targets(self) -> dict[Target, dict[Slot, str]]:
        """The tensors that hold each target: itself, or its parts; the first where two hold the same."""
        found: dict[Target, dict[Slot, str]] = {}
        for name, place in self.places.items():
            found.setdefault(place.slot.target, {}).setdefault(place.slot, name)
        return found

    def label(self, slot: Slot) -> str:
        """What people call a slot."""
        return label(self.family, slot)  # the same for every layout, so that `--only` is too

    def locate(self, slot: Slot, held: Mapping[Slot, str]) -> tuple[Piece, ...] | None:
        """Where a slot lies, given the tensors that hold its target; None where they do not cover it."""
        if slot in held:
            return (self._piece(held[slot]),)
        whole = held.get(Slot(slot.target))
        if whole is not None and slot.rows is not None:
            bounds = slot.rows.bounds(self.shape(whole)[0])
            return None if bounds is None else (self._piece(whole, bounds),)
        return self._joined(held) if slot.rows is None else None

    def _joined(self, held: Mapping[Slot, str]) -> tuple[Piece, ...] | None:
        """All parts of a target in order, where they make it whole."""
        parts = sorted((part.rows, name) for part, name in held.items() if part.rows is not None)
        if not parts or sum(rows.stop - rows.start for rows, _ in parts) != parts[0][0].total:
            return None
        return tuple(self._piece(name) for _, name in parts)

    def _piece(self, name: str, rows: tuple[int, int] | None = None) -> Piece:
        place = self.places[name]
        return Piece(name, rows, place.transposed, place.swapped)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor as its target has it (the reverse where the file stores the transpose)."""
        shape = self.source.infos[name].shape
        return shape[::-1] if self.places[name].transposed else shape

    def slot_shape(self, pieces: tuple[Piece, ...]) -> tuple[int, ...]:
        """The shape of a slot that lies in these pieces."""
        first = self.shape(pieces[0].name)
        rows = sum(p.rows[1] - p.rows[0] if p.rows else self.shape(p.name)[0] for p in pieces)
        return (rows, *first[1:])

    def read(self, pieces: tuple[Piece, ...]) -> Tensor:
        """A slot as a matrix (rows, columns) in its stored dtype; a vector is a column."""
        import torch

        parts = [self._read(piece) for piece in pieces]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _read(self, piece: Piece) -> Tensor:
        if piece.transposed:
            whole = self.source.read(piece.name).T
            return whole if piece.rows is None else whole[slice(*piece.rows)]
        if piece.swapped:
            whole = exchanged(self.source.read(piece.name))
            return whole.reshape(len(whole), -1)
        part = self.source.read(piece.name, None if piece.rows is None else slice(*piece.rows))
        return part.reshape(part.shape[0] if part.ndim else 1, -1)

    def nbytes(self, pieces: tuple[Piece, ...]) -> int:
        """Bytes read for these pieces."""
        return sum(self._piece_bytes(piece) for piece in pieces)

    def _piece_bytes(self, piece: Piece) -> int:
        info = self.source.infos[piece.name]
        if piece.rows is None:
            return info.nbytes
        return info.nbytes // max(1, math.prod(self.shape(piece.name)[:1])) * (piece.rows[1] - piece.rows[0])

    def close(self) -> None:
        """Close the file."""
        self.source.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
