"""xlabs: attention of FLUX.1's double blocks, `….processor.qkv_lora1.down.weight`; alpha = rank."""

from __future__ import annotations

from types import MappingProxyType

from adaptkit.formats.contract import Alpha, KeyFormat

FORMAT = KeyFormat(
    name="xlabs",
    title="XLabs",
    prefixes=("{root}", "{comfy}."),
    joiner=".",
    style="xlabs",
    private=True,
    alpha=Alpha.NONE,
    spelling=MappingProxyType(
        {"lora": MappingProxyType({"up": "up.weight", "down": "down.weight"})}
    ),
    written_by="XLabs x-flux, USO",
    note="has names for the attention of double blocks only",
)
