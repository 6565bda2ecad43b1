"""onetrainer: `lora_transformer_…` over diffusers names, underscores for dots."""

from __future__ import annotations

from adaptkit.formats.contract import Alpha, KeyFormat

FORMAT = KeyFormat(
    name="onetrainer",
    title="OneTrainer (legacy)",
    prefixes=("lora_{onetrainer}_",),
    joiner="_",
    style="onetrainer",
    kin="diffusers",
    alpha=Alpha.TENSOR,
    written_by="OneTrainer before August 2026",
    note="for transformers; its U-Net files are kohya files",
)
