"""`python -m tests.benchmarks.resize_alone IN OUT RANK [RUNS]`: the seconds of reading, resizing and writing, torch being there.

The median of 15 runs, as a single slow moment of the machine would count for more here than in the minute of the dense loop.
"""

from __future__ import annotations

import gc
import sys
import time
from pathlib import Path

import torch

from adaptkit.ops import resize
from tests.benchmarks.measure import median


def main() -> None:
    torch.linalg.eigh(torch.eye(2))  # loads LAPACK
    output = Path(sys.argv[2])
    options = resize.Options(rank=int(sys.argv[3]), output=output)
    spent = []
    for _ in range(int(sys.argv[4]) if len(sys.argv) > 4 else 15):
        output.unlink(missing_ok=True)
        gc.collect()
        gc.freeze()  # the command line looks for cycles among 200,000 objects at least, not among those of torch
        started = time.perf_counter()
        plan = resize.plan(Path(sys.argv[1]), options)
        resize.run(plan)
        plan.close()
        spent.append(time.perf_counter() - started)
    print(median(spent))


if __name__ == "__main__":
    main()
