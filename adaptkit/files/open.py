"""Open a path: a file, a shard index or a folder of weights."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

from adaptkit.errors import CorruptFile, InternalError, UnreadableFile
from adaptkit.files.header import unreadable
from adaptkit.files.limits import lifted, read_json, within
from adaptkit.files.source import join, open_file

if TYPE_CHECKING:
    from collections.abc import Iterable

    from adaptkit.files.source import TensorSource

__all__ = ["COMPONENTS", "open_source", "weight_map"]

COMPONENTS = (
    "unet",
    "transformer",
    "transformer_2",
    "prior",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "vae",
)
"""The weight folders of a diffusers model, in reading order."""


def open_source(path: str | Path) -> TensorSource:
    """Open a weights file, a shard index or a folder of weights.

    Reads headers only.

    The content of a file decides its kind. A folder is a diffusers model (names get the prefix
    `<component>.`), one component, or a set of shards. Safetensors are preferred to pickles, and
    files without a variant (`.fp16.`) to those with one.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _open_folder(path)
        if not path.exists():
            raise UnreadableFile("no such file or folder", file=path, hint=_near(path))
        return _open_index(path) if path.suffix == ".json" else open_file(path)
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:  # pathlib refuses null characters
        raise UnreadableFile(str(error), file=repr(str(path))) from error
    except Exception as error:
        found = InternalError.of(error).at(file=path)
        raise found from found.__cause__


def _near(path: Path) -> str | None:
    """Suggest similar names for a path that does not exist."""
    if not path.parent.is_dir():
        return f"there is no folder {str(path.parent)!r}"
    from difflib import get_close_matches

    near = get_close_matches(
        path.name, [item.name for item in path.parent.iterdir()], n=3, cutoff=0.6
    )
    return f"did you mean {' or '.join(near)}?" if near else None


class _WeightsName(NamedTuple):
    """A parsed file name.

    Examples: `model.fp16-00001-of-00002.safetensors`, `model.safetensors.index.fp16.json`.
    """

    stem: str
    variant: str
    pickle: bool
    shards: int  # 0: not a shard
    is_index: bool


_PICKLE_SUFFIXES = ("bin", "ckpt", "pt", "pth")
_STEMS = (
    "diffusion_pytorch_model",
    "model",
    "pytorch_model",
    "adapter_model",
    "pytorch_lora_weights",
)
_VARIANTS = ("", "fp32", "bf16", "fp16")
_PATTERN = re.compile(
    r"(?P<stem>.+?)"
    r"(?:\.(?P<before>fp32|bf16|fp16|non_ema|ema|int8|fp8))?"
    r"(?:-\d{5}-of-(?P<shards>\d{5}))?"
    r"(?:\.(?P<after>fp32|bf16|fp16|non_ema|ema|int8|fp8))?"
    r"\.(?P<kind>safetensors|sft|bin|ckpt|pt|pth)"
    r"(?P<index>\.index(?:\.(?P<last>\w+))?\.json)?",
    re.IGNORECASE,
)


def _parse_name(name: str) -> _WeightsName | None:
    match = _PATTERN.fullmatch(name)
    if match is None or name.startswith("."):
        return None
    variant = match["before"] or match["after"] or match["last"] or ""
    is_pickle = match["kind"].lower() in _PICKLE_SUFFIXES
    return _WeightsName(
        match["stem"], variant, is_pickle, int(match["shards"] or 0), match["index"] is not None
    )


def _rank(name: _WeightsName) -> tuple[bool, bool, int, int]:
    """Sort key of the weights in a folder; the smallest is opened."""
    variant = _VARIANTS.index(name.variant) if name.variant in _VARIANTS else len(_VARIANTS)
    stem = _STEMS.index(name.stem) if name.stem in _STEMS else len(_STEMS)
    return stem == len(_STEMS), name.pickle, variant, stem


def _open_folder(path: Path) -> TensorSource:
    parts = [(name, path / name) for name in COMPONENTS if _weight_files(path / name)]
    if parts and ((path / "model_index.json").exists() or not _weight_files(path)):
        return join(path, [(f"{name}.", _open_component(folder)) for name, folder in parts])
    return _open_component(path)


