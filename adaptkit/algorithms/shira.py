"""SHiRA: a difference of which some entries are stored with their places."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

from adaptkit.algorithms._record import record
from adaptkit.algorithms._restated import one_for_all
from adaptkit.algorithms._settings import CONFIG_HINT, Unsettled
from adaptkit.algorithms._sparse import Sparse
from adaptkit.algorithms._stored import matched, roles
from adaptkit.algorithms.contract import Facts, Role, Shapes, Stated

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from adaptkit.algorithms._restated import Restated


@record
class Shira(Sparse):
    """ΔW[o, i] = entries where `where` (..., 2, k) holds the pairs (o, i), and 0 elsewhere.

    Bhardwaj et al., arXiv:2406.13175; huggingface/peft `tuners/shira/layer.py`, checked with
    0.21.2. Of linear layers only. The places are integers; PEFT on Windows stores them as float32.
    """

    name: ClassVar[str] = "shira"
    title: ClassVar[str] = "SHiRA"
    peft_type: ClassVar[str] = "SHIRA"
    roles: ClassVar[Mapping[str, Role]] = roles(
        entries=Role("shira_weight"), where=Role("shira_indices", integers=True)
    )
    forms: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"entries", "where"}),)

    entries: Tensor
    where: Tensor

    @classmethod
    def facts(cls, shapes: Shapes, alpha: Stated | None = None) -> Facts:
        entries, where = shapes["entries"], shapes["where"]
        matched(len(entries) == 1 and where == (2, *entries), "entries where", shapes)
        return Facts(0, 0, (), None, 1.0)

    @classmethod
    def decode(cls, tensors: Mapping[str, Tensor], facts: Facts) -> Self:
        return cls(tensors["entries"], tensors["where"])

    def encode(self) -> dict[str, Tensor]:
        return {"entries": self.entries, "where": self.where.int()}

    @classmethod
    def restated(cls, modules: Sequence[Restated]) -> dict[str, Any]:
        """The number of entries is r · (rows + columns), which the file does not tell."""
        stated = one_for_all("r", (m.config.get("r") for m in modules))
        if not isinstance(stated, int):
            raise Unsettled("the tensors of a SHiRA do not tell its r", hint=CONFIG_HINT)
        # any other mask is a function that the configuration does not hold
        return {"r": stated, "mask_type": "random"}

    def places(self, base: Tensor) -> Tensor:
        rows, columns = self.where.long().unbind(-2)
        size = base.shape[-2:]
        inside = not rows.numel() or bool(
            (rows.min() >= 0) & (rows.max() < size[0])
            & (columns.min() >= 0) & (columns.max() < size[1])
        )  # fmt: skip
        self._fitting(inside, base)
        return rows * size[1] + columns


ALGORITHM = Shira
