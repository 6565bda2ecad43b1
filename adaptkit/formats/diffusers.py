"""diffusers: dotted names under the pipeline's parts, `unet.….lora_A.weight`; alpha in the file's metadata."""

from __future__ import annotations

from adaptkit.formats._format import PEFT_SPELLING, Alpha, KeyFormat

FORMAT = KeyFormat(
    name="diffusers",
    title="diffusers (PEFT keys)",
    prefixes=("{diffusers}.",),
    joiner=".",
    style="diffusers",
    alpha=Alpha.METADATA,
    spelling=PEFT_SPELLING,
    written_by="diffusers, SimpleTuner",
    note="alpha stands in the metadata key lora_adapter_metadata; hosts other than diffusers assume alpha = rank",
)
