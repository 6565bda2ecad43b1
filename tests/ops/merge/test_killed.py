"""kill -9 at random moments of a merge over an existing output: the old file or the whole new one, never half of one.

Three moments by default; ADAPTKIT_KILLS=50 for as many as the acceptance asks for.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit.ops import merge

KILLS = int(os.environ.get("ADAPTKIT_KILLS", "3"))
# torch is imported once, every merge is a process of its own: forked before any thread has started
SERVER = """
import os, sys
from pathlib import Path
import torch
from adaptkit.ops import merge
torch.set_num_threads(1)
base, adapter, output = sys.argv[1:]
merge.plan(Path(base), [(Path(adapter), 1.0)], merge.Options(output=Path(output), overwrite=True)).close()
for line in sys.stdin:
    strength, verify = line.split()
    child = os.fork()
    if not child:
        options = merge.Options(output=Path(output), overwrite=True, verify=verify == "True")
        merge.run(merge.plan(Path(base), [(Path(adapter), float(strength))], options))
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture(scope="module", params=["file", "folder"])
def base(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny: Path
) -> Path:
    """The tiny checkpoint with ballast, so that a merge takes a while; its output is a file, or a folder of shards."""
    state = load_file(tiny / "base.safetensors")
    state |= {f"first_stage_model.ballast.{n}": torch.randn(1 << 20) for n in range(8)}
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    save_file(state, path)
    return path if request.param == "file" else path.parent


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_an_output_is_the_old_one_or_the_new_one(tmp_path: Path, tiny: Path, base: Path) -> None:
    adapter, output = (
        tiny / "lora-kohya.safetensors",
        tmp_path / ("out" if base.is_dir() else "out.safetensors"),
    )
    wanted: dict[str, float] = {}
    for strength in (0.25, 0.5):
        target = merge.Options(output=output, overwrite=True)
        merge.run(merge.plan(base, [(adapter, strength)], target))
        wanted[_digest(output)] = strength
    assert len(wanted) == 2
    arguments = [sys.executable, "-c", SERVER, str(base), str(adapter), str(output)]
    draw, seen = random.Random(0), Counter[str]()
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None

        def start(strength: float, verify: bool) -> int:
            server.stdin.write(f"{strength} {verify}\n")  # type: ignore[union-attr]
            server.stdin.flush()  # type: ignore[union-attr]
            return int(server.stdout.readline())  # type: ignore[union-attr]

        whole = {}
        for verify in (False, True):
            start(0.5, verify)
            began = time.perf_counter()
            assert int(server.stdout.readline()) == 0
            whole[verify] = time.perf_counter() - began
        current = 0.5
        for n in range(KILLS):
            other, verify = 0.75 - current, n % 2 > 0
            child = start(other, verify)
            time.sleep(draw.uniform(0, 1.1 * whole[verify]))
            _kill(child)
            seen["killed"] += int(server.stdout.readline()) == signal.SIGKILL
            found = wanted.get(_digest(output))
            assert found in (current, other), "neither the old output nor the new one"
            seen["new" if found == other else "old"] += 1
            current = found
            for left in tmp_path.iterdir():
                assert left == output or (left.name.startswith(".") and left.suffix == ".part"), (
                    left
                )
        server.stdin.close()
    assert seen["killed"] >= KILLS // 4
    # what a killed merge left is in nobody's way
    merge.run(merge.plan(base, [(adapter, 0.25)], merge.Options(output=output, overwrite=True)))
    assert wanted[_digest(output)] == 0.25
    print(dict(seen), whole)


def _digest(path: Path) -> str:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return hashlib.sha256(
        b"".join(file.name.encode() + file.read_bytes() for file in files)
    ).hexdigest()


def _kill(child: int) -> None:
    with suppress(ProcessLookupError):  # it may have finished
        os.kill(child, signal.SIGKILL)
