"""Write one adapter: a safetensors file, or the folder that PEFT reads."""

from __future__ import annotations

import json
from contextlib import contextmanager
from math import isclose
from typing import TYPE_CHECKING, NamedTuple

from adaptkit.entries import entries_of, weights_of
from adaptkit.errors import CannotWrite, NotRepresentable
from adaptkit.ops.adapter_file.peft_config import PeftModule, peft_config
from adaptkit.ops.shared import check_output

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from adaptkit.algorithms.contract import Weights
    from adaptkit.entries import Entry
    from adaptkit.files.header import TensorSpec
    from adaptkit.files.sink import TensorSink
    from adaptkit.keymap import KeyMap
    from adaptkit.names import Slot

    Verify = Callable[[Callable[[Slot], Weights]], None]

__all__ = ["AdapterWriter", "Meant", "check_adapter_output"]

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_FLOAT32 = 1e-6  # alpha is stored as float32
FILES = (".safetensors", ".sft", ".bin", ".ckpt", ".pt", ".pth")  # ends of the names of files
# the files that a PEFT folder may hold
KNOWN = frozenset({WEIGHTS, CONFIG, "adapter_model.bin", "README.md"})


def check_adapter_output(output: Path, *, folder: bool, overwrite: bool) -> None:
    """Refuse an output that exists or cannot be created, before any work."""
    if folder:
        if output.suffix.lower() in FILES:
            raise CannotWrite(
                f"PEFT keys are written as a folder, and {output.name} is the name of a file",
                hint=f"-o {output.with_suffix('').name}, or --to diffusers for one file",
                file=output,
            )
        from adaptkit.files.publish import check_folder

        check_folder(output, KNOWN, overwrite)
    else:
        check_output(output, overwrite)


class Meant(NamedTuple):
    """What a module was written as: `scale` multiplies the stored product.

    `settings` are those of its kind, of which the file tells the first at least.
    """

    kind: type[Weights]
    rank: int | None
    scale: float
    settings: tuple[object, ...] = ()

    def is_read(self, entry: Entry | None) -> bool:
        """Whether a reader finds this."""
        told = () if entry is None else entry.facts.settings
        return (
            entry is not None
            and entry.kind is self.kind
            and entry.facts.rank == self.rank
            and isclose(entry.facts.scale, self.scale, rel_tol=_FLOAT32)
            and (not self.settings or self.settings[: len(told)] == told)
        )


class AdapterWriter:
    """One adapter file. With `modules` it is PEFT's folder: weights and a configuration.

    Before a file appears, its header is read as any file is. A file whose reader would find other
    modules, ranks or scales than those `meant` is not written. `verify` is then called with a
    function that reads the weights of a slot from the file; what it raises stops the file too.
    """

    def __init__(
        self,
        output: Path,
        specs: Sequence[TensorSpec],
        metadata: Mapping[str, str],
        modules: Sequence[PeftModule] | None,
        keys: KeyMap,
        meant: Mapping[Slot, Meant],
        *,
        overwrite: bool,
        verify: Verify | None = None,
    ) -> None:
        self.verify = verify
        self.output, self.specs, self.metadata = output, specs, metadata
        self.config = None if modules is None else peft_config(modules)
        self.keys, self.meant, self.overwrite = keys, meant, overwrite

    def write(
        self,
        fill: Callable[[TensorSink], None],
        *,
        sync: bool = True,
        before: Callable[[], None] | None = None,
    ) -> int:
        """Publish the output and return the bytes of its weights file.

        `fill` puts every tensor into the sink. `sync` waits until the disk has the data. `before`
        is called before a file is replaced: on Windows an open one cannot be.
        """
        from adaptkit.files.sink import TensorSink

        with self._file() as (path, overwrite):
            with TensorSink(path, self.specs, self.metadata, overwrite=overwrite) as sink:
                fill(sink)
                self._read_back(sink)
                if before is not None:
                    before()
                sink.commit(sync=sync)
            return sink.size

    def _read_back(self, sink: TensorSink) -> None:
        """NotRepresentable if a reader of the header finds other modules than those meant."""
        found = entries_of(sink, self.keys, self.metadata, self.config)
        for slot in (*self.meant, *found):
            meant = self.meant.get(slot)
            if meant is None or not meant.is_read(found.get(slot)):
                raise NotRepresentable(
                    f"the file would be read differently: {meant} as {found.get(slot)}",
                    hint="this is a bug in adaptkit; please report it",
                    file=self.output,
                    tensor=self.keys.stem(slot),
                )
        if self.verify is not None:
            self.verify(lambda slot: weights_of(found[slot], sink.tensor))

    @contextmanager
    def _file(self) -> Iterator[tuple[Path, bool]]:
        """The weights file, and whether it may exist already."""
        if self.config is None:
            yield self.output, self.overwrite
            return
        from adaptkit.files.publish import publish_folder

        config = json.dumps(self.config, indent=2, sort_keys=True, ensure_ascii=False)
        with publish_folder(self.output, KNOWN, overwrite=self.overwrite) as folder:
            yield folder / WEIGHTS, False
            (folder / CONFIG).write_text(config + "\n", encoding="utf-8", newline="\n")
