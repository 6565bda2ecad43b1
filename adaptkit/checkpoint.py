"""Read a base model's checkpoint: the tensors that hold a slot."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from adaptkit.detect import Detection, detect_checkpoint, families, is_adapter
from adaptkit.errors import InternalError, NotRepresentable, ShapeMismatch, UnknownAdapter
from adaptkit.files.open import open_source
from adaptkit.files.packed import unpacked
from adaptkit.files.quantized import Quantization, read_widened
from adaptkit.keymap import CheckpointMap, Place, compile_checkpoint, keys_for, label
from adaptkit.names import Slot
from adaptkit.unknown import family_of_weights, own_weights, with_own

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from adaptkit.adapter import Adapter
    from adaptkit.families.contract import ModelFamily
    from adaptkit.files.header import TensorInfo
    from adaptkit.files.source import TensorSource
    from adaptkit.formats.contract import KeyFormat
    from adaptkit.keymap import KeyMap
    from adaptkit.names import Target

EMA = "model_ema."

PLAIN_BASE = "use an fp32, fp16, bf16 or fp8 (e4m3, e5m2) checkpoint of this model"

__all__ = ["PLAIN_BASE", "Checkpoint", "Piece", "exchanged"]


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of one tensor; the whole tensor if `rows` is None.

    `transposed`: the file stores the transpose of the target. `swapped`: the two halves of the rows
    are swapped in the file.
    """

    name: str
    rows: tuple[int, int] | None = None
    transposed: bool = False
    swapped: bool = False


def exchanged(tensor: Tensor, dim: int = 0) -> Tensor:
    """A copy with the two halves of a dimension swapped; its own inverse."""
    import torch

    return torch.cat(tensor.tensor_split(2, dim)[::-1], dim)


