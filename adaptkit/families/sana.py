"""Sana (0.6B, 1.6B, 4.8B), Sana-Sprint and Sana-Video: linear attention, convolutions as MLP.

Gemma 2 2B. Source: diffusers' `convert_sana_transformer_to_diffusers`.
"""

from __future__ import annotations

from adaptkit.families._plain import matrices, norms, parameters
from adaptkit.families.contract import Kind, Mark, ModelFamily, pair, sizes, split, transformer

OURS, THEIRS = "blocks.{i:60}.", "transformer_blocks.{i:60}."
WORDS = (
    ("transformer_blocks", "blocks"),
    ("attn1.to_out.0", "attn.proj"),
    ("attn2.to_out.0", "cross_attn.proj"),
    ("attn2.to_q", "cross_attn.q_linear"),
    ("attn1.norm_q", "attn.q_norm"),
    ("attn1.norm_k", "attn.k_norm"),
    ("attn2.norm_q", "cross_attn.q_norm"),
    ("attn2.norm_k", "cross_attn.k_norm"),
    ("ff.conv_inverted", "mlp.inverted_conv.conv"),
    ("ff.conv_depth", "mlp.depth_conv.conv"),
    ("ff.conv_point", "mlp.point_conv.conv"),
    ("ff.conv_temp", "mlp.t_conv"),
    ("patch_embed.proj", "x_embedder.proj"),
    ("time_embed.emb.timestep_embedder.linear_1", "t_embedder.mlp.0"),
    ("time_embed.emb.timestep_embedder.linear_2", "t_embedder.mlp.2"),
    ("time_embed.linear", "t_block.1"),
    ("caption_projection.linear_1", "y_embedder.y_proj.fc1"),
    ("caption_projection.linear_2", "y_embedder.y_proj.fc2"),
    ("caption_norm", "attention_y_norm"),
    ("proj_out", "final_layer.linear"),
)

ROWS = (
    *matrices("patch_embed.proj", words=WORDS, kernel=(1, 1)),
    *matrices("patch_embedding", kernel=(1, 2, 2)),  # Sana-Video
    *matrices("time_embed.emb.timestep_embedder.linear_(1|2)", "time_embed.linear", words=WORDS),
    *matrices("time_embed.(timestep|guidance)_embedder.linear_(1|2)"),  # Sana-Sprint
    *matrices("caption_projection.linear_(1|2)", words=WORDS),
    *norms("caption_norm", words=WORDS),
    pair(f"{OURS}attn.qkv", split(f"{THEIRS}attn1.to_", *"qkv")),
    pair(f"{OURS}cross_attn.kv_linear", split(f"{THEIRS}attn2.to_", *"kv")),
    *matrices(f"{THEIRS}attn2.to_q", f"{THEIRS}attn(1|2).to_out.0", words=WORDS),
    *norms(f"{THEIRS}attn(1|2).norm_(q|k)", words=WORDS),
    *matrices(f"{THEIRS}ff.conv_(inverted|point)", words=WORDS, kernel=(1, 1)),
    # each channel by itself, of which a low-rank product is no change
    *(
        one._replace(kind=Kind.EMBEDDING)
        for one in matrices(f"{THEIRS}ff.conv_depth", words=WORDS, kernel=(3, 3))
    ),
    *matrices(f"{THEIRS}ff.conv_temp", words=WORDS, kernel=(3, 1)),  # Sana-Video
    *parameters(f"{THEIRS}scale_shift_table", words=WORDS),
    *parameters("scale_shift_table", words=(("scale", "final_layer.scale"),)),
    *matrices("proj_out", words=WORDS),
)

# the MLP's gate and value are five widths together
SIZES = sizes("dxd 3dxd 2dxd 6dxd 5dxd dx2304", 1152, 2240) | sizes("2240x5600 1152x2880")

FAMILY = ModelFamily(
    name="sana",
    title="Sana",
    components=(transformer("Sana transformer", ROWS, sizes=SIZES),),
    marks=(
        Mark("transformer", ".attn.qkv", columns=(1152, 2240)),
        Mark("transformer", "cross_attn.kv_linear", columns=(1152, 2240)),
        Mark("transformer", ".attn.proj", rows=(1152, 2240)),
    ),
    architectures=("sana",),
    modelspec="sana",
    twins=((".attn.", ".cross_attn."),),
)
