"""metadata: read what a safetensors file says about itself, and change it without its tensors."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping  # noqa: TC003 - the types of options are read at run time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptkit.adapter import PEFT_WEIGHTS, Adapter
from adaptkit.detect import is_adapter
from adaptkit.errors import (
    AdaptkitError,
    CannotWrite,
    NothingToDo,
    NotRepresentable,
    UnreadableFile,
)
from adaptkit.files.hub import from_hub, local
from adaptkit.files.open import open_source
from adaptkit.files.provenance import file_hashes, sshs_hashes, sshs_places
from adaptkit.meaning import DIFFUSERS_CONFIG, FLAT_ALPHA
from adaptkit.ops.shared import Brief, check_output, settle

if TYPE_CHECKING:
    from collections.abc import Iterator
    from os import PathLike

    from adaptkit.files.source import TensorSource

__all__ = ["STRIP", "Options", "Report", "edit", "read"]

STRIP = ("training", "all")
# written by trainers about the training; what readers need to load a file is never among them
_TRAINING = ("ss_", "sshs_")
_HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
_NEEDED = ("format", DIFFUSERS_CONFIG, *FLAT_ALPHA)
_THUMBNAIL = "modelspec.thumbnail"


@dataclass(frozen=True)
class Options:
    """What to change: `set` and `unset` single entries, `strip` all of a kind.

    `strip` is `training` (kohya's `ss_` and `sshs_` entries) or `all`; neither removes what readers
    need to load the file. `copy_from` is a file whose entries are added first. Without `output` the
    file itself is written anew.
    """

    set: Mapping[str, str] = field(default_factory=dict)
    unset: tuple[str, ...] = ()
    strip: str | None = None
    copy_from: Path | None = None
    output: Path | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        settle(self)
        if self.copy_from is not None:
            object.__setattr__(self, "copy_from", Path(self.copy_from))

    @property
    def changes(self) -> bool:
        """Whether anything is to be changed."""
        return bool(self.set or self.unset or self.strip or self.copy_from)


@dataclass(frozen=True, repr=False)
class Report(Brief):
    """What a file says about itself.

    `hashes` are AutoV2 (of the whole file) and AutoV3 (of the tensors, as sd-scripts hashes them);
    `stale` names stored hashes that the tensors do not have.
    """

    path: Path
    metadata: Mapping[str, str]
    hashes: Mapping[str, str]
    stale: tuple[str, ...] = ()

    @property
    def tags(self) -> list[tuple[str, int]]:
        """The tags of the training images by how often they occur, over all folders of them."""
        found: Counter[str] = Counter()
        folders = _json(self.metadata.get("ss_tag_frequency", ""))
        for folder in folders.values() if isinstance(folders, dict) else ():
            if isinstance(folder, dict):
                found.update({str(k).strip(): n for k, n in folder.items() if isinstance(n, int)})
        return found.most_common()

    @property
    def thumbnail(self) -> tuple[str, int] | None:
        """The kind and the bytes of the picture in the metadata."""
        head, comma, data = self.metadata.get(_THUMBNAIL, "").partition(",")
        if not comma:
            return None
        kind = head.removeprefix("data:").partition(";")[0]
        return kind or "unknown", len(data) * 3 // 4

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; the picture is in `metadata`, whole."""
        return {
            "path": str(self.path),
            "hashes": dict(self.hashes),
            "stale": list(self.stale),
            "tags": dict(self.tags),
            "metadata": dict(self.metadata),
        }


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def read(path: str | PathLike[str]) -> Report:
    """Read the metadata of a safetensors file or PEFT folder, and hash it."""
    file = _file(local(path))
    with _open(file) as source:
        hashes = file_hashes(file, _data(source))
        metadata = dict(source.metadata)
    model = hashes.pop("sshs_model_hash")
    stored = metadata.get("sshs_model_hash")
    stale = ("sshs_model_hash",) if stored is not None and stored != model else ()
    return Report(file, metadata, hashes, stale)


def edit(path: str | PathLike[str], options: Options) -> Report:
    """Write the file with other metadata and the same tensor bytes; return what it says then.

    The new file is complete before it takes the place of the old one. Raises NotRepresentable if
    the change would give the weights another meaning: alpha may stand in the metadata alone.
    """
    from adaptkit.files.sink import TensorSink

    file = _file(local(path))
    if options.output is None and from_hub(file):
        raise CannotWrite(
            "a file in the cache of the hub stays as it is", hint="give -o FILE", file=file
        )
    output = options.output or file
    if options.output is not None:
        check_output(output, options.overwrite)
    with _open(file) as source:
        before = dict(source.metadata)
        after = _changed(before, options, file)
        if after == before and output == file:
            raise NothingToDo("the metadata says this already", file=file)
        infos = sorted(source.infos.values(), key=lambda info: source.order(info.name))
        after |= sshs_places(after)
        with TensorSink(output, infos, after, overwrite=True) as sink:
            sink.copy_many((info.name, source, info.name) for info in infos)
            if "sshs_legacy_hash" in after or "sshs_model_hash" in after:
                sink.restate(after | _hashes(source, after))
            _check_meaning(source, after, file)
            source.close()  # Windows replaces no open file
            sink.commit()
    return read(output)


def _file(path: Path) -> Path:
    """The safetensors file that a path means."""
    if path.is_dir():
        path = next((path / name for name in PEFT_WEIGHTS if (path / name).is_file()), path)
    return path


def _open(path: Path) -> TensorSource:
    source = open_source(path)
    if not path.is_file() or path.suffix.lower() not in (".safetensors", ".sft"):
        source.close()
        raise UnreadableFile(
            "only one safetensors file has metadata that can be shown and changed",
            hint="name the .safetensors file",
            file=path,
        )
    return source


def _data(source: TensorSource) -> Iterator[memoryview]:
    """The bytes of every tensor in the order of the file."""
    for name in sorted(source.infos, key=source.order):
        yield source.raw(name)


def _hashes(source: TensorSource, metadata: Mapping[str, str]) -> dict[str, str]:
    """sd-scripts' hashes of a file with this metadata, those of them that it states."""
    from adaptkit.files.header import build_header

    training = {name: value for name, value in metadata.items() if name.startswith("ss_")}
    infos = sorted(source.infos.values(), key=lambda info: source.order(info.name))
    header, _ = build_header(infos, training)
    found = sshs_hashes(_data(source), len(header))
    return {name: value for name, value in found.items() if name in metadata}


def _changed(metadata: Mapping[str, str], options: Options, file: Path) -> dict[str, str]:
    found = dict(metadata)
    if options.strip is not None:
        if options.strip not in STRIP:
            from adaptkit.errors import NoSuchName

            raise NoSuchName.among("kind of metadata", options.strip, STRIP)
        gone = _TRAINING if options.strip == "training" else ("",)
        found = {
            name: value
            for name, value in found.items()
            if name in _NEEDED or not name.startswith(gone)
        }
        if any(name in found for name in FLAT_ALPHA) and "ss_network_dim" in metadata:
            found["ss_network_dim"] = metadata["ss_network_dim"]  # what makes this alpha count
    if options.copy_from is not None:
        with _open(_file(options.copy_from)) as other:
            # hashes are of the other file's tensors
            added = {k: v for k, v in other.metadata.items() if k not in (*_HASHES, *_NEEDED)}
        found |= added
    missing = [name for name in options.unset if name not in metadata and name not in found]
    if missing:
        from adaptkit.errors import NoSuchName

        raise NoSuchName.among("entry", missing[0], metadata).at(file=file)
    for name in options.unset:
        found.pop(name, None)
    return found | {name: str(value) for name, value in options.set.items()}


def _check_meaning(source: TensorSource, after: Mapping[str, str], file: Path) -> None:
    """NotRepresentable if modules would have other scales with this metadata."""
    if not is_adapter(source.infos) or after == source.metadata:
        return
    try:
        scales = [
            {slot: entry.facts.scale for slot, entry in adapter.entries.items()}
            for adapter in (Adapter.understand(source), _with_metadata(source, after))
        ]
    except AdaptkitError:
        return  # a file that nobody understands has no scales to lose
    changed = sum(scales[1].get(slot) != scale for slot, scale in scales[0].items())
    if changed:
        raise NotRepresentable(
            f"this would change the scale of {changed} modules: alpha stands in the metadata",
            hint="`adaptkit convert` writes alpha into the file; then metadata is free to change",
            file=file,
        )


def _with_metadata(source: TensorSource, metadata: Mapping[str, str]) -> Adapter:
    class Other:
        """The same tensors under other metadata."""

        def __getattr__(self, name: str) -> Any:
            return metadata if name == "metadata" else getattr(source, name)

    return Adapter.understand(Other())  # type: ignore[arg-type]
