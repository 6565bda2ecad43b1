"""CI's second run of the numeric tests really takes other kernels, and those of `NUMERIC` are there."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.conftest import NUMERIC, TESTS
from tests.synth import ROOT

WIDER = "AVX-512"
PRODUCT = """
import hashlib, torch
torch.set_num_threads(1)
draw = torch.Generator().manual_seed(0)
one, two = (torch.randn(65, 65, generator=draw) for _ in range(2))
print("bits", hashlib.sha256((one @ two).numpy().tobytes()).hexdigest())
print("aten", torch.backends.cpu.get_cpu_capability())
"""


def asked() -> dict[str, str]:
    """The variables that .ci/run sets before the second run."""
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    (line,) = re.findall(r"^export (MKL_.*)$", script, re.MULTILINE)
    return dict(pair.split("=") for pair in line.split())


def told(variables: dict[str, str]) -> dict[str, str]:
    """What torch and MKL say of themselves, and the bits of a product."""
    plain = {name: value for name, value in os.environ.items() if name not in asked()}
    done = subprocess.run(
        [sys.executable, "-c", PRODUCT],
        env=plain | variables | {"MKL_VERBOSE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    words = (line.partition(" ") for line in done.stdout.splitlines())
    found: dict[str, str] = {}
    for name, _, rest in words:
        found.setdefault(name, rest)
    return found


def test_the_second_run_takes_other_kernels() -> None:
    usual, other = told({}), told(asked())
    if usual["aten"] == "DEFAULT":
        pytest.skip("this processor has no AVX2")
    assert other["aten"] == "AVX2"
    if "MKL_VERBOSE" not in usual:
        pytest.skip("this torch computes without MKL")
    assert WIDER not in other["MKL_VERBOSE"]
    if WIDER in usual["MKL_VERBOSE"]:
        assert other["bits"] != usual["bits"]


def test_this_run_takes_the_kernels_that_are_asked_for() -> None:
    import torch

    if wanted := os.environ.get("ATEN_CPU_CAPABILITY"):
        assert torch.backends.cpu.get_cpu_capability().lower() == wanted


def test_the_numeric_tests_are_where_they_are_said_to_be() -> None:
    assert all((TESTS / path).exists() for path in NUMERIC)
