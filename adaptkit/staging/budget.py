"""How much of a run may be in memory at once."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Budget"]

_POLL = 0.2  # seconds between checks of whether the run goes on


class Budget:
    """Admits parcels in order while their bytes and their number stay within bounds.

    A single parcel is always admitted, so that a step of any size can run.
    """

    def __init__(self, bytes: int, parcels: int) -> None:
        self.bytes, self.parcels = bytes, parcels
        self.changed = threading.Condition()
        self.used, self.inside = 0, 0

    def enter(self, size: int, goes_on: Callable[[], bool]) -> bool:
        """Whether a parcel is in, as soon as there is room; False if the run ends before."""
        with self.changed:
            # `used` = 0 admits a parcel of any size: one step may exceed its share of the bound
            while self.used and (self.used + size > self.bytes or self.inside >= self.parcels):
                if not goes_on():
                    return False
                self.changed.wait(_POLL)
            self.used += size
            self.inside += 1
        return True

    def computed(self, size: int, held: int) -> None:
        """Replace a parcel's bytes by those of its results, until `leave`."""
        with self.changed:
            self.used -= size - held
            self.inside -= 1
            self.changed.notify_all()

    def leave(self, held: int) -> None:
        """Free the bytes of results that are stored."""
        with self.changed:
            self.used -= held
            self.changed.notify_all()
