"""`python -m tests.fuzz.kills`: kill -9 at random moments of every writing command.

After each kill the output is the old one or the new one, whole; what is left is hidden; and the
next run works and removes it. A batch that is killed is finished by the same command.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.synth import FIXTURES

TINY = FIXTURES / "tiny"
VERBS = ("merge", "extract", "convert", "resize", "batch")
# torch is imported once; every run is a process of its own, forked before any thread has started
SERVER = """
import json, os, sys
from pathlib import Path
import torch
from adaptkit.ops import batch
from adaptkit.ops.verb import verb
torch.set_num_threads(1)
def planned(name, inputs, options, output):
    found = verb(name)
    options = found.options(output=Path(output), overwrite=True, **options)
    given = [Path(one) if isinstance(one, str) else [(Path(p), s) for p, s in one] for one in inputs]
    return found, found.plan(*given, options)
for line in sys.stdin:
    job = json.loads(line)
    if job[0] != "batch":
        planned(*job)[1].close()  # imports what the child needs
    child = os.fork()
    if not child:
        try:
            if job[0] == "batch":
                batch.run(batch.plan(Path(job[1][0]), batch.Options(jobs=0)))
            else:
                found, plan = planned(*job)
                found.run(plan)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(9)
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@dataclass
class Seen:
    """How the kills of one command ended."""

    verb: str
    runs: int = 0
    killed: int = 0
    old: int = 0
    new: int = 0
    left: int = 0
    broken: list[str] = field(default_factory=list)


