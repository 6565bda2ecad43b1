"""Headers and small tensors made from the tables: what the tests, the fixtures and the benchmarks are built of.

Nothing here is copied from another project: names come from adaptkit's own tables, shapes from model classes that the
generator (`python -m tests.generate`) instantiates without weights.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from adaptkit.detect import families
from adaptkit.families.contract import Component, Kind, Name, Row
from adaptkit.files.header import TensorSpec, build_header
from adaptkit.keymap import compile_keys
from adaptkit.names import Rows, Slot, Target

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "fixtures"
CORPUS = ROOT.parent / "shared" / "corpus"

FIELD = re.compile(r"\{(\w+):(\d+)\}")

Listing = dict[str, tuple[str, tuple[int, ...]]]  # key -> (dtype, shape)


def expand(row: Row) -> Iterator[dict[str, int]]:
    """Every value of a row's (bounded) free indices."""
    bounds = dict(FIELD.findall(row.target))
    for values in itertools.product(*(range(int(bound)) for bound in bounds.values())):
        yield dict(zip(bounds, values, strict=True))


def fill(template: str, indices: Mapping[str, int]) -> str:
    return FIELD.sub(lambda found: str(indices[found.group(1)]), template)


@dataclass(frozen=True)
class Parameter:
    """One target with its shape, and what each naming calls the tensors that hold it."""

    target: Target
    kind: Kind
    shape: tuple[int, ...]
    names: Mapping[
        str, tuple[tuple[str, Rows | None, bool], ...]
    ]  # naming -> (key, rows, transposed)


def parameters(component: Component, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Parameter]:
    """Every parameter of a component whose diffusers name is among `shapes`, in table order."""
    for row in component.rows:
        for indices in expand(row):
            for param in ("weight", "bias"):
                found = _parameter(component, row, indices, param, shapes)
                if found is not None:
                    yield found


def _key(name: Name, param: str, indices: Mapping[str, int]) -> tuple[str, Rows | None, bool]:
    return (
        fill(name.weight if param == "weight" else name.bias, indices),
        name.rows,
        name.transposed and param == "weight",
    )


def _parameter(
    component: Component,
    row: Row,
    indices: Mapping[str, int],
    param: str,
    shapes: Mapping[str, tuple[int, ...]],
) -> Parameter | None:
    names = {
        naming: tuple(_key(name, param, indices) for name in found)
        for naming, found in row.names.items()
    }
    parts = [shapes.get(key) for key, _, _ in names["diffusers"]]
    if any(part is None for part in parts):
        return None
    shape = (sum(part[0] for part in parts), *parts[0][1:])  # type: ignore[index, misc]
    return Parameter(
        Target(component.name, fill(row.target, indices), param), row.kind, shape, names
    )


def checkpoint_listing(
    family: str,
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]],
    layout: str = "native",
    *,
    prefixes: Mapping[str, str] = MappingProxyType({}),
) -> Listing:
    """A checkpoint's header: `shapes` per component, by diffusers name; `layout` native (single file) or diffusers.

    `prefixes` says what a component's native keys begin with, where it is not the first prefix that the table knows.
    """
    listing: Listing = {}
    for part in families()[family].components:
        naming = layout if layout in part.checkpoints else "diffusers"
        native = prefixes.get(part.name, part.checkpoints[naming][0])
        prefix = native if layout == "native" else f"{part.name}."
        for parameter in parameters(part, shapes[part.name]):
            for key, rows, transposed in parameter.names.get(naming, parameter.names["diffusers"]):
                shape = parameter.shape
                if rows is not None:
                    start, stop = rows.bounds(shape[0])  # type: ignore[misc]
                    shape = (stop - start, *shape[1:])
                listing[prefix + key] = ("F16", shape[::-1] if transposed else shape)
    return listing


