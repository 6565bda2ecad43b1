"""Adapters in the formats that diffusers' published converters read, by the function that reads them."""

from __future__ import annotations

from tests.interop.published import flux, images, unet, videos
from tests.interop.published.contract import Case, Numbers, State

__all__ = ["CASES", "HELPERS", "Case", "Numbers", "State"]

CASES: dict[str, tuple[Case, ...]] = {
    **unet.CASES,
    **flux.CASES,
    **images.CASES,
    **videos.CASES,
}
# functions of the module that read no file, and what for they are
HELPERS = {
    "swap_scale_shift": "swaps the halves of one tensor for the converters of FLUX.1",
    "_convert_unet_lora_key": "one key of `_convert_non_diffusers_lora_to_diffusers`",
    "_convert_text_encoder_lora_key": "one key of `_convert_non_diffusers_lora_to_diffusers` and of FLUX.1's",
    "_get_alpha_name": "one alpha of `_convert_non_diffusers_lora_to_diffusers`",
    "_custom_replace": "one key of `_convert_kohya_flux_lora_to_diffusers`",
    "_bake_lokr_alpha_": "the alphas of the three converters of LoKr",
}
