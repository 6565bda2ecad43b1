"""diffusers: dotted names by component, `unet.….lora_A.weight`; alpha folded into the weights."""

from __future__ import annotations

from types import MappingProxyType

from adaptkit.formats.contract import PEFT_SPELLING, Alpha, KeyFormat

FORMAT = KeyFormat(
    name="diffusers",
    title="diffusers (PEFT keys)",
    prefixes=("{diffusers}.",),
    joiner=".",
    style="diffusers",
    kin="diffusers",
    alpha=Alpha.NONE,
    # the norms of FLUX.1's control LoRAs, which replace those of the model
    spelling=MappingProxyType({**PEFT_SPELLING, "set": MappingProxyType({"value": "weight"})}),
    peft=True,
    written_by="diffusers, SimpleTuner",
    note="alpha is folded into lora_B, because readers of these names assume alpha = rank",
)
