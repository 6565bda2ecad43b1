"""Every cell that makes sense. Wide products are thinned by the hash of the cell's name, so that
all axes stay mixed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product

from tests.matrix import spelling
from tests.matrix.axes import (
    ADDITIVE,
    FORMS,
    PARTS,
    REPRESENTATIVES,
    SHARE,
    TARGETS,
    WRITERS,
    adapters,
    depends,
    number,
    thin,
)
from tests.matrix.build import Adapter, groups, layers
from tests.matrix.layers import LAYERS, UNETS
from tests.matrix.verbs import Cell


def formats() -> Iterator[Cell]:
    """Every family, from every format to every other."""
    for spec in adapters(LAYERS, TARGETS, ("lora",), group=PARTS):
        for to in TARGETS:
            if to != spec.format:
                yield Cell("convert", spec, to=to)


def names() -> Iterator[Cell]:
    """Names that a format allows beside its usual ones: bare diffusers names, kohya's SDXL by
    either naming, …
    """
    others = (
        ("bare", "diffusers", LAYERS), ("kohya", "diffusers", ("sdxl",)),
        ("kohya", "native", ("sd1", "z-image")),
    )  # fmt: skip
    for format, naming, families in others:
        for spec in adapters(
            families, (format,), ("lora", "lokr-aligned", "full"), group=PARTS[:4], naming=(naming,)
        ):
            yield from (Cell("convert", spec, to=to) for to in WRITERS)
            yield Cell("merge", spec, layout="folder", dtype="bf16")
            yield Cell("resize", spec, options=("--rank", "2"))


def hosts() -> Iterator[Cell]:
    """--for: the format that a host loads, with what it cannot read folded away."""
    found = (
        Cell("convert", spec, options=("--for", name, *more))
        for spec in adapters(
            LAYERS, ("kohya", "lycoris", "diffusers", "comfy", "peft", "bare"), FORMS,
            group=("all", "denoiser", "plain")
        )
        for name in ("comfyui", "diffusers", "invokeai", "kohya")
        for more in ((), ("--algo", "lora"))
    )  # fmt: skip
    return thin(found, 25)


def relaid() -> Iterator[Cell]:
    """merge --layout: every weight renamed, split or fused, those that change and those that do
    not.
    """
    found = (
        Cell("merge", spec, layout=layout, dtype=dtype, options=("--layout", to))
        for spec in adapters(
            LAYERS, ("kohya", "diffusers", "comfy"), FORMS,
            group=("denoiser", "all", "fused", "swapped")
        )
        for layout, to in (("single", "folder"), ("folder", "single-file"))
        for dtype in ("fp32", "bf16")
        if spec.family in UNETS or not (spec.group == "all" and "te" in groups(spec.family))
    )  # fmt: skip
    return thin(found, 10)


def stacks() -> Iterator[Cell]:
    """Two adapters into one checkpoint: the sum, rounded once."""
    for one, two, _ in PAIRS:
        for a in adapters(REPRESENTATIVES, (one,), ADDITIVE, group=("denoiser", "plain", "fused")):
            for b in adapters((a.family,), (two,), ("lora", "lokr-aligned"), group=(a.group,)):
                for layout, dtype in (("single", "bf16"), ("folder", "fp32")):
                    yield Cell("merge", a, replace(b, seed=1), layout=layout, dtype=dtype)


def forms() -> Iterator[Cell]:
    """Every algorithm and stored form, between the formats."""
    found = (
        Cell("convert", spec, to=to)
        for spec in adapters(
            REPRESENTATIVES,
            ("kohya", "lycoris", "comfy", "bare", "diffusers", "peft"),
            FORMS,
            group=PARTS[:4],
        )
        for to in WRITERS
        if to != spec.format
    )
    return thin(found, 4)


def alphas() -> Iterator[Cell]:
    """Where alpha comes from, with and without biases."""
    sources = {
        "kohya": ("tensor", "none"),
        "comfy": ("tensor", "none"),
        "bare": ("tensor", "none"),
        "diffusers": ("none", "metadata", "pattern", "rslora"),
        "peft": ("config", "pattern", "rslora"),
    }
    for format, values in sources.items():
        biases = ("none", "lora") if format in ("diffusers", "peft") else ("none", "diff")
        for spec in adapters(
            ("flux", "sd1", "wan"),
            (format,),
            ("lora", "lora+dora"),
            alpha=values,
            bias=biases,
            group=("all", "denoiser", "swapped"),
        ):
            if spec.group == "denoiser" and spec.family != "sd1":
                continue
            for to in WRITERS:
                if to != format:
                    yield Cell("convert", spec, to=to)
            yield Cell("resize", spec, options=("--rank", "2"))
            yield Cell("merge", spec, layout="single" if spec.family != "wan" else "folder")


def odd_alphas() -> Iterator[Cell]:
    """An alpha of shape [1] that no 16 bits hold; the placeholder of LoKr of whole factors,
    infinite in fp16.
    """
    kinds = (
        ("odd", ("lora", "loha", "lokr-aligned-factored", "lora+dora")),
        ("huge", ("lokr-aligned",)),
    )
    for alpha, held in kinds:
        for spec in adapters(
            ("flux", "sd1"),
            ("kohya", "comfy", "lycoris"),
            held,
            alpha=(alpha,),
            dtype=("fp32", "fp16", "bf16"),
            group=("plain", "fused", "conv"),
        ):
            for to in WRITERS:
                if to != spec.format:
                    yield Cell("convert", spec, to=to)
            yield Cell("convert", spec, to="diffusers", options=("--algo", "lora"))
            yield Cell("resize", spec, options=("--rank", "2"))
            yield Cell("merge", spec)
            yield Cell("compare", spec, replace(spec, alpha="none"))


def dtypes() -> Iterator[Cell]:
    """Stored number formats, kept and changed."""
    found = (
        Cell("convert", spec, to=to, options=("--dtype", new) if new != "keep" else (), based=based)
        for spec in adapters(
            ("sd1", "flux"),
            ("kohya", "comfy"),
            FORMS,
            dtype=("fp16", "bf16", "fp64", "mixed", "mixed64", "fp8"),
            group=("plain", "conv", "fused"),
        )
        for to in ("kohya", "comfy", "diffusers")
        for new in ("keep", "fp32", "fp16", "bf16")
        for based in depends(spec.form)
        if new != "keep" or to != spec.format
    )
    return thin(found, 15)


def algorithms() -> Iterator[Cell]:
    """--algo, alone and with a rank."""
    changes = (
        ("--algo", "lora"), ("--algo", "full"), ("--algo", "lokr", "--factor", "4"),
        ("--algo", "lora", "--rank", "2"), ("--algo", "lora", "--dtype", "fp16"),
    )  # fmt: skip
    found = (
        Cell("convert", spec, to=to, options=change, based=based)
        for spec in adapters(
            REPRESENTATIVES, ("kohya", "lycoris", "diffusers"), FORMS, group=PARTS[:4]
        )
        for to in ("kohya", "diffusers", "comfy", "peft")
        for change in changes
        for based in depends(spec.form)
    )
    return thin(found, 12)


def resizes() -> Iterator[Cell]:
    rules = (
        ("--rank", "2"), ("--energy", "0.8"), ("--error", "0.3"), ("--size", "20KB"),
        ("--rank", "1", "--conv-rank", "2"),
        ("--sv-ratio", "3"), ("--sv-fro", "0.9"), ("--sv-cumulative", "0.7"),
        ("--rank", "3", "--dtype", "bf16"),
    )  # fmt: skip
    found = (
        Cell("resize", spec, options=rule, based=based)
        for spec in adapters(
            ("sd1", "flux", "wan"),
            ("kohya", "diffusers", "peft", "comfy", "lycoris"),
            FORMS,
            dtype=("fp32", "fp16", "fp8"),
            group=("all", "denoiser", "conv"),
        )
        for rule in rules
        for based in depends(spec.form)
    )
    return thin(found, 18)


PAIRS = (
    ("kohya", "kohya", ""), ("kohya", "diffusers", ""), ("diffusers", "comfy", ""),
    ("comfy", "kohya", "diffusers"),
    ("kohya", "lycoris", "bare"), ("peft", "kohya", "comfy"), ("lycoris", "peft", "kohya"),
    ("bare", "onetrainer", "peft"),
)  # fmt: skip


def pairs(verb: str) -> Iterator[Cell]:
    """Two adapters of different formats and algorithms."""
    seconds = ("lora", "lora-tucker", "loha", "lokr-aligned", "full", "lora+dora", "oft")
    rules: tuple[tuple[str, ...], ...] = ((),)
    if verb == "combine":
        rules = ((), ("--rank", "3"), ("--algo", "full"), ("--algo", "lora"), ("--dtype", "fp16"))
    for one, two, to in PAIRS:
        for a in adapters(
            ("sd1", "flux", "z-image"),
            (one,),
            FORMS,
            group=PARTS[:4],
            dtype=("fp32", "fp8", "mixed64"),
        ):
            for second in adapters((a.family,), (two,), seconds, group=(a.group,)):
                b = replace(second, seed=1)
                target = to if verb == "combine" else ""
                for based, rule in product(depends(a.form + b.form), rules):
                    yield Cell(verb, a, b, to=target, options=rule, based=based)


def merges() -> Iterator[Cell]:
    found = (
        Cell("merge", spec, layout=layout, dtype=dtype)
        for spec in adapters(
            LAYERS,
            ("kohya", "diffusers", "peft", "comfy", "bare"),
            FORMS,
            group=("all", "denoiser"),
            dtype=("fp32", "mixed64", "fp8", "bf16"),
        )
        for layout in ("single", "folder")
        for dtype in ("fp32", "fp16", "bf16")
        if not (
            spec.group == "all"
            and "te" in groups(spec.family)
            and spec.family not in UNETS
            and layout == "single"
        )
    )
    return thin(found, 30)


def extracts() -> Iterator[Cell]:
    rules = (
        ("--rank", "2"), ("--rank", "8"), ("--rank", "4", "--alpha", "2"),
        ("--algo", "lokr", "--factor", "4"), ("--algo", "full"),
        ("--algo", "auto", "--size", "40KB"), ("--energy", "0.9"), ("--error", "0.3"),
        ("--rank", "4", "--dtype", "fp16"),
        ("--algo", "full", "--dtype", "bf16"), ("--size", "20KB"), ("--rank", "4", "--vectors"),
        ("--algo", "full", "--vectors"),
    )  # fmt: skip
    found = (
        Cell("extract", spec, to=to, options=rule, layout=layout, dtype=dtype)
        for spec in adapters(
            LAYERS,
            ("kohya", "bare"),
            ("lora", "lokr-aligned", "full"),
            group=("denoiser", "all"),
            bias=("none", "diff"),
        )
        for to in TARGETS
        for rule in rules
        for layout in ("single", "folder")
        for dtype in ("fp32", "fp16", "bf16")
        if not (spec.group == "all" and "te" in groups(spec.family))
        and spec.format == ("kohya" if _has_kohya(spec.family) else "bare")
    )
    return (cell for cell in thin(found, 40) if _worth(cell))


def _worth(cell: Cell) -> bool:
    """Of the cells whose format has no place for any layer, a few are enough."""
    held = layers(cell.a.family, cell.a.group)
    placed = any(spelling.places(cell.a.family, cell.to, layer) for layer in held)
    return placed or number("few/" + cell.id) % 50 == 0


def _has_kohya(family: str) -> bool:
    return family not in ("auraflow", "ltx")


def shares() -> Iterator[Cell]:
    found = (
        Cell("share", spec, layout=layout, dtype=dtype)
        for spec in adapters(
            ("sd1", "flux", "sd3"),
            ("kohya", "diffusers", "comfy", "peft"),
            FORMS,
            group=("all", "denoiser"),
        )
        for layout in ("single", "folder")
        for dtype in ("fp32", "bf16")
        if not (spec.group == "all" and "te" in groups(spec.family))
    )
    return thin(found, 4)


def turned() -> Iterator[Cell]:
    """OFT of sd-scripts: a format with an algorithm of its own."""
    for spec in adapters(
        ("sdxl", "flux"), ("kohya-oft",), ("kohya-oft",), group=PARTS, dtype=("fp32", "bf16")
    ):
        for to in ("kohya", "diffusers", "comfy"):
            yield Cell("convert", spec, to=to)
            for algorithm in ("lora", "full"):
                yield Cell("convert", spec, to=to, options=("--algo", algorithm), based=True)
        if not ("te" in groups(spec.family) and spec.family == "flux" and spec.group == "te"):
            yield Cell("merge", spec, dtype="fp16")
            yield Cell("merge", spec, layout="folder", dtype="bf16")
            yield Cell("share", spec)
        other = Adapter(spec.family, "kohya", "lora", spec.group, seed=1)
        yield Cell("compare", spec, other, based=True)
        yield Cell("combine", other, spec, based=True)


@cache
def every() -> tuple[Cell, ...]:
    """All cells, each once, in the order of the verbs."""
    sources = (
        thin(formats(), 2), thin(names(), 2), thin(stacks(), 8), forms(), hosts(), relaid(),
        thin(alphas(), 2), thin(odd_alphas(), 5), dtypes(), algorithms(), resizes(),
        thin(pairs("combine"), 100),
        thin(pairs("compare"), 24), merges(), extracts(), shares(), turned(),
    )  # fmt: skip
    found = {cell.id: cell for source in sources for cell in source}
    return tuple(found.values())


def some() -> tuple[Cell, ...]:
    """The default run's share: the same on every worker and machine."""
    return tuple(cell for cell in every() if number(cell.id) % SHARE == 0)


__all__ = ["every", "some"]
