"""Building blocks of family tables: the names of modules.

A *naming* is a convention for module names: `diffusers` (also Hugging Face transformers' text
encoders), `native` (the original checkpoint), `flat`, … A *template* is a module name with free
indices, such as `layers.{i}.fc1`; `{i:12}` bounds an index. Free indices have the same value in all
namings of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from adaptkit.names import Rows

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "Component",
    "Kind",
    "Mark",
    "ModelFamily",
    "Name",
    "Row",
    "named",
    "pair",
    "row",
    "scaled",
    "sizes",
    "split",
    "swapped",
    "transformer",
]


class Kind(Enum):
    """The kind of a module, which decides what can adapt it."""

    MATRIX = "matrix"  # linear or convolution: every algorithm
    NORM = "norm"  # weight and bias are vectors: only stored as full differences
    EMBEDDING = "embedding"  # a look-up table: only stored as a full difference


class Name(NamedTuple):
    """A module's name in one naming, and its relation to the target.

    `rows` is the range of the target's output rows (None: all). `transposed`: the checkpoint stores
    the transpose. `swapped`: the two halves of the output rows are swapped (original models and
    diffusers store the scale and shift of a modulation in opposite orders). `kernel` is the stored
    kernel if it differs from the row's: a linear layer stored as a 1×1 convolution. `joiners` are
    those that the name can be spelled with: `_` alone if its dots are not known, `.` alone if
    another name would read the same with underscores.
    """

    module: str
    weight: str
    bias: str
    rows: Rows | None = None
    transposed: bool = False
    swapped: bool = False
    kernel: tuple[int, ...] | None = None
    joiners: str = "._"


def swapped(module: str) -> Name:
    """A name whose tensors hold the target's rows with their halves swapped."""
    return Name(module, f"{module}.weight", f"{module}.bias", swapped=True)


def named(
    module: str, *, weight: str | None = None, bias: str | None = None, transposed: bool = False
) -> Name:
    """A name with parameters other than `<module>.weight` and `<module>.bias`."""
    return Name(module, weight or f"{module}.weight", bias or f"{module}.bias", None, transposed)


def scaled(module: str) -> Name:
    """A norm with a weight called `scale` (FLUX and relatives)."""
    return Name(module, f"{module}.scale", f"{module}.bias")


def split(stem: str, *parts: str, ratio: tuple[int, ...] | None = None) -> tuple[Name, ...]:
    """Names of modules that share the target's rows, equally or by `ratio`."""
    shares = ratio or (1,) * len(parts)
    if len(shares) != len(parts):
        raise ValueError(f"{len(parts)} parts, {len(shares)} shares")
    ends = [sum(shares[:n]) for n in range(len(shares) + 1)]
    cuts = [Rows(start, stop, ends[-1]) for start, stop in pairwise(ends)]
    modules = [stem + part for part in parts]
    return tuple(
        Name(m, f"{m}.weight", f"{m}.bias", cut) for m, cut in zip(modules, cuts, strict=True)
    )


class Row(NamedTuple):
    """One module or run of modules: target, names and kernel.

    `own`: no table names the module. A file does, see adaptkit.unknown.
    """

    target: str
    names: Mapping[str, tuple[Name, ...]]
    kind: Kind = Kind.MATRIX
    kernel: tuple[int, ...] = ()
    own: bool = False


def row(
    target: str,
    *,
    kind: Kind = Kind.MATRIX,
    kernel: tuple[int, ...] = (),
    **namings: str | Name | tuple[Name, ...],
) -> Row:
    """A row; its `diffusers` name defaults to the target."""
    namings.setdefault("diffusers", target)
    return Row(
        target,
        MappingProxyType({naming: _names(value) for naming, value in namings.items()}),
        kind,
        kernel,
    )


def pair(
    native: str | Name,
    diffusers: str | Name | tuple[Name, ...],
    *,
    kind: Kind = Kind.MATRIX,
    kernel: tuple[int, ...] = (),
    **namings: str | Name | tuple[Name, ...],
) -> Row:
    """A row with the original checkpoint's name as target, and diffusers' name."""
    target = native if isinstance(native, str) else native.module
    return row(target, kind=kind, kernel=kernel, native=native, diffusers=diffusers, **namings)


@lru_cache(maxsize=16384)
def _names(value: str | Name | tuple[Name, ...]) -> tuple[Name, ...]:
    if isinstance(value, str):
        return (named(value),)
    return (value,) if isinstance(value, Name) else value


def sizes(text: str, *widths: int) -> frozenset[tuple[int, int]]:
    """Read the sizes of a component's matrices, `rows x columns` each, `d` being each width.

    >>> sorted(sizes("dxd 4dxd 768x64", 2, 3))
    [(2, 2), (3, 3), (8, 2), (12, 3), (768, 64)]
    """
    return frozenset(
        (_length(rows, width), _length(columns, width))
        for width in widths or (0,)
        for rows, _, columns in (size.partition("x") for size in text.split())
    )


