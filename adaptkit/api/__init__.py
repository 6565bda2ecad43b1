"""The Python API: paths, open adapters and state dicts, through the verbs of the command line.

What a verb makes without an output is held in a temporary file, which lives as long as the object.
"""

from __future__ import annotations

from adaptkit.api.adapters import AdapterFile, combine, open
from adaptkit.api.checkpoints import extract, merge
from adaptkit.api.inspecting import Inspected, inspect

__all__ = ["AdapterFile", "Inspected", "combine", "extract", "inspect", "merge", "open"]
