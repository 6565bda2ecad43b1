"""bare: dotted module names without a prefix, as in `state_dict` and FLUX control LoRAs."""

from __future__ import annotations

from types import MappingProxyType

from adaptkit.formats.contract import COMFY_SPELLING, Alpha, KeyFormat

FORMAT = KeyFormat(
    name="bare",
    title="module names without a prefix",
    prefixes=("{root}",),
    joiner=".",
    style="bare",
    kin="module",
    alpha=Alpha.OPTIONAL,
    spelling=MappingProxyType({**COMFY_SPELLING, "set": MappingProxyType({"value": "scale"})}),
    written_by="black-forest-labs (control LoRAs), custom scripts",
    note="names carry no component; convert it before sharing",
)
