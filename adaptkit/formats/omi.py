"""omi: FLUX.1's names under `transformer.`, fused layers in numbered parts; alpha as a tensor."""

from __future__ import annotations

from adaptkit.formats.contract import Alpha, KeyFormat

FORMAT = KeyFormat(
    name="omi",
    title="Open Model Initiative",
    prefixes=("{diffusers}.",),
    joiner=".",
    style="omi",
    private=True,
    alpha=Alpha.TENSOR,
    written_by="OneTrainer (OMI format)",
    note="FLUX.1; known from its specification, not from published files",
)