class Server:
    """Runs commands, and kills them."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", SERVER]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )

    def start(self, job: Any) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return int(self._line())

    def end(self) -> int:
        return int(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


def killed(server: Server, verb: str, kills: int, seed: int = 0) -> Seen:
    """Kill one command so many times, each time at another moment."""
    draw, seen = random.Random(f"{verb}-{seed}"), Seen(verb)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        jobs = _jobs(verb, home)
        wanted, whole = [], 0.0
        for job in jobs:
            _clear(home / "out")
            began = time.perf_counter()
            server.start(job)
            assert server.end() == 0, f"{verb} fails without a kill"
            whole = time.perf_counter() - began
            wanted.append(_state(home / "out"))
        assert wanted[0] != wanted[1]
        current = 1
        for number in range(kills):
            if verb == "batch":
                _clear(home / "out")
            child = server.start(jobs[1 - current])
            began = time.perf_counter()
            if number % 2:  # at any moment; or after the first byte
                while not _hidden(home / "out") and time.perf_counter() - began < whole:
                    time.sleep(0.0005)
                share = 0.1
            else:
                share = 1.1
            time.sleep(draw.uniform(0, share * whole))
            with suppress(ProcessLookupError):  # it may have finished
                os.kill(child, signal.SIGKILL)
            seen.runs += 1
            seen.killed += server.end() == signal.SIGKILL
            new = _check(seen, home / "out", wanted, 1 - current, batch=verb == "batch")
            current = 1 - current if new or verb == "batch" else current
        server.start(jobs[0])
        if server.end() != 0 or _everything(home / "out") != wanted[0]:
            seen.broken.append("the run after the last kill did not end as the first one")
    return seen


def _hidden(out: Path) -> bool:
    return any(path.name.startswith(".") for path in out.iterdir())


def _check(
    seen: Seen, out: Path, wanted: list[dict[str, str]], number: int, *, batch: bool
) -> bool:
    """Look at what a kill left; whether the whole new output is there."""
    now, whole = _state(out), wanted[number]
    seen.left += len(_everything(out)) > len(now)
    for name in _everything(out).keys() - now.keys():
        if not name.split("/")[0].startswith("."):
            seen.broken.append(f"{name} is left")
    if batch:
        # some outputs are there, and each is whole
        bad = [name for name, digest in now.items() if name != "log" and whole.get(name) != digest]
        seen.broken += [f"{name} is neither whole nor absent" for name in bad]
        seen.new, seen.old = seen.new + (now == whole), seen.old + (now != whole)
    elif now == whole:
        seen.new += 1
    elif now == wanted[1 - number]:
        seen.old += 1
    else:
        seen.broken.append("neither the old output nor the new one")
    return now == whole


def _everything(out: Path) -> dict[str, str]:
    return {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.suffix != ".jsonl"
    }


def _state(out: Path) -> dict[str, str]:
    """The outputs, without what is hidden."""
    return {name: at for name, at in _everything(out).items() if not name.startswith(".")}


def _clear(out: Path) -> None:
    for path in out.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _jobs(verb: str, home: Path) -> list[Any]:
    """Two runs of a command that write different bytes to the same place."""
    (home / "out").mkdir()
    lora, base, tuned = _inputs(home)
    out = str(home / "out" / "made.safetensors")
    if verb == "merge":
        return [
            [verb, [base, [[str(home / "small.safetensors"), strength]]], {}, out]
            for strength in (0.25, 0.5)
        ]
    if verb == "extract":
        return [[verb, [base, tuned], {"rank": rank}, out] for rank in (2, 4)]
    if verb == "convert":
        return [[verb, [lora], {"to": "comfy", "dtype": dtype}, out] for dtype in ("fp32", "bf16")]
    if verb == "resize":
        return [[verb, [lora], {"rank": rank, "dtype": "fp32"}, out] for rank in (1, 2)]
    for n, dtype in enumerate(("fp32", "bf16")):
        lines = "".join(
            f'[[job]]\ncommand = "convert"\nadapter = "{Path(lora).name}"\nto = "comfy"\n'
            f'dtype = "{dtype}"\noutput = "out/{k}.safetensors"\n'
            for k in range(6)
        )
        (home / f"recipe{n}.toml").write_text(lines, encoding="utf-8")
    return [[verb, [str(home / f"recipe{n}.toml")], {}, ""] for n in range(2)]


def _inputs(home: Path) -> tuple[str, str, str]:
    """The tiny files with ballast, so that writing takes a good part of a run."""
    import torch
    from safetensors.torch import load_file, save_file

    draw = torch.Generator().manual_seed(0)
    state = load_file(TINY / "lora-kohya.safetensors")
    stem = "lora_unet_down_blocks_0_attentions_0_proj_in"
    for n in range(4):
        key = stem.replace("down_blocks_0", f"up_blocks_{n % 3 + 1}").replace(
            "_0_proj", f"_{n % 2}_proj"
        )
        state[f"{key}.lora_down.weight"] = torch.randn(4, 40_000, generator=draw)
        state[f"{key}.lora_up.weight"] = torch.randn(8, 4, generator=draw)
        state[f"{key}.alpha"] = torch.tensor(4.0)
    save_file(state, home / "lora.safetensors")
    for name in ("base", "tuned"):
        tensors = load_file(TINY / f"{name}.safetensors")
        if name == "base":
            for n in range(4):
                tensors[f"first_stage_model.ballast.{n}"] = torch.randn(1 << 20, generator=draw)
        save_file(tensors, home / f"{name}.safetensors")
    shutil.copy(TINY / "lora-kohya.safetensors", home / "small.safetensors")
    return (
        str(home / "lora.safetensors"),
        str(home / "base.safetensors"),
        str(home / "tuned.safetensors"),
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="of all commands together")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    failed, server = False, Server()
    for verb in VERBS:
        seen = killed(server, verb, given.kills // len(VERBS), given.seed)
        print(f"{verb:8} {seen.runs:4} runs, {seen.killed} killed, {seen.old} old, {seen.new} new, "
              f"{seen.left} with leftovers, {len(seen.broken)} broken", flush=True)  # fmt: skip
        for what in dict.fromkeys(seen.broken):
            print(f"  {what}")
        failed = failed or bool(seen.broken)
    server.close()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
