"""Metadata of an output: what is kept, what is dropped because it no longer holds, what adaptkit adds; file hashes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from adaptkit.files.header import unreadable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["KEY", "STALE", "history", "kept", "sha256", "sshs_hashes", "sshs_places", "updated"]

KEY = "adaptkit"
STALE = frozenset({"sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"})
"""Hashes of the tensors: wrong as soon as one of them changes."""
SSHS = {"sshs_model_hash": 64, "sshs_legacy_hash": 8}
LEGACY = (0x100000, 0x10000)  # where and how much of a file the first web UI hashed


def sha256(path: str | Path, chunk: int = 8 << 20) -> str:
    """The SHA-256 of a whole file in hexadecimal, read `chunk` bytes at a time."""
    import hashlib  # 4 ms that most commands do not need

    digest = hashlib.sha256()
    try:
        with Path(path).open("rb", buffering=0) as file:
            while data := file.read(chunk):
                digest.update(data)
    except OSError as error:
        raise unreadable(path, error) from error
    return digest.hexdigest()


def sshs_places(metadata: Mapping[str, str]) -> dict[str, str]:
    """Placeholders for the hashes that sd-scripts keeps, as long as those will be; none where the file had none."""
    return {name: "0" * length for name, length in SSHS.items() if name in metadata}


def sshs_hashes(data: Iterable[memoryview], header: int) -> dict[str, str]:
    """sd-scripts' hashes of a file with this tensor data, over what `safetensors.save` would give.

    `header` is the length of a header with only the `ss_` metadata, which is what sd-scripts hashes with. The model hash
    is over the tensors alone, the legacy hash over 64 KiB at 1 MiB of the whole (sd-scripts `library/train_util.py`,
    `precalculate_safetensors_hashes`).
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
