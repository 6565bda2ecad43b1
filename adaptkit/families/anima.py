"""Anima: 2 G parameters, 28 blocks of width 2048, a text adapter of six blocks; Qwen3-0.6B.

The checkpoint holds the text adapter inside the transformer (`llm_adapter.`), diffusers in a
component of its own (`text_conditioner`). Source: circlestone-labs' checkpoint (Cosmos-Predict2
names), mapped as in diffusers' Anima converter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.families._llm import qwen3
from adaptkit.families.contract import (
    NATIVE_PREFIXES,
    Component,
    Kind,
    Mark,
    ModelFamily,
    Row,
    named,
    pair,
    row,
    sizes,
    transformer,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCK, THEIRS = "blocks.{i:28}.", "transformer_blocks.{i:28}."
PREFIXES = ("net.", *NATIVE_PREFIXES)
ATTENTIONS = (("self_attn", "attn1"), ("cross_attn", "attn2"))
PROJECTIONS = (
    ("q_proj", "to_q"),
    ("k_proj", "to_k"),
    ("v_proj", "to_v"),
    ("output_proj", "to_out.0"),
)
BUFFERS = ("seq", "dim_spatial_range", "dim_temporal_range")  # constants in some files


def _blocks() -> Iterator[Row]:
    for ours, theirs in ATTENTIONS:
        for native, diffusers in PROJECTIONS:
            yield pair(f"{BLOCK}{ours}.{native}", f"{THEIRS}{theirs}.{diffusers}")
        for letter in "qk":
            yield pair(
                f"{BLOCK}{ours}.{letter}_norm", f"{THEIRS}{theirs}.norm_{letter}", kind=Kind.NORM
            )
    yield pair(f"{BLOCK}mlp.layer1", f"{THEIRS}ff.net.0.proj")
    yield pair(f"{BLOCK}mlp.layer2", f"{THEIRS}ff.net.2")
    for part, norm in (("self_attn", "norm1"), ("cross_attn", "norm2"), ("mlp", "norm3")):
        for n in (1, 2):
            yield pair(f"{BLOCK}adaln_modulation_{part}.{n}", f"{THEIRS}{norm}.linear_{n}")


ROWS = (
    pair("x_embedder.proj.1", "patch_embed.proj"),
    pair("t_embedder.1.linear_1", "time_embed.t_embedder.linear_1"),
    pair("t_embedder.1.linear_2", "time_embed.t_embedder.linear_2"),
    pair("t_embedding_norm", "time_embed.norm", kind=Kind.NORM),
    *(
        row(
            f"pos_embedder.{n}",
            native=named(f"pos_embedder.{n}", weight=f"pos_embedder.{n}"),
            kind=Kind.NORM,
        )
        for n in BUFFERS
    ),
    *_blocks(),
    pair("final_layer.linear", "proj_out"),
    pair("final_layer.adaln_modulation.1", "norm_out.linear_1"),
    pair("final_layer.adaln_modulation.2", "norm_out.linear_2"),
)


def _conditioner(block: str = "blocks.{i:6}.") -> Iterator[Row]:
    yield row("embed", kind=Kind.EMBEDDING)
    for attention, _ in ATTENTIONS:
        yield from (row(f"{block}{attention}.{letter}_proj") for letter in "qkvo")
        yield from (row(f"{block}{attention}.{letter}_norm", kind=Kind.NORM) for letter in "qk")
    yield row(f"{block}mlp.0")
    yield row(f"{block}mlp.2")
    yield from (
        row(f"{block}norm_{name}", kind=Kind.NORM) for name in ("self_attn", "cross_attn", "mlp")
    )
    yield row("out_proj")
    yield row("norm", kind=Kind.NORM)


# no tag `root`: without a prefix, its blocks could be the transformer's
CONDITIONER = Component(
    name="text_conditioner",
    title="Anima text conditioner",
    rows=tuple(_conditioner()),
    checkpoints={
        "native": tuple(f"{prefix}llm_adapter." for prefix in PREFIXES),
        "diffusers": ("text_conditioner.",),
    },
    tags={
        "kohya": ("unet_llm_adapter",),
        "comfy": ("diffusion_model.llm_adapter", "model.diffusion_model.llm_adapter"),
        "diffusers": ("text_conditioner",),
    },
    sizes=sizes("dxd 4dxd dx4d", 1024),
)

SIZES = sizes("dxd 3dxd 4dxd dx4d dx1024", 2048)

FAMILY = ModelFamily(
    name="anima",
    title="Anima",
    components=(
        transformer("Anima transformer", ROWS, sizes=SIZES, native_prefixes=PREFIXES),
        CONDITIONER,
        qwen3("0.6B", 28, comfy="qwen3_06b"),
    ),
    marks=(
        Mark("transformer", "self_attn.q_proj", columns=2048),
        Mark("transformer", "cross_attn.k_proj", columns=1024),
        Mark("text_encoder", "self_attn.q_proj", columns=1024),
    ),
    architectures=("anima",),
    modelspec="anima-preview",
    twins=((".self_attn.", ".cross_attn."),),  # as in LTX-Video
    # self-attention alone in diffusers' names fits both; Anima's trainers use native names
    yields_to=("ltx",),
)
