"""Show cells: `python -m tests.matrix PATTERN [FOLDER]` runs those whose id the pattern is found in.

The commands with what they answered are printed, and the inputs stay in FOLDER.
"""

from __future__ import annotations

import re
import shlex
import sys
import tempfile
from pathlib import Path

from tests.matrix import host
from tests.matrix.cells import every
from tests.matrix.verbs import play

MOST = 5


def main(pattern: str, folder: Path) -> None:
    """Run at most five cells; an exact id runs alone."""
    exact = [cell for cell in every() if cell.id == pattern]
    found = exact or [cell for cell in every() if re.search(pattern, cell.id)]
    print(f"{len(found)} cells, {min(len(found), MOST)} shown")
    real = host.run

    def shown(arguments: list[str]) -> host.Run:
        ran = real(arguments)
        print("$ adaptkit", shlex.join(arguments))
        error = ran.report.get("relative_error") if ran.code == 0 else None
        print(f"  {ran.err.strip()}" if ran.code else f"  done, relative_error {error}")
        return ran

    host.run = shown
    for number, cell in enumerate(found[:MOST]):
        place = folder / str(number)
        place.mkdir(parents=True)
        print(f"\n{cell.id}")
        for problem in play(cell, place).problems or ["holds"]:
            print(f"  -> {problem}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp()))
