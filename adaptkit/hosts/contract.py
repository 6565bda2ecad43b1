"""The definition of a host: what it loads and writes, by family."""

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
    """Whether a host loads a whole file (None: not measured), and why not.

    That is, every module with the right values.
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
    """One adapted weight as a host finds it in a file.

    `namings` are those in which the module has the file's name, `suffixes` the ends of its tensors'
    keys. `alpha` is the number that a host takes for alpha; `told`: a tensor states it, `stated`:
    only metadata does. `axis` is that of DoRA's norm.
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
    """Modules that a host skips or misreads: those that fit every condition given.

    `what` completes "10 of 504 modules …"; `{kinds}` in it stands for their algorithms.

    Conditions: `modules` is a pattern (`re.search` on `component.module`, target names, `.bias`
    after those of biases). `algorithms`: one of these; `besides`: none of these. `named`: the name
    is of this naming; `unnamed`: it is not (only denoisers, as text encoders have Hugging Face
    names everywhere). `suffix`: a tensor's suffix begins so. `told`: a tensor states alpha;
    `stated`: only metadata does; `odd`: alpha is not the component's most common one. `axis`: that
    of DoRA. `whole`: one such module makes the host refuse the file or load nothing.
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
        """Whether a module is lost.

        `common` is the most common alpha of each component.
        """
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


NOTHING = Loss("none of these names is read: nothing loads, and no error is shown", whole=True)
PARTIAL = Loss("its converter stops, because a kind of block module is missing", whole=True)


@dataclass(frozen=True)
class Cell:
    """A host on files of some families in one format.

    It loads everything except the losses.

    `having`: only files with a module that matches this pattern. `needs`: each of these patterns
    must match some module, else nothing loads.
    """

    format: str
    families: tuple[str, ...]
    losses: tuple[Loss, ...] = ()
    having: str = ""
    needs: tuple[str, ...] = ()

    def fits(self, format: str, family: str, pieces: tuple[Piece, ...]) -> bool:
        """Whether a file falls under this cell."""
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
