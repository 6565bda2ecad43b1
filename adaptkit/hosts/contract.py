"""The contract of a host: the formats and algorithms that it loads, and what to write for it."""

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
# the algorithms that existed when the hosts were measured
MEASURED = (
    "boft", "full", "glora", "ia3", "kohya-oft", "loha", "lokr", "lora", "oft", "peft-boft",
    "peft-oft", "set", *DORA,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a host loads every module of a file with the right values, and why not.

    None if that is not measured.
    """

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
    """One adapted weight as a host finds it in a file, or as a format would write it.

    `namings` are those that name the module as the file does, `suffixes` the ends of its keys.
    `alpha` is the number that a host takes for alpha; `told` if a tensor states it, `stated` if
    only metadata does. `axis` is that of a DoRA.
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
    """Modules that a host does not load, or gets wrong: those that meet every condition given.

    `what` completes "10 of 504 modules …"; `{kinds}` in it are their algorithms.

    - `modules`: a pattern (`re.search`) for `component.module`, with target names; those of biases
      end in `.bias`.
    - `algorithms`: these; `besides`: all but these.
    - `named`: named as in this naming; `unnamed`: not so. The latter is for the denoiser alone:
      text encoders have the names of Hugging Face everywhere.
    - `suffix`: a tensor has a suffix that begins so.
    - `told`: a tensor states alpha; `stated`: only metadata does; `odd`: alpha is not the most
      common one of the component.
    - `axis`: that of a DoRA.
    - `whole`: one such module makes the host refuse the file, or load nothing of it.
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
        """Whether a module is lost; `common` is the most common alpha of each component."""
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
    """How a host loads files of some families in one format: completely, but for the losses.

    With `having`, the cell is about files with a module that matches this pattern. A file loads
    only if each pattern of `needs` matches some module.
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
    """A program that loads adapters. `measured` is the version that the cells were measured with.

    The first cell that fits a file counts; a file without one is not measured. Neither are files
    with algorithms besides `algorithms`. `always` are losses in every format. `writes` are the
    formats to write by family, the better first ("" for all other families). The host loads
    nothing for families in `unsupported`, for the reason given there.
    """

    name: str
    title: str
    measured: str
    cells: tuple[Cell, ...]
    writes: Mapping[str, tuple[str, ...]]
    algorithms: tuple[str, ...] = MEASURED
    always: tuple[Loss, ...] = ()
    unsupported: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def formats(self, family: str) -> tuple[str, ...]:
        """The formats to write for a family, the best first; none if it is unsupported."""
        return (
            () if family in self.unsupported else self.writes.get(family, self.writes.get("", ()))
        )

    def cell(self, format: str, family: str, pieces: tuple[Piece, ...]) -> Cell | None:
        """The cell about a file of this format and family; None if it is not measured."""
        return next((cell for cell in self.cells if cell.fits(format, family, pieces)), None)
