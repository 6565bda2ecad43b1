"""adaptkit inspect."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from adaptkit.cli.options import PATH, inputs, talk

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@click.argument("files", nargs=-1, required=True, type=PATH, metavar="FILE...")
@click.option("--keys", is_flag=True, help="List every tensor: key, dtype, shape.")
@click.option("--modules", is_flag=True, help="List every adapted module: algorithm, rank, alpha, shape.")
@click.option("--stats", is_flag=True, help="Read the weights too: ‖ΔW‖ per module, zeros, NaN, overflow.")
@click.option("--hash", is_flag=True, help="Add the SHA-256 of the file.")
@inputs
@talk
def inspect(
    files: tuple[Path, ...],
    keys: bool,
    modules: bool,
    stats: bool,
    hash: bool,
    family: str | None,
    format: str | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> int:
    """Say what adapter files and checkpoints are, from their headers alone.

    FILE is a .safetensors file, a pickle (.ckpt, .pt, .bin), an index of shards, or a folder: a diffusers or PEFT folder
    counts as one file, any other folder is searched for weight files. Without --stats no weights are read and torch is
    not loaded.
    Exits 1 if a file is corrupt or foreign, after reporting the others.
    """
    from adaptkit.cli.render import inspected
    from adaptkit.ops import inspect as op

    options = op.Options(family=family, format=format, hash=hash, stats=stats)
    reports = [op.run(path, options) for path in op.expand(files)]
    inspected(reports, keys=keys, modules=modules or verbose or stats, as_json=as_json, quiet=quiet)
    return 1 if any(report.error for report in reports) else 0
