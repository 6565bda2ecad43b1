"""Rows of models that the world knows under diffusers' names, or under names close to them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.families.contract import Kind, Row, named, pair, row

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Words", "matrices", "norms", "parameters", "spread"]

# parts of diffusers' names and what the original has for them, replaced in this order
Words = tuple[tuple[str, str], ...]


def spread(*templates: str) -> Iterator[str]:
    """Every name that templates with choices stand for.

    >>> list(spread("attn.to_(q|k)", "(a|b).(1|2)"))
    ['attn.to_q', 'attn.to_k', 'a.1', 'a.2', 'b.1', 'b.2']
    """
    for template in templates:
        head, opened, rest = template.partition("(")
        choices, _, tail = rest.partition(")")
        if not opened:
            yield template
            continue
        for choice in choices.split("|"):
            yield from spread(head + choice + tail)


def matrices(*templates: str, words: Words = (), kernel: tuple[int, ...] = ()) -> Iterator[Row]:
    """Linear layers and convolutions, by diffusers' names."""
    for name in spread(*templates):
        yield _row(name, words, Kind.MATRIX, kernel)


def norms(*templates: str, words: Words = ()) -> Iterator[Row]:
    """Norms, by diffusers' names."""
    for name in spread(*templates):
        yield _row(name, words, Kind.NORM, ())


def parameters(*templates: str, words: Words = ()) -> Iterator[Row]:
    """Parameters without a module of their own, by diffusers' names."""
    for name in spread(*templates):
        native = _original(name, words)
        yield pair(named(native, weight=native), named(name, weight=name), kind=Kind.NORM)


def _row(name: str, words: Words, kind: Kind, kernel: tuple[int, ...]) -> Row:
    native = _original(name, words)
    if native == name:
        return row(name, kind=kind, kernel=kernel)
    return pair(native, name, kind=kind, kernel=kernel)


def _original(name: str, words: Words) -> str:
    for theirs, ours in words:
        name = name.replace(theirs, ours)
    return name
