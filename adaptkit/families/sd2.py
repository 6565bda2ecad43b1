"""Stable Diffusion 2.x: the SD 1 U-Net with linear projections, OpenCLIP-H."""

from __future__ import annotations

from adaptkit.families._clip import clip_sizes, openclip_rows
from adaptkit.families._unet import SIZES, unet_rows
from adaptkit.families._vae import autoencoder
from adaptkit.families.contract import Component, Mark, ModelFamily, sizes

FAMILY = ModelFamily(
    name="sd2",
    title="Stable Diffusion 2.x",
    components=(
        Component(
            name="unet",
            title="U-Net",
            rows=unet_rows((1, 1, 1, 0), middle=1),
            checkpoints={
                "native": ("model.diffusion_model.", "diffusion_model.", ""),
                "diffusers": ("unet.", ""),
            },
            sizes=sizes(f"{SIZES} 2560x320 320x1024 640x1024 1280x1024"),
            tags={
                "kohya": ("unet",),
                "comfy": ("diffusion_model",),
                "root": ("",),
                "diffusers": ("unet",),
            },
            namings={"comfy": "native"},
        ),
        Component(
            name="text_encoder",
            title="OpenCLIP-H",
            # the checkpoint has 24 layers, of which diffusers keeps 23: hosts skip the last one
            rows=openclip_rows(24, projection=True),
            sizes=clip_sizes(1024),
            checkpoints={
                "native": ("cond_stage_model.model.", ""),
                "diffusers": ("text_encoder.", ""),
            },
            tags={
                "kohya": ("te",),
                "comfy": ("text_encoders.clip_h.transformer",),
                "root": ("",),
                "diffusers": ("text_encoder",),
            },
        ),
    ),
    beside=(autoencoder("first_stage_model."),),
    marks=(
        Mark("unet", "attn2.to_k", columns=1024),
        Mark("unet", "attn2.to_v", columns=1024),
        Mark("unet", ".proj_in", kernel=()),
        Mark("unet", ".proj_out", kernel=()),
        Mark("text_encoder", "self_attn.in_proj", columns=1024),
        Mark("text_encoder", "mlp.fc1", columns=1024),
    ),
    architectures=("stable-diffusion-v2", "sd_v2", "sd_2", "sd2"),
    modelspec="stable-diffusion-v2-768-v",
    base_version="sd_v2",
)
