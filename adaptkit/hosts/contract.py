"""What a host is: which formats and algorithms it really loads, family by family, and what one writes for it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adaptkit.names import Slot

__all__ = [
    "DORA",
    "NOTHING",
    "PARTIAL",
    "SD",
    "TE",
    "UNETS",
    "Cell",
    "Host",
    "Loss",
    "Piece",
    "Recipe",
    "Verdict",
]

SD = ("sd1", "sd2")
UNETS = (*SD, "sdxl", "sdxl-refiner")
DORA = ("lora+dora", "loha+dora", "lokr+dora")
TE = r"^text_encoder"


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


@dataclass(frozen=True, slots=True)
class Piece:
    """One adapted weight as a host meets it in a file: of an adapter as it is, or as a format would write it.

    `namings` are those that call the module as the file does; `suffixes` what its tensors end in; `alpha` the number a
    host takes for alpha; `told` whether a tensor tells it, `stated` whether only metadata does. `axis` is DoRA's.
    """

    slot: Slot
    label: str
    algorithm: str
    namings: frozenset[str]
    suffixes: tuple[str, ...]
    alpha: float | None = None
    told: bool = False
    stated: bool = False
    axis: str = ""


@dataclass(frozen=True, slots=True)
class Loss:
    """Modules that a host does not load, or gets wrong: those for which every condition given here holds.

    `what` completes "10 of 504 modules …"; `{kinds}` in it are their algorithms. `modules` is a pattern (`re.search` on
    `component.module`, target names, `.bias` after those of biases). `algorithms`: these; `besides`: all but these.
    `named`: called as in this naming; `unnamed`: not so (the denoiser alone: text encoders have Hugging Face's names
    everywhere). `suffix`: a tensor whose suffix begins so. `told`: alpha stands in a tensor; `stated`: in metadata
    alone; `odd`: alpha is not the most common one of the component. `axis`: DoRA's. `whole`: one such module, and the
    host refuses the file or loads nothing of it.
    """

    what: str
    modules: str = ""
    algorithms: tuple[str, ...] = ()
    besides: tuple[str, ...] = ()
    named: str = ""
    unnamed: str = ""
    suffix: str = ""
    told: bool = False
    stated: bool = False
    odd: bool = False
    axis: str = ""
    whole: bool = False

    def holds(self, piece: Piece, common: Mapping[str, float]) -> bool:
        """Whether a module is lost so; `common` is the most common alpha of each component."""
        denoiser = not piece.slot.component.startswith(("text_encoder", "text_conditioner"))
        return (
            (not self.modules or re.search(self.modules, str(piece.slot.target)) is not None)
            and (not self.algorithms or piece.algorithm in self.algorithms)
            and piece.algorithm not in self.besides
            and (not self.named or self.named in piece.namings)
            and (not self.unnamed or (denoiser and self.unnamed not in piece.namings))
            and (
                not self.suffix or any(suffix.startswith(self.suffix) for suffix in piece.suffixes)
            )
            and (not self.told or piece.told)
            and (not self.stated or piece.stated)
            and (not self.odd or (piece.told and piece.alpha != common.get(piece.slot.component)))
            and (not self.axis or piece.axis == self.axis)
        )


NOTHING = Loss("no such name is read: nothing loads, and no error is shown", whole=True)
PARTIAL = Loss(
    "its converter stops where a kind of block module is missing, and one is", whole=True
)


@dataclass(frozen=True)
class Cell:
    """What a host makes of files of some families in one format: all is loaded but for these losses.

    `having`: only of files with a module that matches this pattern. `needs`: a file loads only where each of these
    patterns matches some module.
    """

    format: str
    families: tuple[str, ...]
    losses: tuple[Loss, ...] = ()
    having: str = ""
    needs: tuple[str, ...] = ()

    def fits(self, format: str, family: str, pieces: tuple[Piece, ...]) -> bool:
        """Whether this cell is about such a file."""
        if format != self.format or family not in self.families:
            return False
        return not self.having or any(
            re.search(self.having, str(piece.slot.target)) for piece in pieces
        )


@dataclass(frozen=True)
class Host:
    """A program that loads adapters. `measured` is the version the cells were found with, by running it.

    The first cell that fits a file counts; where none does, nobody has measured it. `always` are losses whatever the
    format. `writes` are the formats to write, the better first where they load as much ("" for all other families);
    families in `unsupported` it loads nothing for.
    """

    name: str
    title: str
    measured: str
    cells: tuple[Cell, ...]
    writes: Mapping[str, tuple[str, ...]]
    always: tuple[Loss, ...] = ()
    unsupported: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def formats(self, family: str) -> tuple[str, ...]:
        """The formats to write for a family, the best first."""
        return (
            () if family in self.unsupported else self.writes.get(family, self.writes.get("", ()))
        )

    def cell(self, format: str, family: str, pieces: tuple[Piece, ...]) -> Cell | None:
        """What is known about a file of this format and family, if anything."""
        return next((cell for cell in self.cells if cell.fits(format, family, pieces)), None)
