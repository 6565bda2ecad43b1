"""Anima: 2 G parameters, 28 blocks of width 2048, a text adapter of six blocks; Qwen3-0.6B.

The checkpoint holds the text adapter inside the transformer (`llm_adapter.`), diffusers in a
component of its own (`text_conditioner`). Source: circlestone-labs' checkpoint (Cosmos-Predict2
names), mapped as in diffusers' Anima converter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.families._cosmos import ATTENTIONS, PREFIXES, transformer_rows
from adaptkit.families._llm import qwen3
from adaptkit.families.contract import (
    Component,
    Kind,
    Mark,
    ModelFamily,
    Row,
    row,
    sizes,
    transformer,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

ROWS = transformer_rows(28)


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
