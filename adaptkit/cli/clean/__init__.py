"""adaptkit clean."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from adaptkit.cli.options import PATH, talk

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@click.argument("folder", type=PATH)
@click.option("--dry-run", is_flag=True, help="List them and remove nothing.")
@talk
def clean(folder: Path, dry_run: bool, as_json: bool, quiet: bool, verbose: bool) -> int:
    """Remove what killed runs left in FOLDER.

    Outputs are written under hidden names (.NAME.PID-MARK.part). A killed run leaves such a file
    or folder behind. It is removed if its process has ended and none holds it. One of a running
    process or of another machine is kept.

    \b
    adaptkit clean merged/ --dry-run
    """
    from adaptkit.cli.show.page import page
    from adaptkit.cli.show.text import document, human, named
    from adaptkit.errors import UnreadableFile
    from adaptkit.files import leftovers

    if not folder.is_dir():
        raise UnreadableFile("no such folder", file=folder)
    found = list(leftovers.found(folder))
    dead = [one for one in found if one.dead]
    kept = [one for one in dead if not dry_run and not leftovers.remove(one.path)]
    gone = [one for one in dead if one not in kept]
    if as_json:
        record = {
            "folder": str(folder),
            "dry_run": dry_run,
            "removed": [{"path": str(one.path), "bytes": one.bytes} for one in gone],
            "kept": [str(one.path) for one in found if one not in gone],
        }
        document("clean", record)
    elif not quiet:
        for one in gone:
            click.echo(named(one.path))
        what = "would be removed" if dry_run else "removed"
        left = len(found) - len(gone)
        rest = f", {left} in use or not removable" if left else ""
        size = human(sum(one.bytes for one in gone))
        page(stderr=True).print(f"{len(gone)} {what}, {size}{rest}")
    return 1 if kept else 0
