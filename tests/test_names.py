from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptkit.keymap import Templates
from adaptkit.names import Rows, Slot, Target, tokenise

NUMBER = re.compile(r"(?<!\d)(0|[1-9]\d{0,8})(?!\d)")


@given(st.text(alphabet="ab_.#\x010123456789", max_size=40))
def test_tokenise_loses_nothing(text: str) -> None:
    skeleton, numbers = tokenise(text)
    assert numbers == tuple(map(int, NUMBER.findall(text)))
    assert skeleton.count("#") == len(numbers)
    values = iter(numbers)
    whole = re.sub("#", lambda _: str(next(values)), skeleton)
    assert whole.replace("\x01n", "#").replace("\x01e", "\x01") == text


@pytest.mark.parametrize("text", ["a.007", "a_" + "9" * 5000, "٣.x", "a²b"])
def test_what_no_index_looks_like_stays_text(text: str) -> None:
    assert tokenise(text) == (text, ())


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 500))
def test_rows_cut_exactly_or_not_at_all(one: int, two: int, three: int, unit: int) -> None:
    total = one + two + three
    cut = Rows(one, one + two, total)
    assert cut.bounds(total * unit) == (one * unit, (one + two) * unit)
    if total > 1:
        assert cut.bounds(total * unit + 1) is None


def test_names_read_as_people_write_them() -> None:
    target = Target("unet", "conv_in")
    assert str(Slot(target)) == "unet.conv_in"
    assert str(Target("unet", "conv_in", "bias")) == "unet.conv_in.bias"
    assert str(Slot(target, Rows(0, 1, 3))) == "unet.conv_in[0:1/3]"


class TestTemplates:
    def test_literals_bounds_and_repeats(self) -> None:
        table: Templates[str] = Templates()
        table.add("layers.{i:12}.fc1", "one")
        table.add("layers.{i:12}.fc2", "two")
        table.add("pair.{n}.{n}", "pair")
        assert table.match("layers.11.fc1") == ("one", {"i": 11})
        assert table.match("layers.3.fc2") == ("two", {"i": 3})
        assert table.match("layers.12.fc1") is None
        assert table.match("layers.3.fc3") is None
        assert table.match("pair.4.4") == ("pair", {"n": 4})
        assert table.match("pair.4.5") is None

    def test_two_meanings_of_one_name_are_refused(self) -> None:
        table: Templates[str] = Templates()
        table.add("a.{i}", "one")
        table.add("a.{i}", "one")
        with pytest.raises(TypeError, match="means both"):
            table.add("a.{i}", "two")

    def test_several_free_indices_among_fixed_numbers(self) -> None:
        table: Templates[str] = Templates()
        table.add("block2.{i:3}.to{j:5}.norm1.7", "here")
        assert table.match("block2.2.to4.norm1.7") == ("here", {"i": 2, "j": 4})
        for other in (
            "block2.3.to4.norm1.7",
            "block2.2.to5.norm1.7",
            "block1.2.to4.norm1.7",
            "block2.2.to4.norm2.7",
            "block2.2.to4.norm1.8",
        ):
            assert table.match(other) is None, other

    def test_words_may_be_joined_by_underscores(self) -> None:
        table: Templates[str] = Templates()
        table.add("mid.block_1.{i:2}.fc", "here", "_")
        assert table.match("mid_block_1_1_fc") == ("here", {"i": 1})
        assert table.match("mid.block_1.1.fc") is None
