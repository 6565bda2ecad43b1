"""kohya: `lora_unet_…`, `lora_te1_…`, underscores for dots, alpha as a tensor."""

from __future__ import annotations

from adaptkit.formats.contract import Alpha, KeyFormat

FORMAT = KeyFormat(
    name="kohya",
    title="kohya sd-scripts",
    # some Wan-Fun and Z-Image files have a double underscore
    prefixes=("lora_{kohya}_", "lora_{kohya}__"),
    joiner="_",
    style="kohya",
    kin="original",
    alpha=Alpha.TENSOR,
    written_by="sd-scripts, musubi-tuner, LyCORIS inside kohya, most trainers",
    note="loads in ComfyUI, A1111/Forge, InvokeAI, kohya; in diffusers for LoRA",
)
