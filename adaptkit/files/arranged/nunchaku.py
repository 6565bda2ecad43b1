"""nunchaku's files of FLUX.1: factors in the order of its matrix units, beside those of the base.

Source: nunchaku, `lora/flux/nunchaku_converter.py` and `lora/flux/packer.py`.

A quantised layer is W = Q(W) + U·D with a branch U·D of rank 32 of its own, and an adapter is
appended to this branch: ranks 0 to 31 of a file are the base's, which `set_lora_strength` leaves
alone too (`SVD_RANK`), and the others are the adapter. Both factors are tiles of 16 × 16. In a
tile, 32 lanes (8 × 4) hold 2 × 2 pairs of neighbours each, so that an element (n, k) with
n = 8·a + b and k = 8·c + 2·d + e is stored in the order b, d, a, c, e. Tiles of both factors are in
the order (channels, ranks), and the tiles of D have the ranks as their n. The layers of modulations
are not packed and have no branch of the base; their rows are (width, parts) instead of
(parts, width). q, k and v are one layer, and a single block's output is two: the attention's
columns, and those of its MLP. Biases are differences, norms are new values.
"""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from adaptkit.files.arranged.contract import Arranged
from adaptkit.files.packed.svdquant import FUSED as LAYERS
from adaptkit.files.packed.svdquant import SINGLE as OF_SINGLE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from adaptkit.files.header import TensorInfo

__all__ = ["LAYOUT", "factors_of", "find", "names_of"]

LAYOUT = "nunchaku"
BASE_RANK = 32  # of the base's own branch
TILE = 16
_PAIR = re.compile(r"(?P<block>(?:single_)?transformer_blocks\.\d+)\.(?P<local>[\w.]+)\.lora_down")
_VECTOR = re.compile(
    r"(?P<block>(?:single_)?transformer_blocks\.\d+)\.(?P<local>[\w.]+)\.(?P<end>bias|weight)"
)
_NORM = re.compile(r"(?:single_)?transformer_blocks\.\d+\.attn\.norm_(?:added_)?[qk]\.weight")
# nunchaku's layer of a block → diffusers' layers, whose rows follow one another; the quantised base
# has the same, and joint names of diffusers' own
DOUBLE = {name: theirs for name, theirs in LAYERS.items() if not name.startswith("attn.")}
SINGLE = {name: theirs for name, theirs in OF_SINGLE.items() if not name.startswith("attn.")}
# layers whose columns follow one another in diffusers' layer
COLUMNS, JOINED = ("out_proj", "mlp_fc2"), "proj_out"
# modulations, and how many vectors of the width each makes
PARTS: Mapping[str, int] = {"norm1.linear": 6, "norm1_context.linear": 6, "norm.linear": 3}
MODULATIONS = frozenset(PARTS)
FUSED = {name: LAYERS[name] for name in LAYERS if name not in DOUBLE}  # in the names of vectors


class _Pair(NamedTuple):
    """The factors of a layer, of `rows` × `columns`; `rank` is that of the adapter alone."""

    down: TensorInfo
    up: TensorInfo
    rows: int
    columns: int
    rank: int


