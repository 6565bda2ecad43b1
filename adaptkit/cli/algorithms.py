"""adaptkit algorithms."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from adaptkit.cli.options import talk

if TYPE_CHECKING:
    from adaptkit.algorithms.contract import Weights


def _stored(kind: type[Weights], role: str) -> bool:
    """Return whether any readable form stores this role; some roles are only refused.

    A kind without forms of its own stores those of the kind whose roles it has.
    """
    forms = kind.forms or _forms_of(kind)
    return role == "alpha" or any(role in form for form in forms)


def _forms_of(kind: type[Weights]) -> tuple[frozenset[str], ...]:
    """The forms of the kind with these roles."""
    from adaptkit.keymap import algorithms as known

    return next(one.forms for one in known().values() if one.forms and one.roles is kind.roles)


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
