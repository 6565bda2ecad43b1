"""Adapters in Python: open, look into, convert, resize, combine, save."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeAlias

from adaptkit.adapter import Adapter
from adaptkit.api.inputs import PathOrState, Temporary, run, stored
from adaptkit.files.hub import local
from adaptkit.ops.shared import check_output
from adaptkit.ops.stages import Tally, log

if TYPE_CHECKING:
    from collections.abc import Sequence
    from os import PathLike

    import torch

    from adaptkit.entries import Entry
    from adaptkit.ops.shared import WriterReport
    from adaptkit.ops.stages import Progress

__all__ = ["AdapterFile", "AnyAdapter", "Module", "combine", "open", "weighed"]

AnyAdapter: TypeAlias = "AdapterFile | PathOrState"
_MADE = "made.safetensors"


@dataclass(frozen=True, repr=False)
class Module:
    """One adapted weight of a file; tensors are read when they are asked for."""

    name: str
    algorithm: str
    rank: int | None
    scale: float
    _adapter: Adapter
    _entry: Entry

    def __repr__(self) -> str:
        rank = "" if self.rank is None else f", rank {self.rank}"
        return f"Module({self.name!r}: {self.algorithm}{rank}, scale {self.scale:g})"

    @property
    def parameter(self) -> str:
        """The parameter it changes as the file's format spells it, such as `….to_q.weight`."""
        return f"{self._adapter.keys.stem(self._entry.slot)}.{self._entry.slot.param}"

    def tensors(self) -> dict[str, torch.Tensor]:
        """The stored tensors by role (`up`, `down`, `w1`, …), without alpha."""
        return self._adapter.read(self._entry)

    def delta(self) -> torch.Tensor:
        """ΔW at strength 1, of the shape of the weight: (out, in, *kernel), in at least float32.

        Raises `NotRepresentable` where it depends on the base weight, as that of a DoRA.
        """
        dense = self._adapter.weights(self._entry).delta()
        facts = self._entry.facts
        if facts.vector:
            return dense.reshape(-1)
        kernel = facts.kernel or ()
        return dense.reshape(dense.shape[0], -1, *kernel) if kernel else dense


