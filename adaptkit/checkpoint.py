"""A base model's checkpoint: which tensor, or which rows of one, holds a slot."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from adaptkit.detect import Detection, detect_checkpoint, families, is_adapter
from adaptkit.errors import AdaptkitError, ShapeMismatch, UnknownAdapter
from adaptkit.files.open import open_source
from adaptkit.files.quantized import Quantization, read_widened
from adaptkit.keymap import CheckpointMap, KeyMap, Place, compile_checkpoint, compile_keys, label
from adaptkit.names import Slot
from adaptkit.unknown import family_of_weights

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from adaptkit.families.contract import ModelFamily
    from adaptkit.files.header import TensorInfo
    from adaptkit.files.source import TensorSource
    from adaptkit.formats.contract import KeyFormat
    from adaptkit.names import Target

EMA = "model_ema."

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
    """A checkpoint, understood. `others` maps keys that no adapter holds to their part: `vae`, `ema`, `unknown`; `scale`
    for what belongs to quantised weights; `replaced` for weights that averaged ones (`ema` of them) are read instead of.
    """

    source: TensorSource
    family: ModelFamily
    places: Mapping[str, Place]
    others: Mapping[str, str]
    detection: Detection
    quantization: Quantization
    ema: int = 0

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        family: str | None = None,
        ema: bool = False,
        strangers: bool = False,
    ) -> Checkpoint:
        """Read the header of a checkpoint; UnknownAdapter where no family fits.

        `ema`: read the averaged weights (`model_ema.…`) instead of the plain ones, where there are any. `strangers`: where
        no family fits and none is asked for, take it as one of a family that names its modules as this file does.
        """
        source = open_source(path)
        try:
            return cls.understand(source, family=family, ema=ema)
        except UnknownAdapter as error:
            if strangers and family is None and not is_adapter(source.infos):
                made = family_of_weights({name: info.shape for name, info in source.infos.items()})
                if made.components:
                    return cls.under_own_names(source, made, ema=ema)
            source.close()
            raise error.at(file=path) from None
        except AdaptkitError as error:
            source.close()
            raise error.at(file=path) from None

    @classmethod
    def understand(
        cls, source: TensorSource, *, family: str | None = None, ema: bool = False
    ) -> Checkpoint:
        """The checkpoint in an open source."""
        stored = Quantization.of(source.infos)
        infos = {name: info for name, info in source.infos.items() if name not in stored.extras}
        found = detect_checkpoint(infos, source.metadata, family=family)
        if found.family is None:
            raise UnknownAdapter(
                "not a checkpoint of a family adaptkit knows",
                hint=f"known families: {', '.join(families())}",
            )
        return cls._placed(source, stored, compile_checkpoint(found.family), found, ema)

    @classmethod
    def under_own_names(
        cls, source: TensorSource, family: ModelFamily, *, ema: bool = False
    ) -> Checkpoint:
        """The checkpoint in an open source as one of a family that was made from its names (see adaptkit.unknown)."""
        stored, keys = Quantization.of(source.infos), CheckpointMap(family)
        claimed = sum(keys.parse(name) is not None for name in source.infos)
        return cls._placed(
            source, stored, keys, Detection(None, None, claimed, len(source.infos)), ema
        )

    @classmethod
    def _placed(
        cls,
        source: TensorSource,
        stored: Quantization,
        keys: CheckpointMap,
        found: Detection,
        ema: bool,
    ) -> Checkpoint:
        named = {name: place for name in source.infos if (place := keys.parse(name)) is not None}
        averaged = _averaged(source.infos, named) if ema else {}
        places = {
            averaged.get(name, name): place
            for name, place in named.items()
            if name not in stored.extras
        }
        others = {
            name: keys.other(name) or "unknown" for name in source.infos if name not in places
        }
        others |= dict.fromkeys(averaged, "replaced") | dict.fromkeys(
            (name for name in source.infos if name in stored.extras), "scale"
        )
        return cls(source, keys.family, places, others, found, stored, len(averaged))

    @property
    def known(self) -> bool:
        """Whether the family is one that adaptkit has a table for."""
        return self.detection.family is not None

    def keys(self, format: KeyFormat) -> KeyMap:
        """The names that an adapter for this checkpoint has in a format."""
        return (
            compile_keys(self.family.name, format.name)
            if self.known
            else KeyMap(self.family, format)
        )

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

    def dtypes(self, pieces: tuple[Piece, ...]) -> frozenset[str]:
        """The dtypes in which a slot is stored."""
        return frozenset(self.source.infos[piece.name].dtype for piece in pieces)

    def refusal(self, names: Iterable[str]) -> str | None:
        """Why tensors cannot be read as the weights they mean (`nf4 (bitsandbytes)`), by the first such; None for none."""
        infos = (self.source.infos[name] for name in names)
        return next(
            (reason for info in infos if (reason := self.quantization.refusal(info)) is not None),
            None,
        )

    def read(self, pieces: tuple[Piece, ...]) -> Tensor:
        """A slot as a matrix (rows, columns); a vector is a column.

        In its stored dtype; fp8 and scaled weights as float32, multiplied with their scales.
        """
        import torch

        parts = [self._read(piece) for piece in pieces]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def streams(self, pieces: tuple[Piece, ...]) -> bool:
        """Whether `blocks` reads no more than a block at a time: a slot of one piece, stored as it is."""
        (piece, *others) = pieces
        plain = not (others or piece.transposed or piece.swapped)
        return (
            plain
            and bool(self.source.infos[piece.name].shape)
            and self.source.span(piece.name) is not None
        )

    def blocks(self, pieces: tuple[Piece, ...], rows: int) -> Iterator[Tensor]:
        """What `read` gives, so many rows at a time."""
        if not self.streams(pieces):
            whole = self.read(pieces)
            yield from (whole[start : start + rows] for start in range(0, len(whole), rows))
            return
        piece = pieces[0]
        first, last = piece.rows or (0, self.source.infos[piece.name].shape[0])
        for start in range(first, last, rows):
            yield self._read(replace(piece, rows=(start, min(start + rows, last))))

    def announce(self, pieces: tuple[Piece, ...]) -> None:
        """These pieces will be read soon."""
        for piece in pieces:
            self.source.announce(piece.name)

    def _read(self, piece: Piece) -> Tensor:
        if piece.transposed:
            whole = self._numbers(piece.name).T
            return whole if piece.rows is None else whole[slice(*piece.rows)]
        if piece.swapped:
            whole = exchanged(self._numbers(piece.name))
            return whole.reshape(len(whole), -1)
        part = self._numbers(piece.name, piece.rows)
        return part.reshape(part.shape[0] if part.ndim else 1, -1)

    def _numbers(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        return read_widened(self.source, self.quantization, name, rows)

    def stored_bytes(self, pieces: tuple[Piece, ...]) -> int:
        """Bytes of the file read for these pieces, scales left out."""
        return sum(self._share(piece, self._info(piece).nbytes) for piece in pieces)

    def nbytes(self, pieces: tuple[Piece, ...]) -> int:
        """Bytes that reading these pieces takes in memory at most: as stored, and where they are widened once more as such."""
        wide = (
            (piece, self._info(piece))
            for piece in pieces
            if self.quantization.widens(self._info(piece))
        )
        return self.stored_bytes(pieces) + sum(
            self._share(piece, self.quantization.wide_bytes(info)) for piece, info in wide
        )

    def _info(self, piece: Piece) -> TensorInfo:
        return self.source.infos[piece.name]

    def _share(self, piece: Piece, size: int) -> int:
        """What a piece's rows take of a size of its whole tensor."""
        if piece.rows is None or piece.transposed:  # a transposed tensor is read whole
            return size
        return (
            size // max(1, math.prod(self.shape(piece.name)[:1])) * (piece.rows[1] - piece.rows[0])
        )

    def close(self) -> None:
        """Close the file."""
        self.source.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _averaged(infos: Mapping[str, TensorInfo], names: Iterable[str]) -> dict[str, str]:
    """Plain key → the key of its average.

    CompVis' LitEma keeps `model.diffusion_model.out.0.weight` as `model_ema.diffusion_modelout0weight`: the name inside its
    model, without dots, which no buffer may have in its name. Names alike without dots get no average.
    """
    flat: dict[str, list[str]] = {}
    for name in names:
        flat.setdefault(_flat(name.removeprefix("model.")), []).append(name)
    found: dict[str, str] = {}
    for key in infos:
        plain = flat.get(_flat(key.removeprefix(EMA)), []) if key.startswith(EMA) else []
        if len(plain) != 1:
            continue
        if infos[plain[0]].shape != infos[key].shape:
            shapes = f"{list(infos[key].shape)}, that of the weight {list(infos[plain[0]].shape)}"
            raise ShapeMismatch(f"the shape of this average is {shapes}", tensor=key)
        found[plain[0]] = key
    return found


def _flat(name: str) -> str:
    return name.replace(".", "")