def _length(term: str, width: int) -> int:
    number = term.removesuffix("d")
    return int(number or 1) * (width if number != term else 1)


def _frozen() -> Mapping[str, tuple[str, ...]]:
    return MappingProxyType({})


@dataclass(frozen=True, eq=False)
class Component:
    """A part of a model that adapters can hold weights for.

    `name` is diffusers' folder name. `checkpoints` maps a naming to its prefixes in checkpoints.
    `tags` fill the prefix templates of key formats (first value written, all read); a format that
    needs a missing tag cannot hold this component. `namings` maps a format's style to the naming it
    writes (default: `diffusers`). `sizes` are the (rows, columns) of the matrices of all variants;
    empty if they tell nothing. `apart`: its module names are of no other component, so that both
    can be written with one prefix.
    """

    name: str
    title: str
    rows: tuple[Row, ...]
    checkpoints: Mapping[str, tuple[str, ...]]
    tags: Mapping[str, tuple[str, ...]] = field(default_factory=_frozen)
    namings: Mapping[str, str] = field(default_factory=dict)
    sizes: frozenset[tuple[int, int]] = frozenset()
    apart: bool = False

    def naming(self, style: str) -> str:
        """The naming that formats of a style write for this component."""
        return self.namings.get(style, "diffusers")


NATIVE_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "")


def transformer(
    title: str,
    rows: tuple[Row, ...],
    *,
    sizes: frozenset[tuple[int, int]] = frozenset(),
    kohya: str = "native",
    comfy: str = "native",
    native_prefixes: tuple[str, ...] = NATIVE_PREFIXES,
) -> Component:
    """The transformer of a family.

    `kohya` and `comfy` are the namings those formats write.
    """
    return Component(
        name="transformer",
        title=title,
        rows=rows,
        checkpoints={
            "native": native_prefixes,
            "comfy": native_prefixes,
            "diffusers": ("transformer.", ""),
        },
        tags={
            "kohya": ("unet",),
            "comfy": ("diffusion_model", "model.diffusion_model"),
            "root": ("",),
            "diffusers": ("transformer",),
            "onetrainer": ("transformer",),
        },
        namings={"kohya": kohya, "comfy": comfy},
        sizes=sizes,
    )


class Mark(NamedTuple):
    """A shape that tells a family from others with the same names.

    It applies to modules of `component` whose target ends in `suffix`. `columns` are their input
    widths, `rows` their output widths (any of those given), `kernel` their kernel size (`()` for a
    linear layer).
    """

    component: str
    suffix: str
    columns: int | tuple[int, ...] | None = None
    kernel: tuple[int, ...] | None = None
    rows: int | tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class ModelFamily:
    """A model family: components, marks, and names in metadata.

    `others` maps parts of a checkpoint that no adapter holds to key prefixes; `beside` are such
    parts with tables. `architectures` are the values of `modelspec.architecture` and
    `ss_base_model_version` that mean this family (lower case, prefixes); `modelspec` and
    `base_version` are the values to write. `yields_to` names the likelier family for a file that
    fits both. `twins` are parts of module names that come together in every block: trainers choose
    modules by the ends of names, so that a file with the first one alone is of another model.
    `needs` are targets of which a checkpoint has one, all else in it being of another model too.
    `kin` are beginnings of targets that only models made from it have: whether a host loads the
    family is not judged by them.
    `interleaved` are the ends of fused modules whose rows DiffSynth-Studio stores head by head, and
    the rows of a head (see adaptkit.files.arranged.per_head).
    """

    name: str
    title: str
    components: tuple[Component, ...]
    marks: tuple[Mark, ...] = ()
    architectures: tuple[str, ...] = ()
    modelspec: str = ""
    base_version: str = ""  # if trainers write something other than `modelspec`
    yields_to: tuple[str, ...] = ()
    twins: tuple[tuple[str, str], ...] = ()
    needs: tuple[str, ...] = ()
    kin: tuple[str, ...] = ()
    interleaved: tuple[tuple[str, int], ...] = ()
    beside: tuple[Component, ...] = ()
    others: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: MappingProxyType(
            {
                "vae": ("first_stage_model.", "vae."),
                "ema": ("model_ema.",),
                "safety_checker": ("safety_checker.",),
            }
        )
    )

    def component(self, name: str) -> Component:
        """The component of this name; KeyError if there is none."""
        return next(part for part in self.components if part.name == name)

    def experts(self, name: str) -> tuple[str, ...]:
        """The components with the same modules as this one, itself among them.

        The experts of one model are so, of which most formats hold one per file.
        """
        names = _targets(self.component(name))
        return tuple(part.name for part in self.components if _targets(part) == names)


@lru_cache(maxsize=256)
def _targets(part: Component) -> frozenset[str]:
    """The targets in the table of a component."""
    return frozenset(row.target for row in part.rows if not row.own)
