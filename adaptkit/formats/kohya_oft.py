"""kohya-oft: sd-scripts' OFT, `oft_unet_….oft_blocks`; alpha bounds the rotation."""

from __future__ import annotations

from adaptkit.formats.contract import Alpha, KeyFormat

FORMAT = KeyFormat(
    name="kohya-oft",
    title="kohya sd-scripts OFT",
    prefixes=("oft_{kohya}_",),
    joiner="_",
    style="kohya",
    kin="original",
    owns=("kohya-oft",),
    alpha=Alpha.TENSOR,
    written_by="sd-scripts (networks.oft)",
    note="loads in kohya's tools only",
)
