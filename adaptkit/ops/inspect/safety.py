"""What a careful person asks of a stranger's file before anything else loads it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptkit.adapter import open_adapter_source
from adaptkit.errors import AdaptkitError, InternalError
from adaptkit.files.limits import LIMITS
from adaptkit.files.pickled.catalogue import looks_like_pickle
from adaptkit.files.pickled.imports import Imports, imports
from adaptkit.ops.adapter_file.finite import EXPONENTS, non_finite

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from adaptkit.files.source import TensorSource

__all__ = ["NEAR", "non_finite_problem", "safety"]

# the share of a limit from which on a file is near it
NEAR = 0.5
# names in each list of a report
MOST = 100
# characters: no text that a trainer writes of its own is as long
_LONG = 100_000
# control, bidi and zero-width characters, but not the ends of lines
_HIDDEN = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f"
    r"\u061c\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]"
)
_MARKUP = re.compile(
    r"<\s*(script|iframe|object|embed|img|svg|link|style)\b|javascript:", re.IGNORECASE
)
# entries of metadata that readers parse as JSON
_JSON = (
    "lora_adapter_metadata",
    "ss_bucket_info",
    "ss_dataset_dirs",
    "ss_tag_frequency",
    "ss_network_args",
)


def safety(path: Path, asked: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """The record of `inspect --safety`.

    `asked` is what the file asked of each limit, and the most that it may ask. A file that is
    refused has the fields that could be found. `runs_code` is whether loading the file elsewhere
    could run code: null if that could not be followed to the end.
    """
    record: dict[str, Any] = {"format": "unknown", "runs_code": None, "globals": [], "code": []}
    record["limits"] = [
        {"limit": name, "found": found, "most": most, "unit": LIMITS[name].unit}
        for name, (found, most) in asked.items()
        if found >= NEAR * most
    ]
    record |= {"non_finite": None, "not_checked": [], "metadata": []}
    try:
        record |= _loading(path)
        source, _ = open_adapter_source(path)
        with source:
            record |= _numbers(source)
            record["metadata"] = list(_odd(source))[:MOST]
    except Exception as error:
        # what the report says of the file as a whole is not said again
        record["stopped"] = InternalError.of(error).message
    return record


def non_finite_problem(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The problem of tensors with NaN or infinity, if there are any."""
    if bad := record["non_finite"]:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        what = f"{bad[0]}{more} hold{'' if more else 's'} NaN or infinity"
        yield {"severity": "error", "module": None, "what": what}


# what loading runs


def _loading(path: Path) -> dict[str, Any]:
    files = _weights(path)
    forms: list[str] = []
    foreign: list[str] = []
    code, unknown = _code_beside(path), not files
    for file in files:
        found = _followed(file)
        forms.append(found.form)
        foreign += found.foreign
        code += [f"{file.name} is TorchScript"] if found.script else []
        unknown = unknown or found.stopped is not None
    return {
        "format": ", ".join(dict.fromkeys(forms)) or "unknown",
        "runs_code": True if foreign or code else None if unknown else False,
        "globals": list(dict.fromkeys(foreign))[:MOST],
        "code": code[:MOST],
    }


def _followed(file: Path) -> Imports:
    """What a file imports where it is loaded by its name, which may not be what it is."""
    with file.open("rb") as opened:
        head = opened.read(512)
    form = "gguf" if head.startswith(b"GGUF") else "safetensors" if head[8:9] == b"{" else None
    if form and file.suffix.lower() in (".safetensors", ".sft", ".gguf"):
        return Imports(form, ())
    found = imports(file)
    if form:
        # other bytes are no pickle, but a pickle may be made to look like a header
        return found if found.foreign or found.stopped is None else Imports(form, ())
    if found.stopped and not (found.foreign or looks_like_pickle(head)):
        return found._replace(form="unknown")
    return found


def _weights(path: Path) -> tuple[Path, ...]:
    """The files that hold the weights; the file itself if it cannot be opened."""
    try:
        source, _ = open_adapter_source(path)
    except AdaptkitError:
        return (path,) if path.is_file() and path.suffix != ".json" else ()
    with source:
        return source.files


def _code_beside(path: Path) -> list[str]:
    """Python files of a model's folder: some hosts run them with `trust_remote_code`."""
    if not path.is_dir():
        return []
    return sorted(
        (Path(folder) / name).relative_to(path).as_posix()
        for folder, _, names in os.walk(path)
        for name in names
        if name.endswith((".py", ".pyc", ".so", ".pyd", ".dll"))
    )


# numbers and names


def _numbers(source: TensorSource) -> dict[str, Any]:
    integers = ("I", "U", "BOOL")
    odd = {i.dtype for i in source.infos.values()} - set(EXPONENTS)
    return {
        "non_finite": list(non_finite(source, source.infos))[:MOST],
        "not_checked": sorted(dtype for dtype in odd if not dtype.startswith(integers)),
    }


def _odd(source: TensorSource) -> Iterator[dict[str, str]]:
    """Entries of metadata and names of tensors that mean more than they show."""
    hidden = [name for name in source.infos if _HIDDEN.search(name)]
    if hidden:
        yield {"name": hidden[0], "what": f"{len(hidden)} names of tensors hold hidden characters"}
    for name, value in source.metadata.items():
        for what in _of_entry(name, value):
            yield {"name": name, "what": what}


def _of_entry(name: str, value: str) -> Iterator[str]:
    if _HIDDEN.search(name) or _HIDDEN.search(value):
        yield "hidden characters (control, bidi or zero-width)"
    if len(value) > _LONG:
        yield f"{len(value):,} characters"
    if _MARKUP.search(value):
        yield "markup that a browser would act on"
    if name in _JSON:
        try:
            json.loads(value)
        except (ValueError, RecursionError):
            yield "no JSON, as readers expect here"