def _weight_files(folder: Path) -> list[tuple[_WeightsName, Path]]:
    if not folder.is_dir():
        return []
    found = ((_parse_name(item.name), item) for item in sorted(folder.iterdir()))
    return [(name, item) for name, item in found if name is not None and item.is_file()]


def _open_component(folder: Path) -> TensorSource:
    """Open the weights of a folder: a file, or the shards of an index."""
    found = _weight_files(folder)
    if not found:
        raise UnreadableFile("no weights in this folder", file=folder, hint=_contents(folder))
    best = min(_rank(name) for name, _ in found)
    chosen = [(name, item) for name, item in found if _rank(name) == best]
    if len({(name.stem, name.variant) for name, _ in chosen}) > 1:
        names = ", ".join(item.name for _, item in chosen[:8])
        raise UnreadableFile(
            "several weights in this folder", file=folder, hint=f"name one of them: {names}"
        )
    indices = [item for name, item in chosen if name.is_index]
    if indices:
        return _open_index(indices[0])
    whole = [item for name, item in chosen if not name.shards]
    if whole:
        return open_file(whole[0])
    shards = [item for _, item in chosen]
    if len(shards) != chosen[0][0].shards:
        found_names = ", ".join(s.name for s in shards[:8])
        message = f"only {len(shards)} of {chosen[0][0].shards} shards found: {found_names}"
        raise UnreadableFile(message, file=folder, hint="fetch the missing ones")
    _check_links(folder, shards)
    return join(folder, [("", open_file(shard)) for shard in shards])


def _check_links(folder: Path, shards: Iterable[Path]) -> None:
    """Refuse shards that link out of their folder: another's weights would be read and copied.

    Links into the `blobs` of the same repository are how the cache of the Hugging Face hub works.
    """
    home = folder.resolve()
    allowed = [home]
    allowed += [up.parent / "blobs" for up in home.parents if up.name == "snapshots"]
    for shard in shards:
        real = shard.resolve()
        if not any(real.is_relative_to(one) for one in allowed) and not lifted():
            raise UnreadableFile(
                "the shard is a link that leaves its folder",
                file=shard,
                hint="--no-limits follows links of your own",
            )


def _contents(folder: Path) -> str:
    names = sorted(item.name + "/" * item.is_dir() for item in folder.iterdir())
    more = f", and {len(names) - 8} more" if len(names) > 8 else ""
    return f"it holds: {', '.join(names[:8])}{more}" if names else "it is empty"


def _open_index(path: Path) -> TensorSource:
    """Open the shards of an index, checked against their own headers."""
    held = weight_map(path)
    names = sorted(set(held.values()))
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        message = f"{len(missing)} of {len(names)} shards are missing: {', '.join(missing[:4])}"
        raise UnreadableFile(message, file=path, hint="download them into the folder of the index")
    _check_links(path.parent, (path.parent / name for name in names))
    shards = {name: open_file(path.parent / name) for name in names}
    for name, shard in held.items():
        if name not in shards[shard].infos:
            raise CorruptFile(
                f"the index lists it in {shard}, which does not hold it", file=path, tensor=name
            )
    return join(path, [("", shard) for shard in shards.values()])


def weight_map(path: Path) -> dict[str, str]:
    """The shard that holds each tensor, as an index says. Raises `CorruptFile` for a bad index."""
    try:
        within("JSON size", path.stat().st_size)
        table = read_json(path.read_bytes(), "the index")
    except CorruptFile as error:
        raise error.at(file=path) from None
    except ValueError as error:
        raise CorruptFile(f"not valid JSON: {error}", file=path) from error
    found = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(found, dict) or not found:
        hint = "a shard index holds a table 'weight_map'"
        raise UnreadableFile("neither weights nor a shard index", file=path, hint=hint)
    for name, shard in found.items():
        if not isinstance(shard, str) or not _is_inside(shard):
            raise CorruptFile(
                f"the index lists it in {shard!r}, outside its own folder",
                file=path,
                tensor=name,
            )
    return found


def _is_inside(name: str) -> bool:
    """Whether a relative path stays in its folder on every system."""
    parts = PurePosixPath(name.replace("\\", "/"))
    return (
        bool(name)
        and not parts.is_absolute()
        and ".." not in parts.parts
        and ":" not in name
        and "\0" not in name
    )
