"""Time and memory: `python -m tests.benchmarks [NAME...]`.

Not tests: timings depend on the machine and on what else it does, so compare ratios of one run. Exit status 1 where
a bound of `sd15`, `inspect`, `hostile`, `convert`, `resize` or `finetune` is missed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from tests.benchmarks import (
    finetuning,
    gpu,
    hostile,
    inspecting,
    linalg,
    measure,
    peer,
    renaming,
    resizing,
    sd15,
)

PAGE = Path(__file__).parents[2] / "adaptkit" / "guide" / "reference" / "performance.md"
WIDTH = 78  # of a recorded table: the guide is read on terminals of 80 columns

BENCHMARKS = {
    "hostile": (hostile.run, "inspect on files made to cost as much as they can"),
    "inspect": (
        inspecting.run,
        "a 2,000-key file, 2,000 small files and 50 large ones against the start of torch",
    ),
    "convert": (renaming.run, "renaming a 340 MB LoRA against cp"),
    "resize": (
        resizing.run,
        "a LoRA from its factors against dense SVDs; one of SDXL brought to a size",
    ),
    "finetune": (
        finetuning.run,
        "how near the fits of a real fine-tune come to the optimum; needs the extra `bench`",
    ),
    "linalg": (linalg.run, "truncated_svd and nearest_kron against LAPACK"),
    "peer": (
        peer.run,
        "extract from full-size SD 1.5 checkpoints against a script; needs 5 GB of disk",
    ),
    "gpu": (
        gpu.run,
        "a device: its kernels, and an SDXL-sized pair against transfers; needs 24 GB of disk",
    ),
    "sd15": (sd15.run, "extract and merge of full-size SD 1.5 checkpoints; needs 27 GB of disk"),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="which benchmarks to run (default: all)"
    )
    parser.add_argument("--list", action="store_true", help="list the benchmarks and stop")
    parser.add_argument(
        "--folder",
        type=Path,
        help="where scratch files go (default: the system's temporary folder)",
    )
    parser.add_argument("--keep", action="store_true", help="keep the scratch files")
    parser.add_argument(
        "--small", action="store_true", help="small inputs, single runs: does everything work?"
    )
    parser.add_argument("--device", default="", help="the device of `gpu` (default: torch's own)")
    parser.add_argument(
        "--record", action="store_true", help=f"write the figures into the guide ({PAGE.name})"
    )
    options = parser.parse_args()
    if unknown := set(options.names) - BENCHMARKS.keys():
        parser.error(
            f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}"
        )
    return options


def record(name: str, printed: str) -> None:
    """Put what a benchmark printed into its place in the guide, with the machine and the date."""
    lines = [line.rstrip() for line in printed.strip("\n").splitlines()]
    day = datetime.now(UTC).date().isoformat()
    block = "\n".join(["```text", f"{measure.machine()}, {day}", "", *lines, "```"])
    mark = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
    text, found = mark.subn(
        lambda m: f"{m[1]}\n{block}\n\n{m[2]}", PAGE.read_text(encoding="utf-8")
    )
    assert found == 1, f"{PAGE.name} has no place for {name}"
    PAGE.write_text(text, encoding="utf-8", newline="\n")


def main() -> int:
    options = arguments()
    width = WIDTH if options.record else None if sys.stdout.isatty() else 140
    console = Console(width=width, soft_wrap=False, record=options.record)
    if options.list:
        for name, (_, what) in BENCHMARKS.items():
            console.print(f"{name:8} {what}")
        return 0
    if (
        options.small
    ):  # two threads that wait for each other on a busy machine take ten times as long
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="adaptkit-bench-", dir=options.folder))
    missed: list[str] = []
    try:
        console.print(measure.facts(), highlight=False)
        for name in options.names or BENCHMARKS:
            console.print()
            if options.record:
                console.export_text()  # forget what other benchmarks printed
            more = {"device": options.device} if name == "gpu" else {}
            missed += BENCHMARKS[name][0](scratch, console, options.small, **more)
            if options.record and not options.small:
                record(name, console.export_text())
    finally:
        if options.keep:
            console.print(f"kept: {scratch}", highlight=False)
        else:
            shutil.rmtree(scratch, ignore_errors=True)
    for line in missed:
        console.print(f"missed: {line}", style="bold red")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
