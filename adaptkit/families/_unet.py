"""Rows of the latent-diffusion U-Net of SD 1, SD 2 and SDXL.

Source: CompVis/Stability `openaimodel.py` and diffusers' `UNet2DConditionModel`, checked row by row
against diffusers' single-file converter (see tests/families).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adaptkit.families.contract import Kind, Row, row

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["unet_rows"]

CONV = (3, 3)
POINT = (1, 1)
RESNET = (
    ("norm1", "in_layers.0", Kind.NORM, ()),
    ("conv1", "in_layers.2", Kind.MATRIX, CONV),
    ("time_emb_proj", "emb_layers.1", Kind.MATRIX, ()),
    ("norm2", "out_layers.0", Kind.NORM, ()),
    ("conv2", "out_layers.3", Kind.MATRIX, CONV),
    ("conv_shortcut", "skip_connection", Kind.MATRIX, POINT),
)
NORMS = ("norm1", "norm2", "norm3")
PROJECTIONS = (
    *(f"attn{n}.{name}" for n in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")),
    "ff.net.0.proj",
    "ff.net.2",
)


# sizes of the layers of every U-Net 320, 640 and 1280 wide; text comes in rows of another size
SIZES = (
    "320x320 320x640 320x960 320x1280 640x320 640x640 640x960 640x1280 640x1920 640x2560 "
    "1280x320 1280x640 1280x1280 1280x1920 1280x2560 1280x5120 5120x640 10240x1280"
)


def unet_rows(
    depths: tuple[int, ...], *, middle: int, class_embedding: bool = False, pointwise: bool = False
) -> tuple[Row, ...]:
    """All rows of a U-Net.

    `depths[level]` is the number of transformer blocks per attention (0: no attention).

    `middle` is the depth of the middle block. Levels are ordered from the outermost inwards, with
    two residual blocks per level going down and three going up. `pointwise`: projections around the
    attention are 1×1 convolutions (SD 1) instead of linear layers.
    """
    rows = (
        *_ends(class_embedding),
        *_down(depths),
        *_resnet("mid_block.resnets.0", "middle_block.0"),
        *_attention("mid_block.attentions.0", "middle_block.1", middle),
        *_resnet("mid_block.resnets.1", "middle_block.2"),
        *_up(depths),
    )
    around = (".proj_in", ".proj_out")
    return tuple(
        row._replace(kernel=POINT) if pointwise and row.target.endswith(around) else row
        for row in rows
    )


def _ends(class_embedding: bool) -> Iterator[Row]:
    yield row("conv_in", native="input_blocks.0.0", kernel=CONV)
    yield row("time_embedding.linear_1", native="time_embed.0")
    yield row("time_embedding.linear_2", native="time_embed.2")
    if class_embedding:
        yield row("add_embedding.linear_1", native="label_emb.0.0")
        yield row("add_embedding.linear_2", native="label_emb.0.2")
    yield row("conv_norm_out", native="out.0", kind=Kind.NORM)
    yield row("conv_out", native="out.2", kernel=CONV)


def _down(depths: tuple[int, ...]) -> Iterator[Row]:
    block = 1
    for level, depth in enumerate(depths):
        for n in range(2):
            yield from _resnet(f"down_blocks.{level}.resnets.{n}", f"input_blocks.{block}.0")
            yield from _attention(
                f"down_blocks.{level}.attentions.{n}", f"input_blocks.{block}.1", depth
            )
            block += 1
        if level + 1 < len(depths):
            yield row(
                f"down_blocks.{level}.downsamplers.0.conv",
                native=f"input_blocks.{block}.0.op",
                kernel=CONV,
            )
            block += 1


def _up(depths: tuple[int, ...]) -> Iterator[Row]:
    block = 0
    for level, depth in enumerate(reversed(depths)):
        for n in range(3):
            yield from _resnet(f"up_blocks.{level}.resnets.{n}", f"output_blocks.{block}.0")
            yield from _attention(
                f"up_blocks.{level}.attentions.{n}", f"output_blocks.{block}.1", depth
            )
            if n == 2 and level + 1 < len(depths):
                place = 2 if depth else 1  # the upsampler follows the attention, if any
                yield row(
                    f"up_blocks.{level}.upsamplers.0.conv",
                    native=f"output_blocks.{block}.{place}.conv",
                    kernel=CONV,
                )
            block += 1


def _resnet(diffusers: str, native: str) -> Iterator[Row]:
    for ours, theirs, kind, kernel in RESNET:
        yield row(f"{diffusers}.{ours}", native=f"{native}.{theirs}", kind=kind, kernel=kernel)


def _attention(diffusers: str, native: str, depth: int) -> Iterator[Row]:
    if not depth:
        return
    yield row(f"{diffusers}.norm", native=f"{native}.norm", kind=Kind.NORM)
    for name in ("proj_in", "proj_out"):
        yield row(f"{diffusers}.{name}", native=f"{native}.{name}")
    inner = f"transformer_blocks.{{k:{depth}}}"
    for name in (*PROJECTIONS, *NORMS):
        kind = Kind.NORM if name in NORMS else Kind.MATRIX
        ours = f"{diffusers}.{inner}.{name}"
        yield row(ours, native=f"{native}.{inner}.{name}", kind=kind, **_processor(ours))


def _processor(module: str) -> dict[str, Any]:
    """Names of attention adapters in diffusers < 0.20: `attn1.processor.to_q_lora`."""
    stem, found, name = module.removesuffix(".0").rpartition(".to_")
    return {"processor": f"{stem}.processor.to_{name}_lora"} if found else {}