class AdapterFile:
    """An adapter: a file that was opened, or that a verb has made.

    `report` is that of the verb. Closing it, or leaving its context, closes the file and removes
    one that was not saved.
    """

    def __init__(
        self,
        path: Path,
        temporary: Temporary | None = None,
        report: WriterReport | None = None,
        reading: Mapping[str, str | None] | None = None,
    ) -> None:
        self.path, self.report = path, report
        self._temporary, self._reading = temporary, dict(reading or {})
        self._adapter = Adapter.open(path, **self._reading)

    @property
    def family(self) -> str | None:
        """The model family; None if no table knows it."""
        return self._adapter.family.name if self._adapter.known else None

    @property
    def format(self) -> str:
        """The key format."""
        return self._adapter.format.name

    @property
    def metadata(self) -> Mapping[str, str]:
        """The metadata of the file."""
        return self._adapter.metadata

    @cached_property
    def modules(self) -> Mapping[str, Module]:
        """Every module by its name, as `inspect --modules` shows it."""
        return {module.name: module for module in self._modules()}

    def _modules(self) -> Iterator[Module]:
        for slot, entry in self._adapter.entries.items():
            facts, name = entry.facts, self._adapter.label(slot)
            yield Module(name, entry.kind.name, facts.rank, facts.scale, self._adapter, entry)

    @property
    def loads_in(self) -> dict[str, bool | None]:
        """Whether each host loads the whole file; None: not measured."""
        from adaptkit.ops.adapter_file.verdict import verdicts

        found: dict[str, bool | None] = verdicts(self._adapter)["loads_in"]
        return found

    def state_dict(self, device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
        """Every tensor of the file by its key, as stored."""
        source = self._adapter.source
        return {name: source.read(name).to(device) for name in source.infos}

    def convert(
        self,
        to: str | None = None,
        *,
        host: str | None = None,
        output: str | PathLike[str] | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> AdapterFile:
        """The adapter in another format, for a host, in another algorithm (`adaptkit convert`)."""
        from adaptkit.ops.convert import VERB

        options |= {"to": to, "host": host}
        return _made(VERB, self.path, output, progress, self._reading | options)

    def resize(
        self,
        *,
        output: str | PathLike[str] | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> AdapterFile:
        """The adapter with fewer ranks, by one rule such as `size="64MB"` (`adaptkit resize`)."""
        from adaptkit.ops.resize import VERB

        return _made(VERB, self.path, output, progress, self._reading | options)

    def save(
        self,
        path: str | PathLike[str],
        *,
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> Path:
        """Copy the file, or PEFT's folder, to a path."""
        target = Path(path)
        if self.path.is_dir():
            shutil.copytree(self.path, target, dirs_exist_ok=overwrite)
            return target
        check_output(target, overwrite)
        from adaptkit.files.sink import TensorSink

        source = self._adapter.source
        infos = sorted(source.infos.values(), key=lambda info: source.order(info.name))
        with TensorSink(target, infos, source.metadata, overwrite=overwrite) as sink:
            tally = Tally(progress, "writing", sink.size, "bytes")
            tally.add(sink.header)
            sink.wrote = tally.add
            sink.copy_many((info.name, source, info.name) for info in infos)
            sink.commit()
        log().info("save: wrote %s, %d bytes", target, sink.size)
        return target

    def close(self) -> None:
        """Close the file, and remove one that was not saved."""
        self._adapter.close()
        if self._temporary is not None:
            self._temporary.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._adapter.entries)

    def __repr__(self) -> str:
        kinds = ", ".join(f"{name} {count}" for name, count in self._adapter.algorithms().items())
        where = "not saved" if self._temporary is not None else str(self.path)
        return f"AdapterFile({where}: {self.family}, {self.format} keys, modules: {kinds})"


def open(
    adapter: PathOrState,
    *,
    config: Mapping[str, object] | None = None,
    family: str | None = None,
    format: str | None = None,
    alpha_in: str | None = None,
) -> AdapterFile:
    """Open an adapter: a file, a PEFT folder, or a state dict with PEFT's `config` if it has one.

    Raises `UnknownAdapter` for anything else.
    """
    reading = {"family": family, "format": format, "alpha": alpha_in}
    if not isinstance(adapter, Mapping):
        return AdapterFile(local(adapter), reading=reading)
    folder = Temporary()
    return AdapterFile(stored(adapter, folder, "opened", config), folder, reading=reading)


def combine(
    adapters: Sequence[AnyAdapter | tuple[AnyAdapter, float]],
    *,
    output: str | PathLike[str] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> AdapterFile:
    """The weighted sum of adapters, each alone or as (adapter, weight) (`adaptkit combine`)."""
    from adaptkit.ops.combine import VERB

    folder = Temporary()
    try:
        return _made(VERB, weighed(adapters, folder), output, progress, options)
    finally:
        folder.close()


def weighed(
    adapters: Sequence[AnyAdapter | tuple[AnyAdapter, float]], folder: Temporary
) -> list[tuple[Path, float]]:
    """The files of adapters with their strengths."""
    found: list[tuple[Path, float]] = []
    for number, given in enumerate(adapters):
        adapter, strength = given if isinstance(given, tuple) else (given, 1.0)
        if isinstance(adapter, AdapterFile):
            found.append((adapter.path, strength))
        else:
            found.append((stored(adapter, folder, str(number)), strength))
    return found


def _made(
    verb: Any,
    given: Any,
    output: str | PathLike[str] | None,
    progress: Progress | None,
    options: dict[str, Any],
) -> AdapterFile:
    """What a verb makes, at its output or in a temporary file."""
    options = {"alpha_in": options.pop("alpha", None), **options}
    folder: Temporary | None = None
    if output is not None:
        path = Path(output)
    else:
        folder = Temporary()
        # PEFT's folder has no suffix; every other output is one file
        path = folder.path / ("made" if _is_peft(given, options) else _MADE)
    try:
        report = run(verb, given, progress=progress, options=options | {"output": path})
        return AdapterFile(report.output, folder, report)
    except BaseException:
        if folder is not None:
            folder.close()
        raise


def _is_peft(given: Any, options: Mapping[str, Any]) -> bool:
    from adaptkit.detect import formats
    from adaptkit.formats.contract import Alpha

    to = options.get("to")
    if to is None and options.get("host") is None:
        first = given[0][0] if isinstance(given, list) else given
        with Adapter.open(first, family=options.get("family")) as adapter:
            to = adapter.format.name
    form = formats().get(str(to).lower())
    return form is not None and form.alpha is Alpha.CONFIG
