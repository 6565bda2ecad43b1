"""What the modules of a file mean as whole matrices, and whether a host added that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from adaptkit.names import Rows
from tests.interop.hosts.files import File, Part
from tests.interop.hosts.loaded import Place

PAIRS = (("lora_up", "lora_down"), ("lora_B", "lora_A"), ("lora.up", "lora.down"), ("up", "down"))


def delta(file: File, part: Part, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """A module's matrix [out, everything else] in float64, as LyCORIS defines it; None for what has another form."""
    mine = {
        k: tensors[f"{part.stem}.{k}"].double() for k in file.form.tensors(part.shape)
    }  # a suffix each
    if {"dora_scale", "lora_magnitude_vector"} & set(mine):
        return None
    alpha = file.form.alpha
    for up, down in PAIRS:
        if f"{up}.weight" in mine:
            scale = 1.0 if alpha is None else alpha / mine[f"{down}.weight"].shape[0]
            return scale * _product(
                mine[f"{up}.weight"], mine[f"{down}.weight"], mine.get("lora_mid.weight")
            )
    if "diff" in mine:
        return mine["diff"].flatten(1)
    if "hada_w1_a" in mine:
        rank = mine["hada_w1_b"].shape[0]
        one, two = (
            _hada(mine[f"hada_w{n}_a"], mine[f"hada_w{n}_b"], mine.get(f"hada_t{n}"))
            for n in (1, 2)
        )
        return (alpha or rank) / rank * one * two
    if "lokr_w1" in mine:
        scale, second = 1.0, mine.get("lokr_w2")
        if second is None:
            rank = mine["lokr_w2_b"].shape[0]
            scale = (alpha or rank) / rank
            second = (
                torch.einsum("rs...,ra,sb->ab...", mine["lokr_t2"], mine["lokr_w2_a"], mine["lokr_w2_b"])
                if "lokr_t2" in mine
                else mine["lokr_w2_a"] @ mine["lokr_w2_b"]
            )  # fmt: skip
        first = mine["lokr_w1"]
        if second.dim() == 2 and len(part.shape) > 2:  # flat: its columns are inputs and window
            second = second.reshape(second.shape[0], part.shape[1] // first.shape[1], *part.shape[2:])  # fmt: skip
        while first.dim() < second.dim():
            first = first[..., None]
        return scale * torch.kron(first, second.contiguous()).flatten(1)
    return None


def _product(up: torch.Tensor, down: torch.Tensor, mid: torch.Tensor | None) -> torch.Tensor:
    if mid is None:
        return up.flatten(1) @ down.flatten(1)
    core = torch.einsum("rs...,si->ri...", mid, down.flatten(1))
    return torch.einsum("or,ri...->oi...", up.flatten(1), core).flatten(1)


def _hada(a: torch.Tensor, b: torch.Tensor, core: torch.Tensor | None) -> torch.Tensor:
    if core is None:
        return a @ b
    return torch.einsum("rs...,ra,sb->ab...", core, a, b).flatten(1)


def agree(part: Part, expected: torch.Tensor, added: Iterable[tuple[Place, torch.Tensor]]) -> bool:
    """Whether the layers of a module's rows add what it means there: rows of matrices, or numbers of vectors."""
    if part.swapped:
        expected = expected.roll(len(expected) // 2, 0)
    start, stop = share(part.slot.rows)
    covered = 0.0
    for place, found in added:
        got = found.roll(len(found) // 2, 0) if place.swapped else found
        low, high = share(place.rows)
        first, last = max(start, low), min(stop, high)
        if first >= last:
            continue
        total, whole = len(got) / (high - low), len(expected) / (stop - start)
        cut = got[round((first - low) * total) : round((last - low) * total)]
        mine = expected[round((first - start) * whole) : round((last - start) * whole)]
        if cut.shape != mine.shape or not torch.allclose(cut, mine, rtol=1e-4, atol=1e-5):
            return False
        covered += last - first
    return abs(covered - (stop - start)) < 1e-9


def share(rows: Rows | None) -> tuple[float, float]:
    return (0.0, 1.0) if rows is None else (rows.start / rows.total, rows.stop / rows.total)
