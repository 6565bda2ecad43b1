"""Checkpoints in Python: merge adapters into them, extract adapters from them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from adaptkit.api.adapters import AdapterFile, AnyAdapter, weighed
from adaptkit.api.inputs import PathOrState, State, Temporary, run, stored

if TYPE_CHECKING:
    from collections.abc import Sequence
    from os import PathLike

    import torch

    from adaptkit.ops.merge import Report
    from adaptkit.ops.stages import Progress

__all__ = ["extract", "merge"]

Adapters = "Sequence[AnyAdapter | tuple[AnyAdapter, float]]"


@overload
def merge(
    base: State,
    adapters: Sequence[AnyAdapter | tuple[AnyAdapter, float]],
    *,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, torch.Tensor]: ...


@overload
def merge(
    base: str | PathLike[str],
    adapters: Sequence[AnyAdapter | tuple[AnyAdapter, float]],
    *,
    progress: Progress | None = None,
    **options: Any,
) -> Report: ...


def merge(
    base: PathOrState,
    adapters: Sequence[AnyAdapter | tuple[AnyAdapter, float]],
    *,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, torch.Tensor] | Report:
    """Merge adapters, each alone or as (adapter, strength), into a checkpoint (`adaptkit merge`).

    A state dict gives a state dict, whose tensors have the dtypes and devices of the base. A path
    is merged into the file `output=`, and gives the report. The base is not changed.
    """
    from adaptkit.ops.merge import VERB

    folder = Temporary()
    try:
        path = stored(base, folder, "base")
        given = weighed(adapters, folder)
        if not isinstance(base, Mapping):
            report: Report = run(VERB, path, given, progress=progress, options=options)
            return report
        output = folder.path / "merged.safetensors"
        run(VERB, path, given, progress=progress, options=options | {"output": output})
        return _loaded(output, base)
    finally:
        folder.close()


def _loaded(path: Path, like: State) -> dict[str, torch.Tensor]:
    """The tensors of a file in the order and on the devices of a state dict."""
    from safetensors.torch import load_file

    found = load_file(path)
    return {name: found[name].to(tensor.device) for name, tensor in like.items()}


def extract(
    base: PathOrState,
    tuned: PathOrState,
    *,
    output: str | PathLike[str] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> AdapterFile:
    """The adapter that turns one checkpoint into another (`adaptkit extract`)."""
    from adaptkit.ops.extract import VERB

    inputs, folder = Temporary(), None
    if output is None:
        folder = Temporary()
        output = folder.path / "made.safetensors"
    try:
        first, second = stored(base, inputs, "base"), stored(tuned, inputs, "tuned")
        options |= {"output": Path(output)}
        report = run(VERB, first, second, progress=progress, options=options)
        return AdapterFile(report.output, folder, report)
    except BaseException:
        if folder is not None:
            folder.close()
        raise
    finally:
        inputs.close()
