"""The factor of a product: `Factor = Dense | Product | Tucker`, shared by LoKr and LoHa."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from adaptkit.algorithms._parts import same
from adaptkit.algorithms._record import record

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from adaptkit.algorithms._stored import Shapes
    from adaptkit.linalg.lowrank import LowRank

__all__ = [
    "Dense",
    "Factor",
    "Product",
    "Tucker",
    "beside_identity",
    "factor_svd",
    "low_rank",
    "same_factor",
    "spread",
    "tucker_field",
]


class Factor:
    """One factor of a Kronecker or Hadamard product: `Dense | Product | Tucker`."""

    def dense(self) -> Tensor:
        """The matrix, (..., m, n), in float32 or wider."""
        raise NotImplementedError

    @property
    def rows(self) -> int:
        """The number of rows, m."""
        raise NotImplementedError


@record
class Dense(Factor):
    """A matrix stored as it is, (..., m, n)."""

    matrix: Tensor

    def dense(self) -> Tensor:
        from adaptkit.linalg.precision import upcast

        return upcast(self.matrix)

    @property
    def rows(self) -> int:
        return int(self.matrix.shape[-2])


@record
class Product(Factor):
    """left (..., m, r) · right (..., r, n)."""

    left: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        from adaptkit.linalg.precision import upcast

        return upcast(self.left) @ upcast(self.right)

    @property
    def rows(self) -> int:
        return int(self.left.shape[-2])


@record
class Tucker(Factor):
    """Σ_{pq} left[:, p] core[p, q, :] right[q, :].

    left: (..., m, r)   core: (..., r, s, K)   right: (..., s, d)   result: (..., m, d·K)
    """

    core: Tensor
    left: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        from adaptkit.linalg.precision import upcast

        return upcast(self.left) @ spread(upcast(self.core), upcast(self.right))

    @property
    def rows(self) -> int:
        return int(self.left.shape[-2])


def spread(core: Tensor, right: Tensor) -> Tensor:
    """core (..., r, s, K) ×₂ right (..., s, d), as (..., r, d·K).

    The kernel index is the fastest, as in `flatten(1)` of a convolution.
    """
    from adaptkit.linalg.precision import members, one_by_one

    if core.ndim > 3 and one_by_one(right):
        import torch

        pairs = members(core.flatten(-2), right)
        each = [spread(one.reshape(core.shape[-3:]), other) for one, other in pairs]
        return torch.stack(each).reshape(*right.shape[:-2], core.shape[-3], -1)
    wide = core.transpose(-1, -2) @ right.unsqueeze(-3)  # (..., r, K, d)
    return wide.transpose(-1, -2).reshape(*wide.shape[:-2], -1)


def low_rank(factor: Factor) -> tuple[Tensor, Tensor]:
    """(left, right) with left · right = the factor, in float32 or wider.

    A dense factor is multiplied by an identity on its smaller side.
    """
    from adaptkit.linalg.precision import upcast

    if isinstance(factor, Product):
        return upcast(factor.left), upcast(factor.right)
    if isinstance(factor, Tucker):
        return upcast(factor.left), spread(upcast(factor.core), upcast(factor.right))
    return beside_identity(factor.dense())


def beside_identity(x: Tensor) -> tuple[Tensor, Tensor]:
    """(left, right) of rank min(m, n) with left · right = x (..., m, n): x, and an identity."""
    import torch

    rows, columns = x.shape[-2:]
    eye = torch.eye(min(rows, columns), dtype=x.dtype, device=x.device)
    eye = eye.expand(*x.shape[:-2], -1, -1)
    return (eye, x) if rows <= columns else (x, eye)


def tucker_field(modules: Sequence[Shapes]) -> dict[str, bool]:
    """The field of PEFT's LoHa and LoKr configurations that tells Tucker cores."""
    cores, low = {"t1", "t2"}, {"t1", "t2", "w2_b", "w1_b"}
    tucker = {bool(shapes.keys() & cores) for shapes in modules if shapes.keys() & low}
    return {"use_effective_conv2d": True in tucker}


def same_factor(one: Factor, other: Factor) -> bool:
    """Whether two factors are equal bit for bit."""
    if type(one) is not type(other):
        return False
    names = [field.name for field in fields(one)]  # type: ignore[arg-type]
    return all(same(getattr(one, name), getattr(other, name)) for name in names)


def factor_svd(factor: Factor) -> LowRank:
    """All singular triplets of a factor (..., m, n)."""
    from adaptkit.linalg.factored import factored_svd
    from adaptkit.linalg.lowrank import SvdSpec, truncated_svd

    if isinstance(factor, Dense):
        dense = factor.dense()
        return truncated_svd(dense, SvdSpec(min(dense.shape[-2:])))
    found = factored_svd(*low_rank(factor))
    return found.head(min(found.s.shape[-1], found.u.shape[-2], found.vh.shape[-1]))
