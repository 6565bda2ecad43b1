"""CogVideoX (2B, 5B, 1.5) and ConsisID: video, 30 blocks of width 1920 or 42 of 3072; T5-XXL."""

from __future__ import annotations

from adaptkit.families._plain import matrices, norms, parameters
from adaptkit.families.contract import Mark, ModelFamily, sizes, transformer

BLOCK = "transformer_blocks.{i:42}."
WIDTHS = (1920, 3072)
FACE, PERCEIVER = "local_facial_extractor.", "perceiver_cross_attention.{i:21}."

# the face encoder of ConsisID
CONSISID = (
    *matrices(f"{FACE}layers.{{i:10}}.0.to_(q|kv|out)", f"{FACE}layers.{{i:10}}.1.(1|3)"),
    *norms(f"{FACE}layers.{{i:10}}.0.norm(1|2)", f"{FACE}layers.{{i:10}}.1.0"),
    *matrices(f"{FACE}(mapping_{{i:5}}|id_embedding_mapping).(0|3|6)"),
    *norms(f"{FACE}(mapping_{{i:5}}|id_embedding_mapping).(1|4)"),
    *parameters(f"{FACE}(latents|proj_out)"),
    *matrices(f"{PERCEIVER}to_(q|kv|out)"),
    *norms(f"{PERCEIVER}norm(1|2)"),
)

ROWS = (
    *matrices("patch_embed.(proj|text_proj)", "(time|ofs)_embedding.linear_(1|2)"),
    *parameters("patch_embed.pos_embedding"),
    *matrices(f"{BLOCK}attn1.to_(q|k|v|out.0)", f"{BLOCK}norm(1|2).linear"),
    *matrices(f"{BLOCK}ff.net.(0.proj|2)"),
    *norms(f"{BLOCK}attn1.norm_(q|k)", f"{BLOCK}norm(1|2).norm"),
    *norms("norm_final", "norm_out.norm"),
    *matrices("norm_out.linear", "proj_out"),
    *CONSISID,
)

SIZES = sizes("dxd 4dxd dx4d dx4096 6dx512 2dx512 512xd", *WIDTHS) | sizes(
    "512x512 1024x1024 2048x1024 4096x1024 1024x4096 "
    "1024x1280 5120x1024 2048x3072 4096x2048 3072x2048"  # ConsisID
)

FAMILY = ModelFamily(
    name="cogvideox",
    title="CogVideoX",
    components=(transformer("CogVideoX transformer", ROWS, sizes=SIZES),),
    marks=(
        Mark("transformer", "attn1.to_q", columns=WIDTHS),
        Mark("transformer", "norm1.linear", columns=512),
        Mark("transformer", "ff.net.2", rows=WIDTHS),
    ),
    architectures=("cogvideox", "consisid"),
    modelspec="CogVideoX",
)
