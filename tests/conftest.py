from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

os.environ.setdefault(
    "OPENBLAS_NUM_THREADS", "1"
)  # as the command line does: test processes wait for one another

# hundreds of tests start the command line in a process of its own, which would compile all of it anew
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import pytest
import torch

from tests.synth import CORPUS, FIXTURES

sys.dont_write_bytecode = False


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> None:
    """A shell that runs the tests in the background has the programs that they start ignore Ctrl-C."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Small matrices on a shared machine: threads that spin for each other only cost time."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny() -> Path:
    return FIXTURES / "tiny"


@pytest.fixture(scope="session")
def corpus() -> Path:
    if not CORPUS.is_dir():
        pytest.skip(f"the corpus of real key lists is not at {CORPUS}")
    return CORPUS


NUMERIC = (  # what .ci/run runs a second time with other kernels of BLAS
    "algorithms",
    "linalg",
    "ops/test_combine.py",
    "ops/compare/test_run.py",
    "ops/extract/test_run.py",
    "ops/merge/test_run.py",
    "ops/test_resize.py",
    "test_kernels.py",
)
TESTS = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "slow" not in config.getoption("markexpr"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
    for item in items:
        if any(item.path.is_relative_to(TESTS / path) for path in NUMERIC):
            item.add_marker(pytest.mark.numeric)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
