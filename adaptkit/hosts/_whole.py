"""What diffusers' converters ask of a file as a whole."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from adaptkit.hosts.contract import Loss

if TYPE_CHECKING:
    from adaptkit.hosts.contract import Piece

__all__ = ["of_ace_step", "of_fal", "of_lumina2", "of_onetrainer", "spellings", "unmarked"]

TWO_SPELLINGS = Loss(
    "are called lora.down and lora.up beside others called lora_A and lora_B: they are dropped "
    "without a message",
    suffix=r"lora\.",
)
NO_PROJECTION = Loss(
    "no name has q_proj or k_proj, by which it knows such files: nothing loads", whole=True
)


def spellings(pieces: tuple[Piece, ...]) -> Loss | None:
    """It converts a file's spelling of the factors or not, as its first key says."""
    denoiser = [piece for piece in pieces if not piece.slot.component.startswith("text")]
    new = any(suffix.startswith("lora_A") for piece in denoiser[:1] for suffix in piece.suffixes)
    return TWO_SPELLINGS if new else None


def of_ace_step(pieces: tuple[Piece, ...]) -> Loss | None:
    """It knows the original's files by the names of their projections."""
    known = any(re.search(r"[qk]_proj", piece.stem) for piece in pieces)
    return None if known else NO_PROJECTION


NO_PREFIX = Loss(
    "no name tells it whose they are: no prefix, no alpha and no name of an adapter", whole=True
)


def unmarked(pieces: tuple[Piece, ...]) -> Loss | None:
    """It converts names without a prefix if a tensor is called alpha, or has PEFT's `.default.`."""
    known = any(piece.told or "default." in piece.stem for piece in pieces)
    return None if known else NO_PREFIX


FAL = Loss(
    "it mistakes such a file for one of fal's, and expects exactly their modules", whole=True
)
FAL_MODULES = r"double_blocks\.\d+\.|single_blocks\.\d+\.|final_layer\.linear$"


def of_fal(pieces: tuple[Piece, ...]) -> Loss | None:
    """A LoRA of every layer in the blocks and of the last one, in FLUX.1's own names."""
    theirs = all(
        piece.algorithm == "lora"
        and not piece.told
        and "native" in piece.namings
        and re.search(FAL_MODULES, str(piece.slot.target)) is not None
        for piece in pieces
    )
    return None if theirs and len(pieces) == 19 * 10 + 38 * 3 + 1 else FAL


ONE_NAME = Loss("get one name for different modules, so the last one wins, or it stops", whole=True)


def of_onetrainer(pieces: tuple[Piece, ...]) -> Loss | None:
    """Of the layers in blocks it knows those of attention."""
    names = {name for piece in pieces for naming, name in piece.names if naming == "diffusers"}
    others = r"blocks\.\{\w+:\d+\}\.(ff|norm|proj_)"
    return ONE_NAME if any(re.search(others, name) for name in names) else None


INCOMPLETE = Loss(
    "its converter stops, because a block lacks a module or a number is left out", whole=True
)


def of_lumina2(pieces: tuple[Piece, ...]) -> Loss | None:
    """It takes every block of a kind, the first and all others, for a whole one."""
    blocks: dict[str, dict[int, int]] = {}
    for piece in pieces:
        if found := re.search(r"(\w*refiner|layers)\.(\d+)\.", str(piece.slot.target)):
            counts = blocks.setdefault(found[1], {})
            counts[int(found[2])] = counts.get(int(found[2]), 0) + 1
    whole = all(
        sorted(counts) == list(range(len(counts)))
        and set(counts.values()) == {5 if kind == "context_refiner" else 6}
        for kind, counts in blocks.items()
    )
    return None if whole else INCOMPLETE
