"""Stable Diffusion 3.5 large (and turbo): 38 layers; CLIP-L, OpenCLIP-G and T5-XXL.

A separate family from `sd3`, because diffusers swaps the modulation of the last layer.
"""

from __future__ import annotations

from adaptkit.families._sd3 import components, marks
from adaptkit.families._vae import autoencoder
from adaptkit.families.contract import ModelFamily

FAMILY = ModelFamily(
    name="sd35-large",
    title="Stable Diffusion 3.5 large",
    components=components("MMDiT", 38, 2432),
    beside=(autoencoder("first_stage_model."),),
    marks=marks(2432),
    architectures=("stable-diffusion-3-5-l", "sd3_5-l", "sd3.5-l", "sd3.5_l"),
    modelspec="stable-diffusion-3-5-large",
    yields_to=("sd3", "sdxl", "flux"),
)
