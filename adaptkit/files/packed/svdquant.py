"""SVDQuant of nunchaku: four-bit numbers in the order of a kernel's tiles, and factors beside them.

A layer computes (x / smooth) · Wqᵀ + x · down · up, so its weight is Wq / smooth + up · down.
The orders are those of deepcompressor's `backend/nunchaku/utils.py: NunchakuWeightPacker`
(128 rows, 64 columns). int4: scales of groups of 64; nvfp4: E2M1 numbers, e4m3 scales of groups
of 16, and scales of the tensor and of each row. Biases, which take up what activations were
shifted by, and the AWQ layers beside are not read: the file cannot be turned into plain weights,
only compared with and extracted from.
"""

from __future__ import annotations

from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from adaptkit.files.packed.nvfp4 import E2M1
from adaptkit.files.packing import Packed, unread

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from adaptkit.files.header import TensorInfo
    from adaptkit.files.source import TensorSource

__all__ = ["FUSED", "SINGLE", "find"]

ROWS, COLUMNS = 128, 64  # of a tile
QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
ADDED = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
# the layers that share one tensor by rows, and other names than diffusers has for the rest
FUSED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "attn.to_qkv": QKV,
        "attn.add_qkv_proj": ADDED,
        "qkv_proj": QKV,
        "qkv_proj_context": ADDED,
        "out_proj": ("attn.to_out.0",),
        "out_proj_context": ("attn.to_add_out",),
        "mlp_fc1": ("ff.net.0.proj",),
        "mlp_fc2": ("ff.net.2",),
        "mlp_context_fc1": ("ff_context.net.0.proj",),
        "mlp_context_fc2": ("ff_context.net.2",),
    }
)
SINGLE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"qkv_proj": QKV, "mlp_fc1": ("proj_mlp",), "attn.to_qkv": QKV}
)
HALVES = ("out_proj", "mlp_fc2")  # of `proj_out` of a single block, side by side
# part → its names in older and newer files
NAMES = {
    "scale": ("wscales",),
    "row": ("wcscales",),
    "one": ("wtscale",),
    "smooth": ("smooth_factor", "smooth"),
    "down": ("proj_down", "lora_down"),
    "up": ("proj_up", "lora_up"),
    "zero": ("wzeros",),
    "unused": ("smooth_factor_orig", "smooth_orig"),
    "bias": ("bias",),
}


class _Form(NamedTuple):
    """Sizes of a layer, and whether its numbers are those of nvfp4."""

    rows: int
    columns: int
    float_: bool


def find(source: TensorSource) -> dict[str, Packed]:
    """The packed weights of a file, by the names of the layers that they belong to."""
    layers: dict[str, Packed] = {}
    for key in source.infos:
        if key.endswith(".qweight"):
            module = key.removesuffix(".qweight")
            if f"{module}.wscales" in source.infos:
                layers[module] = _layer(source, module)
    return dict(_shown(layers))


def _layer(source: TensorSource, module: str) -> Packed:
    infos = source.infos
    parts = {"weight": f"{module}.qweight"}
    for part, names in NAMES.items():
        held = next((key for key in (f"{module}.{name}" for name in names) if key in infos), None)
        if held is not None:
            parts[part] = held
    weight, scale = infos[parts["weight"]], infos[parts["scale"]]
    if "zero" in parts or len(weight.shape) != 2 or len(scale.shape) != 2:
        rows, columns = (*weight.shape, 1)[:2]
        return unread("AWQ_INT4", (4 * rows, 2 * columns), parts, plain=False)
    form = _Form(weight.shape[0], 2 * weight.shape[1], scale.dtype == "F8_E4M3")
    name = "SVDQ_NVFP4" if form.float_ else "SVDQ_INT4"
    sizes = (form.rows, form.columns)
    if not _fits({part: infos[key] for part, key in parts.items()}, form):
        return unread(name + "_OTHER", sizes, parts, plain=False)
    return Packed(name, sizes, parts, partial(_numbers, form=form), plain=False, by_pieces=False)


def _fits(infos: Mapping[str, TensorInfo], form: _Form) -> bool:
    numel = {part: info.numel for part, info in infos.items()}
    rank = infos["down"].shape[-1] if "down" in infos else 0
    wanted = {
        "scale": form.rows * form.columns // (16 if form.float_ else 64),
        "row": form.rows,
        "one": 1,
        "smooth": form.columns,
        "down": form.columns * rank,
        "up": form.rows * rank,
    }
    return (
        infos["weight"].dtype == "I8"
        and form.rows % ROWS == 0
        and form.columns % (2 * COLUMNS) == 0
        and rank % 16 == 0
        and ("down" in infos) == ("up" in infos)
        and all(numel[part] == size for part, size in wanted.items() if part in numel)
    )


