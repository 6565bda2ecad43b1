"""What a host is: which formats and algorithms it really loads, family by family, and what one writes for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["SD", "UNETS", "Cell", "Host", "Recipe", "Verdict"]

SD = ("sd1", "sd2")
UNETS = (*SD, "sdxl", "sdxl-refiner")


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a host loads every module of a file with the right values (None: nobody has measured it), and why not."""

    loads: bool | None
    why: str = ""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to write an adapter so that a host loads it."""

    format: str
    fold_alpha: bool = False
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cell:
    """What a host makes of files of some families in one format; the first cell that fits a file counts.

    `naming`: only files whose denoiser's modules are named so. `lost` are patterns (`re.search` on `component.module`,
    target names) of modules that the host drops or gets wrong (only those of `algorithms`, where given); `note` says how.
    A `note` without `lost` says why nothing loads. `alpha` False: a file with alpha tensors is refused or comes out wrong.
    """

    format: str
    families: tuple[str, ...]
    naming: str = ""
    lost: tuple[str, ...] = ()
    note: str = ""
    alpha: bool = True
    algorithms: tuple[str, ...] = ()

    @property
    def nothing(self) -> bool:
        """Whether such files do not load at all."""
        return bool(self.note) and not self.lost


@dataclass(frozen=True)
class Host:
    """A program that loads adapters. `measured` is the version the cells were found with, by running it.

    `algorithms` names those it loads, each with the families it does so for (empty: all). `metadata` says whether it
    reads an alpha that stands in the file's metadata. `writes` is the format that loads best, by family ("" for all
    others); families in `unsupported` it loads nothing for. `equal_scales`: (formats) where it applies one alpha to
    all attention layers. `axes` are the axes on which its DoRA is right.
    """

    name: str
    title: str
    measured: str
    cells: tuple[Cell, ...]
    algorithms: Mapping[str, tuple[str, ...]]
    writes: Mapping[str, str]
    unsupported: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    metadata: bool = False
    tucker: bool = True
    equal_scales: tuple[str, ...] = ()
    axes: tuple[str, ...] = ("input", "output")
