"""Translate keys to slots and back, compiled from the tables.

`compile_keys(family, format)` reads and spells adapter keys, `compile_checkpoint(family)` those of
checkpoints. Parsing a key is one dictionary look-up. Every spelling a table can produce is
generated in advance, so that underscores in `to_out_0` or `context_block` are never mistaken for
dots.
"""

from __future__ import annotations

from adaptkit.keymap.adapter_keys import (
    Dialect,
    KeyMap,
    Parsed,
    compile_keys,
    keys_for,
    module_names,
    prefixes,
)
from adaptkit.keymap.checkpoint_keys import CheckpointMap, Place, Spelled, compile_checkpoint
from adaptkit.keymap.roles import RoleName, algorithms, param_of, split_suffix
from adaptkit.keymap.rows import Reading, find_row, label
from adaptkit.keymap.templates import Templates
from adaptkit.keymap.wrappers import unwrapped, wrapper

__all__ = [
    "CheckpointMap",
    "Dialect",
    "KeyMap",
    "Parsed",
    "Place",
    "Reading",
    "RoleName",
    "Spelled",
    "Templates",
    "algorithms",
    "compile_checkpoint",
    "compile_keys",
    "find_row",
    "keys_for",
    "label",
    "module_names",
    "param_of",
    "prefixes",
    "split_suffix",
    "unwrapped",
    "wrapper",
]
