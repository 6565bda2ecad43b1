"""DoRA: a LoRA, LoHa or LoKr whose rows or columns are scaled to learnt magnitudes."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from adaptkit.algorithms._factor import Dense, Product, Tucker
from adaptkit.algorithms._record import record
from adaptkit.algorithms._rotation import toward
from adaptkit.algorithms._stored import SCRATCH, matched, roles
from adaptkit.algorithms._wrapping import Wrapping
from adaptkit.algorithms.contract import (
    Decomposition,
    Facts,
    FitSpec,
    Role,
    Shapes,
    Stated,
    Weights,
)
from adaptkit.errors import NotRepresentable, ShapeMismatch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

OUTPUT, INPUT = "output", "input"
STORED = ("magnitude", "vector")


@record
class Dora(Wrapping):
    """W' = m · (W + ΔW) / ‖W + ΔW‖, by output rows (`axis` output) or input columns (input).

    magnitude: (..., rows, 1) or (..., 1, inputs). Source: Liu et al., arXiv:2402.09353. In
    LyCORIS (`modules/locon.py: apply_weight_decompose`) the stored shape tells the axis:
    `[out, 1, …]` by default, `[1, in, …]` in OneTrainer. PEFT (`tuners/lora/dora.py`) stores
    `[out]`, and `[1, out, 1, 1]` for convolutions. ComfyUI and InvokeAI divide by other norms on
    the output axis.
    """

    name: ClassVar[str] = "dora"
    title: ClassVar[str] = "DoRA"
    wraps: ClassVar[tuple[str, ...]] = ("lora", "loha", "lokr")
    own: ClassVar[Mapping[str, Role]] = roles(
        magnitude=Role("dora_scale", ("magnitude",)),
        vector=Role("lora_magnitude_vector", ("lora_magnitude_vector.weight",)),
    )
    roles: ClassVar[Mapping[str, Role]] = own

    inner: Weights
    magnitude: Tensor
    axis: str
    ones: int = 0  # trailing dimensions of 1 of the stored magnitudes: one per kernel dimension

    @classmethod
    def around(cls, inner: type[Weights]) -> Mapping[str, Any]:
        return {
            "title": f"{inner.title} with DoRA",
            "wrapper": cls.name,
            "resized": inner.resized and f"{inner.resized}+{cls.name}",
            # PEFT has DoRA for those kinds alone whose configuration has a field for it
            "peft_type": inner.peft_type if "use_dora" in inner.peft_fields(()) else "",
            "peft_alpha": inner.peft_alpha,
            "peft_lacks": inner.peft_lacks,
            "cores": inner.cores,
            "roles": MappingProxyType({**inner.roles, **cls.own}),
            "forms": tuple(form | {role} for form in inner.forms for role in STORED),
        }

    @classmethod
    def facts(cls, shapes: Shapes, alpha: Stated | None = None) -> Facts:
        facts = cls.kind.facts(
            {role: shape for role, shape in shapes.items() if role not in STORED}, alpha
        )
        _axis(shapes, facts)
        return facts

    @classmethod
    def decode(cls, tensors: Mapping[str, Tensor], facts: Facts) -> Self:
        inner = cls.kind.decode(
            {role: t for role, t in tensors.items() if role not in STORED}, facts
        )
        role = next(role for role in STORED if role in tensors)
        stored, batch = tensors[role], _leading(inner)
        own = tuple(stored.shape[batch:])
        axis = _axis({role: own}, facts)
        flat = stored.reshape(*stored.shape[:batch], -1)
        magnitude = flat.unsqueeze(-1) if axis == OUTPUT else flat.unsqueeze(-2)
        return cls(inner, magnitude, axis, max(len(own) - 2, 0))

    def encode(self) -> dict[str, Tensor]:
        shape = (*self.magnitude.shape, *(1,) * self.ones)
        return {**self.inner.encode(), "magnitude": self.magnitude.reshape(shape)}

    def delta(self) -> Tensor:
        raise NotRepresentable(
            "what a DoRA changes depends on the weight it is applied to",
            hint="merge it into its checkpoint",
        )

    def apply(self, base: Tensor, strength: float) -> Tensor:
        """W + strength · (W' − W): at strength 1 exactly W'.

        In blocks of rows: ΔW is never formed, and made twice for magnitudes on the input axis.
        """
        from adaptkit.linalg.precision import row_blocks

        inner = self.inner.widened() if base.dtype.itemsize > 4 else self.inner.computed()
        # the columns of one input, one per position of the kernel, share its magnitude
        inputs = base.shape[-1] if self.axis == OUTPUT else self.magnitude.shape[-1]
        magnitude = self.magnitude.to(base.dtype).unsqueeze(-1)
        factor = None if self.axis == OUTPUT else magnitude / self._norms(base, inner, inputs)
        for rows in row_blocks(base):
            part = base[..., rows, :]
            merged = _added(part, inner, rows)
            wide = _by_inputs(merged, inputs)
            if factor is None:
                wide.mul_(magnitude[..., rows, :, :] / _norm(wide, (-2, -1)))
            else:
                wide.mul_(factor)
            toward(part, merged, strength)
        return base

    def _norms(self, base: Tensor, inner: Weights, inputs: int) -> Tensor:
        """‖·‖ of the columns of each input of W + ΔW, (..., 1, inputs, 1)."""
        import torch

        from adaptkit.linalg.precision import row_blocks

        total: Tensor | None = None
        for rows in row_blocks(base):
            wide = _by_inputs(_added(base[..., rows, :], inner, rows), inputs)
            square = torch.linalg.vector_norm(wide, dim=(-3, -1), keepdim=True).square()
            total = square if total is None else total.add_(square)
        assert total is not None
        return total.sqrt_().add_(torch.finfo(base.dtype).eps)

    @classmethod
    def applying(cls, rows: int, columns: int) -> int:
        return 11 * min(rows * columns, SCRATCH)

    @classmethod
    def decompose(cls, weights: Weights, spec: FitSpec) -> Decomposition:
        """The direction by rank; the magnitudes stay. `energies` are those of the direction."""
        if not isinstance(weights, Dora):
            raise NotRepresentable(f"a {weights.name} has no magnitudes to make a {cls.name} of")
        return _Direction(
            cls.kind.decompose(weights.inner, spec), tuple(weights.encode()["magnitude"].shape)
        )

    def part(self, start: int, stop: int) -> Self:
        self._by_rows()
        return replace(
            self, inner=self.inner.part(start, stop), magnitude=self.magnitude[..., start:stop, :]
        )

    def own_part(self, start: int, stop: int) -> Self:
        return replace(self.part(start, stop), inner=self.inner.own_part(start, stop))

    def swapped(self) -> Self:
        if self.axis == INPUT:  # the norm of a column does not depend on the order of rows
            return replace(self, inner=self.inner.swapped())
        return super().swapped()

    @classmethod
    def fuse(cls, parts: Sequence[Self]) -> Self:
        import torch

        for part in parts:
            part._by_rows()
        try:
            inner = cls.kind.fuse([part.inner for part in parts])
        except NotRepresentable as error:
            error.hint = "--algo lora --base CHECKPOINT can hold what it changes"
            raise
        return replace(
            parts[0], inner=inner, magnitude=torch.cat([part.magnitude for part in parts], -2)
        )

    def folded(self) -> Self:
        return replace(self, inner=self.inner.folded())

    def unrolled(self) -> Self:
        return replace(self, inner=self.inner.unrolled())

    def _by_rows(self) -> None:
        if self.axis == INPUT:
            raise NotRepresentable(
                "a DoRA with magnitudes on its input axis cannot be split or fused: "
                "the norm of a column needs all rows",
                hint="merge it into its checkpoint",
            )

    @classmethod
    def peft_fields(cls, modules: Sequence[Shapes]) -> dict[str, Any]:
        return {**cls.kind.peft_fields(modules), "use_dora": True}

    @classmethod
    def stored_as(cls, role: str, *, peft: bool) -> str:
        return (
            ("vector" if peft else "magnitude")
            if role in STORED
            else cls.kind.stored_as(role, peft=peft)
        )

    @classmethod
    def laid_out(
        cls, role: str, shape: tuple[int, ...], facts: Facts, *, peft: bool
    ) -> tuple[int, ...]:
        if role not in STORED:
            return cls.kind.laid_out(role, shape, facts, peft=peft)
        axis = _axis({role: shape}, facts)
        ones = (1,) * len(facts.kernel or ())
        if axis == INPUT and peft:
            raise NotRepresentable(
                "a DoRA with magnitudes on its input axis has no PEFT form",
                hint="write kohya or comfy keys",
            )
        if axis == INPUT:
            return (1, math.prod(shape), *ones)
        if peft:
            return (1, facts.rows, *ones) if ones else (facts.rows,)
        return (facts.rows, 1, *ones)


class _Direction(Decomposition):
    """The ranks of the inner weights; the magnitudes are stored with each."""

    def __init__(self, inner: Decomposition, magnitude: tuple[int, ...]) -> None:
        self.inner, self.magnitude = inner, magnitude
        self.energies, self.norm = inner.energies, inner.norm

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        return {**self.inner.shapes(rank), "magnitude": self.magnitude}

    def numbers(self, rank: int) -> int:
        return self.inner.numbers(rank) + math.prod(self.magnitude)

    def keep(self, weights: Weights, rank: int) -> Weights:
        assert isinstance(weights, Dora)
        inner = self.inner.keep(weights.inner, rank)
        return Dora.over(type(inner))(inner, weights.magnitude, weights.axis, weights.ones)

    def lighter(self) -> Decomposition:
        return _Direction(self.inner.lighter(), self.magnitude)


def _added(base: Tensor, inner: Weights, rows: slice) -> Tensor:
    """W + ΔW of these rows, as a new tensor."""
    return inner.some_rows(rows.start, rows.stop).to(base.dtype).add_(base)


def _by_inputs(x: Tensor, inputs: int) -> Tensor:
    """A view of (..., rows, inputs·K) as (..., rows, inputs, K)."""
    return x.view(*x.shape[:-1], inputs, x.shape[-1] // inputs)


def _norm(x: Tensor, over: tuple[int, ...]) -> Tensor:
    import torch

    eps = torch.finfo(x.dtype).eps
    found: Tensor = torch.linalg.vector_norm(x, dim=over, keepdim=True).add_(eps)
    return found


def _leading(weights: Weights) -> int:
    """The number of batch dimensions of these weights."""
    match getattr(weights, fields(weights)[0].name):  # type: ignore[arg-type]
        case Dense(matrix) | Product(matrix, _) | Tucker(_, matrix, _):
            return int(matrix.ndim) - 2
        case tensor:
            return int(tensor.ndim) - 2


def _axis(shapes: Shapes, facts: Facts) -> str:
    """The axis of the stored magnitudes; ShapeMismatch if they fit neither."""
    role = next(role for role in STORED if role in shapes)
    shape = shapes[role]
    matched(math.prod(shape) > 0 and bool(shape), role, shapes)
    inputs = facts.columns // max(1, math.prod(facts.kernel or ()))
    if role == "vector" or len(shape) == 1:
        matched(math.prod(shape) == facts.rows, role, shapes)
        return OUTPUT
    if shape[0] == facts.rows and math.prod(shape) == facts.rows:
        return OUTPUT
    if shape[0] == 1 and (
        math.prod(shape) == inputs or (facts.kernel is None and inputs % math.prod(shape) == 0)
    ):
        return INPUT  # if flat factors do not tell the kernel, any that divides the inputs fits
    raise ShapeMismatch(
        f"magnitudes {list(shape)} fit neither {facts.rows} rows nor {inputs} inputs"
    )


ALGORITHM = Dora
