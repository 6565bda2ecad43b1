"""Rows of CLIP text encoders, in Hugging Face names and in OpenCLIP's, which fuse q, k and v.

Source: transformers' `CLIPTextModel` and open_clip's `TextTransformer`, related as diffusers'
`convert_open_clip_checkpoint` does (in_proj is q, k, v in thirds; `text_projection` is stored transposed).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.families._family import Component, Kind, Name, Row, named, row, split

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["clip_g", "clip_l", "clip_rows", "openclip_rows"]

ROOT = "text_model."


def clip_l(*, kohya: tuple[str, ...] = ("te1",), prefixes: tuple[str, ...] = ()) -> Component:
    """CLIP-L as a pipeline's first text encoder; `prefixes` are those of single-file checkpoints."""
    comfy = "text_encoders.clip_l.transformer"
    checkpoints = (*prefixes, f"{comfy}.", "text_encoder.")
    return Component(
        name="text_encoder",
        title="CLIP-L",
        rows=clip_rows(12),
        checkpoints={"diffusers": checkpoints, "flat": checkpoints},
        tags={"kohya": kohya, "onetrainer": kohya, "comfy": (comfy,), "root": ("",), "diffusers": ("text_encoder",)},
    )


def clip_g(*, prefixes: tuple[str, ...] = ("conditioner.embedders.1.model.",), native: str = "native") -> Component:
    """OpenCLIP-G as a pipeline's second text encoder; `prefixes` those of single-file checkpoints, in `native` names."""
    comfy = "text_encoders.clip_g.transformer"
    theirs = (f"{comfy}.", "text_encoder_2.")
    ours = {"native": prefixes, "diffusers": theirs} if native == "native" else {"diffusers": (*prefixes, *theirs)}
    return Component(
        name="text_encoder_2",
        title="OpenCLIP-G",
        rows=openclip_rows(32, projection=True),
        checkpoints=ours,
        tags={
            "kohya": ("te2",),
            "onetrainer": ("te2",),
            "comfy": (comfy,),
            "root": ("",),
            "diffusers": ("text_encoder_2",),
        },
    )


def clip_rows(layers: int) -> tuple[Row, ...]:
    """CLIP with Hugging Face names; `flat` is what transformers 5 calls them, without `text_model.`."""
    layer = f"encoder.layers.{{i:{layers}}}."
    matrices = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
    return (
        *(_flat(f"embeddings.{name}_embedding", Kind.EMBEDDING) for name in ("token", "position")),
        *(_flat(layer + name, Kind.MATRIX) for name in matrices),
        *(_flat(layer + name, Kind.NORM) for name in ("layer_norm1", "layer_norm2")),
        _flat("final_layer_norm", Kind.NORM),
    )


def _flat(module: str, kind: Kind) -> Row:
    return row(ROOT + module, flat=module, kind=kind, **_processor(ROOT + module))


def _processor(module: str) -> dict[str, str]:
    """What diffusers before 0.20 called the adapters of attention layers: `self_attn.to_q_lora`, `to_out_lora`."""
    stem, _, name = module.rpartition(".")
    return {"processor": f"{stem}.to_{name.partition('_')[0]}_lora"} if stem.endswith("self_attn") else {}


def openclip_rows(layers: int, *, projection: bool) -> tuple[Row, ...]:
    """CLIP whose checkpoints carry OpenCLIP names (`native`); adapters always use the Hugging Face ones."""
    rows = [*_openclip_ends(), *_openclip_layer(layers)]
    if projection:
        transposed = named("text_projection", weight="text_projection", transposed=True)
        rows.append(row("text_projection", native=transposed))
    return tuple(rows)


def _openclip_ends() -> Iterator[Row]:
    bare = named("positional_embedding", weight="positional_embedding")
    yield row(f"{ROOT}embeddings.token_embedding", native="token_embedding", kind=Kind.EMBEDDING)
    yield row(f"{ROOT}embeddings.position_embedding", native=bare, kind=Kind.EMBEDDING)
    yield row(f"{ROOT}final_layer_norm", native="ln_final", kind=Kind.NORM)


def _openclip_layer(layers: int) -> Iterator[Row]:
    ours = f"{ROOT}encoder.layers.{{i:{layers}}}."
    theirs = f"transformer.resblocks.{{i:{layers}}}."
    qkv = split(f"{ours}self_attn.", "q_proj", "k_proj", "v_proj")
    old = split(f"{ours}self_attn.", "to_q_lora", "to_k_lora", "to_v_lora")
    yield row(f"{ours}self_attn.in_proj", diffusers=qkv, native=_in_proj(f"{theirs}attn.in_proj"), processor=old)
    yield row(f"{ours}self_attn.out_proj", native=f"{theirs}attn.out_proj", processor=f"{ours}self_attn.to_out_lora")
    yield row(f"{ours}mlp.fc1", native=f"{theirs}mlp.c_fc")
    yield row(f"{ours}mlp.fc2", native=f"{theirs}mlp.c_proj")
    yield row(f"{ours}layer_norm1", native=f"{theirs}ln_1", kind=Kind.NORM)
    yield row(f"{ours}layer_norm2", native=f"{theirs}ln_2", kind=Kind.NORM)


def _in_proj(module: str) -> Name:
    return named(module, weight=f"{module}_weight", bias=f"{module}_bias")
