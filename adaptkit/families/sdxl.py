"""Stable Diffusion XL (base): U-Net of 2.6 G parameters, CLIP-L and OpenCLIP-G.

Kolors has the same U-Net, and a layer before it for the text of ChatGLM3.
"""

from __future__ import annotations

from adaptkit.families._clip import clip_rows, clip_sizes, openclip_rows
from adaptkit.families._unet import SIZES, unet_rows
from adaptkit.families._vae import autoencoder
from adaptkit.families.contract import Component, Mark, ModelFamily, row, sizes

FAMILY = ModelFamily(
    name="sdxl",
    title="Stable Diffusion XL",
    kin=("encoder_hid_proj",),
    components=(
        Component(
            name="unet",
            title="U-Net",
            rows=(
                *unet_rows((0, 2, 10), middle=10, class_embedding=True),
                row("encoder_hid_proj", native="encoder_hid_proj"),  # Kolors
            ),
            checkpoints={
                "native": ("model.diffusion_model.", "diffusion_model.", ""),
                "diffusers": ("unet.", ""),
            },
            sizes=sizes(f"{SIZES} 640x2048 1280x2048 1280x2816 2048x4096 1280x5632"),
            tags={
                "kohya": ("unet",),
                "comfy": ("diffusion_model",),
                "root": ("",),
                "diffusers": ("unet",),
            },
            namings={"kohya": "native", "comfy": "native"},
        ),
        Component(
            name="text_encoder",
            title="CLIP-L",
            rows=clip_rows(12),
            sizes=clip_sizes(768),
            checkpoints={
                "diffusers": ("conditioner.embedders.0.transformer.", "text_encoder."),
                "flat": ("conditioner.embedders.0.transformer.", "text_encoder."),
            },
            tags={
                "kohya": ("te1",),
                "comfy": ("text_encoders.clip_l.transformer",),
                "diffusers": ("text_encoder",),
            },
        ),
        Component(
            name="text_encoder_2",
            title="OpenCLIP-G",
            rows=openclip_rows(32, projection=True),
            sizes=clip_sizes(1280),
            checkpoints={
                "native": ("conditioner.embedders.1.model.",),
                "diffusers": ("text_encoder_2.",),
            },
            tags={
                "kohya": ("te2",),
                "comfy": ("text_encoders.clip_g.transformer",),
                "diffusers": ("text_encoder_2",),
            },
        ),
    ),
    beside=(autoencoder("first_stage_model."),),
    marks=(
        Mark("unet", "attn2.to_k", columns=2048),
        Mark("unet", "attn2.to_v", columns=2048),
        Mark("text_encoder", "mlp.fc1", columns=768),
        Mark("text_encoder_2", "mlp.fc1", columns=1280),
    ),
    architectures=(
        "stable-diffusion-xl-v1-base",
        "stable-diffusion-xl-1",
        "sdxl_base",
        "sdxl_1",
        "sdxl",
    ),
    modelspec="stable-diffusion-xl-v1-base",
    base_version="sdxl_base_v1-0",
)
