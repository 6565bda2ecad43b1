"""The words family tables are written in: a row says what every naming calls one module.

A *naming* is a way the world names modules: `diffusers` (also Hugging Face transformers' text encoders), `native`
(the original checkpoint), `flat`, … A *template* is a module name with free indices, `layers.{i}.fc1`; `{i:12}` bounds
an index. Free indices carry over between the namings of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
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
    "split",
    "swapped",
    "transformer",
]


class Kind(Enum):
    """What sort of module a row describes, which decides what may adapt it."""

    MATRIX = "matrix"  # linear or convolution: every algorithm
    NORM = "norm"  # weight and bias are vectors: only stored as full differences
    EMBEDDING = "embedding"  # a look-up table: only stored as a full difference


class Name(NamedTuple):
    """What one naming calls a module, and how its tensors relate to the target's.

    `rows` is the cut of the target's output rows this name covers (None: all); `transposed` says that the checkpoint
    stores the transpose of the target; `swapped` that the two halves of the output rows stand in the other order (the
    scale and shift of a modulation, which the original models and diffusers write in opposite orders). `kernel` is what
    this naming stores where that is not the row's: a linear layer as a 1×1 convolution.
    """

    module: str
    weight: str
    bias: str
    rows: Rows | None = None
    transposed: bool = False
    swapped: bool = False
    kernel: tuple[int, ...] | None = None


def swapped(module: str) -> Name:
    """A name whose tensors hold the target's rows with their halves exchanged."""
    return Name(module, f"{module}.weight", f"{module}.bias", swapped=True)


def named(
    module: str, *, weight: str | None = None, bias: str | None = None, transposed: bool = False
) -> Name:
    """A name whose parameters are not spelled `<module>.weight` and `<module>.bias`."""
    return Name(module, weight or f"{module}.weight", bias or f"{module}.bias", None, transposed)


def scaled(module: str) -> Name:
    """A norm whose weight is called `scale` (FLUX and its kin)."""
    return Name(module, f"{module}.scale", f"{module}.bias")


def split(stem: str, *parts: str, ratio: tuple[int, ...] | None = None) -> tuple[Name, ...]:
    """Names of modules that together hold the target's rows, in order; `ratio` gives their shares (default: equal)."""
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
    """One module (or a run of them): its target name and its names in each naming; `kernel` of a convolution, else ()."""

    target: str
    names: Mapping[str, tuple[Name, ...]]
    kind: Kind = Kind.MATRIX
    kernel: tuple[int, ...] = ()


def row(
    target: str,
    *,
    kind: Kind = Kind.MATRIX,
    kernel: tuple[int, ...] = (),
    **namings: str | Name | tuple[Name, ...],
) -> Row:
    """A row; the `diffusers` naming is the target's own name unless it is given."""
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
    """A row whose target has the original checkpoint's name, and what diffusers calls it."""
    target = native if isinstance(native, str) else native.module
    return row(target, kind=kind, kernel=kernel, native=native, diffusers=diffusers, **namings)


def _names(value: str | Name | tuple[Name, ...]) -> tuple[Name, ...]:
    if isinstance(value, str):
        return (named(value),)
    return (value,) if isinstance(value, Name) else value


def _frozen() -> Mapping[str, tuple[str, ...]]:
    return MappingProxyType({})


@dataclass(frozen=True, eq=False)
class Component:
    """A part of a model that adapters can hold weights for.

    `name` is diffusers' folder name. `checkpoints` maps a naming to the prefixes its keys carry in checkpoints. `tags`
    fill the prefix templates of the key formats (first value written, all read); a format whose template needs a tag
    that is missing here cannot hold this component. `namings` says which naming a format's style writes, where that is
    not `diffusers`.
    """

    name: str
    title: str
    rows: tuple[Row, ...]
    checkpoints: Mapping[str, tuple[str, ...]]
    tags: Mapping[str, tuple[str, ...]] = field(default_factory=_frozen)
    namings: Mapping[str, str] = field(default_factory=dict)

    def naming(self, style: str) -> str:
        """The naming that formats of this style write for this component."""
        return self.namings.get(style, "diffusers")


NATIVE_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "")


def transformer(
    title: str,
    rows: tuple[Row, ...],
    *,
    kohya: str = "native",
    comfy: str = "native",
    native_prefixes: tuple[str, ...] = NATIVE_PREFIXES,
) -> Component:
    """The denoiser of a family that is a transformer; `kohya` and `comfy` are the namings those formats write."""
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
    )


class Mark(NamedTuple):
    """A shape that tells this family from those that share its names.

    It is about the modules of `component` whose target name ends in `suffix`: `columns` their input width (any of those
    given), `rows` their output width, `kernel` their kernel size (`()` for a linear layer).
    """

    component: str
    suffix: str
    columns: int | tuple[int, ...] | None = None
    kernel: tuple[int, ...] | None = None
    rows: int | tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class ModelFamily:
    """A model family: its components, what tells it from look-alikes, and what metadata calls it.

    `others` names the parts of a checkpoint that no adapter holds, by their key prefixes. `architectures` are the
    values of `modelspec.architecture` and `ss_base_model_version` that mean this family (lower case, prefixes);
    `modelspec` and `base_version` are what adaptkit writes there. `yields_to` names the look-alikes that a file which
    could be either more likely is. `beside` are parts that no adapter holds, with the names that each layout gives them.
    """

    name: str
    title: str
    components: tuple[Component, ...]
    marks: tuple[Mark, ...] = ()
    architectures: tuple[str, ...] = ()
    modelspec: str = ""
    base_version: str = ""  # where trainers write something else than `modelspec`
    yields_to: tuple[str, ...] = ()
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
        """The component of this name (KeyError where there is none)."""
        return next(part for part in self.components if part.name == name)
