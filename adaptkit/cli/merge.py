"""adaptkit merge."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from adaptkit.cli.options import ALPHA_IN, BLOCKS, INPUT, SIZE, STRENGTH, writer

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@click.argument("base", type=INPUT)
@click.argument("adapters", nargs=-1, required=True, type=STRENGTH, metavar="ADAPTER[:STRENGTH]...")
@BLOCKS
@click.option(
    "--shard-size", type=SIZE, metavar="SIZE", help="Write a folder of shards of at most SIZE."
)
@click.option(
    "--layout",
    type=click.Choice(["single-file", "folder"]),
    help="Write one file with the original key names, or a folder with diffusers' key names.",
)
@click.option(
    "--pad-inputs",
    is_flag=True,
    help="Let a layer of BASE have more inputs than the adapter (Fill, Control, inpainting); the "
    "last ones stay as they are.",
)
@ALPHA_IN
@writer
def merge(base: Path, adapters: tuple[tuple[Path, float], ...], **chosen: Any) -> None:
    """Merge adapters into checkpoint BASE.

    The strength of an adapter follows its last colon and defaults to 1; a negative strength
    subtracts. All adapters of a layer are added in float32 and rounded once. Unchanged layers are
    copied byte for byte. An adapter module without a matching layer in BASE fails the run.

    BASE is a file, an index of shards or a folder. The output has the same layout and file names,
    unless --layout selects the other layout: then every weight is renamed, split or fused, bit
    for bit. A new folder holds weights only; take the config.json files from any diffusers folder
    of the model. Quantised weights stay as they are stored unless --dtype is given, and the report
    gives the error. A GGUF file gives a GGUF file.

    --blocks multiplies the strength in parts of the model: `te=0`, `unet.down_blocks.*=0.5`,
    `double.0-5=0.3`, `IN04=0`, or the 12, 17, 20 or 26 numbers (57 or 61 for FLUX) of the LoRA
    Block Weight extension. If several rules match a module, the last one applies. A rule that
    matches nothing is an error.

    \b
    adaptkit merge base.safetensors style.safetensors:0.8 detail.safetensors -o merged.safetensors
    adaptkit merge base.ckpt style.safetensors --blocks "te=0,unet.up_blocks.0-1=0.5" --verify
    """
    from adaptkit.cli.show.merge import merged
    from adaptkit.cli.show.talk import write
    from adaptkit.ops.merge import VERB

    write(VERB, "merging", merged, base, adapters, **chosen)
