"""The words that family tables are written in, and what every family's table must keep to."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise

import pytest

from adaptkit.detect import families
from adaptkit.families.contract import (
    Component,
    Kind,
    Name,
    named,
    pair,
    row,
    scaled,
    split,
    swapped,
    transformer,
)
from adaptkit.names import Rows

FIELD = re.compile(r"\{(\w+)(?::(\d+))?\}")


def test_a_row_has_its_own_name_unless_diffusers_is_given() -> None:
    one = row("layers.{i:2}.fc", native="h.{i:2}.fc")
    assert {naming: [name.module for name in names] for naming, names in one.names.items()} == {
        "diffusers": ["layers.{i:2}.fc"],
        "native": ["h.{i:2}.fc"],
    }
    assert (one.kind, one.kernel) == (Kind.MATRIX, ())
    two = pair(scaled("a.norm"), "b.norm", kind=Kind.NORM)
    assert (two.target, two.kind) == ("a.norm", Kind.NORM)
    assert two.names["native"] == (Name("a.norm", "a.norm.scale", "a.norm.bias"),)
    assert two.names["diffusers"] == (Name("b.norm", "b.norm.weight", "b.norm.bias"),)


def test_names_tell_how_their_tensors_are_stored() -> None:
    assert swapped("a") == Name("a", "a.weight", "a.bias", swapped=True)
    assert named("a", weight="a_w", transposed=True) == Name("a", "a_w", "a.bias", None, True)
    assert named("a", bias="a_b") == Name("a", "a.weight", "a_b")


def test_parts_are_equal_shares_or_those_asked_for() -> None:
    thirds = split("attn.to_", "q", "k", "v")
    assert [(name.weight, name.rows) for name in thirds] == [
        ("attn.to_q.weight", Rows(0, 1, 3)),
        ("attn.to_k.weight", Rows(1, 2, 3)),
        ("attn.to_v.weight", Rows(2, 3, 3)),
    ]
    uneven = split("", "q", "mlp", ratio=(1, 4))
    assert [(name.bias, name.rows) for name in uneven] == [
        ("q.bias", Rows(0, 1, 5)),
        ("mlp.bias", Rows(1, 5, 5)),
    ]
    with pytest.raises(ValueError, match="2 parts, 3 shares"):
        split("", "a", "b", ratio=(1, 1, 1))


def test_formats_write_diffusers_names_where_a_component_says_nothing_else() -> None:
    part = transformer("T", (row("a"),), comfy="diffusers")
    assert [part.naming(style) for style in ("kohya", "comfy", "peft")] == [
        "native",
        "diffusers",
        "diffusers",
    ]


PARTS = [
    (name, part)
    for name, family in families().items()
    for part in (*family.components, *family.beside)
]


def test_there_are_families() -> None:
    assert len(families()) >= 20
    assert len(PARTS) >= 50


@pytest.mark.parametrize(
    ("family", "part"), PARTS, ids=[f"{family}-{part.name}" for family, part in PARTS]
)
def test_a_table_is_of_one_piece(family: str, part: Component) -> None:
    """Names of a row share its indices and bounds, its parts cover the rows, no target comes twice."""
    assert part.rows, family
    targets = Counter(one.target for one in part.rows)
    assert targets.most_common(1)[0][1] == 1
    for one in part.rows:
        free = dict(FIELD.findall(one.target))
        assert part in families()[family].beside or all(free.values()), one.target
        assert "diffusers" in one.names
        for naming, names in one.names.items():
            for name in names:
                for text in (name.module, name.weight, name.bias):
                    assert dict(FIELD.findall(text)).keys() == free.keys(), (naming, text)
                    assert {bound for _, bound in FIELD.findall(text)} <= {*free.values(), ""}
            cuts = [name.rows for name in names if name.rows is not None]
            # a module may have several names, each of the whole; parts follow one another
            if cuts and len(cuts) == len(names):
                assert cuts[0].start == 0
                assert all(a.stop == b.start for a, b in pairwise(cuts)), one
                assert len({cut.total for cut in cuts}) == 1
