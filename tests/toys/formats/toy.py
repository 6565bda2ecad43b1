"""A toy format: dotted names behind a prefix of its own."""

from __future__ import annotations

from adaptkit.formats.contract import Alpha, KeyFormat

FORMAT = KeyFormat(
    name="toy",
    title="toy",
    prefixes=("toybox.{own}.",),
    tags={"transformer": ("denoiser",), "unet": ("unet",)},
    joiner=".",
    style="toy",
    alpha=Alpha.TENSOR,
    kin="diffusers",
)
