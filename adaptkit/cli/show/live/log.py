"""`--log-file`: what the logger `adaptkit` says, with its time."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from adaptkit.errors import CannotWrite

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["logging_to"]


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Append to a log file until the command ends. Raises `CannotWrite`."""
    import logging

    from adaptkit.cli.show.text import safe
    from adaptkit.ops.stages import log

    class Safe(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            # names in files must not forge lines
            return safe(super().format(record).replace("\n", " "))

    try:
        handler = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise CannotWrite(f"cannot be written: {error.strerror or error}", file=path) from error
    handler.setFormatter(Safe("%(asctime)s %(levelname)s %(message)s"))
    logger = log()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.info("adaptkit %s", " ".join(sys.argv[1:]))
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
        handler.close()
