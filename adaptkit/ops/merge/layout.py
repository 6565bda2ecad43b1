"""Files of a merged checkpoint: one file, or a folder like the base."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from glob import escape
from typing import TYPE_CHECKING

from adaptkit.errors import NotRepresentable
from adaptkit.files.header import GGML, nbytes, read_header
from adaptkit.ops.shared import Brief

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from adaptkit.files.header import TensorSpec
    from adaptkit.files.source import TensorSource

__all__ = [
    "Layout", "Move", "Volume", "as_gguf", "as_single", "in_shards", "index_text", "plan_layout",
]  # fmt: skip

SINGLE = (".safetensors", ".sft")
GGUF = ".gguf"
WEIGHTS = (*SINGLE, ".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx", GGUF)
_SHARD = re.compile(r"(?P<stem>.+?)-\d{5}-of-\d{5}")
# transformers' name of the same weights as safetensors
_PICKLED = {"pytorch_model": "model"}


@dataclass(frozen=True, repr=False)
class Volume(Brief):
    """One weights file of the output, at `path` in it ("" for the output itself).

    `names` maps names in the checkpoint to names in this file. `copied` is the identical file of
    the base, if any.
    """

    path: str
    names: Mapping[str, str]
    specs: tuple[TensorSpec, ...]
    metadata: Mapping[str, str]
    copied: Path | None = None


@dataclass(frozen=True, repr=False)
class Layout(Brief):
    """Contents of the output: weights, shard indices (path → JSON), copied files (path → source).

    `left_out` are files that would be read instead of the merged weights or in addition. `moves`
    holds the rows of each tensor of the base if the names differ. `like` is the GGUF file that the
    output is a copy of, but for the numbers.
    """

    folder: bool
    volumes: tuple[Volume, ...]
    indices: Mapping[str, str] = field(default_factory=dict)
    others: Mapping[str, Path] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    moves: Mapping[str, Sequence[Move]] = field(default_factory=dict)
    like: Path | None = None

    @property
    def top(self) -> frozenset[str]:
        """Return the names at the top of the output folder."""
        paths = (*(volume.path for volume in self.volumes), *self.indices, *self.others)
        return frozenset(path.split("/", 1)[0] for path in paths)

    def files(self) -> list[str]:
        """Return the paths of the weights files."""
        return [volume.path for volume in self.volumes if volume.path]


def as_single(
    source: TensorSource, output: Path | None, shard_size: int | None, layout: str | None = None
) -> bool:
    """Return whether the output is one file: by `--layout`, its name, or the base.

    Raise NotRepresentable if these contradict each other or `--shard-size`.
    """
    named = output is not None and output.suffix.lower() in SINGLE
    if shard_size is not None and (named or layout == "single-file"):
        raise NotRepresentable(
            "shards need a folder as output",
            hint="pass an output name without .safetensors",
            file=output,
        )
    if named and layout == "folder":
        raise NotRepresentable(
            "--layout folder: the output has the name of a file",
            hint="pass an output name without .safetensors",
            file=output,
        )
    if layout is not None:
        return layout == "single-file"
    return named or (source.files == (source.path,) and shard_size is None)


def as_gguf(source: TensorSource, output: Path | None, dtype: str, other: str | None) -> bool:
    """Return whether the output is a GGUF file, as the base is: by its name, or the types it keeps.

    `other` is an option that asks for another layout. Raises NotRepresentable for contradictions.
    """
    named = output is not None and output.suffix.lower() == GGUF
    if source.form != "gguf":
        if named:
            raise NotRepresentable(
                "only a GGUF checkpoint is merged into a GGUF file",
                hint="pass an output name that ends in .safetensors",
                file=output,
            )
        return False
    blocks = any(info.dtype in GGML for info in source.infos.values())
    if not named and (dtype != "keep" or (output is not None and not blocks)):
        return False
    if not named and output is not None:
        raise NotRepresentable(
            "the types of this GGUF file have no place in a safetensors file",
            hint=f"pass an output name that ends in {GGUF}, or --dtype bf16",
            file=output,
        )
    if other is not None:
        raise NotRepresentable(
            f"{other}: a GGUF file has no such layout",
            hint="--dtype bf16 and a name without .gguf write safetensors files",
            file=source.path,
        )
    return True


def plan_layout(
    source: TensorSource,
    specs: Sequence[TensorSpec],
    touched: Iterable[str],
    single: bool,
    shard_size: int | None,
) -> Layout:
    """Place each tensor of `specs`, named as in the checkpoint; `touched` are changed ones."""
    if single:
        if _is_pipeline(source):
            raise NotRepresentable(
                "a diffusers folder does not fit into one file with the same names",
                hint="pass an output name without .safetensors, or --layout single-file",
                file=source.path,
            )
        return Layout(
            False, (Volume("", {s.name: s.name for s in specs}, tuple(specs), source.metadata),)
        )
    return _Folder(
        source, {spec.name: spec for spec in specs}, frozenset(touched), shard_size
    ).layout()


def in_shards(sizes: Mapping[str, int], room: int) -> list[list[str]]:
    """Split names into shards of at most `room` bytes, with at least one tensor each."""
    shards: list[list[str]] = [[]]
    left = room
    for name, size in sizes.items():
        if size > left and shards[-1]:
            shards.append([])
            left = room
        shards[-1].append(name)
        left -= size
    return shards


def index_text(places: Mapping[str, str], size: int) -> str:
    """Return the index of shards in the format of Hugging Face's libraries."""
    table = {"metadata": {"total_size": size}, "weight_map": dict(places)}
    return json.dumps(table, indent=2, ensure_ascii=False) + "\n"


