"""Rows of T5 encoders (T5-XXL, UMT5-XXL), which have one naming.

Source: transformers' `T5EncoderModel` and `UMT5EncoderModel`.
"""

from __future__ import annotations

from functools import cache

from adaptkit.families.contract import Component, Kind, Row, row, sizes

__all__ = ["t5", "t5_rows"]


@cache
def t5_rows(layers: int, *, bias_everywhere: bool = False) -> tuple[Row, ...]:
    """A T5 encoder; `bias_everywhere`: position bias in all layers (UMT5)."""
    block = f"encoder.block.{{i:{layers}}}."
    first = block if bias_everywhere else "encoder.block.0."
    return (
        row("shared", kind=Kind.EMBEDDING),
        row("encoder.embed_tokens", kind=Kind.EMBEDDING),
        *(row(f"{block}layer.0.SelfAttention.{name}") for name in ("q", "k", "v", "o")),
        *(row(f"{block}layer.1.DenseReluDense.{name}") for name in ("wi_0", "wi_1", "wo")),
        row(f"{first}layer.0.SelfAttention.relative_attention_bias", kind=Kind.EMBEDDING),
        row(f"{block}layer.0.layer_norm", kind=Kind.NORM),
        row(f"{block}layer.1.layer_norm", kind=Kind.NORM),
        row("encoder.final_layer_norm", kind=Kind.NORM),
    )


def t5(
    name: str,
    *,
    kohya: tuple[str, ...] = (),
    onetrainer: tuple[str, ...] | None = None,
    comfy: str = "text_encoders.t5xxl.transformer",
) -> Component:
    """T5-XXL as diffusers' component `name`.

    `kohya` are the prefixes `lora_<tag>_` it goes by, the written one first; `onetrainer` those of
    OneTrainer, where they differ.
    """
    return Component(
        name=name,
        title="T5-XXL",
        rows=t5_rows(24),
        sizes=sizes("4096x4096 10240x4096 4096x10240"),
        checkpoints={"diffusers": (f"{name}.", f"{comfy}.", "")},
        tags={
            "kohya": kohya,
            "onetrainer": kohya if onetrainer is None else onetrainer,
            "comfy": (comfy,),
            "root": ("",),
            "diffusers": (name,),
        },
    )
