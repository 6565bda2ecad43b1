"""PVeRA: a VeRA whose inner vector is drawn at random in the training."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

from adaptkit.algorithms._projected import Projected
from adaptkit.algorithms._record import record
from adaptkit.algorithms._stored import Facts, roles
from adaptkit.algorithms.contract import Role
from adaptkit.errors import NotRepresentable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adaptkit.algorithms._settings import Wanted


@record
class Pvera(Projected):
    """ΔW = diag(rows) · pvera_B · diag(inner) · pvera_A of the means, see `Projected`.

    The second halves of `inner` and `pvera_A` are variances, which count in the training alone
    (arXiv:2512.07703; huggingface/peft `tuners/pvera`, checked with 0.21.2).
    """

    name: ClassVar[str] = "pvera"
    title: ClassVar[str] = "PVeRA"
    peft_type: ClassVar[str] = "PVERA"
    parts: ClassVar[int] = 2
    shared: ClassVar[Mapping[str, str]] = MappingProxyType({"left": "pvera_B", "right": "pvera_A"})
    roles: ClassVar[Mapping[str, Role]] = roles(
        rows=Role("pvera_lambda_b"), inner=Role("pvera_lambda_d")
    )

    @classmethod
    def settled(cls, facts: Facts, wanted: Wanted) -> Facts:
        if wanted.config is not None and wanted.config.get("sample_at_inference"):
            raise NotRepresentable(
                "sample_at_inference: what this PVeRA adds is drawn anew for every input"
            )
        return super().settled(facts, wanted)


ALGORITHM = Pvera
