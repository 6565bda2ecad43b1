"""Bria FIBO: 8 double and 38 single blocks of width 3072 with FLUX.1's names; SmolLM3 3B.

Each block has a projection of the language model's layers of its own.
"""

from __future__ import annotations

from adaptkit.families._plain import matrices, norms
from adaptkit.families.contract import Mark, ModelFamily, sizes, transformer

DOUBLE, SINGLE = "transformer_blocks.{i:8}.", "single_transformer_blocks.{i:38}."

ROWS = (
    *matrices("time_embed.timestep_embedder.linear_(1|2)", "context_embedder", "x_embedder"),
    *matrices("caption_projection.{i:46}.linear"),
    *matrices(f"{DOUBLE}(norm1|norm1_context).linear", f"{DOUBLE}(ff|ff_context).net.(0.proj|2)"),
    *matrices(
        f"{DOUBLE}attn.(to_q|to_k|to_v|to_out.0|to_add_out)", f"{DOUBLE}attn.add_(q|k|v)_proj"
    ),
    *norms(f"{DOUBLE}attn.(norm|norm_added)_(q|k)"),
    *matrices(f"{SINGLE}(norm.linear|proj_mlp|proj_out)", f"{SINGLE}attn.to_(q|k|v)"),
    *norms(f"{SINGLE}attn.norm_(q|k)"),
    *matrices("norm_out.linear", "proj_out"),
)

FAMILY = ModelFamily(
    name="bria-fibo",
    title="Bria FIBO",
    components=(
        transformer(
            "Bria FIBO transformer",
            ROWS,
            sizes=sizes("dxd 2dxd 3dxd 4dxd 6dxd dx4d dx5d dx4096 1536x2048", 3072),
        ),
    ),
    marks=(
        Mark("transformer", "attn.to_q", columns=3072),
        Mark("transformer", "ff.net.0.proj", rows=12288),
        Mark("transformer", "proj_mlp", rows=12288),
    ),
    architectures=("bria-fibo", "fibo"),
    modelspec="bria-fibo",
    # blocks alone fit all of them
    yields_to=("flux", "chroma", "hunyuan-video", "framepack"),
)
