"""`python -m tests.faults`: every fault on both systems under every command; CI runs a share."""

from __future__ import annotations

import os
import sys

import pytest

if __name__ == "__main__":
    os.environ["ADAPTKIT_FAULTS"] = "all"
    sys.exit(pytest.main(["-q", "tests/faults", *sys.argv[1:]]))
