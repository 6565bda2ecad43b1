"""diffusers-old: attention processors, `….processor.to_q_lora.down.weight`; alpha = rank."""

from __future__ import annotations

from types import MappingProxyType

from adaptkit.formats.contract import Alpha, KeyFormat

FORMAT = KeyFormat(
    name="diffusers-old",
    title="diffusers before 0.20",
    prefixes=("{diffusers}.", "{root}"),
    joiner=".",
    style="processor",
    private=True,
    alpha=Alpha.NONE,
    spelling=MappingProxyType(
        {"lora": MappingProxyType({"up": "up.weight", "down": "down.weight"})}
    ),
    written_by="diffusers' training scripts before 0.20",
    note="has names for attention layers only; diffusers still loads it",
)
