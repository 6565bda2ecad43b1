"""adaptkit formats, families, algorithms: what this version knows."""

from __future__ import annotations

import click

from adaptkit.cli.options import talk
from adaptkit.names import Slot, Target

EXAMPLE = Slot(Target("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"))


def _show(kind: str, rows: list[dict[str, object]], as_json: bool) -> None:
    from adaptkit.cli.render import listed

    listed(kind, rows, as_json)


@click.command()
@talk
def formats(as_json: bool, quiet: bool, verbose: bool) -> None:
    """List the key formats: how each spells a module, and who writes it."""
    from adaptkit.detect import formats as known
    from adaptkit.keymap import compile_keys

    rows: list[dict[str, object]] = [
        {
            "name": f.name,
            "title": f.title,
            "example": compile_keys("sd1", f.name).spell(EXAMPLE, "lora", "up"),
            "alpha": f.alpha.value,
            "written_by": f.written_by,
            "note": f.note,
        }
        for f in known().values()
    ]
    _show("formats", rows, as_json)


@click.command()
@talk
def families(as_json: bool, quiet: bool, verbose: bool) -> None:
    """List the model families and their parts."""
    from adaptkit.detect import families as known

    rows: list[dict[str, object]] = [
        {"name": f.name, "title": f.title, "components": {part.name: part.title for part in f.components}}
        for f in known().values()
    ]
    _show("families", rows, as_json)


@click.command()
@talk
def algorithms(as_json: bool, quiet: bool, verbose: bool) -> None:
    """List the algorithms, the tensors each stores, and which can be extracted."""
    from adaptkit.keymap import algorithms as known

    rows: list[dict[str, object]] = [
        {
            "name": a.name,
            "title": a.title,
            "tensors": [role.spelling for role in a.roles.values()],
            "extract": a.extractable,
        }
        for a in known().values()
    ]
    _show("algorithms", rows, as_json)
