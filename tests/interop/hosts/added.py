"""What a module of a file is to add to a weight, and a small model with such weights to load it into.

A layer's inputs are cut to few columns, its rows are all kept: loaders split them at numbers of their own. Answers are
those of `tests.oracle` in float64, on one probe of the inputs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache

import numpy as np
import torch

from adaptkit.detect import families
from adaptkit.families.contract import Component, Kind, Name, Row
from adaptkit.keymap.rows import find_row
from adaptkit.names import Rows, Target
from tests import oracle
from tests.interop.hosts.diffusers import Result, _bounds, kron, low_rank, probe
from tests.interop.hosts.files import File, Part, Shape, _shape, hash_of
from tests.interop.hosts.loaded import Loaded
from tests.synth import expand, fill

CUTS, LEAST = (128, 64, 32), 4
PAIRS = (("lora_up", "lora_down"), ("lora_B", "lora_A"), ("lora.up", "lora.down"), ("up", "down"))


def shape_of(family: str, part: Component, row: Row) -> Shape:
    """A weight's shape with fewer columns, and, where the real one is not known, rows that can be split."""
    rows, columns, *kernel = _shape(family, part, row)
    for total in {name.rows.total for names in row.names.values() for name in names if name.rows}:
        rows *= 1 if rows % total == 0 else total
    cut = next((n for n in CUTS if columns % n == 0 and columns // n >= LEAST), 1)
    return (rows, columns // cut, *kernel)


def narrowed(file: File) -> File:
    """A file of the same modules for a model of fewer columns."""
    family, parts = families()[file.family], []
    for part in file.parts:
        hit = find_row(family, part.slot.component, part.slot.target.module)
        assert hit is not None
        shape = shape_of(file.family, family.component(part.slot.component), hit[0])
        start, stop = (round(share * shape[0]) for share in _bounds(part.slot.rows))
        parts.append(part._replace(shape=(stop - start, *shape[1:])))
    return replace(file, parts=tuple(parts))


def tensors_of(file: File) -> dict[str, torch.Tensor]:
    """The tensors of a file, the large ones too of numbers that differ."""
    pool, found = _numbers(), file.tensors()
    for key, tensor in found.items():
        size = tensor.numel()
        # OFT's blocks may be larger than all numbers there are, and were not tried
        if 0 in tensor.stride() and 1 < size < len(pool):
            start = hash_of(key) % (len(pool) - size)
            found[key] = pool[start : start + size].view(tensor.shape).float()
    return found


@cache
def _numbers() -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(1 << 23, generator=draw, dtype=torch.float64)


def weight(target: Target, shape: Shape) -> torch.Tensor:
    """A weight of the base model: the same numbers for a target in every model."""
    size, pool = torch.Size(shape).numel(), _numbers()
    start = hash_of(str(target)) % (len(pool) - size)
    return pool[start : start + size].view(shape)


def rows_of(whole: torch.Tensor, rows: Rows | None, swapped: bool) -> torch.Tensor:
    """Some rows of a weight, in a layer's own order."""
    start, stop = (round(share * len(whole)) for share in _bounds(rows))
    cut = whole[start:stop]
    return cut.roll(len(cut) // 2, 0) if swapped else cut


def layers(
    family: str, part: Component, naming: str, blocks: int | None, absent: str = "^$"
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, weight) of every layer of a component, as one naming has them (diffusers' where that has none)."""
    for row in part.rows:
        if row.kind is not Kind.MATRIX or re.search(absent, row.target):
            continue
        shape = shape_of(family, part, row)
        for indices in expand(row):
            if blocks is not None and any(index >= blocks for index in indices.values()):
                continue
            whole = weight(Target(part.name, fill(row.target, indices)), shape)
            for name in names_in(row, naming):
                yield fill(name.module, indices), rows_of(whole, name.rows, name.swapped)


def names_in(row: Row, naming: str) -> tuple[Name, ...]:
    return row.names.get(naming) or row.names.get("diffusers", ())


def put(model: torch.nn.Module, path: str, numbers: torch.Tensor) -> torch.nn.Module:
    """Add a layer with a bias at a dotted path."""
    *folders, last = path.split(".")
    for folder in folders:
        if folder not in model._modules:
            model.add_module(folder, torch.nn.Module())
        model = model._modules[folder]  # type: ignore[assignment]
    rows, columns, *kernel = numbers.shape
    if kernel:
        kind = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)[len(kernel) - 1]
        layer: torch.nn.Module = kind(columns, rows, tuple(kernel), device="meta")
    else:
        layer = torch.nn.Linear(columns, rows, device="meta")
    layer.weight = torch.nn.Parameter(numbers, requires_grad=False)
    layer.bias = torch.nn.Parameter(numbers.new_zeros(1).expand(rows), requires_grad=False)
    model.add_module(last, layer)
    return layer


def on_probe(delta: torch.Tensor) -> torch.Tensor:
    flat = delta.flatten(1).double()
    return flat @ probe(flat.shape[1])


def meant(file: File, part: Part, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """What a module of a file adds, on the probe, in the order of the file's rows; None for OFT, which was not tried."""
    if "oft_blocks" in file.form.tensors(part.shape):
        return None
    mine = {k: tensors[f"{part.stem}.{k}"] for k in file.form.tensors(part.shape)}
    kernel, kind = part.shape[2:], file.form.algorithm
    alpha = file.form.alpha
    t = {role: value.double().numpy() for role, value in mine.items()}
    pair = next((p for p in PAIRS if f"{p[0]}.weight" in mine), None)
    delta = None
    if pair is not None:
        up, down = (mine[f"{name}.weight"] for name in pair)
        scale = 1.0 if alpha is None else alpha / down.shape[0]
        if kind == "lora" and "lora_mid.weight" not in mine:
            return low_rank(up, down, scale)
        mid = t.get("lora_mid.weight")
        delta = oracle.lora(up.double().numpy(), down.double().numpy(), scale, mid)
    elif kind == "lokr":
        w2 = mine.get("lokr_w2")
        if "lokr_t2" in mine:
            roles = {k.removeprefix("lokr_"): v for k, v in t.items()}
            delta = oracle.lokr_stored(roles, alpha, kernel)
        elif w2 is None:
            scale = (1.0 if alpha is None else alpha) / mine["lokr_w2_b"].shape[0]
            return kron(mine["lokr_w1"], mine["lokr_w2_a"] @ mine["lokr_w2_b"], scale)
        else:
            return kron(mine["lokr_w1"], w2, 1.0)
    elif kind == "loha":
        delta = oracle.loha({k.removeprefix("hada_"): v for k, v in t.items()}, alpha, kernel)
    elif kind == "full":
        delta = t["diff"]
    whole = _base(file, part).double().numpy()
    if kind == "lora+dora":
        name = next(k for k in mine if "dora" in k or "magnitude" in k)
        shape = mine[name].shape
        axis = 1 if len(shape) > 1 and shape[0] == 1 and shape[1] == part.shape[1] else 0
        assert delta is not None
        delta = oracle.dora(whole, delta, t[name], axis) - whole
    elif kind == "glora":
        a1, a2, b1, b2 = (t[f"{role}.weight"] for role in ("a1", "a2", "b1", "b2"))
        # the oracle's own sum takes too long here
        through = np.einsum("or...,rj->oj...", np.einsum("oi...,ir->or...", whole, a1), a2)
        scale = 1.0 if alpha is None else alpha / len(b2)
        delta = scale * ((b1 @ b2).reshape(whole.shape) + through)
    elif kind == "ia3":
        delta = oracle.ia3(whole, t["weight"], 0) - whole
    assert delta is not None, file.form.name
    return on_probe(torch.from_numpy(delta))


def _base(file: File, part: Part) -> torch.Tensor:
    """The weight of the base model that a module of a file belongs to, in the file's rows."""
    share = _bounds(part.slot.rows)
    total = round(part.shape[0] / (share[1] - share[0]))
    whole = weight(part.slot.target, (total, *part.shape[1:]))
    return rows_of(whole, part.slot.rows, part.swapped)


def loaded(
    file: File, tensors: Mapping[str, torch.Tensor], results: Mapping[str, Result]
) -> Loaded:
    """The modules of a file that were added as they are meant."""
    found = set()
    for part in file.parts:
        result = results.get(part.slot.component)
        expected = None if result is None else meant(file, part, tensors)
        if result is not None and expected is not None and result.right(part, expected, None):
            found.add(part.stem)
    return Loaded(frozenset(found))


class Sum(Result):
    """What the layers of a component add, whose layers have the names of one naming."""

    def __init__(self, family: str, component: str, naming: str = "diffusers") -> None:
        super().__init__(family, component)
        self.naming = naming

    def names(self, row: Row) -> tuple[Name, ...]:
        return names_in(row, self.naming)
