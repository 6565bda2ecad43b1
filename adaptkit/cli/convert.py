"""adaptkit convert."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from adaptkit.cli.options import HOST, INPUT, SUFFIX, complete_formats, ranks, recasts, writer

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@click.argument("adapters", nargs=-1, required=True, type=INPUT, metavar="ADAPTER...")
@click.option(
    "--to",
    metavar="FORMAT",
    shell_complete=complete_formats,
    help="Key format to write; `adaptkit formats` lists them.",
)
@click.option("--for", "host", type=HOST, help="Write the format that this host loads.")
@recasts
@ranks
@writer
@SUFFIX
def convert(adapters: tuple[Path, ...], **chosen: Any) -> int:
    """Convert adapters to another key format.

    Keys are renamed and tensors copied byte for byte. Layers that the formats fuse differently are
    split or fused exactly. If the new format has no key for alpha, alpha is multiplied into the
    weights, and the report gives the number of modules and the error. A key that would be lost
    fails the run.

    --algo also changes the algorithm. The result is exact if possible, and otherwise the nearest
    adapter, with the error in the report. A rank rule truncates the ranks in the same run.

    With --only or --skip alone the file keeps its format. Several files, folders or globs are
    written to the folder of -o under their names, or beside each input; one that fails stops no
    other, and the exit code is 1 then.

    \b
    adaptkit convert style.safetensors --to comfy
    adaptkit convert style.safetensors --for diffusers -o style-diffusers.safetensors
    adaptkit convert style.safetensors --to peft -o style-peft
    adaptkit convert style.safetensors --skip te
    adaptkit convert loras --for comfyui -o for-comfyui
    adaptkit convert lokr.safetensors --to diffusers --algo lora --rank 32
    """
    from adaptkit.cli.show.rewrite import converted
    from adaptkit.cli.show.talk import write_each
    from adaptkit.ops.convert import VERB
    from adaptkit.ops.ranks.options import RULES

    if chosen["to"] and chosen["host"]:
        raise click.UsageError("--to and --for exclude each other")
    asked = ("to", "host", "algo", "only", "skip", "blocks", "alpha_in", *RULES)
    if chosen["dtype"] == "keep" and not any(chosen[name] for name in asked):
        raise click.UsageError("missing --to FORMAT or --for HOST")
    return write_each(VERB, "converting", converted, adapters, **chosen)