def _shown(layers: Mapping[str, Packed]) -> Iterator[tuple[str, Packed]]:
    for module, one in layers.items():
        single = "single_transformer_blocks." in f"{module}."
        table = SINGLE if single else FUSED
        found = next((end for end in table if module.endswith(f".{end}")), None)
        half = next((end for end in HALVES if module.endswith(f".{end}")), None)
        if single and half:
            stem = module.removesuffix(half)
            if half == HALVES[0] and stem + HALVES[1] in layers:
                yield f"{stem}proj_out.weight", _beside(one, layers[stem + HALVES[1]])
            continue
        if found is None:
            yield f"{module}.weight", one
            continue
        stem, names = module.removesuffix(found), table[found]
        for number, name in enumerate(names):
            yield f"{stem}{name}.weight", _cut(one, number, len(names))


def _cut(one: Packed, number: int, count: int) -> Packed:
    """The rows of one of several layers of equal size."""
    rows = one.shape[0] // count

    def numbers(stored: Mapping[str, Tensor]) -> Iterator[Tensor]:
        yield one.decode(stored)[number * rows : (number + 1) * rows]

    return one if count == 1 else one._replace(shape=(rows, *one.shape[1:]), numbers=numbers)


def _beside(left: Packed, right: Packed) -> Packed:
    """Two layers whose inputs are joined, and whose outputs are added."""
    parts = {**left.parts, **{f"right {part}": key for part, key in right.parts.items()}}

    def numbers(stored: Mapping[str, Tensor]) -> Iterator[Tensor]:
        import torch

        other = {part: t for part, t in stored.items() if part.startswith("right ")}
        own = {part.removeprefix("right "): t for part, t in other.items()}
        yield torch.cat([left.decode(stored), right.decode(own)], 1)

    shape = left.shape[0], left.shape[1] + right.shape[1]
    dtype = left.dtype if right.dtype == left.dtype else right.dtype
    return left._replace(dtype=dtype, shape=shape, parts=parts, numbers=numbers)


def _numbers(stored: Mapping[str, Tensor], form: _Form) -> Iterator[Tensor]:
    yield _decode(stored, form)


def _decode(stored: Mapping[str, Tensor], form: _Form) -> Tensor:
    import torch

    places = _places(stored["weight"], form)
    if form.float_:
        numbers = torch.tensor([*E2M1, *(-n for n in E2M1)])[places.int()]
        scales = _small(stored["scale"], form)
    else:
        numbers = (places ^ 8).float().sub_(8)  # of two's complement
        scales = _by_row(stored["scale"].float(), form.rows)
    wide = numbers.reshape(form.rows, scales.shape[1], -1).mul_(scales.unsqueeze(-1))
    weight = wide.reshape(form.rows, form.columns)
    if "one" in stored:
        weight.mul_(stored["one"].float().reshape(()))
    if "row" in stored:
        weight.mul_(_by_row(stored["row"].float(), form.rows))
    if "smooth" in stored:
        weight.div_(_by_row(stored["smooth"].float(), form.columns).reshape(1, -1))
    if "down" in stored:
        rank = stored["down"].shape[-1]
        down = _factor(stored["down"].float(), form.columns // 16, rank // 16)
        # of `down` the tiles are those of (rank, columns)
        down = down.permute(1, 2, 0, 3).reshape(rank, form.columns)
        up = _factor(stored["up"].float(), form.rows // 16, rank // 16)
        weight.addmm_(up.permute(0, 2, 1, 3).reshape(form.rows, rank), down)
    return weight


def _places(packed: Tensor, form: _Form) -> Tensor:
    """The places (rows, columns) of numbers of four bits: 8 × 4 lanes hold 2 × 2 times 8 each."""
    import torch

    bytes_ = packed.contiguous().view(torch.uint8)
    halves = torch.stack([bytes_ & 15, bytes_ >> 4], -1)
    tiles = halves.reshape(form.rows // ROWS, form.columns // COLUMNS, 8, 8, 4, 2, 2, 8)
    return tiles.permute(0, 2, 5, 3, 1, 6, 4, 7).reshape(form.rows, form.columns)


def _by_row(packed: Tensor, rows: int) -> Tensor:
    """Scales (rows, groups): of 16 rows, lane l holds 2 l, 2 l + 1, and those 8 further."""
    tiles = packed.reshape(rows // ROWS, -1, 8, 4, 2, 2)
    return tiles.permute(0, 2, 4, 3, 5, 1).reshape(rows, -1)


def _small(packed: Tensor, form: _Form) -> Tensor:
    """e4m3 scales (rows, columns / 16), four of a row side by side."""
    tiles = packed.float().reshape(form.rows // ROWS, form.columns // COLUMNS, 8, 4, 4, 4)
    return tiles.permute(0, 4, 3, 2, 1, 5).reshape(form.rows, form.columns // 16)


def _factor(packed: Tensor, long: int, short: int) -> Tensor:
    """Tiles (long, short, 16, 16) of a factor: 8 × 4 lanes hold 2 × 2 pairs each."""
    tiles = packed.reshape(long, short, 8, 4, 2, 2, 2)
    return tiles.permute(0, 1, 4, 2, 5, 3, 6).reshape(long, short, 16, 16)
