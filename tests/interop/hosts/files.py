"""The files that the hosts are asked to load: family × spelling × algorithm × choice of modules.

Names come from adaptkit's family tables, shapes from the base models' headers in `fixtures/checkpoints`. A spelling is
a key format's prefix before the names of one naming, whether or not any tool writes them so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import torch

from adaptkit.detect import families, formats
from adaptkit.families.contract import Component, Kind, Row
from adaptkit.keymap import compile_checkpoint, prefixes
from adaptkit.keymap.rows import find_row
from adaptkit.names import WEIGHT, Rows, Slot, Target
from tests.synth import FIXTURES, expand, fill, load_listing, write_header_only

RANK = 2
Shape = tuple[int, ...]
# of text encoders, which no loader here looks at but for CLIP's 768 columns
TEXT = (64, 64)
WIDTHS = {"sd1": {"text_encoder": 768}, "sd2": {"text_encoder": 1024}}


class Part(NamedTuple):
    """One module of a file: where it belongs, what its keys begin with, the shape of its weight."""

    slot: Slot
    stem: str
    shape: Shape
    swapped: bool
    denoiser: bool
    naming: str
    name: str  # in the family's table, with free indices


@dataclass(frozen=True)
class Form:
    """An algorithm as it is stored: `tensors` gives suffix -> shape for a weight's shape; alpha is stored if given."""

    name: str
    algorithm: str
    tensors: Callable[[Shape], Mapping[str, Shape]]
    alpha: float | None = None
    kernels: bool = False  # only for convolutions with a window

    @property
    def peft(self) -> bool:
        """Whether its factors have PEFT's names."""
        return "lora_A.weight" in self.tensors((8, 8))


@dataclass(frozen=True)
class File:
    """A file as a header, what each of its modules means, and what it was made of."""

    family: str
    format: str
    naming: str
    form: Form
    choice: str
    parts: tuple[Part, ...]
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})

    @property
    def name(self) -> str:
        return f"{self.family}|{self.format}|{self.naming}|{self.form.name}|{self.choice}"

    @property
    def listing(self) -> dict[str, tuple[str, Shape]]:
        found: dict[str, tuple[str, Shape]] = {}
        for part in self.parts:
            for suffix, shape in self.form.tensors(part.shape).items():
                found[f"{part.stem}.{suffix}"] = ("F32", shape)
            if self.form.alpha is not None:
                found[f"{part.stem}.alpha"] = ("F32", ())
        return found

    def tensors(self) -> dict[str, torch.Tensor]:
        """Numbers for every key: the same key has the same ones in every file. What is large is constant, and one number in memory."""
        found = {}
        for key, (_, shape) in self.listing.items():
            if not shape:
                found[key] = torch.tensor(self.form.alpha or 0.0)
            elif torch.Size(shape).numel() > 1 << 17:
                found[key] = torch.ones(1).expand(shape)
            else:
                draw = torch.Generator().manual_seed(hash_of(key))
                found[key] = torch.randn(shape, generator=draw)
        return found

    def write(self, path):  # type: ignore[no-untyped-def]
        return write_header_only(
            path, self.listing, alpha=self.form.alpha or 0.0, metadata=self.metadata
        )


def hash_of(text: str) -> int:
    """A number that is the same in every run."""
    import zlib

    return zlib.crc32(text.encode())


# ---------------------------------------------------------------- algorithms as stored


def _ones(shape: Shape) -> Shape:
    return (1,) * len(shape[2:])


def _inputs(shape: Shape) -> int:
    return torch.Size(shape[1:]).numel()


def _pair(up: str, down: str) -> Callable[[Shape], dict[str, Shape]]:
    return lambda s: {up: (s[0], RANK, *_ones(s)), down: (RANK, *s[1:])}


def _tucker(s: Shape) -> dict[str, Shape]:
    return {
        "lora_up.weight": (s[0], RANK, *_ones(s)),
        "lora_mid.weight": (RANK, RANK, *s[2:]),
        "lora_down.weight": (RANK, s[1], *_ones(s)),
    }


def _loha(s: Shape) -> dict[str, Shape]:
    return {
        f"hada_w{n}_{side}": (s[0], RANK) if side == "a" else (RANK, _inputs(s))
        for n in (1, 2)
        for side in "ab"
    }


def _cut(n: int) -> int:
    """A divisor of a width near its square root."""
    return next(d for d in range(int(n**0.5), 0, -1) if n % d == 0)


