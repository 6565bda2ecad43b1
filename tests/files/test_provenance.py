"""Metadata: what stays, what goes, what is added."""

from __future__ import annotations

import hashlib
import itertools
import json
import random

import pytest

from adaptkit.errors import UnreadableFile
from adaptkit.files.provenance import (
    KEY,
    family,
    history,
    kept,
    sha256,
    sshs_hashes,
    sshs_places,
    updated,
)


def test_hash(tmp_path):
    path = tmp_path / "ü.bin"
    path.write_bytes(b"abc" * 1000)
    assert sha256(path) == sha256(path, chunk=7) == hashlib.sha256(b"abc" * 1000).hexdigest()
    with pytest.raises(UnreadableFile):
        sha256(tmp_path / "none")


def test_stale_hashes_go_and_the_rest_stays_in_order():
    old = {"z": "1", "sshs_model_hash": "x", "modelspec.title": "t", "sshs_legacy_hash": "x",
           "modelspec.hash_sha256": "x", "a": "2"}  # fmt: skip
    assert list(kept(old).items()) == [("z", "1"), ("modelspec.title", "t"), ("a", "2")]
    assert list(updated(old, {"b": 1, "a": "ü"})) == ["z", "modelspec.title", "a", KEY]
    assert updated(old, {"b": 1, "a": "ü"})[KEY] == '[{"a":"ü","b":1}]'
    assert "sshs_model_hash" in old


def test_records_pile_up_newest_last():
    once = updated({}, {"command": "resize"})
    twice = updated(once, {"command": "convert"})
    assert [record["command"] for record in json.loads(twice[KEY])] == ["resize", "convert"]
    assert twice == updated(once, {"command": "convert"})
    assert history(twice)[0] == {"command": "resize"}


@pytest.mark.parametrize(
    ("text", "before"),
    [
        ('{"a":1}', [{"a": 1}]),
        ("[1,2]", [1, 2]),
        ("free text", ["free text"]),
        ("[" * 100_000, ["[" * 100_000]),
    ],
)
def test_what_others_left_under_our_key_is_kept(text, before):
    assert json.loads(updated({KEY: text}, {"n": 1})[KEY]) == [*before, {"n": 1}]


def test_the_newest_record_that_names_a_family_counts():
    once = updated({}, {"family": "flux"})
    assert family(once) == family(updated(once, {"command": "metadata"})) == "flux"
    assert family(updated(once, {"family": "wan"})) == "wan"
    for text in ("free text", "[1,2]", '{"family":1}', '[{"family":null}]', "[" * 100_000):
        assert family({KEY: text}) is None


MIB, WINDOW = 1 << 20, 1 << 16


def blob(size, seed=0):
    return random.Random(seed).randbytes(size)


def cut(data, sizes):
    """Pieces of these sizes in turn, over and over."""
    at = 0
    for size in itertools.cycle(sizes):
        if at >= len(data):
            return
        yield memoryview(data)[at : at + size]
        at += size


@pytest.mark.parametrize("header", [8 + 2, 8 + 4712])
@pytest.mark.parametrize(
    "sizes", [[3 << 20], [4096], [MIB - 1000, 1, 999, WINDOW - 1, 2], [WINDOW // 2 + 3]]
)
def test_sd_scripts_hashes_are_those_of_the_whole_file(header, sizes):
    """`addnet_hash_safetensors` and `addnet_hash_legacy`: all tensors, and 64 KiB at 1 MiB."""
    head, data = blob(header), blob(MIB + 3 * WINDOW, seed=1)
    whole = head + data
    assert len(whole) > MIB + 2 * WINDOW, "a window twice as long would be seen"
    expected = {
        "sshs_model_hash": hashlib.sha256(data).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(whole[0x100000:0x110000]).hexdigest()[:8],
    }
    assert sshs_hashes(cut(data, sizes), header) == expected


@pytest.mark.parametrize("size", [100, MIB - 500, MIB - 400, MIB + WINDOW // 2, MIB + WINDOW - 400])
def test_a_file_that_ends_before_the_window_does_is_hashed_as_far_as_it_goes(size):
    head, data = blob(400), blob(size, seed=1)
    expected = hashlib.sha256((head + data)[MIB : MIB + WINDOW]).hexdigest()[:8]
    assert sshs_hashes(cut(data, [70_000]), len(head))["sshs_legacy_hash"] == expected


def test_the_hashes_are_as_long_as_the_places_kept_for_them():
    places = sshs_places({"sshs_model_hash": "x", "sshs_legacy_hash": "y", "ss_lr": "1"})
    found = sshs_hashes([memoryview(b"abc")], 10)
    assert {name: len(text) for name, text in places.items()} == {
        name: len(text) for name, text in found.items()
    }
    assert all(set(text) == {"0"} for text in places.values())
    assert sshs_places({"sshs_legacy_hash": "y"}) == {"sshs_legacy_hash": "00000000"}
    assert sshs_places({"ss_lr": "1"}) == {}
