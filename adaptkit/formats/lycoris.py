"""lycoris: `lycoris_…` with the denoiser's diffusers names, as LyCORIS' wrapper saves them."""

from __future__ import annotations

from adaptkit.formats.contract import Alpha, KeyFormat

FORMAT = KeyFormat(
    name="lycoris",
    title="LyCORIS wrapper",
    prefixes=("lycoris_{root}",),
    joiner="_",
    style="lycoris",
    kin="diffusers",
    alpha=Alpha.TENSOR,
    written_by="LyCORIS (create_lycoris), SimpleTuner",
    note="names carry no component; loads in ComfyUI",
)
