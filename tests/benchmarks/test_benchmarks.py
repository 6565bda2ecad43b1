"""The benchmarks run; what they measure is no test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.synth import ROOT


def benchmarks(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.benchmarks", *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    )


# what each prints; `gpu` needs a device
SMALL = {
    "hostile": ["below 1 MB"],
    "inspect": ["torch imported by inspect: no"],
    "convert": ["torch imported by convert: no"],
    "resize": ["at 8 strengths"],
    "finetune": ["finetune"],
    "linalg": ["truncated_svd 320 × 320"],
    "peer": ["torch.svd_lowrank, streamed"],
    "sd15": ["within 1.0 GB", "obvious merge"],
}


@pytest.mark.share(4)
@pytest.mark.parametrize("name", SMALL)
def test_small(name: str, tmp_path: Path) -> None:
    done = benchmarks(name, "--small", "--folder", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    for words in SMALL[name]:
        assert words in done.stdout, done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_device(tmp_path: Path) -> None:
    """On the CPU: every figure is printed, and nothing stays."""
    done = benchmarks("gpu", "--small", "--device", "cpu", "--folder", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    for words in (
        "LoKr added",
        "100 %",
        "back",
        "looped",
        "truncated_svd, rank 32",
        "merge of that LoKr",
    ):
        assert words in done.stdout, done.stdout
    assert not list(tmp_path.iterdir())


def test_the_parent_process_stays_small() -> None:
    """What it imports would count as peak memory of every child."""
    code = "import sys, tests.benchmarks.__main__; print({'torch', 'numpy'} & sys.modules.keys())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "set()"


def test_list_and_names() -> None:
    assert "sd15" in benchmarks("--list").stdout
    refused = benchmarks("nonesuch")
    assert refused.returncode == 2
    assert "nonesuch" in refused.stderr
