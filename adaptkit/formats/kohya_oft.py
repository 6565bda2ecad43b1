"""kohya-oft: sd-scripts' own OFT, `oft_unet_….oft_blocks`, whose alpha bounds the rotation and scales with the layer."""

from __future__ import annotations

from adaptkit.formats.contract import Alpha, KeyFormat

FORMAT = KeyFormat(
    name="kohya-oft",
    title="kohya sd-scripts OFT",
    prefixes=("oft_{kohya}_",),
    joiner="_",
    style="kohya",
    owns=("kohya-oft",),
    alpha=Alpha.TENSOR,
    written_by="sd-scripts (networks.oft)",
    note="loads in kohya's tools only",
)
