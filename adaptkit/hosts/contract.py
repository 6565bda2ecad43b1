"""The definition of a host: what it loads and writes, by family."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping

    from adaptkit.keymap import Dialect
    from adaptkit.names import Slot

__all__ = [
    "BEYOND_WEBUI",
    "DORA",
    "NOTHING",
    "NO_MODEL",
    "PARTIAL",
    "SD",
    "TE",
    "UNETS",
    "UNREAD",
    "Cell",
    "Host",
    "Loss",
    "Piece",
    "Recipe",
    "Verdict",
]

NO_MODEL = "no model of this family"
SD = ("sd1", "sd2")
UNETS = (*SD, "sdxl", "sdxl-refiner")
DORA = ("lora+dora", "loha+dora", "lokr+dora")
TE = r"^text_encoder"
# families that neither A1111 nor Forge has a model of
BEYOND_WEBUI = (
    "ace-step", "anima", "auraflow", "bria-fibo", "bria-fibo2", "cogvideox", "cogview4", "cosmos",
    "cosmos-14b", "ernie-image", "flux2", "flux3", "framepack", "glm-image", "hidream",
    "hidream-o1", "hunyuan-dit", "hunyuan-image", "hunyuan-video", "hunyuan-video-15",
    "ideogram4", "kandinsky5", "krea2", "longcat-image", "ltx", "ltx-13b", "ltx2", "lumina2",
    "minimax-h3", "mochi", "ovis-image", "pixart", "prx", "qwen-image", "qwen-image-21", "sana",
    "stable-cascade", "wan", "wan-animate2", "z-image",
)  # fmt: skip
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
    dialect: Dialect | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """One adapted weight as a host finds it in a file.

    `stem` is a key without its suffix. `names` are the (naming, name) pairs of the family's table
    under which the module has the file's name, `suffixes` the ends of its tensors' keys, `kernel`
    the dimensions of its window, `columns` the width of its input. `alpha` is the number that a
    host takes for alpha, `rank` is 0 if there is none; `told`: a tensor states alpha, `stated`:
    only metadata does, `loose`: only metadata that are neither PEFT's configuration nor diffusers'
    for the component. `axis` is that of DoRA's norm. `keys` is the number of its keys, with that of
    alpha.
    """

    slot: Slot
    stem: str
    label: str
    algorithm: str
    names: tuple[tuple[str, str], ...]
    suffixes: tuple[str, ...]
    kernel: int = 0
    columns: int = 0
    alpha: float | None = None
    rank: int = 0
    told: bool = False
    stated: bool = False
    loose: bool = False
    axis: str = ""
    keys: int = 0

    @property
    def namings(self) -> frozenset[str]:
        """The namings in which the module has the file's name."""
        return frozenset(naming for naming, _ in self.names)

    @property
    def likeness(self) -> Hashable:
        """All that a loss asks of a module besides its name in the model, and a table of names."""
        return (
            self.slot.component, self.algorithm, self.names, self.suffixes, self.kernel,
            self.alpha, self.rank, self.told, self.stated, self.loose, self.axis,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Loss:
    """Modules that a host skips or misreads: those that fit every condition given.

    `what` completes "10 of 504 modules …"; `{kinds}` in it stands for their algorithms.

    Conditions: `modules` is a pattern (`re.search` on `component.module`, target names, `.bias`
    after those of biases). `stems`: it has one of these. `algorithms`: one of these; `besides`:
    none of these. `named`: the name is of this naming; `unnamed`: it is not (only denoisers, as
    text encoders have Hugging Face names everywhere). `suffix`: a tensor's suffix matches from its
    start. `kernel`: the window has this many dimensions. `rank`: that of the module; `multiple`:
    its rank is a multiple of this. `told`: a tensor states alpha; `untold`: none does; `stated`:
    only metadata does, `loose`: only such as are neither PEFT's nor diffusers'; `odd`: alpha is not
    the component's most common one. `axis`: that of DoRA. `whole`: one such module makes the host
    refuse the file or load nothing. `left`: it does not look for tensors whose suffix matches.
    """

    what: str
    modules: str = ""
    stems: frozenset[str] = frozenset()
    algorithms: tuple[str, ...] = ()
    besides: tuple[str, ...] = ()
    named: str = ""
    unnamed: str = ""
    suffix: str = ""
    kernel: int = 0
    rank: int = 0
    multiple: int = 0
    told: bool = False
    untold: bool = False
    stated: bool = False
    loose: bool = False
    odd: bool = False
    axis: str = ""
    whole: bool = False
    left: str = ""

    def holds(self, piece: Piece, common: Mapping[str, float]) -> bool:
        """Whether a module is lost.

        `common` is the most common alpha of each component.
        """
        return self.about(piece) and self.fits(piece, common)

    def about(self, piece: Piece) -> bool:
        """Whether the names of a module fulfil the conditions on them."""
        return (not self.stems or piece.stem in self.stems) and (
            not self.modules or re.search(self.modules, str(piece.slot.target)) is not None
        )

    def fits(self, piece: Piece, common: Mapping[str, float]) -> bool:
        """Whether a module fulfils all other conditions, which ask no more than its likeness."""
        denoiser = not piece.slot.component.startswith(("text_encoder", "text_conditioner"))
        return (
            (not self.algorithms or piece.algorithm in self.algorithms)
            and piece.algorithm not in self.besides
            and (not self.named or self.named in piece.namings)
            and (not self.unnamed or (denoiser and self.unnamed not in piece.namings))
            and (not self.suffix or any(re.match(self.suffix, suffix) for suffix in piece.suffixes))
            and (not self.kernel or piece.kernel == self.kernel)
            and (not self.rank or piece.rank == self.rank)
            and (not self.multiple or (piece.rank > 0 and piece.rank % self.multiple == 0))
            and (not self.told or piece.told)
            and (not self.untold or not piece.told)
            and (not self.stated or piece.stated)
            and (not self.loose or piece.loose)
            and (not self.odd or (piece.told and piece.alpha != common.get(piece.slot.component)))
            and (not self.axis or piece.axis == self.axis)
        )

    def leaves(self, piece: Piece) -> int:
        """The number of a module's keys that the host does not look for because of this loss."""
        return (
            sum(re.match(self.left, suffix) is not None for suffix in piece.suffixes)
            if self.left
            else 0
        )


NOTHING = Loss("none of these names is read: nothing loads, and no error is shown", whole=True)
PARTIAL = Loss("its converter stops, because a kind of block module is missing", whole=True)


UNREAD = Loss("are not loaded under these names")


@dataclass(frozen=True)
class Cell:
    """What a host does with files of some families in one format, beyond the names that it knows.

    It loads everything that it reads, except the losses.

    `having`: only files with a module that matches this pattern. `needs`: each of these patterns
    must match some module, else nothing loads, for the reason `partial`. `like`: it reads the names
    of this format instead. `every`: it reads all names of such a file. `unread`: what comes of
    names that it does not read, if not what the host's own loss says. `none`: a loss of the file if
    of all modules that fit its conditions, none has a name that is read. `check` finds a loss that
    depends on more than one module.
    """

    format: str
    families: tuple[str, ...]
    losses: tuple[Loss, ...] = ()
    having: str = ""
    needs: tuple[str, ...] = ()
    partial: Loss = PARTIAL
    like: str = ""
    every: bool = False
    unread: Loss | None = None
    none: Loss | None = None
    check: Callable[[tuple[Piece, ...]], Loss | None] | None = None

    def fits(self, format: str, family: str, pieces: tuple[Piece, ...]) -> bool:
        """Whether a file falls under this cell."""
        if format != self.format or family not in self.families:
            return False
        return not self.having or any(
            re.search(self.having, str(piece.slot.target)) for piece in pieces
        )


@dataclass(frozen=True)
class Host:
    """A program that loads adapters.

    Which names it reads was measured, see `adaptkit.hosts._measured`; names that were not tried are
    not known, nor are algorithms besides `algorithms`. `unread` is the loss of names that it does
    not read, `nothing` that of a file of no others. The first cell that fits a file counts.
    `always` are losses in every format. `writes` are the formats to write by family, the better
    first ("" for all other families), `dialect` is how it wants them. The host loads nothing for
    families in `unsupported`, for the reason given there. `also` are other names for it, and
    programs that take the same files. `untried` are patterns of layers, by family, whose names no
    table is about, as the model that was tried has none. `refuses` is the loss of a file with more
    keys than `spare` that it finds no place for, if there is such a limit.
    """

    name: str
    title: str
    cells: tuple[Cell, ...]
    writes: Mapping[str, tuple[str, ...]]
    unread: Loss = UNREAD
    nothing: Loss = NOTHING
    algorithms: tuple[str, ...] = MEASURED
    always: tuple[Loss, ...] = ()
    dialect: Dialect | None = None
    unsupported: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    also: tuple[str, ...] = ()
    untried: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    spare: int | None = None
    refuses: Loss = NOTHING

    def formats(self, family: str) -> tuple[str, ...]:
        """The formats to write for a family, the best first; none if it is unsupported."""
        return (
            () if family in self.unsupported else self.writes.get(family, self.writes.get("", ()))
        )

    def cell(self, format: str, family: str, pieces: tuple[Piece, ...]) -> Cell | None:
        """The first cell about a file of this format and family."""
        return next((cell for cell in self.cells if cell.fits(format, family, pieces)), None)
