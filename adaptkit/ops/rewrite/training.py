"""kohya's record of the training (`ss_…`) in a file that was rewritten: what still holds of it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from adaptkit.keymap.kinds import network_module

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from adaptkit.ops.rewrite.plan import Recast
    from adaptkit.ops.rewrite.state import State

__all__ = ["restated"]

# what leaves ranks and alphas as they were
_STILL = {"renamed", "unchanged", "split", "swapped", "cast"}
# arguments of LyCORIS that describe the algorithm
_KIND = ("algo", "factor", "decompose_both", "full_matrix", "use_tucker", "use_cp", "dora_wd")
_DYNAMIC = "Dynamic"


def restated(plan: Recast, state: State) -> dict[str, str | None]:
    """The entries that a rewritten file states otherwise than its input; None: not any more."""
    known = plan.adapter.metadata
    found: dict[str, str | None] = {}
    if "changed" in plan.counts() and "ss_network_module" in known:
        found["ss_network_module"] = network_module({task.kind.name for task in plan.tasks})
    if not {"ss_network_dim", "ss_network_args"} & known.keys():
        return found
    left = plan.left_out is not None and plan.left_out.modules > 0
    if plan.counts().keys() <= _STILL and not left:
        return found
    return found | _ranks(plan, state)


def _ranks(plan: Recast, state: State) -> dict[str, str | None]:
    """Ranks and alphas; those of convolutions apart if the input states them so."""
    known, args = plan.adapter.metadata, _arguments(plan.adapter.metadata)
    modules = [
        (task.convolution, state.module(task, stored))
        for task in plan.tasks
        if (stored := state.outcome(task)) is not None and not stored.kind.dense
    ]
    apart = {"conv_dim", "conv_alpha"} & args.keys() and any(not conv for conv, _ in modules)
    main = [module for conv, module in modules if not (apart and conv)]
    found: dict[str, str | None] = {}
    if "ss_network_dim" in known and not main:
        found |= {"ss_network_dim": None, "ss_network_alpha": None}
    elif "ss_network_dim" in known:
        found["ss_network_dim"] = _one(str(module.rank) for module in main)
        found["ss_network_alpha"] = _one(f"{module.alpha:g}" for module in main)
    if "ss_network_args" not in known or not args:
        return found
    if "changed" in plan.counts():
        args = {name: value for name, value in args.items() if name not in _KIND}
    windows = [module for conv, module in modules if conv]
    for name, values in (
        ("conv_dim", [str(module.rank) for module in windows]),
        ("conv_alpha", [f"{module.alpha:g}" for module in windows]),
    ):
        if name in args:
            value = _one(values) if values else _DYNAMIC
            args.pop(name)
            args |= {} if value == _DYNAMIC else {name: value}
    return found | {"ss_network_args": json.dumps(args) if args else None}


def _arguments(metadata: Mapping[str, str]) -> dict[str, object]:
    try:
        found = json.loads(metadata.get("ss_network_args", ""))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _one(values: Iterable[str]) -> str:
    found = set(values)
    return found.pop() if len(found) == 1 else _DYNAMIC
