"""Stable Diffusion 3 and 3.5 medium: 24 layers; CLIP-L, OpenCLIP-G and T5-XXL."""

from __future__ import annotations

from adaptkit.families._sd3 import components, marks
from adaptkit.families._vae import autoencoder
from adaptkit.families.contract import ModelFamily

FAMILY = ModelFamily(
    name="sd3",
    title="Stable Diffusion 3 / 3.5 medium",
    components=components("MMDiT", 24, 1536, dual=13),
    beside=(autoencoder("first_stage_model."),),
    marks=marks(1536),
    architectures=(
        "stable-diffusion-3-m",
        "stable-diffusion-3-5-m",
        "sd3_m",
        "sd3_5-m",
        "sd3.5-m",
        "sd3.5_m",
    ),
    modelspec="stable-diffusion-3-medium",
    yields_to=("sdxl", "flux"),  # text encoders alone fit both
)