def find(
    infos: Mapping[str, TensorInfo],
) -> tuple[dict[str, Arranged], dict[str, TensorInfo]] | None:
    """What is read of a packed file: the tensors that are made, and those that are renamed.

    None if no layer is packed, or if it is a quantised checkpoint. Tensors that fit no rule keep
    their names, which no family knows.
    """
    # asked of every file: most have no such name
    downs = [key for key in infos if key.endswith(".lora_down")]
    found = {key: match for key in downs if (match := _PAIR.fullmatch(key)) is not None}
    packed = any(match["local"] not in MODULATIONS for match in found.values())
    if not packed or any(key.endswith(".qweight") for key in infos):
        return None
    blocks: dict[str, dict[str, _Pair]] = {}
    for key, match in found.items():
        if (pair := _pair(infos, key, match["block"], match["local"])) is not None:
            blocks.setdefault(match["block"], {})[match["local"]] = pair
    made: dict[str, Arranged] = {}
    used: set[str] = set()
    for block, layers in blocks.items():
        if block.startswith("single_") and not layers.keys() >= set(COLUMNS):
            for local in COLUMNS:  # one alone does not tell the width of both
                layers.pop(local, None)
        made |= dict(_block(block, layers))
        used |= {info.name for pair in layers.values() for info in (pair.down, pair.up)}
    for key, info in infos.items():
        vectors = dict(_cut_vector(key, info))
        made |= vectors
        used |= {key} if vectors else set()
    kept: dict[str, TensorInfo] = {}
    for key, info in infos.items():
        if key not in used:
            name = _renamed(key, info)
            # of two tensors of one name neither is lost: one keeps a name that nobody knows
            kept[key if name in made or name in kept else name] = info
    return made, kept


def names_of(block: str, local: str) -> tuple[str, ...]:
    """diffusers' layers that a layer of a block is; none if nunchaku has no such layer."""
    single = block.startswith("single_")
    if local in MODULATIONS:
        return (local,) if single == (local == "norm.linear") else ()
    if single and local in COLUMNS:
        return (JOINED,)
    return (SINGLE if single else DOUBLE).get(local, ())


def _pair(infos: Mapping[str, TensorInfo], key: str, block: str, local: str) -> _Pair | None:
    """The factors of a layer; None if they are not what nunchaku stores."""
    down, up, names = infos[key], infos.get(f"{key[:-4]}up"), names_of(block, local)
    if up is None or not names or len(down.shape) != 2 or len(up.shape) != 2:
        return None
    (rows, rank), plain = up.shape, local in MODULATIONS
    columns = down.shape[1 if plain else 0]
    fits = down.dtype == up.dtype and down.shape[0 if plain else 1] == rank and rows and columns
    if plain:
        return _Pair(down, up, rows, columns, rank) if fits and not rows % PARTS[local] else None
    tiled = rank >= BASE_RANK and not any(n % TILE for n in (rows, columns, rank))
    tiled = tiled and not rows % len(names)
    return _Pair(down, up, rows, columns, rank - BASE_RANK) if fits and tiled else None


def _block(block: str, layers: Mapping[str, _Pair]) -> Iterator[tuple[str, Arranged]]:
    """The plain factors of a block; none of a layer that holds the base's branch alone."""
    stem = f"transformer.{block}."
    joined: dict[str, _Pair] = {}
    for local, pair in layers.items():
        names = names_of(block, local)
        if names == (JOINED,):
            joined[local] = pair
        elif pair.rank > 0:
            yield from _layer(stem, names, pair, PARTS.get(local, 0))
    if any(pair.rank > 0 for pair in joined.values()):
        yield from _both(f"{stem}{JOINED}", [joined[local] for local in COLUMNS])


def _layer(
    stem: str, names: tuple[str, ...], pair: _Pair, parts: int
) -> Iterator[tuple[str, Arranged]]:
    dtype, height = pair.down.dtype, pair.rows // len(names)
    for n, name in enumerate(names):
        down = partial(_down, plain=parts > 0)
        up = partial(_up, parts=parts, rows=slice(n * height, (n + 1) * height))
        for end, info, shape, read in (
            ("A", pair.down, (pair.rank, pair.columns), down),
            ("B", pair.up, (height, pair.rank), up),
        ):
            yield f"{stem}{name}.lora_{end}.weight", Arranged(dtype, shape, {"": info.name}, read)


