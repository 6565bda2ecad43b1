"""Wan 2.1 and 2.2: video, 1.3B (30 blocks), 5B (30) and 14B (40), and the models made of them.

They have the same blocks, and layers of their own: FLF2V, VACE, Animate, S2V, Fun-Control and
Fun-Camera, HuMo, ReCamMaster, SCAIL, Helios, SkyReels V2, ChronoEdit, AnyFlow. Those that diffusers
has no class for keep the names of their checkpoints.

Wan 2.2 A14B has two experts of 14B. Their adapters are two files that do not name their expert,
except in diffusers, where `transformer_2` is the low-noise one. Source: Wan-AI
`wan/modules/model.py` and diffusers' `WanTransformer3DModel`, `WanVACETransformer3DModel`, mapped
as in diffusers' `convert_wan_to_diffusers`; ComfyUI's `comfy/ldm/wan/model.py` for S2V, Fun, HuMo
and SCAIL.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.families._plain import matrices, norms, parameters
from adaptkit.families.contract import (
    Component,
    Kind,
    Mark,
    ModelFamily,
    Row,
    named,
    pair,
    row,
    sizes,
    split,
    transformer,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

ATTENTION = (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))
IMAGE = (("k_img", "add_k_proj"), ("v_img", "add_v_proj"))  # Wan 2.1 image to video
EMBEDDER = "condition_embedder."


def _bare(native: str, diffusers: str) -> Row:
    """A parameter without a module of its own."""
    return pair(named(native, weight=native), named(diffusers, weight=diffusers), kind=Kind.NORM)


def _block(block: str) -> Iterator[Row]:
    """A block; both namings share its stem."""
    for ours, theirs, more in (("self_attn", "attn1", ()), ("cross_attn", "attn2", IMAGE)):
        for native, diffusers in (*ATTENTION, *more):
            yield pair(f"{block}{ours}.{native}", f"{block}{theirs}.{diffusers}")
        for letter in "qk":
            yield pair(
                f"{block}{ours}.norm_{letter}", f"{block}{theirs}.norm_{letter}", kind=Kind.NORM
            )
    yield pair(f"{block}cross_attn.norm_k_img", f"{block}attn2.norm_added_k", kind=Kind.NORM)
    yield pair(f"{block}ffn.0", f"{block}ffn.net.0.proj")
    yield pair(f"{block}ffn.2", f"{block}ffn.net.2")
    # the original numbers its norms 1, 3, 2 in the order of use; only this one has parameters
    yield pair(f"{block}norm3", f"{block}norm2", kind=Kind.NORM)
    yield _bare(f"{block}modulation", f"{block}scale_shift_table")


def _animate() -> Iterator[Row]:
    """The face adapter of Wan Animate."""
    yield row("pose_patch_embedding", kernel=(1, 2, 2))
    for name in ("conv1_local", "conv2", "conv3"):
        yield pair(f"face_encoder.{name}.conv", f"face_encoder.{name}", kernel=(3,))
    yield row("face_encoder.out_proj")
    ours, theirs = "face_adapter.fuser_blocks.{i:8}.", "face_adapter.{i:8}."
    yield pair(f"{ours}linear1_kv", split(theirs, "to_k", "to_v"))
    yield pair(f"{ours}linear1_q", f"{theirs}to_q")
    yield pair(f"{ours}linear2", f"{theirs}to_out")
    for letter in "qk":
        yield pair(f"{ours}{letter}_norm", f"{theirs}norm_{letter}", kind=Kind.NORM)
    yield from parameters("face_encoder.padding_tokens")


def _sound() -> Iterator[Row]:
    """What S2V and HuMo hear with."""
    encoder = "casual_audio_encoder.encoder."
    yield from matrices(f"{encoder}(conv1_local|conv1_global|conv2|conv3).conv", kernel=(3,))
    yield from matrices(f"{encoder}final_linear")
    yield from parameters("casual_audio_encoder.weights", f"{encoder}padding_tokens")
    yield from matrices("audio_injector.injector.{i:12}.(q|k|v|o)")
    yield from norms("audio_injector.injector.{i:12}.norm_(q|k)")
    yield from matrices("audio_injector.injector_adain_layers.{i:12}.linear")
    yield from matrices("cond_encoder", "frame_packer.proj", kernel=(1, 2, 2))
    yield from matrices("frame_packer.proj_2x", kernel=(2, 4, 4))
    yield from matrices("frame_packer.proj_4x", kernel=(4, 8, 8))
    yield row("trainable_cond_mask", kind=Kind.EMBEDDING)
    humo = "blocks.{i:40}.audio_cross_attn_wrapper."
    yield from matrices(f"{humo}audio_cross_attn.(q|k|v|o)")
    yield from matrices("audio_proj.audio_proj_glob_(1|2|3).layer")
    yield from norms(f"{humo}audio_cross_attn.norm_(q|k)", f"{humo}norm1_audio")
    yield from norms("audio_proj.audio_proj_glob_norm.layer")


def _control() -> Iterator[Row]:
    """What Fun-Control, Fun-Camera, ReCamMaster and SCAIL are steered by."""
    yield from matrices("ref_conv", "control_adapter.conv", kernel=(2, 2))
    yield from matrices("control_adapter.residual_blocks.{i:1}.conv(1|2)", kernel=(3, 3))
    yield from matrices("blocks.{i:40}.(cam_encoder|projector)")
    yield from matrices("patch_embedding_(pose|mask)", kernel=(1, 2, 2))


KIN = (
    # SkyReels V2
    row("fps_embedding", kind=Kind.EMBEDDING),
    pair("fps_projection.0", "fps_projection.net.0.proj"),
    pair("fps_projection.2", "fps_projection.net.2"),
    # AnyFlow
    *matrices(f"{EMBEDDER}delta_embedder.linear_(1|2)"),
    *matrices("far_patch_embedding", kernel=(1, 4, 4)),
    # Helios
    *matrices("patch_short", kernel=(1, 2, 2)),
    *matrices("patch_mid", kernel=(2, 4, 4)),
    *matrices("patch_long", kernel=(4, 8, 8)),
    *parameters("norm_out.scale_shift_table"),
)

ROWS = (
    pair("patch_embedding", "patch_embedding", kernel=(1, 2, 2)),
    *(
        pair(f"{name}_embedding.{n}", f"{EMBEDDER}{name}_embedder.linear_{m}")
        for name in ("text", "time")
        for n, m in ((0, 1), (2, 2))
    ),
    pair("time_projection.1", f"{EMBEDDER}time_proj"),
    pair("img_emb.proj.0", f"{EMBEDDER}image_embedder.norm1", kind=Kind.NORM),
    pair("img_emb.proj.1", f"{EMBEDDER}image_embedder.ff.net.0.proj"),
    pair("img_emb.proj.3", f"{EMBEDDER}image_embedder.ff.net.2"),
    pair("img_emb.proj.4", f"{EMBEDDER}image_embedder.norm2", kind=Kind.NORM),
    _bare("img_emb.emb_pos", f"{EMBEDDER}image_embedder.pos_embed"),  # FLF2V
    *_block("blocks.{i:40}."),
    pair("vace_patch_embedding", "vace_patch_embedding", kernel=(1, 2, 2)),
    *_block("vace_blocks.{i:15}."),
    pair("vace_blocks.0.before_proj", "vace_blocks.0.proj_in"),
    pair("vace_blocks.{i:15}.after_proj", "vace_blocks.{i:15}.proj_out"),
    *_animate(),
    *_sound(),
    *_control(),
    *KIN,
    pair("head.head", "proj_out"),
    _bare("head.modulation", "scale_shift_table"),
)

# what sound, cameras and masks steer: targets of `_sound` and `_control`
STEERED = (
    "casual_audio_encoder.", "audio_injector.", "cond_encoder", "frame_packer.",
    "blocks.{i:40}.audio_cross_attn_wrapper.", "audio_proj.", "ref_conv", "control_adapter.",
    "blocks.{i:40}.cam_encoder", "blocks.{i:40}.projector", "patch_embedding_pose",
    "patch_embedding_mask",
)  # fmt: skip

# 1.3B, 5B, 14B; the image embedder is 1280 wide
SIZES = sizes("dxd 6dxd dx4096 dx1280", 1536, 3072, 5120) | sizes(
    "8960x1536 1536x8960 14336x3072 3072x14336 13824x5120 5120x13824 1280x1280 "
    "4096x512 1024x1024 5120x1024 10240x5120 "  # Animate
    "1280x1024 2560x1280 5120x2560 "  # S2V
    "5120x1536 512x51200 512x512 24576x512 3072x6144"  # HuMo, Fun-Camera
)

# no kohya or ComfyUI tags: outside diffusers each expert is a file of its own
LOW_NOISE = Component(
    name="transformer_2",
    title="Wan transformer (low noise)",
    rows=ROWS,
    checkpoints={"diffusers": ("transformer_2.",)},
    tags={"diffusers": ("transformer_2",)},
    sizes=SIZES,
)

FAMILY = ModelFamily(
    name="wan",
    title="Wan",
    kin=STEERED,
    components=(transformer("Wan transformer", ROWS, sizes=SIZES), LOW_NOISE),
    marks=(
        Mark("transformer", "self_attn.q", columns=(1536, 3072, 5120)),
        Mark("transformer", "cross_attn.k", columns=(1536, 3072, 5120)),
    ),
    architectures=("wan",),
    modelspec="wan2.1",
)
