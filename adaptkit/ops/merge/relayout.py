"""merge --layout: convert a checkpoint's tensors to the other layout by the families' tables.

Between an original single file and a diffusers folder, a tensor is renamed, split by rows, fused
from several tensors, has its halves exchanged, or is transposed. All but the last move whole rows
as bytes; nothing is computed.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from adaptkit.errors import NotRepresentable, WrongUsage
from adaptkit.files.header import TensorSpec, nbytes
from adaptkit.keymap import CheckpointMap
from adaptkit.ops.merge.layout import Layout, Move, Volume, in_shards, index_text
from adaptkit.ops.shared import Unused

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from adaptkit.checkpoint import Checkpoint
    from adaptkit.families.contract import Component
    from adaptkit.keymap import Place, Spelled
    from adaptkit.names import Slot, Target

__all__ = ["LAYOUTS", "MADE_ANEW", "Relayout", "wanted"]

SINGLE, FOLDER = LAYOUTS = ("single-file", "folder")
NATIVE, DIFFUSERS = "native", "diffusers"
# training state and constants: hosts compute them on loading, and no diffusers folder holds them
MADE_ANEW = "not stored in this layout; hosts compute it on loading"
_CONSTANTS = re.compile(
    r"(betas|alphas_cumprod(_prev)?|sqrt_\w+|log_one_minus_\w+|posterior_\w+|denoiser\.sigmas"
    r"|logvar|model_ema\..+|.*\bposition_ids|.*\blogit_scale)$"
)


class _Span(NamedTuple):
    """Rows [first, last) of a target, stored in a tensor from row `row`."""

    first: int
    last: int
    name: str
    row: int


def wanted(base: Checkpoint, layout: str | None) -> bool:
    """Return whether a layout needs other names than the base has."""
    if layout not in (None, *LAYOUTS):
        raise WrongUsage(f"--layout {layout}: expected {' or '.join(LAYOUTS)}")
    if layout == FOLDER:
        return not base.source.path.is_dir()
    return layout == SINGLE and base.source.files != (base.source.path,) and not _is_native(base)


def _is_native(base: Checkpoint) -> bool:
    """Return whether all weights have the names of an original file and need no renaming."""
    keys = CheckpointMap(base.family, beside=True)
    return all(
        name in _native(keys, place)
        for name in base.source.infos
        if (place := keys.parse(name)) is not None
    )


def _native(keys: CheckpointMap, place: Place) -> Iterator[str]:
    part = keys.family.component(place.slot.component)
    naming = _naming(part, SINGLE)
    spelled = keys.spelled(place.slot.target, naming)
    return (
        p + one.key
        for p in part.checkpoints.get(naming, ())
        if p != f"{part.name}."
        for one in spelled
    )


def _naming(part: Component, layout: str) -> str:
    """Return the naming of a component in a layout."""
    return NATIVE if layout == SINGLE and NATIVE in part.checkpoints else DIFFUSERS


class Relayout:
    """The moves of all tensors to another layout.

    `specs` are the tensors of the output by file, `lost` the tensors without a name there.
    """

    def __init__(self, base: Checkpoint, given: Iterable[TensorSpec], layout: str) -> None:
        if not base.known:
            raise NotRepresentable(
                "--layout: the model family is unknown, and with it the key names in other layouts",
                hint="omit --layout",
                file=base.source.path,
            )
        self.base, self.wanted = base, layout
        self.keys = CheckpointMap(base.family, beside=True)
        self.given = {spec.name: spec for spec in given}
        self.moves: dict[str, list[Move]] = {}
        self.specs: dict[str, dict[str, TensorSpec]] = {}
        self.lost: list[Unused] = []
        self._places: dict[str, Place] = {}
        for target, held in self._held().items():
            self._target(target, held)

    @property
    def refused(self) -> list[Unused]:
        """Return the tensors that hosts do not compute on loading."""
        return [item for item in self.lost if item.reason != MADE_ANEW]

    def layout(self, shard_size: int | None) -> Layout:
        """Return the files of the output: one, or one or more shards per component."""
        volumes: list[Volume] = []
        indices: dict[str, str] = {}
        where: dict[tuple[str, str], str] = {}
        for path, specs in self.specs.items():
            # the first file is the denoiser's, which gets the metadata of the base
            metadata = {"format": "pt", **({} if volumes else self.base.source.metadata)}
            sizes = {name: nbytes(spec.dtype, spec.shape) for name, spec in specs.items()}
            shards = in_shards(sizes, sum(sizes.values()) if shard_size is None else shard_size)
            for n, held in enumerate(shards, 1):
                file = (
                    path
                    if len(shards) == 1
                    else path.replace(".safetensors", f"-{n:05}-of-{len(shards):05}.safetensors")
                )
                where |= {(path, name): file for name in held}
                volumes.append(Volume(file, {}, tuple(specs[name] for name in held), metadata))
            if len(shards) > 1:
                beside = {name: where[path, name].rpartition("/")[2] for name in specs}
                indices[f"{path}.index.json"] = index_text(beside, sum(sizes.values()))
        moves = {
            name: [replace(move, path=where[move.path, move.stored]) for move in moved]
            for name, moved in self.moves.items()
        }
        return Layout(self.wanted == FOLDER, tuple(volumes), indices, moves=moves)

    def _held(self) -> dict[Target, dict[Slot, str]]:
        found: dict[Target, dict[Slot, str]] = {}
        for name in self.given:
            place = self.keys.parse(name)
            if place is None:
                self._lose(
                    name,
                    MADE_ANEW if _CONSTANTS.match(name) else "its name in this layout is unknown",
                )
            elif place.slot in found.get(place.slot.target, {}):
                self._lose(name, "a duplicate; the first one is kept")
            else:
                self._places[name] = place
                found.setdefault(place.slot.target, {})[place.slot] = name
        return found

    def _lose(self, name: str, reason: str) -> None:
        self.lost.append(Unused(name, reason))

    def _target(self, target: Target, held: Mapping[Slot, str]) -> None:
        part = self.keys.family.component(target.component)
        place = self._file(part)
        spelled = self.keys.spelled(target, _naming(part, self.wanted))
        if place is None or not spelled:
            for name in held.values():
                self._lose(
                    name,
                    f"the layout does not hold the {part.title}"
                    if place is None
                    else "it has no name in this layout",
                )
            return
        path, prefix = place
        rows = self._rows(held)
        spans = [span for slot, name in held.items() for span in self._spans(slot, name, rows)]
        for one in spelled:
            self._tensor(path, prefix, one, rows, spans)

    def _file(self, part: Component) -> tuple[str, str] | None:
        """Return file and key prefix of a component; None if the layout does not hold it."""
        prefixes = part.checkpoints.get(_naming(part, self.wanted), ())
        own = f"{part.name}."
        if self.wanted == FOLDER:
            prefix = next((p.removeprefix(own) for p in prefixes if p.startswith(own)), None)
            stem = "model" if part.name.startswith("text_encoder") else "diffusion_pytorch_model"
            return None if prefix is None else (f"{part.name}/{stem}.safetensors", prefix)
        if self._alone and "" in prefixes and part.name == "transformer":
            # the format of the original releases; kohya's and musubi's tools expect it
            return "", ""
        prefix = next((p for p in prefixes if p not in ("", own)), None)
        return None if prefix is None else ("", prefix)

    @property
    def _alone(self) -> bool:
        """Return whether the checkpoint is only a denoiser."""
        return len({place.slot.component for place in self._places.values()}) == 1

    # rows

    def _shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the target; a scalar counts as a vector of one."""
        shape = self.given[name].shape or (1,)
        return shape[::-1] if self._places[name].transposed else shape

    def _rows(self, held: Mapping[Slot, str]) -> int:
        """Return the number of rows of a target."""
        whole = next((name for slot, name in held.items() if slot.rows is None), None)
        return (
            self._shape(whole)[0]
            if whole is not None
            else sum(self._shape(name)[0] for name in held.values())
        )

    def _spans(self, slot: Slot, name: str, rows: int) -> Iterator[_Span]:
        bounds = (0, rows) if slot.rows is None else slot.rows.bounds(rows)
        if bounds is None or bounds[1] - bounds[0] != self._shape(name)[0]:
            raise self._refusal("its parts do not form the whole layer", name)
        return _lies(name, bounds, self._places[name].swapped)

    def _tensor(
        self, path: str, prefix: str, one: Spelled, rows: int, spans: Sequence[_Span]
    ) -> None:
        """Plan one tensor of the output from the spans of its target."""
        key = prefix + one.key
        bounds = (0, rows) if one.place.slot.rows is None else one.place.slot.rows.bounds(rows)
        if bounds is None:
            raise self._refusal(f"{rows} rows cannot be split as {key} requires", spans[0].name)
        moves = [
            (
                b.name,
                Move(path, key, b.row + first - b.first, last - first, o.row + first - o.first),
            )
            for o in _lies(key, bounds, one.place.swapped)
            for b in spans
            if (first := max(o.first, b.first)) < (last := min(o.last, b.last))
        ]
        if sum(move.count for _, move in moves) != bounds[1] - bounds[0]:
            raise self._refusal(
                f"it is only a part of {key}, and the other parts are missing", spans[0].name
            )
        if one.place.transposed or any(self._places[name].transposed for name, _ in moves):
            moves = [self._whole(moves, one)]
        dtypes = {self.given[name].dtype for name, _ in moves}
        if len(dtypes) > 1:
            raise self._refusal(
                f"{key} would mix {' and '.join(sorted(dtypes))}",
                spans[0].name,
                "pass --dtype to choose one",
            )
        shape = self._stored_shape(moves[0][0], one, bounds[1] - bounds[0])
        if key in self.specs.setdefault(path, {}):
            raise self._refusal(f"{key} would be written twice", moves[0][0])
        self.specs[path][key] = TensorSpec(key, dtypes.pop(), shape)
        for name, move in moves:
            self.moves.setdefault(name, []).append(move)

    def _whole(self, moves: Sequence[tuple[str, Move]], one: Spelled) -> tuple[str, Move]:
        """Return the single move of a tensor that is transposed on either side."""
        name, move = moves[0]
        if len(moves) > 1 or move.count != self._shape(name)[0]:
            raise self._refusal(f"{move.stored} is transposed, which needs a whole tensor", name)
        turned = one.place.transposed != self._places[name].transposed
        return name, Move(move.path, move.stored, 0, self.given[name].shape[0], 0, turned)

    def _stored_shape(self, name: str, one: Spelled, rows: int) -> tuple[int, ...]:
        """Return the shape as in the base, except for rows and kernels stored differently."""
        if not self.given[name].shape:
            return ()
        tail = self._shape(name)[1:]
        place = self._places[name]
        ours = next(
            (
                s
                for s in self.keys.spelled(place.slot.target, place.naming)
                if s.place.slot == place.slot
            ),
            one,
        )
        if ours.kernel != one.kernel and one.kernel is not None:
            tail = (*tail[:1], *one.kernel)
        return (rows, *tail)[::-1] if one.place.transposed else (rows, *tail)

    def _refusal(self, what: str, name: str, hint: str = "omit --layout") -> NotRepresentable:
        return NotRepresentable(
            f"--layout {self.wanted}: {what}", hint=hint, file=self.base.source.path, tensor=name
        )


def _lies(name: str, bounds: tuple[int, int], swapped: bool) -> Iterator[_Span]:
    """Yield the spans of a tensor with these rows, possibly with their halves exchanged."""
    first, last = bounds
    half = (last - first) // 2 if swapped else 0
    if half:
        yield _Span(first, first + half, name, last - first - half)
    yield _Span(first + half, last, name, 0)
