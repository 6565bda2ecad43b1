"""The values of every axis, and which of them make sense together."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from itertools import product

from tests.matrix import algebra, spelling
from tests.matrix.build import Adapter, groups, layers
from tests.matrix.verbs import Cell

SEED = "adaptkit"
SHARE = 20  # the default run takes one cell in this many

WRITERS = ("kohya", "lycoris", "diffusers", "peft", "comfy", "onetrainer", "bare")
SPECIAL = ("diffusers-old", "xlabs", "omi")
TARGETS = (*WRITERS, *SPECIAL)
ADDITIVE = (
    "lora", "lora-rank1", "lora-tucker", "loha", "loha-tucker", "lokr", "lokr-aligned",
    "lokr-factored", "lokr-aligned-factored", "lokr-w1", "lokr-both", "lokr-tucker", "full",
)  # fmt: skip
DEPENDENT = (
    "lora+dora", "lora+dora-input", "loha+dora", "lokr-aligned+dora", "glora", "oft",
    "oft-rescaled",
    "boft", "ia3", "ia3-input",
)  # fmt: skip
PEFT = (
    "lora",
    "lora-rank1",
    "lora+dora",
    "loha",
    "loha-tucker",
    "lokr-peft",
    "peft-oft",
    "peft-boft",
    "peft-ia3",
    "peft-hira",
    "peft-adalora",
)
FORMS = (*ADDITIVE, *DEPENDENT, *PEFT[5:])
ALPHA = {"peft": "config", "diffusers": "metadata", "diffusers-old": "none", "xlabs": "none"}
REPRESENTATIVES = ("sd1", "flux", "lumina2", "sd3")


def number(name: str) -> int:
    return zlib.crc32(f"{SEED}/{name}".encode())


def thin(cells: Iterable[Cell], share: int) -> Iterator[Cell]:
    """One in `share`."""
    return (cell for cell in cells if number("thin/" + cell.id) % share == 0)


def fits(spec: Adapter) -> bool:
    """A format has a place for the layers, and the form is one that files of this format have."""
    if spec.group not in groups(spec.family):
        return False
    if (spec.format == "peft" and spec.form not in PEFT) or (
        spec.format != "peft" and spec.form in PEFT[5:]
    ):
        return False
    if spec.format in ("diffusers", *SPECIAL) and spec.form not in (
        "lora",
        "lora-rank1",
        "lora+dora",
    ):
        return False
    if spec.format in SPECIAL and "dora" in spec.form:
        return False
    if spec.form == "peft-ia3" and any(
        len(one.shape) > 2 for one in layers(spec.family, spec.group)
    ):
        return False
    if (spec.format == "kohya-oft") != (spec.form == "kohya-oft"):
        return False
    if spec.format == "omi" and spec.family != "flux":
        return False
    return any(
        spelling.places(spec.family, spec.format, layer)
        for layer in layers(spec.family, spec.group)
    )


def adapters(
    families: Iterable[str], formats: Iterable[str], forms: Iterable[str], **axes: Iterable[str]
) -> Iterator[Adapter]:
    """The product of the axes; `group`, `dtype`, `alpha`, `bias` where they are not named take
    their usual value.
    """
    names = list(axes)
    for family, format, form in product(families, formats, forms):
        for values in product(*axes.values()):
            rest = dict(zip(names, values, strict=True))
            spec = Adapter(family, format, form, **{"alpha": ALPHA.get(format, "tensor"), **rest})
            if fits(spec):
                yield spec


def depends(form: str) -> tuple[bool, ...]:
    return (False, True) if algebra.dependent(form) else (False,)


PARTS = ("plain", "fused", "swapped", "conv", "te", "all")
