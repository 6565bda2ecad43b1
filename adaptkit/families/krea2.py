"""Krea 2: 28 blocks of width 6144, and a text fusion of four narrower blocks.

Source: the original checkpoint and diffusers' `Krea2Transformer2DModel`, mapped as in its
converter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.families.contract import (
    Kind,
    Mark,
    ModelFamily,
    Row,
    named,
    pair,
    row,
    scaled,
    sizes,
    split,
    transformer,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

ATTENTION = (("wo", "to_out.0"), ("gate", "to_gate"))
# 48 heads of queries share 12 of keys and values; the text fusion has 20 of each
SHARES, ALIKE = (4, 1, 1), (1, 1, 1)
NORMS = (
    ("prenorm", "norm1"),
    ("postnorm", "norm2"),
    ("attn.qknorm.qnorm", "attn.norm_q"),
    ("attn.qknorm.knorm", "attn.norm_k"),
)


def _block(ours: str, theirs: str, shares: tuple[int, ...]) -> Iterator[Row]:
    yield row(
        f"{ours}attn.qkv",
        native=split(f"{ours}attn.", "wq", "wk", "wv", ratio=shares),
        diffusers=split(f"{theirs}attn.", "to_q", "to_k", "to_v", ratio=shares),
        # SimpleTuner's `fused_qkv_projections`
        fused=f"{theirs}attn.to_qkv",
    )
    for native, diffusers in ATTENTION:
        yield pair(f"{ours}attn.{native}", f"{theirs}attn.{diffusers}")
    for name in ("gate", "up", "down"):
        yield pair(f"{ours}mlp.{name}", f"{theirs}ff.{name}")
    for native, diffusers in NORMS:
        yield pair(scaled(ours + native), theirs + diffusers, kind=Kind.NORM)


def _modulation(native: str, diffusers: str) -> Row:
    """A learned scale and shift: flat in the original, a table (6, width) in diffusers."""
    return pair(named(native, weight=native), named(diffusers, weight=diffusers), kind=Kind.NORM)


ROWS = (
    pair("first", "img_in"),
    pair("tmlp.0", "time_embed.linear_1"),
    pair("tmlp.2", "time_embed.linear_2"),
    pair("tproj.1", "time_mod_proj"),
    pair(scaled("txtmlp.0"), "txt_in.norm", kind=Kind.NORM),
    pair("txtmlp.1", "txt_in.linear_1"),
    pair("txtmlp.3", "txt_in.linear_2"),
    *(
        made
        for part in ("layerwise", "refiner")
        for made in _block(
            f"txtfusion.{part}_blocks.{{i:2}}.", f"text_fusion.{part}_blocks.{{i:2}}.", ALIKE
        )
    ),
    pair("txtfusion.projector", "text_fusion.projector"),
    *_block("blocks.{i:28}.", "transformer_blocks.{i:28}.", SHARES),
    _modulation("blocks.{i:28}.mod.lin", "transformer_blocks.{i:28}.scale_shift_table"),
    pair(scaled("last.norm"), "final_layer.norm", kind=Kind.NORM),
    pair("last.linear", "final_layer.linear"),
    _modulation("last.modulation.lin", "final_layer.scale_shift_table"),
)

SIZES = sizes(
    "6144x6144 9216x6144 16384x6144 6144x16384 36864x6144 6144x2560 "
    "2560x2560 7680x2560 6912x2560 2560x6912"  # the text fusion
)

FAMILY = ModelFamily(
    name="krea2",
    title="Krea 2",
    components=(transformer("Krea 2 transformer", ROWS, sizes=SIZES),),
    marks=(
        Mark("transformer", "attn.qkv", columns=(6144, 2560)),  # 2560: the text fusion
        Mark("transformer", "attn.wo", rows=(6144, 2560)),
    ),
    architectures=("krea-2", "krea2", "krea_2"),
    modelspec="Krea-2",
    yields_to=("flux", "sd3", "qwen-image"),  # if a toy's sizes tell nothing
)
