"""OSF: the trailing singular triplets of a weight are replaced."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

from adaptkit.algorithms._foreign import Applied, OfPeft
from adaptkit.algorithms._record import record
from adaptkit.algorithms._restated import patterns
from adaptkit.algorithms._stored import matched, roles
from adaptkit.algorithms.contract import Facts, Role, Shapes, Stated

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from adaptkit.algorithms._restated import Restated


@record
class Osf(OfPeft, Applied):
    """W' = W_k + left · diag(values) · right, W_k the best approximation of W of rank k.

    left: (..., m, t)   values: (..., t)   right: (..., t, n)   k = min(m, n) − t

    Nayak et al., arXiv:2504.07097; huggingface/peft `tuners/osf`, checked with 0.21.2. Of linear
    layers only.
    """

    name: ClassVar[str] = "osf"
    title: ClassVar[str] = "OSF"
    peft_type: ClassVar[str] = "OSF"
    roles: ClassVar[Mapping[str, Role]] = roles(
        left=Role("osf_svd_params.U_low"),
        values=Role("osf_svd_params.S_low"),
        right=Role("osf_svd_params.V_low"),
    )
    forms: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"left", "values", "right"}),)

    left: Tensor
    values: Tensor
    right: Tensor

    @classmethod
    def facts(cls, shapes: Shapes, alpha: Stated | None = None) -> Facts:
        left, values, right = (shapes[role] for role in ("left", "values", "right"))
        fits = len(left) == len(right) == 2 and len(values) == 1
        fits = fits and left[1] == values[0] == right[0] and 0 < values[0] <= min(left[0], right[1])
        matched(fits, "left values right", shapes)
        return Facts(left[0], right[1], (), None, 1.0)

    @classmethod
    def decode(cls, tensors: Mapping[str, Tensor], facts: Facts) -> Self:
        return cls(tensors["left"], tensors["values"], tensors["right"])

    def encode(self) -> dict[str, Tensor]:
        return {"left": self.left, "values": self.values, "right": self.right}

    @classmethod
    def restated(cls, modules: Sequence[Restated]) -> dict[str, Any]:
        """The number of triplets that are not replaced, `effective_rank`."""
        sides = ((m, min(m.facts.rows, m.facts.columns)) for m in modules)
        usual, others = patterns((m.name, side - m.shapes["values"][0]) for m, side in sides)
        # searched for anywhere in a name, unlike the patterns of other kinds
        return {"effective_rank": usual, "rank_pattern": {f"{n}$": k for n, k in others.items()}}

    @property
    def rows(self) -> int:
        return int(self.left.shape[-2])

    @classmethod
    def applying(cls, rows: int, columns: int) -> int:
        return 20 * rows * columns  # the singular value decomposition of the weight

    def apply(self, base: Tensor, strength: float) -> Tensor:
        import torch

        self._fitting((self.rows, self.right.shape[-1]) == tuple(base.shape[-2:]), base)
        u, s, v = torch.linalg.svd(base, full_matrices=False)
        kept = s.shape[-1] - self.values.shape[-1]
        left, values, right = (one.to(base.dtype) for one in (self.left, self.values, self.right))
        change = (left * values.unsqueeze(-2)) @ right
        started = (u[..., kept:] * s[..., None, kept:]) @ v[..., kept:, :]
        return base.add_(change.sub_(started), alpha=strength)


ALGORITHM = Osf