def _root(source: TensorSource) -> Path:
    return source.path if source.path.is_dir() else source.path.parent


def _is_pipeline(source: TensorSource) -> bool:
    """Return whether the weights are in subfolders, whose names prefix the tensors."""
    return source.path.is_dir() and any(file.parent != source.path for file in source.files)


class _Folder:
    """Group the files of the base by their index and plan the files of each group."""

    def __init__(
        self,
        source: TensorSource,
        specs: Mapping[str, TensorSpec],
        touched: frozenset[str],
        shard_size: int | None,
    ) -> None:
        self.source, self.specs, self.touched, self.shard_size = source, specs, touched, shard_size
        self.root = _root(source)
        self.held: dict[Path, list[str]] = {file: [] for file in source.files}
        for name in source.infos:
            if name in specs:
                self.held[source.files[source.order(name)[0]]].append(name)
        self.volumes: list[Volume] = []
        self.indices: dict[str, str] = {}

    def layout(self) -> Layout:
        groups: dict[tuple[Path, str], list[Path]] = {}
        for file in self.source.files:
            groups.setdefault((file.parent, _stem(file)), []).append(file)
        for (_, stem), files in groups.items():
            self._group(stem, files)
        others, left_out = self._others()
        return Layout(True, tuple(self.volumes), self.indices, others, left_out)

    def _group(self, stem: str, files: Sequence[Path]) -> None:
        pickled = files[0].suffix not in SINGLE
        names = [name for file in files for name in self.held[file]]
        changed = not self.touched.isdisjoint(names)
        total = sum(_size(self.specs[name]) for name in names)
        if self.shard_size is not None and (len(files) > 1 or total > self.shard_size):
            return self._cut(stem, files[0], names)
        for file in files:
            path = self._path(file.parent, _PICKLED.get(stem, stem) + file.name[len(stem) :])
            path = path.removesuffix(file.suffix) + ".safetensors" if pickled and changed else path
            if pickled and not changed:
                path = self._path(file.parent, file.name)
            same = self.touched.isdisjoint(self.held[file]) and not (pickled and changed)
            self._volume(path, file, self.held[file], file if same else None)
        if (index := self._index_of(files)) is not None and changed:
            name = f"{_PICKLED.get(stem, stem)}.safetensors.index.json" if pickled else index.name
            self._index(self._path(index.parent, name), names)
        elif index is not None:
            self.indices[self._path(index.parent, index.name)] = index.read_text(encoding="utf-8")
        return None

    def _cut(self, stem: str, first: Path, names: Sequence[str]) -> None:
        """Plan shards of at most the requested size, in the order of the base."""
        assert self.shard_size is not None
        shards = in_shards({name: _size(self.specs[name]) for name in names}, self.shard_size)
        for n, held in enumerate(shards, 1):
            self._volume(
                self._path(first.parent, f"{stem}-{n:05}-of-{len(shards):05}.safetensors"),
                first,
                held,
                None,
            )
        self._index(self._path(first.parent, f"{stem}.safetensors.index.json"), names)

    def _volume(self, path: str, file: Path, held: Sequence[str], copied: Path | None) -> None:
        prefix = self._prefix(file)
        names = {name: name.removeprefix(prefix) for name in held}
        specs = tuple(self.specs[name]._replace(name=stored) for name, stored in names.items())
        metadata = read_header(file).metadata if file.suffix in SINGLE else {}
        self.volumes.append(Volume(path, names, specs, {"format": "pt", **metadata}, copied))

    def _prefix(self, file: Path) -> str:
        return f"{file.parent.name}." if _is_pipeline(self.source) else ""

    def _path(self, folder: Path, name: str) -> str:
        return (folder.relative_to(self.root) / name).as_posix()

    def _index_of(self, files: Sequence[Path]) -> Path | None:
        """Return the index of these shards."""
        if self.source.path.suffix == ".json":
            return self.source.path
        found = files[0].parent.glob(f"{escape(_stem(files[0]))}*.index*.json")
        return next(iter(sorted(found)), None) if _SHARD.match(files[0].name) else None

    def _index(self, path: str, names: Sequence[str]) -> None:
        place = {
            stored: volume.path.rpartition("/")[2]
            for volume in self.volumes
            for stored in self._stored(volume, names)
        }
        self.indices[path] = index_text(place, sum(_size(self.specs[name]) for name in names))

    def _stored(self, volume: Volume, names: Sequence[str]) -> Iterator[str]:
        return (volume.names[name] for name in names if name in volume.names)

    def _others(self) -> tuple[dict[str, Path], tuple[str, ...]]:
        """Return the other files to copy, and the duplicate weights to leave out."""
        if not self.source.path.is_dir():
            config = self.root / "config.json"
            return ({"config.json": config} if config.is_file() else {}), ()
        taken = {*(volume.path for volume in self.volumes), *self.indices}
        folders = {file.parent for file in self.source.files}
        others: dict[str, Path] = {}
        left_out: list[str] = []
        for item in sorted(self.root.rglob("*")):
            path = item.relative_to(self.root)
            if (
                not item.is_file()
                or item in self.source.files
                or any(part.startswith(".") for part in path.parts)
            ):
                continue
            is_weights = item.suffix.lower() in WEIGHTS or ".index." in item.name
            if item.parent in folders and is_weights:
                if path.as_posix() not in taken and not self._is_index(item):
                    left_out.append(path.as_posix())
            else:
                others[path.as_posix()] = item
        return others, tuple(left_out)

    def _is_index(self, item: Path) -> bool:
        return item.suffix == ".json" and any(
            _stem(file) == item.name.partition(".")[0] and file.parent == item.parent
            for file in self.source.files
        )


def _stem(file: Path) -> str:
    """Return `model` for `model-00001-of-00002.safetensors`."""
    found = _SHARD.match(file.name)
    return found["stem"] if found else file.name.removesuffix(file.suffix)


def _size(spec: TensorSpec) -> int:
    return nbytes(spec.dtype, spec.shape)


@dataclass(frozen=True, slots=True)
class Move:
    """Destination of `count` rows from row `start` of a tensor of the base.

    They become rows of `stored` in file `path` from row `at`. A `transposed` move takes the whole
    tensor and exchanges rows and columns.
    """

    path: str
    stored: str
    start: int
    count: int
    at: int
    transposed: bool = False
