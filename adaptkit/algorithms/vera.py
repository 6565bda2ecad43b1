"""VeRA: one random product for the whole model, scaled by two vectors in each layer."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

from adaptkit.algorithms._projected import Projected
from adaptkit.algorithms._record import record
from adaptkit.algorithms._stored import roles
from adaptkit.algorithms.contract import Role

if TYPE_CHECKING:
    from collections.abc import Mapping


@record
class Vera(Projected):
    """ΔW = diag(rows) · vera_B · diag(inner) · vera_A, see `Projected`.

    Kopiczko et al., arXiv:2310.11454; huggingface/peft `tuners/vera`, checked with 0.21.2.
    """

    name: ClassVar[str] = "vera"
    title: ClassVar[str] = "VeRA"
    peft_type: ClassVar[str] = "VERA"
    shared: ClassVar[Mapping[str, str]] = MappingProxyType({"left": "vera_B", "right": "vera_A"})
    row_wise: ClassVar[bool] = True
    roles: ClassVar[Mapping[str, Role]] = roles(
        rows=Role("vera_lambda_b"), inner=Role("vera_lambda_d")
    )


ALGORITHM = Vera
