"""Stable Diffusion 1.x: U-Net of 860 M parameters, CLIP-L."""

from __future__ import annotations

from adaptkit.families._clip import clip_rows, clip_sizes
from adaptkit.families._unet import SIZES, unet_rows
from adaptkit.families._vae import autoencoder
from adaptkit.families.contract import Component, Mark, ModelFamily, sizes

FAMILY = ModelFamily(
    name="sd1",
    title="Stable Diffusion 1.x",
    components=(
        Component(
            name="unet",
            title="U-Net",
            rows=unet_rows((1, 1, 1, 0), middle=1, pointwise=True),
            checkpoints={
                "native": ("model.diffusion_model.", "diffusion_model.", ""),
                "diffusers": ("unet.", ""),
            },
            sizes=sizes(f"{SIZES} 2560x320 320x768 640x768 1280x768"),
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
            title="CLIP-L",
            rows=clip_rows(12),
            sizes=clip_sizes(768),
            checkpoints={
                "diffusers": ("cond_stage_model.transformer.", "text_encoder.", ""),
                "flat": ("cond_stage_model.transformer.", "text_encoder."),
            },
            tags={
                "kohya": ("te",),
                "comfy": ("text_encoders.clip_l.transformer",),
                "root": ("",),
                "diffusers": ("text_encoder",),
            },
        ),
    ),
    beside=(autoencoder("first_stage_model."),),
    marks=(
        Mark("unet", "attn2.to_k", columns=768),
        Mark("unet", "attn2.to_v", columns=768),
        Mark("unet", ".proj_in", kernel=(1, 1)),
        Mark("unet", ".proj_out", kernel=(1, 1)),
        Mark("text_encoder", "self_attn.q_proj", columns=768),
        Mark("text_encoder", "self_attn.k_proj", columns=768),
        Mark("text_encoder", "mlp.fc1", columns=768),
    ),
    architectures=("stable-diffusion-v1", "sd_v1", "sd_1.5", "sd1"),
    modelspec="stable-diffusion-v1",
    base_version="sd_v1",
)
