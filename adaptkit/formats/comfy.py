"""comfy: ComfyUI's dotted names under `diffusion_model.` and `text_encoders.`; optional alpha."""

from __future__ import annotations

from adaptkit.formats.contract import COMFY_SPELLING, Alpha, KeyFormat

FORMAT = KeyFormat(
    name="comfy",
    title="ComfyUI native",
    prefixes=("{comfy}.",),
    joiner=".",
    style="comfy",
    kin="original",
    alpha=Alpha.OPTIONAL,
    spelling=COMFY_SPELLING,
    written_by="ComfyUI, ai-toolkit, diffusion-pipe",
    note="ComfyUI loads it completely; alpha is written only if it differs from the rank",
)
