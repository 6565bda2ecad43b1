"""HiDream-O1: pixels drawn by Qwen3-VL 8B, 36 layers 4096 wide, with patches in and out.

The original and musubi-tuner have `model.` before its names, ComfyUI has not. The language model
sees references with Qwen3-VL's own vision tower. Source: transformers' `Qwen3VLModel`, ComfyUI's
`comfy/ldm/hidream_o1`, and musubi-tuner's `lora_hidream_o1`.
"""

from __future__ import annotations

from dataclasses import replace

from adaptkit.families._llm import llm_rows
from adaptkit.families._plain import matrices, norms
from adaptkit.families.contract import Kind, Mark, ModelFamily, Row, named, row, sizes, transformer


def _in_original(plain: Row) -> Row:
    """A row with the original's name."""
    return plain._replace(names={**plain.names, "native": (named(f"model.{plain.target}"),)})


VISION = "visual.blocks.{i:27}."

PLAIN = (
    *(row(f"language_model.{one.target}", kind=one.kind) for one in llm_rows(36, qk_norms=True)),
    *matrices("t_embedder1.mlp.(0|2)", "x_embedder.proj(1|2)", "final_layer2.linear"),
    *matrices("visual.patch_embed.proj", kernel=(2, 16, 16)),
    row("visual.pos_embed", kind=Kind.EMBEDDING),
    *matrices(f"{VISION}attn.(qkv|proj)", f"{VISION}mlp.linear_fc(1|2)"),
    *norms(f"{VISION}norm(1|2)", "visual.merger.norm", "visual.deepstack_merger_list.{i:3}.norm"),
    *matrices("visual.merger.linear_fc(1|2)", "visual.deepstack_merger_list.{i:3}.linear_fc(1|2)"),
    row("lm_head", kind=Kind.EMBEDDING),  # unused
)
ROWS = tuple(map(_in_original, PLAIN))

SIZES = sizes(
    "dxd 1024xd 12288xd dx12288 dx1024 1024x3072 3072xd "
    "3456x1152 1152x1152 4304x1152 1152x4304 4608x4608 dx4608",
    4096,
)

TRANSFORMER = transformer("HiDream-O1 transformer", ROWS, sizes=SIZES, comfy="diffusers")

FAMILY = ModelFamily(
    name="hidream-o1",
    title="HiDream-O1",
    # no names without a prefix: an adapter of Qwen3-VL itself has them
    components=(
        replace(TRANSFORMER, tags={k: v for k, v in TRANSFORMER.tags.items() if k != "root"}),
    ),
    marks=(
        Mark("transformer", "self_attn.q_proj", columns=4096),
        Mark("transformer", "self_attn.k_proj", rows=1024),
        Mark("transformer", "mlp.gate_proj", rows=12288),
    ),
    architectures=("hidream-o1", "hidream_o1"),
    modelspec="hidream-o1",
    needs=("x_embedder.proj1", "final_layer2.linear"),  # Qwen3-VL itself has all else
)
