"""``python -m adaptkit``."""

from __future__ import annotations

from adaptkit.cli import main

if __name__ == "__main__":
    main()
