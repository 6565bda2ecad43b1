"""A worker process: read bundles of jobs as JSON lines from stdin, answer on stdout."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys

from adaptkit.ops.batch.recipe import Job
from adaptkit.ops.batch.workers import answer, perform

__all__ = ["main"]


def main() -> None:
    """Serve until stdin ends; redirect what libraries print to stderr."""
    # on Windows the parent sends this for ^C
    if hasattr(signal, "SIGBREAK"):
        signal.signal(signal.SIGBREAK, signal.default_int_handler)
    # as in the command line: headers are many small objects
    gc.set_threshold(200_000, 20, 20)
    with os.fdopen(os.dup(1), "w", encoding="ascii", newline="\n") as replies:
        os.dup2(2, 1)
        for line in sys.stdin.buffer:
            replies.write(
                answer(perform(tuple(Job.from_dict(record) for record in json.loads(line))))
            )
            replies.flush()


if __name__ == "__main__":
    code = 0
    try:
        main()
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        # the parent has ended
        code = 1
    # skips the teardown of torch
    os._exit(code)
