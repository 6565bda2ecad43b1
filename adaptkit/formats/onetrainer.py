"""onetrainer: `lora_transformer_…` with diffusers' names, underscores for dots, alpha tensors."""

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
