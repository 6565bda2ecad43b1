"""diffusers: dotted names under pipeline components, `unet.….lora_A.weight`; no alpha."""

from __future__ import annotations

from adaptkit.formats.contract import PEFT_SPELLING, Alpha, KeyFormat

FORMAT = KeyFormat(
    name="diffusers",
    title="diffusers (PEFT keys)",
    prefixes=("{diffusers}.",),
    joiner=".",
    style="diffusers",
    kin="diffusers",
    alpha=Alpha.NONE,
    spelling=PEFT_SPELLING,
    peft=True,
    written_by="diffusers, SimpleTuner",
    note="alpha is folded into lora_B: every reader of these names takes alpha = rank",
)
