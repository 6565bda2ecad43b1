"""LN tuning: the weights and biases of norms are replaced."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from adaptkit.algorithms._foreign import OfPeft
from adaptkit.algorithms._record import record
from adaptkit.algorithms._replaced import Replaced
from adaptkit.algorithms._stored import roles
from adaptkit.algorithms.contract import Role
from adaptkit.names import BIAS

if TYPE_CHECKING:
    from collections.abc import Mapping


@record
class LnTuning(OfPeft, Replaced):
    """W' = value, b' = bias, of norms or of any other layer.

    Zhao et al., arXiv:2312.11420; huggingface/peft `tuners/ln_tuning`, checked with 0.21.2.
    """

    name: ClassVar[str] = "ln-tuning"
    title: ClassVar[str] = "LN tuning"
    peft_type: ClassVar[str] = "LN_TUNING"
    roles: ClassVar[Mapping[str, Role]] = roles(
        value=Role("ln_tuning_layers.weight"), bias=Role("ln_tuning_layers.bias", param=BIAS)
    )
    forms: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"value"}), frozenset({"bias"}))


ALGORITHM = LnTuning
