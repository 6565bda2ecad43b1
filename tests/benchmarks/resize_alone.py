"""`python -m tests.benchmarks.resize_alone IN OUT RANK`: the seconds of reading, resizing and writing, torch being there."""

from __future__ import annotations

import gc
import sys
import time
from pathlib import Path

import torch

from adaptkit.ops import resize


def main() -> None:
    torch.linalg.eigh(torch.eye(2))  # loads LAPACK
    output = Path(sys.argv[2])
    options = resize.Options(rank=int(sys.argv[3]), output=output)
    spent = []
    for _ in range(5):
        output.unlink(missing_ok=True)
        gc.collect()
        gc.freeze()  # the command line looks for cycles among 200,000 objects at least, not among those of torch
        started = time.perf_counter()
        plan = resize.plan(Path(sys.argv[1]), options)
        resize.run(plan)
        plan.close()
        spent.append(time.perf_counter() - started)
    print(sorted(spent)[2])


if __name__ == "__main__":
    main()
