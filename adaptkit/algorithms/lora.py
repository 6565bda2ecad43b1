"""LoRA and LoCon: a low-rank product, for some convolutions with a Tucker core."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from adaptkit.algorithms._factor import beside_identity, spread
from adaptkit.algorithms._lora_cut import by_cores, by_singular_values, cut_stack
from adaptkit.algorithms._parts import grouped, same, stacked, unique
from adaptkit.algorithms._record import record
from adaptkit.algorithms._stored import flat, matched, roles, scaling
from adaptkit.algorithms.contract import (
    ALPHA,
    THIN,
    Decomposition,
    Facts,
    FitSpec,
    KeptStack,
    Role,
    Shapes,
    Stated,
    Weights,
)
from adaptkit.errors import NotRepresentable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor


@record
class Lora(Weights):
    """ΔW = scale · up · down.   up: (..., m, r)   down: (..., r, i·K)

    scale is alpha / rank (Hu et al., arXiv:2106.09685; kohya sd-scripts `networks/lora.py`). With
    a Tucker core, mid: (..., r, r, K) and down: (..., r, i), and
    ΔW[o, i, k] = scale · Σ up[o, p] mid[p, q, k] down[q, i] (LyCORIS `functional/general.py:
    rebuild_tucker`). DyLoRA and LoRA-FA files are LoRA files.
    """

    name: ClassVar[str] = "lora"
    title: ClassVar[str] = "LoRA / LoCon"
    low_rank: ClassVar[bool] = True
    by_rows: ClassVar[bool] = True
    stacks: ClassVar[bool] = True
    resized: ClassVar[str | None] = "lora"
    ladder_roles: ClassVar[tuple[str, str] | None] = ("up", "down")
    extractable: ClassVar[bool] = True
    fit_options: ClassVar[frozenset[str]] = frozenset({"alpha", "clamp_quantile"})
    default_rank: ClassVar[int | None] = 32
    network_module: ClassVar[str] = "networks.lora"
    peft_type: ClassVar[str] = "LORA"
    peft_alpha: ClassVar[str] = "lora_alpha"
    cores: ClassVar[frozenset[str]] = frozenset({"mid"})
    roles: ClassVar[Mapping[str, Role]] = roles(
        up=Role(
            "lora_up.weight",
            ("lora_B.weight", "lora_B", "lora.up.weight", "lora_linear_layer.up.weight"),
        ),
        down=Role(
            "lora_down.weight",
            ("lora_A.weight", "lora_A", "lora.down.weight", "lora_linear_layer.down.weight"),
        ),
        mid=Role("lora_mid.weight"),
        alpha=Role(ALPHA, ("lora_alpha",)),  # FastVideo, SimpleTuner
    )
    forms: ClassVar[tuple[frozenset[str], ...]] = (
        frozenset({"up", "down"}),
        frozenset({"up", "down", "mid"}),
    )

    up: Tensor
    down: Tensor
    scale: float
    kernel: tuple[int, ...] = ()
    mid: Tensor | None = None

    @classmethod
    def facts(cls, shapes: Shapes, alpha: Stated | None = None) -> Facts:
        up, down, mid = shapes["up"], shapes["down"], shapes.get("mid")
        matched(len(up) >= 2 and len(down) >= 2 and all(n == 1 for n in up[2:]), "up down", shapes)
        rank = down[0]
        matched(rank > 0 and up[1] == (mid[0] if mid else rank), "up mid down", shapes)
        kernel = down[2:]
        if mid is not None:
            matched(
                len(mid) == len(down) > 2 and mid[1] == rank and all(n == 1 for n in kernel),
                "up mid down",
                shapes,
            )
            kernel = mid[2:]
        return Facts(up[0], _columns(down[1], kernel), kernel, rank, scaling(alpha, rank))

    @classmethod
    def decode(cls, tensors: Mapping[str, Tensor], facts: Facts) -> Self:
        kernel = facts.kernel or ()
        mid = tensors.get("mid")
        core = None if mid is None else mid.reshape(*mid.shape[: mid.ndim - len(kernel)], -1)
        own = 2 + len(kernel)
        down = flat(tensors["down"], own)
        # some files store the `up` of a 1×1 convolution without its trailing ones
        up = tensors["up"].reshape(*down.shape[:-2], facts.rows, -1)
        return cls(up, down, facts.scale, kernel, core)

    def encode(self) -> dict[str, Tensor]:
        import torch

        rank = self.down.shape[-2]
        batch = self.down.shape[:-2]
        ones = [1] * len(self.kernel)
        stored = {"up": self.up.reshape(*batch, *self.up.shape[-2:], *ones)}
        if self.mid is None:
            stored["down"] = self.down.reshape(*batch, rank, -1, *self.kernel)
        else:
            stored["mid"] = self.mid.reshape(*self.mid.shape[:-1], *self.kernel)
            stored["down"] = self.down.reshape(*batch, rank, -1, *ones)
        stored[ALPHA] = torch.tensor(self.scale * rank, dtype=torch.float32)
        return stored

    def unrolled(self) -> Self:
        return self if self.mid is None else replace(self, down=self._right(), mid=None)

    def _right(self) -> Tensor:
        from adaptkit.linalg.precision import upcast

        down = upcast(self.down)
        return down if self.mid is None else spread(upcast(self.mid), down)

    def delta(self) -> Tensor:
        left, right = self.factors()
        return left @ right

    def factors(self) -> tuple[Tensor, Tensor]:
        from adaptkit.linalg.precision import upcast

        up = upcast(self.up)
        return up if self.scale == 1.0 else up * self.scale, self._right()

    def thin_factors(self) -> tuple[Tensor, Tensor] | None:
        # known before anything is widened
        thick = self.up.shape[-1] > THIN * min(self.rows, self.down.shape[-1])
        return None if self.mid is None and thick else super().thin_factors()

    def _wide_blocks(self) -> Iterator[Tensor]:
        if self.mid is not None or self.scale != 1.0:
            return super()._wide_blocks()
        from adaptkit.linalg.products import wide_blocks

        # widened as they are needed: beside an identity, no block needs all of a factor
        return wide_blocks(self.rows, None, lambda: (self.up, self.down), self.delta)

    def widened(self) -> Self:
        import torch

        from adaptkit.linalg.precision import upcast

        right = self.down if self.mid is None else self._right()
        # by way of float32: torch takes three times as long straight from a half float
        up, down = upcast(self.up).to(torch.float64, copy=True), upcast(right).double()
        if self.scale != 1.0:
            up.mul_(self.scale)  # as `factors` does, so that both give the same numbers
        return replace(self, up=up, down=down, scale=1.0, mid=None)

    def computed(self) -> Self:
        up, down = self.factors()
        return replace(self, up=up, down=down, scale=1.0, mid=None)

    def apply(self, base: Tensor, strength: float) -> Tensor:
        up, right = self.up.to(base.dtype), self._right().to(base.dtype)
        alpha = self.scale * strength
        if base.ndim == 2:
            return base.addmm_(up, right, alpha=alpha)
        if base.ndim == 3:
            return base.baddbmm_(up, right, alpha=alpha)
        return base.add_(up @ right, alpha=alpha)

    @classmethod
    def applying(cls, rows: int, columns: int) -> int:
        return 0

    def part(self, start: int, stop: int) -> Self:
        return replace(self, up=self.up[..., start:stop, :])

    def own_part(self, start: int, stop: int) -> Self:
        """A block of a block-diagonal `up`, as `fuse` stacks layers whose `down` differ."""
        import torch

        part, used = self.part(start, stop), self.up != 0
        if self.mid is not None or self.up.ndim != 2:
            return part
        here = used[start:stop].any(0)
        elsewhere = used[:start].any(0) | used[stop:].any(0)
        # a column that other rows share stays in all of them: they give the weight back at its rank
        if not here.any() or here.all() or (here & elsewhere).any():
            return part
        keep = torch.nonzero(here).flatten()
        return replace(part, up=part.up[:, keep], down=self.down[keep])

    @property
    def rows(self) -> int:
        return int(self.up.shape[-2])

    @classmethod
    def fuse(cls, parts: Sequence[Self]) -> Self:
        """Parts that share a `down` share its columns; the ranks of the others add up."""
        import torch

        if any(
            not same(part.mid, parts[0].mid)
            or (part.mid is not None and not same(part.down, parts[0].down))
            for part in parts
        ):
            raise NotRepresentable(
                "LoRA with different Tucker cores cannot be fused", hint="use --algo full"
            )
        if len({part.scale for part in parts}) > 1:
            parts = [part.folded() for part in parts]
        groups = grouped([part.down for part in parts])
        up = stacked([part.up for part in parts], groups)
        return replace(
            parts[0], up=up, down=torch.cat(unique([part.down for part in parts], groups), -2)
        )

    @classmethod
    def zeros(cls, like: Self, rows: int) -> Self:
        return replace(like, up=like.up.new_zeros(*like.up.shape[:-2], rows, like.up.shape[-1]))

    def folded(self) -> Self:
        """The scale is multiplied into `up`; powers of two are exact."""
        from adaptkit.linalg.precision import upcast

        return (
            self if self.scale == 1.0 else replace(self, up=upcast(self.up) * self.scale, scale=1.0)
        )

    def times(self, factor: float) -> Self:
        """The scale takes the number, `up` its sign: some readers refuse a negative alpha."""
        return replace(self, up=-self.up if factor < 0 else self.up, scale=self.scale * abs(factor))

    @classmethod
    def _plain(cls, up: Tensor, down: Tensor, kernel: tuple[int, ...]) -> Self:
        return cls(up, down, 1.0, kernel)

    @classmethod
    def decompose(cls, weights: Weights, spec: FitSpec) -> Decomposition:
        """By singular values: best approximations (Eckart–Young), √σ on both sides."""
        return by_singular_values(weights, spec, cls._plain)

    @classmethod
    def decompose_stack(cls, weights: Weights, spec: FitSpec) -> list[Decomposition]:
        """By singular values, from thin factors; NotRepresentable without them."""
        return by_cores(weights, spec, cls._plain)

    @classmethod
    def keep_stack(
        cls, weights: Weights, found: Sequence[Decomposition], ranks: Sequence[int]
    ) -> KeptStack:
        """From the cores that `found` holds; NotRepresentable if it holds none."""
        return cut_stack(weights, found, ranks, cls._plain)

    @classmethod
    def sum(cls, parts: Sequence[Self]) -> Self:
        """Factors are concatenated, each with its own scale: ranks add up."""
        import torch

        if any(part.mid is not None for part in parts):
            parts = [cls(*part.factors(), 1.0, part.kernel) for part in parts]
        parts = [part.folded() for part in parts]
        up, down = (
            torch.cat([part.up for part in parts], -1),
            torch.cat([part.down for part in parts], -2),
        )
        return replace(parts[0], up=up, down=down)

    @classmethod
    def exactly(cls, weights: Weights, kernel: tuple[int, ...] | None) -> Self:
        """Through exact low-rank factors, in float32."""
        if kernel is None:
            raise NotRepresentable(
                "the stored shapes do not tell the kernel size that a LoRA has to state"
            )
        left, right = weights.factors()
        return cls(left, right, 1.0, kernel)

    @classmethod
    def fit(cls, delta: Tensor, spec: FitSpec) -> Self:
        """Best approximation of rank k (Eckart–Young), √σ on both sides, alpha = rank.

        Without a rank it is exact: delta itself, beside an identity.
        """
        if spec.rank is None:
            return cls(*beside_identity(delta), 1.0, spec.kernel)
        from adaptkit.linalg.lowrank import SvdSpec, truncated_svd

        rank = min(spec.rank, *delta.shape[-2:])
        how = SvdSpec(rank, method=spec.svd, seed=spec.seed)  # type: ignore[arg-type]
        svd = truncated_svd(delta, how)
        up, down = svd.balanced()
        return cls(up, down, 1.0, spec.kernel)

    @classmethod
    def candidates(cls, delta: Tensor, spec: FitSpec, *, ladder: bool) -> list[Weights]:
        found = cls.fit(delta, spec)
        if spec.quantile is not None:
            found = found.clamped(spec.quantile)
        return [found if spec.alpha is None else found.with_alpha(spec.alpha)]

    @classmethod
    def fitted_numbers(cls, rows: int, columns: int, rank: int | None) -> int:
        return rows * columns if rank is None else rank * (rows + columns)

    def with_alpha(self, alpha: float) -> Self:
        """The same ΔW at another alpha; `up` takes the change of the scale alpha / rank."""
        rank = self.down.shape[-2]
        return replace(self, up=self.up * (rank / alpha), scale=alpha / rank)

    def clamped(self, quantile: float) -> Self:
        """Both factors clamped to a quantile of their magnitudes, as kohya's scripts do."""
        import torch

        both = torch.cat([self.up.flatten(-2), self.down.flatten(-2)], -1).abs()
        # not torch.quantile, which takes at most 16 million numbers
        place = max(1, math.ceil(quantile * both.shape[-1]))
        most = both.kthvalue(place, dim=-1).values[..., None, None]
        return replace(self, up=self.up.clamp(-most, most), down=self.down.clamp(-most, most))

    def ladder_errors(self, delta: Tensor) -> tuple[float, ...]:
        from adaptkit.linalg.lowrank import truncation_errors

        up, down = self.factors()
        return tuple(truncation_errors(delta, up, down).tolist())

    def ladder_errors_of_stack(self, delta: Tensor) -> Tensor:
        from adaptkit.linalg.lowrank import truncation_errors_of_stack

        return truncation_errors_of_stack(delta, *self.factors())

    @classmethod
    def too_wide(cls, shapes: Shapes) -> bool:
        up, down = shapes["up"], shapes["down"]
        return sum(map(math.prod, shapes.values())) > up[0] * math.prod(down[1:])

    @classmethod
    def peft_fields(cls, modules: Sequence[Shapes]) -> dict[str, Any]:
        return {"use_dora": False, "use_rslora": False, "bias": "none", "fan_in_fan_out": False}


def _columns(inputs: int, kernel: tuple[int, ...]) -> int:
    return inputs * math.prod(kernel)


ALGORITHM = Lora
