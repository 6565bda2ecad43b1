"""Rows of Tencent's Hunyuan transformers: Video, Video 1.5, Image 2.1 and FramePack.

Every row has three namings: `native` is that of Tencent and musubi-tuner, `comfy` that of
ComfyUI's modules in memory (FLUX.1's names, the only ones under which its adapters load
completely), and diffusers'.

Source: Tencent-Hunyuan `hyvideo/modules/models.py`, ComfyUI's
`HunyuanVideo.process_unet_state_dict` and diffusers'
`convert_hunyuan_video_transformer_to_diffusers`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.families.contract import Kind, Mark, Name, Row, pair, row, scaled, split, swapped

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "SIZES",
    "byt5",
    "double_blocks",
    "embedder",
    "ends",
    "marks",
    "plain_embedder",
    "single_blocks",
    "video_rows",
]

REFINER, THEIRS = (
    "txt_in.individual_token_refiner.blocks.{i:2}.",
    "context_embedder.token_refiner.refiner_blocks.{i:2}.",
)
SIDES = (
    ("img", "to_{}", "to_out.0", "norm_{}", "norm1", "ff"),
    ("txt", "add_{}_proj", "to_add_out", "norm_added_{}", "norm1_context", "ff_context"),
)
LAYERS = ((0, "in", 1), (2, "out", 2))
SHARES = (1, 1, 1, 4)
# sizes of HunyuanVideo's layers, d wide
SIZES = "dxd 2dxd 3dxd 4dxd 6dxd 7dxd dx4d dx5d dx768 dx4096"


def _same(
    native: str, diffusers: str | Name, kind: Kind = Kind.MATRIX, kernel: tuple[int, ...] = ()
) -> Row:
    """A module with the same name in ComfyUI and in Tencent's checkpoint."""
    return pair(native, diffusers, comfy=native, kind=kind, kernel=kernel)


def embedder(native: str, diffusers: str) -> Iterator[Row]:
    """An embedder of two linear layers: `mlp.0`, `mlp.2`; in ComfyUI `in_layer`, `out_layer`."""
    for n, layer, m in LAYERS:
        yield pair(f"{native}.mlp.{n}", f"{diffusers}.linear_{m}", comfy=f"{native}.{layer}_layer")


def plain_embedder(native: str, diffusers: str) -> Iterator[Row]:
    """An embedder with layers `in_layer` and `out_layer` in Tencent's checkpoint too."""
    for _, layer, m in LAYERS:
        yield _same(f"{native}.{layer}_layer", f"{diffusers}.linear_{m}")


def ends(kernel: tuple[int, ...]) -> Iterator[Row]:
    """Patch embedding (a convolution with `kernel`), text refiner and final layer."""
    yield _same("img_in.proj", "x_embedder.proj", kernel=kernel)
    yield _same("txt_in.input_embedder", "context_embedder.proj_in")
    yield from embedder("txt_in.t_embedder", "context_embedder.time_text_embed.timestep_embedder")
    for _, layer, m in LAYERS:
        theirs = f"context_embedder.time_text_embed.text_embedder.linear_{m}"
        yield pair(
            f"txt_in.c_embedder.linear_{m}", theirs, comfy=f"txt_in.c_embedder.{layer}_layer"
        )
    yield from _refiner()
    yield _same("final_layer.linear", "proj_out")
    yield _same("final_layer.adaLN_modulation.1", swapped("norm_out.linear"))


def _refiner() -> Iterator[Row]:
    qkv = split(f"{THEIRS}attn.", "to_q", "to_k", "to_v")
    yield pair(f"{REFINER}self_attn_qkv", qkv, comfy=f"{REFINER}self_attn.qkv")
    yield pair(
        f"{REFINER}self_attn_proj", f"{THEIRS}attn.to_out.0", comfy=f"{REFINER}self_attn.proj"
    )
    yield from _mlp(f"{REFINER}mlp", f"{THEIRS}ff")
    yield _same(f"{REFINER}adaLN_modulation.1", f"{THEIRS}norm_out.linear")
    for name in ("norm1", "norm2"):
        yield _same(REFINER + name, THEIRS + name, Kind.NORM)


