"""adaptkit families."""

from __future__ import annotations

import click

from adaptkit.cli.options import talk


@click.command()
@talk
def families(as_json: bool, quiet: bool, verbose: bool) -> None:
    """List the model families and their components."""
    from adaptkit.cli.show.page import listed
    from adaptkit.detect import families as known

    rows: list[dict[str, object]] = [
        {
            "name": f.name,
            "title": f.title,
            "components": {part.name: part.title for part in f.components},
        }
        for f in known().values()
    ]
    listed("families", rows, as_json)
