"""Stable Diffusion 3.5 large (and turbo): 8 G parameters, 38 layers; CLIP-L, OpenCLIP-G and T5-XXL.

A family of its own beside `sd3`: which layer's modulation diffusers swaps depends on the number of layers.
"""

from __future__ import annotations

from adaptkit.families._sd3 import components, marks
from adaptkit.families._vae import autoencoder
from adaptkit.families.contract import ModelFamily

FAMILY = ModelFamily(
    name="sd35-large",
    title="Stable Diffusion 3.5 large",
    components=components("MMDiT", 38),
    beside=(autoencoder("first_stage_model."),),
    marks=marks(2432),
    architectures=("stable-diffusion-3-5-l", "sd3_5-l", "sd3.5-l", "sd3.5_l"),
    modelspec="stable-diffusion-3-5-large",
    yields_to=("sd3", "sdxl", "flux"),
)
