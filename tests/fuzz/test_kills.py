"""A share of `python -m tests.fuzz.kills`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.kills import Seen, Server, _check, killed

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


@pytest.mark.parametrize("verb", ["convert", "batch"])
def test_a_moment_of_each_command(server: Server, verb: str) -> None:
    seen = killed(server, verb, 1)
    assert (seen.runs, seen.broken) == (1, [])


def test_half_an_output_is_seen(tmp_path: Path) -> None:
    wanted = [{"made": "one"}, {"made": "two"}]
    (tmp_path / "made").write_bytes(b"half")
    for batch in (False, True):
        seen = Seen("merge")
        assert not _check(seen, tmp_path, wanted, 0, batch=batch)
        assert len(seen.broken) == 1
    (tmp_path / "made.tmp").write_bytes(b"")
    seen = Seen("merge")
    _check(seen, tmp_path, wanted, 0, batch=False)
    assert seen.broken
