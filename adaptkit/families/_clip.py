"""Rows of CLIP text encoders, in Hugging Face's and OpenCLIP's naming.

OpenCLIP fuses q, k and v. Source: transformers' `CLIPTextModel` and open_clip's `TextTransformer`,
mapped as in diffusers' `convert_open_clip_checkpoint` (in_proj is q, k, v in thirds;
`text_projection` is stored transposed).
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from adaptkit.families.contract import Component, Kind, Name, Row, named, row, sizes, split

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["clip_g", "clip_l", "clip_rows", "clip_sizes", "openclip_rows"]

ROOT = "text_model."


def clip_l(
    *,
    name: str = "text_encoder",
    kohya: tuple[str, ...] = ("te1",),
    prefixes: tuple[str, ...] = (),
    projection: bool = False,
    alone: bool = True,
) -> Component:
    """CLIP-L as diffusers' component `name`; `prefixes` are those of single-file checkpoints.

    `alone`: the pipeline has no other CLIP, so that names without a component mean this one.
    """
    comfy = "text_encoders.clip_l.transformer"
    checkpoints = (*prefixes, f"{comfy}.", f"{name}.")
    return Component(
        name=name,
        title="CLIP-L",
        rows=(*clip_rows(12), *([row("text_projection")] if projection else ())),
        checkpoints={"diffusers": checkpoints, "flat": checkpoints},
        sizes=clip_sizes(768),
        tags=_tags(name, kohya, comfy) | ({"root": ("",)} if alone else {}),
    )


def clip_g(
    *,
    name: str = "text_encoder_2",
    kohya: tuple[str, ...] = ("te2",),
    native: tuple[str, ...] = (),
) -> Component:
    """OpenCLIP-G as diffusers' component `name`.

    `native` are the prefixes of files with OpenCLIP names.
    """
    comfy = "text_encoders.clip_g.transformer"
    checkpoints = {"diffusers": (f"{comfy}.", f"{name}.")}
    return Component(
        name=name,
        title="OpenCLIP-G",
        rows=openclip_rows(32, projection=True),
        sizes=clip_sizes(1280),
        checkpoints=checkpoints | ({"native": native} if native else {}),
        tags=_tags(name, kohya, comfy),
    )


def clip_sizes(width: int) -> frozenset[tuple[int, int]]:
    """The sizes of a CLIP of this width."""
    return sizes("dxd 3dxd 4dxd dx4d", width)


def _tags(name: str, kohya: tuple[str, ...], comfy: str) -> dict[str, tuple[str, ...]]:
    return {"kohya": kohya, "onetrainer": kohya, "comfy": (comfy,), "diffusers": (name,)}


@cache
def clip_rows(layers: int) -> tuple[Row, ...]:
    """CLIP under Hugging Face names; `flat` is transformers 5's naming, without `text_model.`."""
    layer = f"encoder.layers.{{i:{layers}}}."
    matrices = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.out_proj",
        "mlp.fc1",
        "mlp.fc2",
    )
    return (
        *(_flat(f"embeddings.{name}_embedding", Kind.EMBEDDING) for name in ("token", "position")),
        *(_flat(layer + name, Kind.MATRIX) for name in matrices),
        *(_flat(layer + name, Kind.NORM) for name in ("layer_norm1", "layer_norm2")),
        _flat("final_layer_norm", Kind.NORM),
    )


def _flat(module: str, kind: Kind) -> Row:
    return row(ROOT + module, flat=module, kind=kind, **_processor(ROOT + module))


def _processor(module: str) -> dict[str, Any]:
    """Names of attention adapters in diffusers < 0.20: `self_attn.to_q_lora`, `to_out_lora`."""
    stem, _, name = module.rpartition(".")
    return (
        {"processor": f"{stem}.to_{name.partition('_')[0]}_lora"}
        if stem.endswith("self_attn")
        else {}
    )


@cache
def openclip_rows(layers: int, *, projection: bool) -> tuple[Row, ...]:
    """CLIP with OpenCLIP names in checkpoints (`native`); adapters use Hugging Face names."""
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
    yield row(
        f"{ours}self_attn.in_proj",
        diffusers=qkv,
        native=_in_proj(f"{theirs}attn.in_proj"),
        processor=old,
    )
    yield row(
        f"{ours}self_attn.out_proj",
        native=f"{theirs}attn.out_proj",
        processor=f"{ours}self_attn.to_out_lora",
    )
    yield row(f"{ours}mlp.fc1", native=f"{theirs}mlp.c_fc")
    yield row(f"{ours}mlp.fc2", native=f"{theirs}mlp.c_proj")
    yield row(f"{ours}layer_norm1", native=f"{theirs}ln_1", kind=Kind.NORM)
    yield row(f"{ours}layer_norm2", native=f"{theirs}ln_2", kind=Kind.NORM)


def _in_proj(module: str) -> Name:
    return named(module, weight=f"{module}_weight", bias=f"{module}_bias")
