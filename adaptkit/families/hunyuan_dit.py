"""Hunyuan-DiT: 1.5 G parameters, 40 blocks of width 1408 with skips; a Chinese CLIP and mT5."""

from __future__ import annotations

from adaptkit.families._plain import matrices, norms, parameters
from adaptkit.families.contract import Kind, Mark, ModelFamily, row, sizes, transformer

BLOCK = "blocks.{i:40}."

ROWS = (
    *matrices("pos_embed.proj", kernel=(2, 2)),
    *matrices("text_embedder.linear_(1|2)", "time_extra_emb.pooler.(k|q|v|c)_proj"),
    *matrices("time_extra_emb.(timestep|extra)_embedder.linear_(1|2)"),
    row("time_extra_emb.style_embedder", kind=Kind.EMBEDDING),
    *parameters("text_embedding_padding", "time_extra_emb.pooler.positional_embedding"),
    *matrices(f"{BLOCK}attn(1|2).to_(q|k|v|out.0)", f"{BLOCK}ff.net.(0.proj|2)"),
    *matrices(f"{BLOCK}norm1.linear", f"{BLOCK}skip_linear"),
    *norms(f"{BLOCK}(norm1.norm|norm2|norm3|skip_norm)", f"{BLOCK}attn(1|2).norm_(q|k)"),
    *matrices("norm_out.linear", "proj_out"),
)

SIZES = sizes("dxd 2dxd dx2d dx1024 6144xd dx6144 4dxd dx4d", 1408) | sizes(
    "8192x2048 1024x8192 2048x2048 1024x2048 5632x3968 5632x1024 5632x2048 1408x5632"
)

FAMILY = ModelFamily(
    name="hunyuan-dit",
    title="Hunyuan-DiT",
    components=(transformer("Hunyuan-DiT transformer", ROWS, sizes=SIZES),),
    marks=(
        Mark("transformer", "attn1.to_q", columns=1408),
        Mark("transformer", "attn2.to_k", columns=1024),
        Mark("transformer", "ff.net.2", rows=1408),
    ),
    architectures=("hunyuan-dit", "hunyuandit"),
    modelspec="hunyuan-dit",
)
