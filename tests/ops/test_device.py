from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import emulated
from tests.synth import FIXTURES

TESTS = ["on_device.py", "on_device_stacks.py", "on_device_streams.py"]
if not torch.cuda.is_available():
    TESTS += ["on_device_counts.py", "on_device_faults.py", "on_device_narrow.py"]


def test_every_command_on_a_device(tmp_path: Path) -> None:
    """`on_device.py` and its like, in a process of its own: an emulated device, once there, is there for all that the process does."""
    if not torch.cuda.is_available() and not emulated.available():
        pytest.skip("no CUDA device, and this torch cannot emulate one")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--basetemp={tmp_path / 'made'}",
    ]
    done = subprocess.run(
        [*command, *(str(Path(__file__).parent / name) for name in TESTS)],
        check=False, cwd=FIXTURES.parent, capture_output=True, text=True, encoding="utf-8", timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
