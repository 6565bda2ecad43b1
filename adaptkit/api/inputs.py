"""What the API takes: paths and state dicts, which are written to temporary files for the verbs."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from adaptkit.files.hub import local
from adaptkit.meaning import PEFT_CONFIG

if TYPE_CHECKING:
    from os import PathLike

    import torch

    from adaptkit.ops.stages import Progress
    from adaptkit.ops.verb import Verb

__all__ = ["PathOrState", "State", "Temporary", "run", "stored"]

State: TypeAlias = "Mapping[str, torch.Tensor]"
PathOrState: TypeAlias = "str | PathLike[str] | State"
_NAME = "adapter.safetensors"
_PEFT = "adapter_model.safetensors"


class Temporary:
    """A temporary folder that goes with the last object that needs it."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="adaptkit-", ignore_cleanup_errors=True)

    @property
    def path(self) -> Path:
        """The folder."""
        return Path(self._folder.name)

    def close(self) -> None:
        """Remove it."""
        self._folder.cleanup()


def stored(
    given: PathOrState, folder: Temporary, name: str, config: Mapping[str, object] | None = None
) -> Path:
    """The file of an input; a state dict is written to the folder."""
    if not isinstance(given, Mapping):
        return local(given)
    from safetensors.torch import save_file

    home = folder.path / name
    home.mkdir()
    # cloned: tensors that share memory, or lie on a device, are stored each by itself
    tensors = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in given.items()}
    path = home / (_NAME if config is None else _PEFT)
    save_file(tensors, path)
    if config is None:
        return path
    (home / PEFT_CONFIG).write_text(json.dumps(dict(config)), encoding="utf-8")
    return home


def run(verb: Verb, *inputs: Any, progress: Progress | None, options: dict[str, Any]) -> Any:
    """Plan and run a verb, and close its files."""
    with verb.plan(*inputs, verb.options(**options)) as plan:
        return verb.perform(plan, progress)