def _both(module: str, pairs: list[_Pair]) -> Iterator[tuple[str, Arranged]]:
    """Two layers that share their output as one: their columns side by side, their ranks added."""
    rank, columns = sum(pair.rank for pair in pairs), sum(pair.columns for pair in pairs)
    dtype = pairs[0].down.dtype
    downs = {str(n): pair.down.name for n, pair in enumerate(pairs)}
    ups = {str(n): pair.up.name for n, pair in enumerate(pairs)}
    yield f"{module}.lora_A.weight", Arranged(dtype, (rank, columns), downs, _both_down)
    yield f"{module}.lora_B.weight", Arranged(dtype, (pairs[0].rows, rank), ups, _both_up)


def _cut_vector(key: str, info: TensorInfo) -> Iterator[tuple[str, Arranged]]:
    """The biases of q, k and v of a fused layer's."""
    match = _VECTOR.fullmatch(key)
    names = FUSED.get(match["local"], ()) if match is not None and match["end"] == "bias" else ()
    if match is None or not names or len(info.shape) != 1 or info.shape[0] % len(names):
        return
    height = info.shape[0] // len(names)
    for n, name in enumerate(names):
        read = partial(_cut, rows=slice(n * height, (n + 1) * height))
        full = f"transformer.{match['block']}.{name}.lora_B.bias"
        yield full, Arranged(info.dtype, (height,), {"": key}, read)


def _renamed(key: str, info: TensorInfo) -> str:
    """The name of a tensor that is stored as it is read: of biases, norms and unpacked layers."""
    if key.startswith("text_encoder"):
        return key
    if key.endswith((".lora_A.weight", ".lora_B.weight")):
        return f"transformer.{key}"
    if len(info.shape) == 1 and key.endswith(".bias"):
        return f"transformer.{key.removesuffix('.lora_B.bias').removesuffix('.bias')}.lora_B.bias"
    if len(info.shape) == 1 and _NORM.fullmatch(key):
        return f"transformer.{key.removesuffix('.weight')}.scale"
    return key


def _unpacked(stored: Tensor) -> Tensor:
    """The tiles (c, r, n, k) of a factor of (16 c, 16 r) numbers, or (c, r, k, n) of a D."""
    channels, ranks = (n // TILE for n in stored.shape)
    lanes = stored.reshape(channels, ranks, 8, 4, 2, 2, 2)  # c, r, b, d, a, c', e
    return lanes.permute(0, 1, 4, 2, 5, 3, 6).reshape(channels, ranks, TILE, TILE)


def factors_of(stored: Tensor, *, down: bool) -> Tensor:
    """A factor out of its tiles: (ranks, channels) of a D, (channels, ranks) of a U."""
    tiles = _unpacked(stored)
    if down:
        return tiles.permute(1, 2, 0, 3).reshape(stored.shape[1], -1)
    return tiles.permute(0, 2, 1, 3).reshape(stored.shape)


def _down(stored: Mapping[str, Tensor], plain: bool = False) -> Tensor:
    (whole,) = stored.values()
    return whole if plain else factors_of(whole, down=True)[BASE_RANK:]


def _up(stored: Mapping[str, Tensor], parts: int = 0, rows: slice = slice(None)) -> Tensor:
    (whole,) = stored.values()
    if parts:
        return whole.reshape(-1, parts, whole.shape[1]).transpose(0, 1).reshape(whole.shape)
    return factors_of(whole, down=False)[rows, BASE_RANK:]


def _both_down(stored: Mapping[str, Tensor]) -> Tensor:
    one, two = (_down({"": stored[part]}) for part in sorted(stored))
    found = one.new_zeros(len(one) + len(two), one.shape[1] + two.shape[1])
    found[: len(one), : one.shape[1]] = one
    found[len(one) :, one.shape[1] :] = two
    return found


def _both_up(stored: Mapping[str, Tensor]) -> Tensor:
    import torch

    return torch.cat([_up({"": stored[part]}) for part in sorted(stored)], 1)


def _cut(stored: Mapping[str, Tensor], rows: slice) -> Tensor:
    (whole,) = stored.values()
    return whole[rows]
