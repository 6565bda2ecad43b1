"""Rows of MMDiT, the transformer of Stable Diffusion 3 and 3.5.

Source: Stability-AI `sd3.5/mmditx.py` and diffusers' `SD3Transformer2DModel`, mapped as in
diffusers' `convert_sd3_transformer_checkpoint_to_diffusers`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.families._clip import clip_g, clip_l
from adaptkit.families._t5 import t5
from adaptkit.families.contract import (
    Component,
    Kind,
    Mark,
    Row,
    named,
    pair,
    sizes,
    split,
    swapped,
    transformer,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["components", "marks"]

NORMS = ("q", "k")


def components(title: str, layers: int, width: int, *, dual: int = 0) -> tuple[Component, ...]:
    """All components of a model; its first `dual` layers have a second attention."""
    return (
        transformer(
            title,
            (*_ends(), *_layers(layers), *_dual(dual)),
            sizes=sizes("dxd 2dxd 3dxd 4dxd 6dxd 9dxd dx4d dx2048 dx4096", width),
        ),
        clip_l(projection=True, alone=False),
        clip_g(),
        t5("text_encoder_3", kohya=("te3",)),
    )


def marks(width: int) -> tuple[Mark, ...]:
    """Marks of a transformer of this width."""
    names = (
        "x_block.attn.qkv",
        "x_block.attn.proj",
        "x_block.mlp.fc1",
        "x_block.adaLN_modulation.1",
    )
    return tuple(
        Mark("transformer", name.replace("x_block", block), columns=width)
        for name in names
        # both sides, as an adapter may hold only one of them
        for block in ("x_block", "context_block")
    )


def _ends() -> Iterator[Row]:
    yield pair("x_embedder.proj", "pos_embed.proj", kernel=(2, 2))
    bare, theirs = (
        named("pos_embed", weight="pos_embed"),
        named("pos_embed.pos_embed", weight="pos_embed.pos_embed"),
    )
    yield pair(bare, theirs, kind=Kind.EMBEDDING)
    yield pair("context_embedder", "context_embedder")
    for ours, name in (("t_embedder", "timestep_embedder"), ("y_embedder", "text_embedder")):
        for n, m in ((0, 1), (2, 2)):
            yield pair(f"{ours}.mlp.{n}", f"time_text_embed.{name}.linear_{m}")
    yield pair("final_layer.linear", "proj_out")
    # diffusers' AdaLayerNormContinuous stores scale before shift, the original shift before scale
    yield pair("final_layer.adaLN_modulation.1", swapped("norm_out.linear"))


def _layers(layers: int) -> Iterator[Row]:
    """All layers. The last one modulates its text side like a final layer, swapped.

    That side only feeds the attention.
    """
    ours, theirs = f"joint_blocks.{{i:{layers}}}.", f"transformer_blocks.{{i:{layers}}}."
    yield from _attention(f"{ours}x_block.attn", f"{theirs}attn", "to_{}", "norm_{}")
    yield from _attention(
        f"{ours}context_block.attn", f"{theirs}attn", "add_{}_proj", "norm_added_{}"
    )
    yield from _rest(f"{ours}x_block.", theirs, "to_out.0", "ff", "norm1")
    # the last layer has no text MLP: its text output is not used
    last = layers - 1
    ours, theirs = f"joint_blocks.{{i:{last}}}.", f"transformer_blocks.{{i:{last}}}."
    yield from _rest(f"{ours}context_block.", theirs, "to_add_out", "ff_context", "norm1_context")
    modulation = swapped(f"transformer_blocks.{last}.norm1_context.linear")
    yield pair(f"joint_blocks.{last}.context_block.adaLN_modulation.1", modulation)


def _dual(layers: int) -> Iterator[Row]:
    """The second attention of the image side (SD 3.5 medium)."""
    if layers:
        ours, theirs = (
            f"joint_blocks.{{i:{layers}}}.x_block.attn2",
            f"transformer_blocks.{{i:{layers}}}.attn2",
        )
        yield from _attention(ours, theirs, "to_{}", "norm_{}")
        yield pair(f"{ours}.proj", f"{theirs}.to_out.0")


def _attention(ours: str, theirs: str, project: str, norm: str) -> Iterator[Row]:
    """Fused q, k and v, with norms in SD 3.5 only."""
    yield pair(f"{ours}.qkv", split(f"{theirs}.", *(project.format(letter) for letter in "qkv")))
    for letter in NORMS:
        yield pair(f"{ours}.ln_{letter}", f"{theirs}.{norm.format(letter)}", kind=Kind.NORM)


def _rest(ours: str, theirs: str, out: str, mlp: str, norm: str) -> Iterator[Row]:
    yield pair(f"{ours}attn.proj", f"{theirs}attn.{out}")
    yield pair(f"{ours}mlp.fc1", f"{theirs}{mlp}.net.0.proj")
    yield pair(f"{ours}mlp.fc2", f"{theirs}{mlp}.net.2")
    yield pair(f"{ours}adaLN_modulation.1", f"{theirs}{norm}.linear")
