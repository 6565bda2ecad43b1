from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from zlib import crc32

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
SEED = "adaptkit"  # of the cases that a share of them takes


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--whole", action="store_true", help="all cases of the tests of which a share runs"
    )


def _left_out(items: list[pytest.Item]) -> set[pytest.Item]:
    """The cases that are not of the seeded share of their test (`share(n)`: one in n, and at least one)."""
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("share"):
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    out: set[pytest.Item] = set()
    for cases in tests.values():
        marker = cases[0].get_closest_marker("share")
        assert marker is not None
        drawn = sorted(cases, key=lambda item: crc32(f"{SEED} {item.nodeid}".encode()))
        out.update(drawn[-(-len(cases) // marker.args[0]) :])
    return out


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow = "slow" in config.getoption("markexpr")
    out = {item for item in items if item.get_closest_marker("slow") and not slow}
    # a case that is named is meant
    if not config.getoption("whole") and not any("[" in one for one in config.args):
        out |= _left_out(items)
    config.hook.pytest_deselected(items=[item for item in items if item in out])
    items[:] = [item for item in items if item not in out]
    for item in items:
        if any(item.path.is_relative_to(TESTS / path) for path in NUMERIC):
            item.add_marker(pytest.mark.numeric)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
