"""Kinds that PEFT alone reads, kinds that need the weight, and kinds that are not written."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

from adaptkit.algorithms.contract import Weights
from adaptkit.errors import NotRepresentable, OverLimit, ShapeMismatch
from adaptkit.files.limits import within

if TYPE_CHECKING:
    from torch import Tensor

    from adaptkit.algorithms._stored import Facts

__all__ = ["Applied", "OfPeft", "Unwritten", "count", "number", "seed"]


class OfPeft(Weights):
    """A kind of PEFT's folder alone: its tensors mean nothing without the configuration there.

    The configuration of the source is written again, so that seeds and settings stay.
    """

    peft_kept: ClassVar[bool] = True
    peft_only: ClassVar[bool] = True

    def folded(self) -> Self:
        return self


class Unwritten(Weights):
    """A kind that is not written: its file means something else to most of its readers."""

    def encode(self) -> dict[str, Tensor]:
        raise self._unwritten()

    @classmethod
    def laid_out(
        cls, role: str, shape: tuple[int, ...], facts: Facts, *, peft: bool
    ) -> tuple[int, ...]:
        raise cls._unwritten()

    @classmethod
    def _unwritten(cls) -> NotRepresentable:
        base = "" if cls.additive else " with --base CHECKPOINT"
        return NotRepresentable(
            f"{cls.title} is read, not written: hosts of image models do not load it",
            hint=f"--algo lora{base} writes what it changes",
        )


class Applied(Weights):
    """One that needs the weight that it changes, or only its size, which the file does not tell."""

    additive: ClassVar[bool] = False

    def delta(self) -> Tensor:
        raise NotRepresentable(
            f"what {self.title} changes depends on the weight", hint="merge it into its checkpoint"
        )

    @classmethod
    def _fitting(cls, holds: bool, base: Tensor) -> None:
        """ShapeMismatch unless these tensors fit the weight."""
        if not holds:
            raise ShapeMismatch(f"its {cls.title} does not fit a weight {list(base.shape[-2:])}")


def number(value: object, name: str) -> float:
    """A number of a configuration; NotRepresentable if it is something else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise NotRepresentable(f"adapter_config.json: {name} is {value!r}, not a number")
    try:
        return float(value)
    except OverflowError:  # an integer of more than 308 digits
        raise NotRepresentable(f"adapter_config.json: {name} is too large a number") from None


def count(value: object, name: str) -> int:
    """A number of ranks or steps in a configuration, which is work or memory: OverLimit beyond it.

    NotRepresentable if it is no such number.
    """
    found = number(value, name)
    if found < 0 or found % 1:  # NaN and infinity leave a rest that is NaN
        raise NotRepresentable(f"adapter_config.json: {name} is {value!r}, not a whole number")
    try:
        within("configured count", int(found))
    except OverLimit as error:
        error.message = f"adapter_config.json: {name}: {error.message}"
        raise
    return int(found)


def seed(value: object, name: str) -> int:
    """The seed of a generator of torch; NotRepresentable if it is something else."""
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 1 << 63:
        raise NotRepresentable(f"adapter_config.json: {name} is {value!r}, no seed")
    return value
