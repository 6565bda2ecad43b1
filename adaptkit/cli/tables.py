"""adaptkit formats, families and algorithms: the tables of what adaptkit knows."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import click

from adaptkit.cli.options import talk
from adaptkit.errors import NotRepresentable
from adaptkit.names import Rows, Slot, Target

if TYPE_CHECKING:
    from adaptkit.algorithms.contract import Weights
    from adaptkit.formats.contract import KeyFormat

# modules that spell an example key in every format
EXAMPLES = (
    ("sd1", Slot(Target("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"))),
    ("flux", Slot(Target("transformer", "double_blocks.0.img_attn.proj"))),
    ("flux", Slot(Target("transformer", "double_blocks.0.img_attn.qkv"), Rows(0, 1, 3))),
)


def _example(format: KeyFormat) -> str:
    """Return an example key in this format."""
    from adaptkit.keymap import algorithms, compile_keys

    algorithm = format.owns[0] if format.owns else "lora"
    role = next(iter(algorithms()[algorithm].roles))
    for family, slot in EXAMPLES:
        with suppress(NotRepresentable):
            return compile_keys(family, format.name).spell(slot, algorithm, role)
    return ""


def _loading(format: str) -> dict[str, list[str]]:
    """Return the families that each host loads completely in this format."""
    from adaptkit.hosts import complete, hosts

    return {name: found for name, host in hosts().items() if (found := complete(host, format))}


@click.command()
@talk
def formats(as_json: bool, quiet: bool, verbose: bool) -> None:
    """List the key formats and the hosts that load them.

    Each format is shown with an example key and the tools that write it. adaptkit reads all
    formats, also mixed in one file.
    """
    from adaptkit.cli.show.page import listed
    from adaptkit.detect import formats as known

    rows: list[dict[str, object]] = [
        {
            "name": f.name,
            "title": f.title,
            "example": _example(f),
            "alpha": f.alpha.value,
            "loads_in": _loading(f.name),
            "written_by": f.written_by,
            "note": f.note,
        }
        for f in known().values()
    ]
    listed("formats", rows, as_json)


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
