"""Metadata: what stays, what goes, what is added."""

from __future__ import annotations

import hashlib
import json

import pytest

from adaptkit.errors import UnreadableFile
from adaptkit.files.provenance import KEY, history, kept, sha256, updated


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
