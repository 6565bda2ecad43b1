"""Write one adapter: a safetensors file, or the folder that PEFT reads."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING

from adaptkit.ops.adapter_file.peft_config import PeftModule, peft_config
from adaptkit.ops.shared import check_output

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from adaptkit.files.header import TensorSpec
    from adaptkit.files.sink import TensorSink

__all__ = ["AdapterWriter", "check_adapter_output"]

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# the files that a PEFT folder may hold
KNOWN = frozenset({WEIGHTS, CONFIG, "adapter_model.bin", "README.md"})


def check_adapter_output(output: Path, *, folder: bool, overwrite: bool) -> None:
    """Refuse an output that exists or cannot be created, before any work."""
    if folder:
        from adaptkit.files.publish import check_folder

        check_folder(output, KNOWN, overwrite)
    else:
        check_output(output, overwrite)


class AdapterWriter:
    """One adapter file. With `modules` it is PEFT's folder: weights and a configuration."""

    def __init__(
        self,
        output: Path,
        specs: Sequence[TensorSpec],
        metadata: Mapping[str, str],
        modules: Sequence[PeftModule] | None,
        *,
        overwrite: bool,
    ) -> None:
        self.output, self.specs, self.metadata = output, specs, metadata
        self.modules, self.overwrite = modules, overwrite

    def write(self, fill: Callable[[TensorSink], None], *, sync: bool = True) -> int:
        """Publish the output and return the bytes of its weights file.

        `fill` puts every tensor into the sink. `sync` waits until the disk has the data.
        """
        from adaptkit.files.sink import TensorSink

        with self._file() as (path, overwrite):
            with TensorSink(path, self.specs, self.metadata, overwrite=overwrite) as sink:
                fill(sink)
                sink.commit(sync=sync)
            return sink.size

    @contextmanager
    def _file(self) -> Iterator[tuple[Path, bool]]:
        """The weights file, and whether it may exist already."""
        if self.modules is None:
            yield self.output, self.overwrite
            return
        from adaptkit.files.publish import publish_folder

        config = json.dumps(peft_config(self.modules), indent=2, sort_keys=True, ensure_ascii=False)
        with publish_folder(self.output, KNOWN, overwrite=self.overwrite) as folder:
            yield folder / WEIGHTS, False
            (folder / CONFIG).write_text(config + "\n", encoding="utf-8", newline="\n")
