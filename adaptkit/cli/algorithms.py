"""adaptkit algorithms."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from adaptkit.cli.options import talk

if TYPE_CHECKING:
    from adaptkit.algorithms.contract import Weights


def _stored(kind: type[Weights], role: str) -> bool:
    """Return whether any readable form stores this role; some roles are only refused."""
    return role == "alpha" or any(role in form for form in kind.forms)


@click.command()
@talk
def algorithms(as_json: bool, quiet: bool, verbose: bool) -> None:
    """List the algorithms and the tensors that they store."""
    from adaptkit.cli.show.page import listed
    from adaptkit.keymap import algorithms as known

    rows: list[dict[str, object]] = [
        {
            "name": a.name,
            "title": a.title,
            "tensors": [role.spelling for name, role in a.roles.items() if _stored(a, name)],
            "extract": a.extractable,
        }
        for a in known().values()
    ]
    listed("algorithms", rows, as_json)
