"""Metadata of a merged checkpoint: the adapters, their strengths and hashes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from adaptkit import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from adaptkit.ops.merge.layout import Volume
    from adaptkit.ops.merge.plan import Plan

__all__ = ["Provenance"]

STATED = {"modelspec.hash_sha256": "modelspec.hash_sha256", "sshs_model_hash": "sshs_model_hash"}


class Provenance:
    """Names, strengths and hashes of what was merged, without time or place.

    `modelspec.merged_from` follows sd-scripts. `sd_merge_recipe` and `sd_merge_models` follow the
    web UI, and model hosts show them. `adaptkit` is our own record.
    """

    def __init__(self, plan: Plan, known: dict[Path, str]) -> None:
        from adaptkit.files.provenance import sha256

        self.plan = plan
        for file in {
            file for adapter in plan.adapters for file in adapter.source.files
        } - known.keys():
            known[file] = sha256(file)
        self.hashes = [
            "+".join(known[file] for file in adapter.source.files) for adapter in plan.adapters
        ]

    def metadata(self, volume: Volume) -> dict[str, str]:
        """Return the metadata of one file of the output."""
        from adaptkit.files.provenance import updated

        plan = self.plan
        base = {"name": plan.base.source.path.name, **_stated(plan.base.source.metadata)}
        merged = [
            {"name": a.source.path.name, "sha256": digest, "strength": strength}
            for a, digest, strength in zip(plan.adapters, self.hashes, plan.strengths, strict=True)
        ]
        record: dict[str, Any] = {
            "adaptkit": __version__,
            "command": "merge",
            "base": base,
            "adapters": merged,
        }
        if plan.options.blocks:
            record["blocks"] = list(plan.options.blocks)
        for option in ("only", "skip"):
            if getattr(plan.options, option):
                record[option] = list(getattr(plan.options, option))
        found = updated(volume.metadata, record)
        return (
            {**found, **_for_hosts(found, base, merged)}
            if any(merge.changes for merge in plan.merges)
            else found
        )


def _stated(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the hashes in the base's metadata; the base is not read to compute one."""
    return {name: metadata[key] for key, name in STATED.items() if key in metadata}


def _for_hosts(
    metadata: Mapping[str, str], base: Mapping[str, str], merged: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    earlier = metadata.get("modelspec.merged_from")
    names = [
        earlier or base["name"].rpartition(".")[0] or base["name"],
        *(_bare(item["name"]) for item in merged),
    ]
    recipe = {
        "type": "adaptkit",
        "base_model": dict(base),
        "loras": [dict(item) for item in merged],
        "dtype": "float32",
    }
    models = {item["sha256"]: {"name": item["name"]} for item in merged}
    return {
        "modelspec.merged_from": ", ".join(names),
        "sd_merge_recipe": _compact(recipe),
        "sd_merge_models": _compact({**_earlier_models(metadata), **models}),
    }


def _earlier_models(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        found = json.loads(metadata.get("sd_merge_models", "{}"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _bare(name: str) -> str:
    return name.rpartition(".")[0] or name


def _compact(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
