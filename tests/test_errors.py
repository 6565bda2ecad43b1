"""The error tree: what a message holds, what callers may catch, how the command line exits."""

from __future__ import annotations

import re

import pytest

from adaptkit import errors
from adaptkit.errors import AdaptkitError, CorruptFile, NoSuchName, UnsafePickle, WrongUsage


def subclasses() -> list[type[AdaptkitError]]:
    found = [getattr(errors, name) for name in errors.__all__ if name != "AdaptkitError"]
    assert len(found) >= 14
    return found


def test_every_error_is_of_the_tree_and_public() -> None:
    here = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert here == set(errors.__all__)
    assert all(issubclass(error, AdaptkitError) for error in subclasses())


def test_the_tree_in_the_docstring_is_the_tree_of_classes() -> None:
    drawn = re.findall(r"^([│ ]*)[├└]── (\w+)", errors.__doc__ or "", re.M)
    assert {name for _, name in drawn} == {error.__name__ for error in subclasses()}
    # a branch of its own stands under its parent, one step further in
    inner = {name for indent, name in drawn if len(indent) > 4}
    below = {error.__name__ for error in subclasses() if error.__base__ is not AdaptkitError}
    assert below == inner


def test_only_wrong_usage_exits_as_click_does() -> None:
    assert {error.exit_code for error in subclasses() if error is not WrongUsage} == {1}
    assert WrongUsage.exit_code == 2


def test_a_pickle_that_runs_code_is_a_corrupt_file() -> None:
    assert issubclass(UnsafePickle, CorruptFile)


def test_the_message_says_where_unless_it_does_already() -> None:
    assert str(AdaptkitError("too short")) == "too short"
    assert str(AdaptkitError("too short", file="a.bin")) == "a.bin: too short"
    whole = AdaptkitError("too short", file="a.bin", tensor="up", hint="look")
    assert str(whole) == "a.bin: tensor 'up': too short"
    assert whole.hint == "look"
    assert str(AdaptkitError("a.bin is too short", file="a.bin")) == "a.bin is too short"
    assert str(AdaptkitError("tensor 'up' is short", tensor="up")) == "tensor 'up' is short"


def test_at_adds_what_deeper_code_did_not_know() -> None:
    error = AdaptkitError("short", tensor="up")
    assert error.at(file="outer", tensor="down") is error
    assert (error.file, error.tensor) == ("outer", "up")
    assert error.at(file="further").file == "outer"
    assert AdaptkitError("short").at(tensor="up").file is None


def test_near_names_are_offered_and_all_of_them_where_none_is_near() -> None:
    near = NoSuchName.among("family", "sdlx", ["flux", "sdxl", "sd1"])
    assert near.message == "unknown family 'sdlx'"
    assert near.hint is not None
    assert near.hint.startswith("did you mean sdxl")
    far = NoSuchName.among("family", "qqqq", ["sdxl", "flux"])
    assert far.hint == "known: flux, sdxl"


@pytest.mark.parametrize("error", subclasses(), ids=lambda error: error.__name__)
def test_every_error_says_what_it_means(error: type[AdaptkitError]) -> None:
    assert error.__doc__
    with pytest.raises(AdaptkitError, match="here"):
        raise error("here")
