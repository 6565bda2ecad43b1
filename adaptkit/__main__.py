"""Run the command line with ``python -m adaptkit``."""

from __future__ import annotations

from adaptkit.cli import run

if __name__ == "__main__":
    run()
