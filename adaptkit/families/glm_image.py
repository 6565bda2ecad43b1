"""GLM-Image: 30 blocks of width 4096, as CogView4's, and projections of glyphs and tokens."""

from __future__ import annotations

from adaptkit.families._plain import matrices
from adaptkit.families.contract import Kind, Mark, ModelFamily, row, sizes, transformer

BLOCK = "transformer_blocks.{i:30}."

ROWS = (
    *matrices("image_projector.proj", "(glyph|prior)_projector.net.(0.proj|2)"),
    row("prior_token_embedding", kind=Kind.EMBEDDING),
    *matrices("time_condition_embed.(timestep|condition)_embedder.linear_(1|2)"),
    *matrices(
        f"{BLOCK}norm1.linear", f"{BLOCK}attn1.to_(q|k|v|out.0)", f"{BLOCK}ff.net.(0.proj|2)"
    ),
    *matrices("norm_out.linear", "proj_out"),
)

FAMILY = ModelFamily(
    name="glm-image",
    title="GLM-Image",
    components=(
        transformer(
            "GLM-Image transformer",
            ROWS,
            sizes=sizes("dxd 4dxd dx4d 12dx512 2dx512 dx1472 512x512 512x1024", 4096),
        ),
    ),
    marks=(
        Mark("transformer", "attn1.to_q", columns=4096),
        Mark("transformer", "norm1.linear", columns=512),
        Mark("transformer", "ff.net.2", rows=4096),
    ),
    architectures=("glm-image", "glm_image"),
    modelspec="GLM-Image",
    yields_to=("cogview4", "ltx2", "ltx-13b"),  # if the last blocks are missing
)
