"""Pack a finished adapter of diffusers' names for nunchaku, and read it back."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from adaptkit.errors import AdaptkitError, CorruptFile
from adaptkit.files.arranged.nunchaku import find
from adaptkit.files.arranged.packing import Packer
from adaptkit.files.open import open_source
from adaptkit.meaning import DIFFUSERS_CONFIG

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from torch import Tensor

    from adaptkit.files.sink import TensorSink
    from adaptkit.files.source import TensorSource

__all__ = ["check_packing", "pack_file", "packed_dtype"]

CLOSE = 1e-9  # float64 sums of the same products in another order
_VALUE = re.compile(r"\.(set_)?weight$")
PROBES = 2  # vectors that ΔW is multiplied with


def check_packing(base: Path, modules: Iterable[str]) -> None:
    """Raise unless a base is one that nunchaku quantised, and has a place for these modules."""
    with open_source(base) as source:
        Packer(source).check(modules)


def packed_dtype(base: Path) -> str:
    """The dtype of a base's own factors, which those of an adapter must have too."""
    with open_source(base) as source:
        return Packer(source).dtype


def pack_file(plain: Path, base: Path, output: Path, *, overwrite: bool) -> int:
    """Write the packed file; return its bytes. `CorruptFile` if it is not read as what it is."""
    from adaptkit.files.sink import TensorSink

    with open_source(plain) as source, open_source(base) as quantised:
        try:
            made = list(Packer(quantised).pack(source))
            # the ranks of the plain file, which are filled up here
            kept = {k: v for k, v in source.metadata.items() if k != DIFFUSERS_CONFIG}
            sink = TensorSink(output, [one.spec for one in made], kept, overwrite=overwrite)
            with sink:
                for one in made:
                    sink.put(one.spec.name, one.make().contiguous())
                _read_back(sink, source)
                sink.commit()
        except AdaptkitError as error:
            raise error.at(file=base) from None
        return sink.size


def _read_back(sink: TensorSink, source: TensorSource) -> None:
    """Compare each ΔW · v of the packed file with that of the plain one, and all vectors."""
    import torch

    found = find(sink.infos)
    made, kept = found if found is not None else ({}, {})

    def read(name: str) -> Tensor:
        if name in made:
            return made[name].read({p: sink.tensor(k) for p, k in made[name].parts.items()})
        return sink.tensor(kept[name].name)

    draw = torch.Generator().manual_seed(0)
    for name, info in source.infos.items():
        down, up = name, name.replace(".lora_A.", ".lora_B.")
        if ".lora_B.weight" in name:
            continue
        try:
            if down == up:
                # a norm's new value is read under another name than it was written under
                there = name if name in made or name in kept else _VALUE.sub(".scale", name)
                same = torch.equal(source.read(name), read(there))
            else:
                probe = torch.randn(info.shape[1], PROBES, generator=draw).double()
                one, two = (
                    of(up).double() @ (of(down).double() @ probe) for of in (source.read, read)
                )
                same = bool((one - two).norm() <= CLOSE * one.norm())
        except (KeyError, RuntimeError):  # not there, or of another size
            same = False
        if not same:
            raise CorruptFile(
                "packed, it is read as another adapter",
                hint="this is a bug in adaptkit; please report it",
                tensor=name,
            )
