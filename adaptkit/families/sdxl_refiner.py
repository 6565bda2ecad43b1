"""Stable Diffusion XL refiner: four-level U-Net of 2.3 G parameters, OpenCLIP-G."""

from __future__ import annotations

from adaptkit.families._clip import clip_g
from adaptkit.families._unet import unet_rows
from adaptkit.families._vae import autoencoder
from adaptkit.families.contract import Component, Mark, ModelFamily, sizes

FAMILY = ModelFamily(
    name="sdxl-refiner",
    title="Stable Diffusion XL refiner",
    components=(
        Component(
            name="unet",
            title="U-Net",
            rows=unet_rows((0, 4, 4, 0), middle=4, class_embedding=True),
            checkpoints={
                "native": ("model.diffusion_model.", "diffusion_model.", ""),
                "diffusers": ("unet.", ""),
            },
            sizes=sizes(
                "384x384 384x768 384x1152 384x1536 768x384 768x768 768x1152 768x1280 768x1536 "
                "768x2304 768x3072 1536x384 1536x768 1536x1280 1536x1536 1536x2304 "
                "1536x2560 1536x3072 1536x6144 6144x768 12288x1536"
            ),
            tags={
                "kohya": ("unet",),
                "comfy": ("diffusion_model",),
                "root": ("",),
                "diffusers": ("unet",),
            },
            namings={"kohya": "native", "comfy": "native"},
        ),
        clip_g(native=("conditioner.embedders.0.model.",)),
    ),
    beside=(autoencoder("first_stage_model."),),
    marks=(
        Mark("unet", "attn1.to_q", columns=(768, 1536)),
        Mark("unet", "attn2.to_q", columns=(768, 1536)),
        Mark("unet", "attn2.to_k", columns=1280),
        Mark("unet", "attn2.to_v", columns=1280),
        Mark("unet", "ff.net.0.proj", columns=(768, 1536)),
    ),
    architectures=("stable-diffusion-xl-v1-refiner", "sdxl_refiner"),
    modelspec="stable-diffusion-xl-v1-refiner",
    yields_to=("sdxl", "sd1", "sd2"),
)