def adapter_listing(
    family: str,
    format: str,
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]],
    *,
    rank: int = 4,
    only: str = ".*",
    alpha: bool = True,
) -> Listing:
    """The header of a LoRA on every matrix whose target matches `only` (of those the format has a place for)."""
    keys = compile_keys(family, format)
    listing: Listing = {}
    for part in families()[family].components:
        for parameter in parameters(part, shapes[part.name]):
            if parameter.kind is not Kind.MATRIX or parameter.target.param != "weight":
                continue
            if not re.fullmatch(only, str(parameter.target)):
                continue
            for slot in keys.slots(parameter.target):
                rows = parameter.shape[0]
                start, stop = (0, rows) if slot.rows is None else slot.rows.bounds(rows)  # type: ignore[misc]
                for role, tensor in lora_shapes((stop - start, *parameter.shape[1:]), rank).items():
                    listing[keys.spell(slot, "lora", role)] = ("F16", tensor)
                if alpha:
                    listing[keys.spell(slot, "lora", "alpha")] = ("F32", ())
    return listing


def lora_shapes(shape: tuple[int, ...], rank: int) -> dict[str, tuple[int, ...]]:
    ones = (1,) * (len(shape) - 2)
    return {"down": (rank, *shape[1:]), "up": (shape[0], rank, *ones)}


def shares(row: Row) -> int:
    """How many equal shares the rows of a target fall into, over all namings."""
    return math.lcm(
        *(
            name.rows.total
            for names in row.names.values()
            for name in names
            if name.rows is not None
        )
    )


def tiny_slots(family: str, format: str) -> Iterator[tuple[Slot, int]]:
    """The matrices of the first and the last block of every kind that a format has a name for, each with its rows."""
    keys = compile_keys(family, format)
    for part in families()[family].components:
        for row in part.rows:
            if row.kind is Kind.MATRIX:
                every = list(expand(row))
                for indices in every[:1] + every[1:][-1:]:
                    for slot in keys.slots(Target(part.name, fill(row.target, indices))):
                        rows = 8 * shares(row)
                        start, stop = (0, rows) if slot.rows is None else slot.rows.bounds(rows)  # type: ignore[misc]
                        yield slot, stop - start


def slots_of(family: str, format: str, targets: Iterable[Target]) -> Iterator[Slot]:
    keys = compile_keys(family, format)
    for target in targets:
        yield from keys.slots(target)


def save_listing(path: Path, listing: Listing, note: str) -> None:
    """Our compact form: a comment line, then key, dtype, shape (`320x4x3x3`, empty for a scalar), tab-separated."""
    lines = [f"# {note}"]
    lines += [
        f"{key}\t{dtype}\t{'x'.join(map(str, shape))}" for key, (dtype, shape) in listing.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def load_listing(path: Path) -> Listing:
    listing: Listing = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            key, dtype, shape = line.split("\t")
            listing[key] = (dtype, tuple(map(int, shape.split("x"))) if shape else ())
    return listing


def corpus_listing(path: Path) -> Listing:
    keys = json.loads(path.read_text(encoding="utf-8"))["keys"]
    return {key: ("F16" if shape else "F32", tuple(shape)) for key, shape in keys.items()}


def shrink(listing: Listing, by: int = 32) -> Listing:
    """The same model with every width divided: channels, not kernels (a row count divisible by 3 stays so)."""
    return {
        key: (dtype, tuple(n if n <= 16 else max(1, n // by) for n in shape))
        for key, (dtype, shape) in listing.items()
    }


def write_header_only(
    path: Path, listing: Listing, alpha: float = 4.0, metadata: Mapping[str, str] | None = None
) -> Path:
    """A safetensors file of this header, its data all zeros (sparse on disk), every alpha set."""
    specs = [TensorSpec(key, dtype, shape) for key, (dtype, shape) in listing.items()]
    head, infos = build_header(specs, metadata or {})
    with path.open("wb") as file:
        file.write(head)
        file.truncate(max((info.stop for info in infos.values()), default=len(head)))
        for key, info in infos.items():
            if key.endswith("alpha"):
                file.seek(info.start)
                file.write(
                    struct.pack("<f", alpha) if info.dtype == "F32" else struct.pack("<e", alpha)
                )
    return path