def _mlp(native: str, diffusers: str) -> Iterator[Row]:
    for n, m, theirs in ((1, 0, "net.0.proj"), (2, 2, "net.2")):
        yield pair(f"{native}.fc{n}", f"{diffusers}.{theirs}", comfy=f"{native}.{m}")


def double_blocks(layers: int, *, fused: bool = True) -> Iterator[Row]:
    """Double blocks; `fused`: Tencent fuses q, k and v (ComfyUI always does)."""
    ours, theirs = f"double_blocks.{{i:{layers}}}.", f"transformer_blocks.{{i:{layers}}}."
    for side, project, out, norm, modulation, mlp in SIDES:
        old, new = f"{ours}{side}_attn_", f"{ours}{side}_attn."
        qkv = split(f"{theirs}attn.", *(project.format(letter) for letter in "qkv"))
        native = f"{old}qkv" if fused else split(old, *"qkv")
        yield row(
            f"{old}qkv" if fused else f"{new}qkv", native=native, diffusers=qkv, comfy=f"{new}qkv"
        )
        yield pair(f"{old}proj", f"{theirs}attn.{out}", comfy=f"{new}proj")
        yield from _norms(old, f"{new}norm.", f"{theirs}attn.", norm)
        yield pair(
            f"{ours}{side}_mod.linear",
            f"{theirs}{modulation}.linear",
            comfy=f"{ours}{side}_mod.lin",
        )
        yield from _mlp(f"{ours}{side}_mlp", theirs + mlp)


def single_blocks(layers: int) -> Iterator[Row]:
    """Single blocks; their norms and modulations have other names than FLUX.1's."""
    ours, theirs = f"single_blocks.{{i:{layers}}}.", f"single_transformer_blocks.{{i:{layers}}}."
    parts = split(theirs, "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", ratio=SHARES)
    yield pair(f"{ours}linear1", parts, comfy=f"{ours}linear1")
    yield _same(f"{ours}linear2", f"{theirs}proj_out")
    yield from _norms(ours, f"{ours}norm.", f"{theirs}attn.", "norm_{}")
    yield pair(f"{ours}modulation.linear", f"{theirs}norm.linear", comfy=f"{ours}modulation.lin")


def _norms(native: str, comfy: str, diffusers: str, norm: str) -> Iterator[Row]:
    """The norms of q and k; ComfyUI calls their weight `scale`."""
    for word, letter in (("query", "q"), ("key", "k")):
        name = scaled(f"{comfy}{word}_norm")
        yield pair(
            f"{native}{letter}_norm", diffusers + norm.format(letter), comfy=name, kind=Kind.NORM
        )


def video_rows() -> tuple[Row, ...]:
    """All rows of HunyuanVideo, which FramePack extends."""
    return (
        *ends((1, 2, 2)),
        *embedder("time_in", "time_text_embed.timestep_embedder"),
        *plain_embedder("vector_in", "time_text_embed.text_embedder"),
        *embedder("guidance_in", "time_text_embed.guidance_embedder"),
        *double_blocks(20),
        *single_blocks(40),
    )


def byt5() -> Iterator[Row]:
    """The embedder of ByT5, the glyph encoder."""
    for n in (1, 2, 3):
        yield _same(f"byt5_in.fc{n}", f"context_embedder_2.linear_{n}")
    yield _same("byt5_in.layernorm", "context_embedder_2.norm", Kind.NORM)


def marks(width: int, *, qkv: str = "img_attn_qkv") -> tuple[Mark, ...]:
    """Marks of a model of this width, on the same modules as those of FLUX.1."""
    return (
        Mark("transformer", qkv, columns=width),
        Mark("transformer", "img_mlp.fc1", rows=4 * width),
        Mark("transformer", "linear1", rows=7 * width),
    )
