"""peft: `base_model.model.….lora_A.weight` for one model; alpha in adapter_config.json."""

from __future__ import annotations

from adaptkit.formats.contract import PEFT_SPELLING, Alpha, KeyFormat

FORMAT = KeyFormat(
    name="peft",
    title="PEFT",
    prefixes=("base_model.model.{root}",),
    joiner=".",
    style="peft",
    kin="module",
    alpha=Alpha.CONFIG,
    spelling=PEFT_SPELLING,
    peft=True,
    written_by="peft (save_pretrained)",
    note="one model per file; alpha is in adapter_config.json next to it",
)