@dataclass(frozen=True, repr=False)
class Checkpoint:
    """A parsed checkpoint.

    `others` maps keys that no adapter adapts to their part: `vae`, `ema`, `unknown`; `scale` for
    tensors of quantised weights; `replaced` for weights whose average (`ema`) is read instead.
    """

    source: TensorSource
    family: ModelFamily
    places: Mapping[str, Place]
    others: Mapping[str, str]
    detection: Detection
    quantization: Quantization
    ema: int = 0

    def __repr__(self) -> str:
        return (
            f"Checkpoint({str(self.source.path)!r}: {self.family.name}, {len(self.places)} weights)"
        )

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        family: str | None = None,
        ema: bool = False,
        strangers: bool = False,
    ) -> Checkpoint:
        """Read the header of a checkpoint; `UnknownAdapter` if no family fits.

        With `ema`, averaged weights (`model_ema.…`) are read in place of the plain ones, if the
        file has any. With `strangers`, a file of no known family is read as a family made of its
        own module names, unless `family` is given. Packed weights are read as numbers.
        """
        source = unpacked(open_source(path))
        try:
            try:
                return cls.understand(source, family=family, ema=ema)
            except UnknownAdapter:
                # an adapter given as the base must stay an error, not become a family of its own
                if not strangers or family is not None or is_adapter(source.infos):
                    raise
                made = family_of_weights({name: info.shape for name, info in source.infos.items()})
                if not made.components:
                    raise
                return cls.under_own_names(source, made, ema=ema)
        except Exception as error:
            source.close()
            found = InternalError.of(error).at(file=path)
            raise found from found.__cause__

    @classmethod
    def understand(
        cls, source: TensorSource, *, family: str | None = None, ema: bool = False
    ) -> Checkpoint:
        """Parse the checkpoint in an open source."""
        stored = Quantization.of(source.infos)
        infos = {name: info for name, info in source.infos.items() if name not in stored.extras}
        found = detect_checkpoint(infos, source.metadata, family=family)
        if found.family is None and is_adapter(source.infos):
            raise UnknownAdapter(
                "this is an adapter, and a checkpoint belongs here",
                hint="are the arguments swapped? merge BASE ADAPTER, extract BASE TUNED",
            )
        if found.family is None:
            near = ""
            if found.nearest:
                near = f"{found.nearest}; --family {found.nearest.family} names it anyway; "
            raise UnknownAdapter(
                "not a checkpoint of a known family",
                hint=f"{near}known families: {', '.join(families())}",
            )
        keys = compile_checkpoint(found.family)
        grown = with_own(keys.family, own_weights(keys, infos))
        if grown is not keys.family:
            keys = CheckpointMap(grown)
        return cls._placed(source, stored, keys, found, ema)

    @classmethod
    def under_own_names(
        cls, source: TensorSource, family: ModelFamily, *, ema: bool = False
    ) -> Checkpoint:
        """Parse a checkpoint as a family made of its own names (see adaptkit.unknown)."""
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
            # a single number or nothing at all is no weight, whatever its name
            if name not in stored.extras and _has_rows(source.infos[averaged.get(name, name)])
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
        """Whether adaptkit has a table for the family."""
        return self.detection.family is not None

    def keys(self, format: KeyFormat) -> KeyMap:
        """The key map of a format for adapters of this checkpoint."""
        return keys_for(self.family, format)

    def targets(self) -> dict[Target, dict[Slot, str]]:
        """The tensors that hold each target or its parts.

        Of two that hold the same, the first counts.
        """
        found: dict[Target, dict[Slot, str]] = {}
        for name, place in self.places.items():
            found.setdefault(place.slot.target, {}).setdefault(place.slot, name)
        return found

    def label(self, slot: Slot) -> str:
        """The display name of a slot, equal in all layouts, so that `--only` is too."""
        return label(self.family, slot)

    def locate(self, slot: Slot, held: Mapping[Slot, str]) -> tuple[Piece, ...] | None:
        """Locate a slot in the tensors of its target; None if incomplete."""
        if slot in held:
            return (self._piece(held[slot]),)
        # a fused tensor serves its parts by rows; separate tensors serve the whole by concatenation
        whole = held.get(Slot(slot.target))
        if whole is not None and slot.rows is not None:
            bounds = slot.rows.bounds(self.shape(whole)[0])
            return None if bounds is None else (self._piece(whole, bounds),)
        return self._joined(held) if slot.rows is None else None

    def _joined(self, held: Mapping[Slot, str]) -> tuple[Piece, ...] | None:
        """All parts of a target in order, if they cover it."""
        parts = sorted((part.rows, name) for part, name in held.items() if part.rows is not None)
        if not parts or sum(rows.stop - rows.start for rows, _ in parts) != parts[0][0].total:
            return None
        return tuple(self._piece(name) for _, name in parts)

    def _piece(self, name: str, rows: tuple[int, int] | None = None) -> Piece:
        place = self.places[name]
        return Piece(name, rows, place.transposed, place.swapped)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor in its target; reversed if transposed."""
        shape = self.source.infos[name].shape
        return shape[::-1] if self.places[name].transposed else shape

    def slot_shape(self, pieces: tuple[Piece, ...]) -> tuple[int, ...]:
        """The shape of a slot in these pieces."""
        first = self.shape(pieces[0].name)
        rows = sum(p.rows[1] - p.rows[0] if p.rows else self.shape(p.name)[0] for p in pieces)
        return (rows, *first[1:])

    def check_size(
        self, pieces: tuple[Piece, ...], size: tuple[int, int], label: str, adapter: Path
    ) -> None:
        """Raise unless a module of an adapter fits these pieces.

        `size` is (rows, columns) as the module has it, 0 where its tensors do not tell. Raises
        NotRepresentable if the weights are packed, whose shapes say nothing, else ShapeMismatch.
        """
        for piece in pieces:
            if (reason := self.refusal([piece.name])) is not None:
                raise NotRepresentable(
                    f"stored as {reason}, which adapters cannot be added to",
                    hint=PLAIN_BASE,
                    file=self.source.path,
                    tensor=piece.name,
                )
        shape = self.slot_shape(pieces)
        there = (shape[0] if shape else 1), math.prod(shape[1:])
        if any(one and other and one != other for one, other in zip(there, size, strict=True)):
            shown = ["{} × {}".format(*(n or "?" for n in one)) for one in (there, size)]
            raise ShapeMismatch(
                f"{label} is {shown[0]} in {self.source.path.name}, {shown[1]} in this adapter",
                hint="the adapter is for a model of another size, or of another family; "
                "see `adaptkit inspect --modules`",
                file=adapter,
            )

    def adapted(self, adapter: Adapter) -> Adapter:
        """An adapter for this checkpoint, with what its file leaves for the checkpoint to tell.

        Those are the dots of its own names, numbers of rows, and the sizes of the whole model that
        random numbers are drawn for.
        """
        adapter = adapter.with_dots(self.family)
        held = self.targets()
        shapes: dict[Slot, tuple[int, int]] = {}
        for slot, entry in adapter.entries.items():
            if not entry.kind.additive:
                pieces = self.locate(slot, held.get(slot.target, {}))
                shape = (0,) if pieces is None else self.slot_shape(pieces)
                shapes[slot] = shape[0] if shape else 0, math.prod(shape[1:])
        return adapter.sized(shapes) if shapes else adapter

    def dtypes(self, pieces: tuple[Piece, ...]) -> frozenset[str]:
        """The stored dtypes of a slot."""
        return frozenset(self.source.infos[piece.name].dtype for piece in pieces)

    def likeness(self, pieces: Iterable[Piece]) -> Hashable:
        """All that decides how these pieces are read and rounded, names aside."""
        return tuple(
            (replace(piece, name=""), *(self._stored_as(name) for name in names))
            for piece in pieces
            if (names := (piece.name, self.quantization.scales.get(piece.name)))
        )

    def _stored_as(self, name: str | None) -> Hashable:
        info = None if name is None else self.source.infos[name]
        return info and (info.shape, info.dtype)

    def refusal(self, names: Iterable[str]) -> str | None:
        """The first unsupported quantization among tensors (`nf4 (bitsandbytes)`), or None."""
        infos = (self.source.infos[name] for name in names)
        return next(
            (reason for info in infos if (reason := self.quantization.refusal(info)) is not None),
            None,
        )

    def read(self, pieces: tuple[Piece, ...]) -> Tensor:
        """Read a slot as a matrix (rows, columns); a vector becomes a column.

        The dtype is the stored one. fp8 and scaled weights come as float32, scales applied.
        """
        import torch

        parts = [self._read(piece) for piece in pieces]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def streams(self, pieces: tuple[Piece, ...]) -> bool:
        """Whether `blocks` reads block by block: a slot of one piece, stored unmodified."""
        (piece, *others) = pieces
        # these need the whole tensor before the first block
        plain = not (others or piece.transposed or piece.swapped)
        return (
            plain
            and bool(self.source.infos[piece.name].shape)
            and self.source.span(piece.name) is not None
        )

    def blocks(self, pieces: tuple[Piece, ...], rows: int) -> Iterator[Tensor]:
        """Read a slot as `read` does, `rows` rows at a time."""
        if not self.streams(pieces):
            whole = self.read(pieces)
            yield from (whole[start : start + rows] for start in range(0, len(whole), rows))
            return
        piece = pieces[0]
        first, last = piece.rows or (0, self.source.infos[piece.name].shape[0])
        for start in range(first, last, rows):
            yield self._read(replace(piece, rows=(start, min(start + rows, last))))

    def announce(self, pieces: tuple[Piece, ...]) -> None:
        """Prefetch pieces that will be read soon."""
        for piece in pieces:
            self.source.announce(piece.name)

    def _read(self, piece: Piece) -> Tensor:
        # rows of a transpose are columns of the file: read everything, then cut
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
        """Bytes read from the file for these pieces, without scales."""
        return sum(self._share(piece, self._info(piece).nbytes) for piece in pieces)

    def nbytes(self, pieces: tuple[Piece, ...]) -> int:
        """Peak memory to read these pieces: stored bytes, plus widened bytes if widened."""
        wide = (
            (piece, self._info(piece))
            for piece in pieces
            if self.quantization.widens(self._info(piece))
        )
        return self.stored_bytes(pieces) + sum(
            self._share(piece, self.quantization.wide_bytes(info))
            + (0 if (packed := self.source.packed(piece.name)) is None else packed.unpacking_bytes)
            for piece, info in wide
        )

    def held_bytes(self, pieces: tuple[Piece, ...]) -> int:
        """Memory that these pieces take once they are read."""
        infos = ((piece, self._info(piece)) for piece in pieces)
        return sum(
            self._share(
                piece,
                self.quantization.wide_bytes(info)
                if self.quantization.widens(info)
                else info.nbytes,
            )
            for piece, info in infos
        )

    def _info(self, piece: Piece) -> TensorInfo:
        return self.source.infos[piece.name]

    def _share(self, piece: Piece, size: int) -> int:
        """The share of a piece's rows in a size of its whole tensor."""
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


def _has_rows(info: TensorInfo) -> bool:
    return bool(info.shape) and info.numel > 0


def _averaged(infos: Mapping[str, TensorInfo], names: Iterable[str]) -> dict[str, str]:
    """Map each plain key to the key of its average.

    CompVis' LitEma (latent-diffusion `ldm/modules/ema.py`) stores the average of
    `model.diffusion_model.out.0.weight` as `model_ema.diffusion_modelout0weight`: buffer names may
    not contain dots. Names that are equal without dots get no average.
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
            weight = list(infos[plain[0]].shape)
            shapes = f"{list(infos[key].shape)}, that of the weight {weight}"
            raise ShapeMismatch(f"the shape of this average is {shapes}", tensor=key)
        found[plain[0]] = key
    return found


def _flat(name: str) -> str:
    return name.replace(".", "")
