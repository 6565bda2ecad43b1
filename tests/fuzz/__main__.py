"""`python -m tests.fuzz --minutes N`: mutate files through readers and verbs; exit 1 for a finding."""

from __future__ import annotations

import argparse
import sys
import time

from tests.fuzz.run import NAMES, fuzz


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=2.0, help="time for all targets together")
    parser.add_argument("--executions", type=int, help="of each target, in place of a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "targets", nargs="*", default=NAMES, metavar="TARGET", help=", ".join(NAMES)
    )
    given = parser.parse_args()
    failed = False
    for name in given.targets:
        share = (
            None if given.executions else time.monotonic() + 60 * given.minutes / len(given.targets)
        )
        told = fuzz(name, given.executions or sys.maxsize, given.seed, share)
        print(f"{name:9} {told.executions:>9,} executions {told.seconds:7.1f} s, slowest {told.slowest:.2f} s, "
              f"{len(told.found)} findings", flush=True)  # fmt: skip
        for what, key in told.found.items():
            print(f"  {key}: {what}")
        failed = failed or bool(told.found)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
