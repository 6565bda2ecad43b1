"""`python -m tests.benchmarks.resize_alone IN OUT RANK`: the seconds of reading, resizing and writing, torch being there."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from adaptkit.ops import resize


def main() -> None:
    torch.linalg.eigh(torch.eye(2))  # loads LAPACK
    options = resize.Options(rank=int(sys.argv[3]), output=Path(sys.argv[2]), overwrite=True)
    spent = []
    for _ in range(3):
        started = time.perf_counter()
        plan = resize.plan(Path(sys.argv[1]), options)
        resize.run(plan)
        plan.close()
        spent.append(time.perf_counter() - started)
    print(sorted(spent)[1])


if __name__ == "__main__":
    main()
