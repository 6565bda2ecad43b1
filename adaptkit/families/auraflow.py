"""AuraFlow: 6.8 G parameters, 4 double and 32 single blocks; Pile-T5-XL.

Source: ComfyUI's and diffusers' converters of `AuraFlowTransformer2DModel`.
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
    sizes,
    swapped,
    transformer,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

DOUBLE, JOINT = "double_layers.{i:4}.", "joint_transformer_blocks.{i:4}."
SINGLE, ALONE = "single_layers.{i:32}.", "single_transformer_blocks.{i:32}."


def _bare(native: str, diffusers: str) -> Row:
    """A parameter without a module of its own."""
    return pair(named(native, weight=native), named(diffusers, weight=diffusers), kind=Kind.NORM)


def _mlp(ours: str, theirs: str) -> Iterator[Row]:
    for native, diffusers in (
        ("c_fc1", "linear_1"),
        ("c_fc2", "linear_2"),
        ("c_proj", "out_projection"),
    ):
        yield pair(f"{ours}.{native}", f"{theirs}.{diffusers}")


def _attention(ours: str, *theirs: str) -> Iterator[Row]:
    for letter, name in zip("qkvo", theirs, strict=True):
        yield pair(ours + letter, name)


ROWS = (
    pair("init_x_linear", "pos_embed.proj"),
    _bare("positional_encoding", "pos_embed.pos_embed"),
    _bare("register_tokens", "register_tokens"),
    pair("cond_seq_linear", "context_embedder"),
    pair("t_embedder.mlp.0", "time_step_proj.linear_1"),
    pair("t_embedder.mlp.2", "time_step_proj.linear_2"),
    # in a double block the text comes first (w1, C), the image second (w2, X)
    *_attention(
        f"{DOUBLE}attn.w2", *(f"{JOINT}attn.to_{name}" for name in ("q", "k", "v", "out.0"))
    ),
    *_attention(
        f"{DOUBLE}attn.w1",
        *(f"{JOINT}attn.add_{name}_proj" for name in "qkv"),
        f"{JOINT}attn.to_add_out",
    ),
    *_mlp(f"{DOUBLE}mlpX", f"{JOINT}ff"),
    *_mlp(f"{DOUBLE}mlpC", f"{JOINT}ff_context"),
    pair(f"{DOUBLE}modX.1", f"{JOINT}norm1.linear"),
    pair(f"{DOUBLE}modC.1", f"{JOINT}norm1_context.linear"),
    *_attention(
        f"{SINGLE}attn.w1", *(f"{ALONE}attn.to_{name}" for name in ("q", "k", "v", "out.0"))
    ),
    *_mlp(f"{SINGLE}mlp", f"{ALONE}ff"),
    pair(f"{SINGLE}modCX.1", f"{ALONE}norm1.linear"),
    pair("final_linear", "proj_out"),
    # scale before shift in diffusers, shift before scale in the original
    pair("modF.1", swapped("norm_out.linear")),
)

SIZES = sizes("dxd 2dxd 6dxd dx2048 8192xd dx8192", 3072)

FAMILY = ModelFamily(
    name="auraflow",
    title="AuraFlow",
    components=(transformer("AuraFlow transformer", ROWS, sizes=SIZES),),
    marks=(
        Mark("transformer", "attn.w1q", columns=3072),
        Mark("transformer", "attn.w2q", columns=3072),
    ),
    architectures=("auraflow", "aura-flow"),
    modelspec="auraflow",
    yields_to=("flux",),  # q, k and v of single blocks alone fit both
)
