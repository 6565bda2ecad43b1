"""A worker process of a batch: reads bundles of jobs as JSON lines from stdin, answers each with a line on what was stdout."""

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
    """Serve until stdin ends; nothing but answers goes out, whatever a library prints."""
    if hasattr(signal, "SIGBREAK"):  # what a parent on Windows sends for ^C
        signal.signal(signal.SIGBREAK, signal.default_int_handler)
    gc.set_threshold(200_000, 20, 20)  # as the command line does: headers are many small objects
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
    except BrokenPipeError:  # the parent is gone
        code = 1
    os._exit(code)  # without taking torch apart
