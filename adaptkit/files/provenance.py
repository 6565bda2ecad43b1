"""Metadata of an output: entries kept, dropped and added, and file hashes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from adaptkit.files.header import unreadable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = [
    "FAMILY",
    "KEY",
    "STALE",
    "family",
    "file_hashes",
    "history",
    "kept",
    "sha256",
    "sshs_hashes",
    "sshs_places",
    "updated",
]

KEY = "adaptkit"
FAMILY = "family"
STALE = frozenset({"sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"})
"""Hashes of the tensors, invalid once a tensor changes."""
SSHS = {"sshs_model_hash": 64, "sshs_legacy_hash": 8}
# offset and length of the part that AUTOMATIC1111's first web UI hashed
LEGACY = (0x100000, 0x10000)


def sha256(path: str | Path, chunk: int = 8 << 20) -> str:
    """Hash a whole file, read `chunk` bytes at a time; hexadecimal SHA-256."""
    import hashlib  # 4 ms that most commands do not need

    digest = hashlib.sha256()
    try:
        with Path(path).open("rb", buffering=0) as file:
            while data := file.read(chunk):
                digest.update(data)
    except OSError as error:
        raise unreadable(path, error) from error
    return digest.hexdigest()


def file_hashes(path: Path, data: Iterable[memoryview]) -> dict[str, str]:
    """The hashes by which model sites and tools know a safetensors file.

    `data` are the bytes of its tensors, in the order of the file. AutoV2 is the beginning of the
    hash of the whole file, AutoV3 of that of its tensors, which sd-scripts writes as
    `sshs_model_hash`.
    """
    whole, model = sha256(path), sshs_hashes(data, 0)["sshs_model_hash"]
    return {
        "sha256": whole,
        "autov2": whole[:10].upper(),
        "autov3": model[:12].upper(),
        "sshs_model_hash": model,
    }


def sshs_places(metadata: Mapping[str, str]) -> dict[str, str]:
    """Placeholders for sd-scripts' hashes, of the final length.

    Empty if the file had none.
    """
    return {name: "0" * length for name, length in SSHS.items() if name in metadata}


def sshs_hashes(data: Iterable[memoryview], header: int) -> dict[str, str]:
    """Compute sd-scripts' hashes of tensor data, as of the output of `safetensors.save`.

    `header` is the length of a header with only the `ss_` metadata, which sd-scripts hashes with.
    The model hash covers the tensors alone, the legacy hash 64 KiB at offset 1 MiB of the whole.
    Source: sd-scripts `library/train_util.py`, `precalculate_safetensors_hashes`.
    """
    import hashlib

    digest, legacy = hashlib.sha256(), hashlib.sha256()
    first, at = LEGACY[0] - header, 0
    for piece in data:
        digest.update(piece)
        legacy.update(piece[max(0, first - at) : max(0, first + LEGACY[1] - at)])
        at += len(piece)
    return {"sshs_model_hash": digest.hexdigest(), "sshs_legacy_hash": legacy.hexdigest()[:8]}


def kept(metadata: Mapping[str, str]) -> dict[str, str]:
    """Drop the hashes that no longer hold; keep everything else, in order."""
    return {key: value for key, value in metadata.items() if key not in STALE}


def history(metadata: Mapping[str, str]) -> list[object]:
    """The records adaptkit left in a file, oldest first.

    Foreign records are kept unchanged.
    """
    text = metadata.get(KEY)
    if text is None:
        return []
    try:
        records = json.loads(text)
    except (ValueError, RecursionError):
        return [text]
    return records if isinstance(records, list) else [records]


def family(metadata: Mapping[str, str]) -> str | None:
    """The model family that adaptkit's records name, the newest that names one."""
    found = (one.get(FAMILY) for one in reversed(history(metadata)) if isinstance(one, dict))
    return next((name for name in found if isinstance(name, str)), None)


def updated(metadata: Mapping[str, str], ours: Mapping[str, object]) -> dict[str, str]:
    """Append `ours` to the "adaptkit" records (a JSON list, newest last) of `kept(metadata)`.

    Deterministic: compact JSON, sorted keys, no time and no path except those in `ours`.
    """
    records = [*history(metadata), dict(ours)]
    text = json.dumps(records, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return {**kept(metadata), KEY: text}