def _lokr(s: Shape) -> dict[str, Shape]:
    a, b = _cut(s[0]), _cut(s[1])
    return {"lokr_w1": (a, b), "lokr_w2": (s[0] // a, s[1] // b, *s[2:])}


def _lokr_flat(s: Shape) -> dict[str, Shape]:
    tensors = _lokr(s)
    return {role: (shape[0], _inputs(shape)) for role, shape in tensors.items()}


def _lokr_factored(s: Shape) -> dict[str, Shape]:
    a, b = _cut(s[0]), _cut(s[1])
    return {
        "lokr_w1": (a, b),
        "lokr_w2_a": (s[0] // a, RANK),
        "lokr_w2_b": (RANK, _inputs((0, s[1] // b, *s[2:]))),
    }


def _with(base: Callable[[Shape], Mapping[str, Shape]], **more: Callable[[Shape], Shape]):  # type: ignore[no-untyped-def]
    return lambda s: {**base(s), **{suffix: shape(s) for suffix, shape in more.items()}}


def _rows(s: Shape) -> Shape:
    return (s[0], *((1,) * (len(s) - 1)))


def _columns(s: Shape) -> Shape:
    return (1, s[1], *_ones(s))


KOHYA = _pair("lora_up.weight", "lora_down.weight")
PEFT = _pair("lora_B.weight", "lora_A.weight")
OLD = _pair("lora.up.weight", "lora.down.weight")

FORMS = {
    form.name: form
    for form in (
        Form("lora_up, alpha", "lora", KOHYA, 1.0),
        Form("lora_up", "lora", KOHYA),
        Form("lora_B", "lora", PEFT),
        Form("lora_B, alpha", "lora", PEFT, 1.0),
        Form("lora.up", "lora", OLD),
        Form("up", "lora", _pair("up.weight", "down.weight")),
        Form("loha", "loha", _loha, 1.0),
        Form("lokr", "lokr", _lokr, 1.0),
        Form("lokr, factored", "lokr", _lokr_factored, 1.0),
        Form("full", "full", lambda s: {"diff": s}),
        Form("dora_scale [out, 1]", "lora+dora", _with(KOHYA, dora_scale=_rows), 1.0),
        Form("dora_scale [1, in]", "lora+dora", _with(KOHYA, dora_scale=_columns), 1.0),
        Form("lora_B, dora_scale [1, in]", "lora+dora", _with(PEFT, dora_scale=_columns)),
        Form(
            "lora_magnitude_vector",
            "lora+dora",
            _with(PEFT, lora_magnitude_vector=lambda s: (s[0],) if len(s) == 2 else (1, s[0], *_ones(s))),
        ),
        Form(
            "glora",
            "glora",
            lambda s: {
                "a1.weight": (s[1], RANK),
                "a2.weight": (RANK, s[1]),
                "b1.weight": (s[0], RANK),
                "b2.weight": (RANK, _inputs(s)),
            },
            1.0,
        ),
        Form("ia3", "ia3", lambda s: {"weight": (s[0],), "on_input": ()}),
        Form("oft", "oft", lambda s: {"oft_blocks": (s[0] // _cut(s[0]), _cut(s[0]), _cut(s[0]))}, 0.0),
        Form("oft_blocks", "kohya-oft", lambda s: {"oft_blocks": (s[0] // _cut(s[0]), _cut(s[0]), _cut(s[0]))}, 0.0),
        Form("tucker", "lora", _tucker, 1.0, kernels=True),
        Form(
            "loha, tucker",
            "loha",
            lambda s: {
                **{f"hada_w{n}_a": (RANK, s[0]) for n in (1, 2)},
                **{f"hada_w{n}_b": (RANK, s[1]) for n in (1, 2)},
                **{f"hada_t{n}": (RANK, RANK, *s[2:]) for n in (1, 2)},
            },
            1.0,
            kernels=True,
        ),
        Form(
            "lokr, tucker",
            "lokr",
            lambda s: {
                "lokr_w1": (_cut(s[0]), _cut(s[1])),
                "lokr_w2_a": (RANK, s[0] // _cut(s[0])),
                "lokr_w2_b": (RANK, s[1] // _cut(s[1])),
                "lokr_t2": (RANK, RANK, *s[2:]),
            },
            1.0,
            kernels=True,
        ),
        Form("lokr, conv", "lokr", _lokr, 1.0, kernels=True),
        Form("lokr, flat", "lokr", _lokr_flat, 1.0, kernels=True),
    )
}  # fmt: skip


# ---------------------------------------------------------------- modules of a family


@cache
def shapes(family: str) -> Mapping[tuple[str, str], Shape]:
    """(component, row) -> shape of the weights of that row, from the base model's header."""
    keys = compile_checkpoint(family)
    table = families()[family]
    found: dict[tuple[str, str], Shape] = {}
    for name, (_, shape) in load_listing(FIXTURES / "checkpoints" / f"{family}.tsv").items():
        place = keys.parse(name)
        if place is None or place.slot.param != WEIGHT:
            continue
        target = place.slot.target
        hit = find_row(table, target.component, target.module)
        if hit is None:
            continue
        rows = place.slot.rows
        out = shape[0] if rows is None else shape[0] * rows.total // (rows.stop - rows.start)
        found.setdefault((target.component, hit[0].target), (out, *shape[1:]))
    return found


def _shape(family: str, part: Component, row: Row) -> Shape:
    known = shapes(family).get((part.name, row.target))
    if known is not None:
        return known
    width = WIDTHS.get(family, {}).get(part.name)
    return (width, width) if width else (*TEXT, *row.kernel)


def is_denoiser(component: str) -> bool:
    return component in {"transformer", "transformer_2", "transformer_ref", "unet", "prior"}


def parts(
    family: str, format: str, naming: str, blocks: int | None = None, wanted: str = ""
) -> Iterator[Part]:
    """Every matrix of a family that a format's prefix can stand before, under the names of one naming.

    `blocks` cuts every run of blocks to the first ones. `wanted` is the prefix of a component that has it.
    """
    spelling, taken = formats()[format], set[str]()
    for part in families()[family].components:
        known = prefixes(part, spelling)
        prefix = (wanted,) if wanted and wanted in known else known[:1]
        # of two components with one prefix, the second has no names of its own
        if not prefix or (prefix[0] in taken and not part.apart):
            continue
        taken.add(prefix[0])
        for row in part.rows:
            if row.kind is not Kind.MATRIX:
                continue
            used = spelling.style if spelling.private else naming
            if not spelling.private and used not in row.names:
                used = "diffusers"
            names = row.names.get(used, ())
            shape = _shape(family, part, row)
            for indices in expand(row):
                if blocks is not None and any(index >= blocks for index in indices.values()):
                    continue
                target = Target(part.name, fill(row.target, indices))
                for name in names:
                    if name.transposed:
                        continue
                    rows = shape[0] if name.rows is None else _share(shape[0], name.rows)
                    module = fill(name.module, indices).replace(".", spelling.joiner)
                    yield Part(
                        Slot(target, name.rows),
                        prefix[0] + module,
                        (rows, *shape[1:]),
                        name.swapped,
                        is_denoiser(part.name),
                        used,
                        name.module,
                    )


def _share(total: int, rows: Rows) -> int:
    start, stop = rows.bounds(total) or (0, max(1, total // rows.total))
    return stop - start


def namings(family: str) -> list[str]:
    """The public namings of a family's denoiser."""
    private = {f.style for f in formats().values() if f.private} - {"comfy", "diffusers"}
    found = {naming for row in families()[family].components[0].rows for naming in row.names}
    return sorted(found - private - {"flat"})


KIN = r"vace|adapter|motion|siglip|nerf|audio|cam_encoder|projector|frame_packer"

CHOICES: Mapping[str, Callable[[Part], bool]] = {
    "denoiser": lambda part: part.denoiser,
    "everything": lambda part: True,
    # attention and feed-forward layers, which is what most trainers adapt
    "layers": lambda part: (
        part.denoiser
        and re.search(r"(block|layer|refiner)s?\.?\w*\.\d", part.slot.target.module) is not None
        and re.search(r"mod|adaln|norm", part.slot.target.module, re.I) is None
    ),
    # without what only some models of a family have
    "image": lambda part: CHOICES["layers"](part) and re.search(KIN, part.stem) is None,
    "core": lambda part: (
        CHOICES["image"](part) and re.search(r"_img|add_[kv]_proj", part.stem) is None
    ),
    "attention": lambda part: (
        part.denoiser and re.search(r"attn|attention", part.slot.target.module) is not None
    ),
    # with the modulations, which some converters miss
    "blocks": lambda part: (
        part.denoiser
        and re.search(r"(block|layer|refiner)s?\.?\w*\.\d", part.slot.target.module) is not None
    ),
    # without refiners of the text, and the last layer
    "main": lambda part: (
        CHOICES["blocks"](part) and re.search(r"txt_in|individual|final", part.stem) is None
    ),
}


def make(
    family: str,
    format: str,
    naming: str,
    form: str,
    choice: str,
    blocks: int | None = None,
    wanted: str = "",
) -> File | None:
    """A file, or None where the spelling has no place for such modules."""
    made = FORMS[form]
    kept: dict[str, Part] = {}
    for part in parts(family, format, naming, blocks, wanted):
        if CHOICES[choice](part) and (not made.kernels or torch.Size(part.shape[2:]).numel() > 1):
            kept.setdefault(part.stem, part)
    if not kept or (made.kernels and choice != "denoiser"):
        return None
    return File(family, format, naming, made, choice, tuple(kept.values()))
