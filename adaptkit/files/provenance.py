"""Metadata of an output: what is kept, what is dropped because it no longer holds, what adaptkit adds; file hashes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from adaptkit.files.header import unreadable

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["KEY", "STALE", "history", "kept", "sha256", "updated"]

KEY = "adaptkit"
STALE = frozenset({"sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"})
"""Hashes of the tensors: wrong as soon as one of them changes."""


def sha256(path: str | Path, chunk: int = 8 << 20) -> str:
    """The SHA-256 of a whole file in hexadecimal, read `chunk` bytes at a time."""
    digest = hashlib.sha256()
    try:
        with Path(path).open("rb", buffering=0) as file:
            while data := file.read(chunk):
                digest.update(data)
    except OSError as error:
        raise unreadable(path, error) from error
    return digest.hexdigest()


def kept(metadata: Mapping[str, str]) -> dict[str, str]:
    """Everything but the hashes that no longer hold, in the order given."""
    return {key: value for key, value in metadata.items() if key not in STALE}


def history(metadata: Mapping[str, str]) -> list[object]:
    """The records that adaptkit left in a file, oldest first; what is not its own form is kept as it is."""
    text = metadata.get(KEY)
    if text is None:
        return []
    try:
        records = json.loads(text)
    except (ValueError, RecursionError):
        return [text]
    return records if isinstance(records, list) else [records]


def updated(metadata: Mapping[str, str], ours: Mapping[str, object]) -> dict[str, str]:
    """`kept(metadata)` with `ours` appended to the records under "adaptkit": a JSON list, the newest last.

    Deterministic: compact, keys sorted, no time and no path but those in `ours`.
    """
    records = [*history(metadata), dict(ours)]
    text = json.dumps(records, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return {**kept(metadata), KEY: text}
