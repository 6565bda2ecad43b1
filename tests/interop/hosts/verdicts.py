"""Every verdict beside what the loader did with the same file: yes or no, and which modules are lost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from adaptkit.adapter import Adapter
from adaptkit.detect import families, formats
from adaptkit.errors import AdaptkitError
from adaptkit.hosts import hosts, judge, losses
from adaptkit.names import Slot
from tests.interop.hosts.files import FORMS, File, make, namings
from tests.interop.hosts.loaded import RefusedError
from tests.interop.hosts.record import BLOCKS, CHOICES, LOADERS, spellings, wanted_prefixes


@dataclass(frozen=True)
class Cell:
    """One file and one host: the slots that adaptkit says are lost, and those that are."""

    host: str
    file: File
    claimed: frozenset[Slot] | None
    lost: frozenset[Slot]
    why: str = ""

    @property
    def agrees(self) -> bool:
        return self.claimed is None or self.claimed == self.lost

    def __str__(self) -> str:
        total, claimed = len(self.file.parts), self.claimed or frozenset()
        more, less = sorted(map(str, claimed - self.lost)), sorted(map(str, self.lost - claimed))
        return (
            f"{self.host} {self.file.name}: said to lose {len(claimed)} of {total}, loses {len(self.lost)}"
            f" ({self.why[:90]}) too many: {more[:2]} too few: {less[:2]}"
        )


def natural(format: str, form: str) -> bool:
    """Whether some tool may write this form under such keys."""
    ours = ("up", "oft_blocks")  # spellings of some formats, which have no other
    if form in ours or spellings(format)[0] in ours:
        return form in spellings(format)
    # factors as PEFT calls them stand in dotted keys only, diffusers' old ones in its own
    if formats()[format].joiner == "_" and FORMS[form].peft:
        return False
    return form != "lora.up" or format == "diffusers"


def files(host: str, family: str, forms: tuple[str, ...] | None = None) -> Iterator[File]:
    """All files of a family: a plain LoRA in every spelling and choice of modules, other algorithms on the denoiser."""
    for format in formats():
        for naming in namings(family):
            for form in forms or FORMS:
                if not natural(format, form):
                    continue
                plain = form in spellings(format)
                # text encoders in the usual spellings only: others are read or not as they come
                usual = form in spellings(format)[:2]
                choices = CHOICES if usual else CHOICES[1:] if plain else ("denoiser", "layers")
                for choice, wanted in product(choices, wanted_prefixes(host, family, format)):
                    file = make(family, format, naming, form, choice, BLOCKS, wanted)
                    if file is not None and (not wanted or wanted in str(file.listing)):
                        yield file


def cell(host: str, file: File, folder: Path) -> Cell | None:
    """Compare one verdict; None for a file that adaptkit does not take for an adapter of this family and format."""
    path = file.write(folder / "file.safetensors")
    try:
        with Adapter.open(path, family=file.family, format=file.format) as adapter:
            if adapter.unclaimed or {e.slot for e in adapter.entries.values()} != {
                part.slot for part in file.parts
            }:
                return None
            verdict, lost = judge(adapter)[host], losses(adapter, host)
    except AdaptkitError:
        return None
    if lost is not None:
        assert verdict.loads is (not lost), (host, file.name, verdict)
    try:
        really = LOADERS[host].load(file, BLOCKS).lost(file)
        why = verdict.why
    except RefusedError as error:
        really, why = {part.slot for part in file.parts}, f"{verdict.why} / {error}"
    claimed = None if lost is None else frozenset(lost)
    return Cell(host, file, claimed, frozenset(really), why)


def compare(
    host: str, chosen: list[str], folder: Path, forms: tuple[str, ...] | None = None
) -> Iterator[Cell]:
    for family in chosen or list(families()):
        if family in hosts()[host].unsupported:
            continue
        for file in files(host, family, forms):
            found = cell(host, file, folder)
            if found is not None:
                yield found
