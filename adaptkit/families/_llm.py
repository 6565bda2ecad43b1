"""Rows of language models used as text encoders.

Gemma 2, Qwen 3, Llama. Source: transformers' `Gemma2Model`, `Qwen3Model` and `LlamaModel`.
Checkpoints and adapters use these names, with the prefix `model.` for models with a language head.
"""

from __future__ import annotations

from adaptkit.families.contract import Component, Kind, Row, row, sizes

__all__ = ["gemma2_2b", "llm", "llm_rows", "qwen3"]

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def llm_rows(
    layers: int, *, qk_norms: bool = False, feedforward_norms: bool = False
) -> tuple[Row, ...]:
    """A decoder; `qk_norms`: norms of q and k (Qwen 3), `feedforward_norms`: Gemma 2's."""
    layer = f"layers.{{i:{layers}}}."
    norms = ["input_layernorm", "post_attention_layernorm"]
    norms += ["self_attn.q_norm", "self_attn.k_norm"] * qk_norms
    norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] * feedforward_norms
    return (
        row("embed_tokens", kind=Kind.EMBEDDING),
        *(row(f"{layer}self_attn.{name}") for name in ATTENTION),
        *(row(f"{layer}mlp.{name}") for name in MLP),
        *(row(layer + name, kind=Kind.NORM) for name in norms),
        row("norm", kind=Kind.NORM),
    )


# sizes by title
SIZES = {
    "Llama 3 8B": sizes("dxd 1024xd 14336xd dx14336", 4096),
    "Qwen2.5-VL 7B": sizes("dxd 512xd 18944xd dx18944", 3584),
    "Qwen 3 0.6B": sizes("dxd 2dxd dx2d 3dxd dx3d", 1024),
    "Qwen 3 4B": sizes("4096xd dx4096 1024xd 9728xd dx9728", 2560),
    "Gemma 2 2B": sizes("2048xd dx2048 1024xd 4dxd dx4d", 2304),
}


def llm(
    title: str, rows: tuple[Row, ...], *, comfy: str, kohya: tuple[str, ...] = ("te",)
) -> Component:
    """A language model as a pipeline's only text encoder.

    `comfy` is its name in ComfyUI.

    ComfyUI keeps the language head, so its keys have the prefix `model.`; others are read too.
    """
    ours, theirs = f"text_encoders.{comfy}.transformer", "text_encoder"
    return Component(
        name=theirs,
        title=title,
        rows=rows,
        sizes=SIZES[title],
        checkpoints={"diffusers": (f"{ours}.model.", f"{ours}.", f"{theirs}.model.", f"{theirs}.")},
        tags={
            "kohya": kohya,
            "onetrainer": kohya,
            "comfy": (f"{ours}.model", ours),
            "root": ("",),
            "diffusers": (theirs, f"{theirs}.model"),
        },
    )


def gemma2_2b() -> Component:
    """Gemma 2 2B, 2304 wide."""
    return llm("Gemma 2 2B", llm_rows(26, feedforward_norms=True), comfy="gemma2_2b")


def qwen3(size: str, layers: int, *, comfy: str, kohya: tuple[str, ...] = ("te",)) -> Component:
    """Qwen 3: 0.6B has 28 layers of width 1024, 4B has 36 layers of width 2560."""
    return llm(f"Qwen 3 {size}", llm_rows(layers, qk_norms=True), comfy=comfy, kohya=kohya)
