"""`python -m tests.interop.hosts --record [HOST [FAMILY …]]` measures anew; `… HOST [FAMILY …]` compares every verdict with the loader."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.interop.hosts import record, verdicts


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--record"]:
        record.record(*arguments[1:])
        return 0
    total = 0
    for host in arguments[:1] or list(record.LOADERS):
        if not record.LOADERS[host].there():
            print(f"{host} is not here: see tests/interop/hosts/{host}.py", flush=True)
            continue
        cells = unknown = wrong = 0
        with tempfile.TemporaryDirectory() as folder:
            for cell in verdicts.compare(host, arguments[1:], Path(folder)):
                cells += 1
                unknown += cell.claimed is None
                if not cell.agrees:
                    wrong += 1
                    print(cell, flush=True)
        print(f"{host}: {cells} files, {unknown} not measured, {wrong} wrong", flush=True)
        total += wrong
    return total > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
