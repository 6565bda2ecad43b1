"""RandLoRA: many random products for the whole model, scaled by two matrices in each layer."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from adaptkit.algorithms._drawn import kaiming
from adaptkit.algorithms._foreign import Applied, OfPeft, number, seed
from adaptkit.algorithms._record import record
from adaptkit.algorithms._restated import counted
from adaptkit.algorithms._stored import matched, roles
from adaptkit.algorithms.contract import Facts, Role, Shapes, Stated
from adaptkit.errors import NotRepresentable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from adaptkit.algorithms._restated import Restated
    from adaptkit.algorithms._settings import Wanted

SAVED = (("left", "right"), ("left_again", "right_again"))


@record
class RandLora(OfPeft, Applied):
    """ΔW = scale · left · right for a layer of no more columns than rows, else of its transpose.

    within: (..., r, k)   along: (..., k, n)   left: (..., M, K, r)   right: (..., r, 1, N)

    left · right is the sum over all c < k · r of left[:m, c] · mixed[c, :n], with `mixed` the
    (r · k, n) of within[q, b] · right[q] · along[b], which runs over q first, and left over b
    first; n is the smaller side of the layer, m the larger. scale is randlora_alpha / r (Albert et
    al., arXiv:2502.00987; huggingface/peft `tuners/randlora`, checked with 0.21.2). left and right
    are `randlora_B` and `randlora_A`, one pair for the model. A file without them
    (`save_projection = False`) states the seed that they are drawn from; they need the most rows
    and columns of all layers with an adapter. Of linear layers only.
    """

    name: ClassVar[str] = "randlora"
    title: ClassVar[str] = "RandLoRA"
    peft_type: ClassVar[str] = "RANDLORA"
    linear: ClassVar[bool] = True
    drawn_whole: ClassVar[bool] = True
    settings: ClassVar[Mapping[str, object]] = MappingProxyType(
        {"randlora_alpha": 640, "projection_prng_key": 0, "sparse": False, "very_sparse": False}
    )
    shared: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"left": "randlora_B", "right": "randlora_A"}
    )
    # PEFT 0.21 saves the pair again with every layer
    roles: ClassVar[Mapping[str, Role]] = roles(
        within=Role("randlora_lambda"),
        along=Role("randlora_gamma"),
        left_again=Role("randlora_B"),
        right_again=Role("randlora_A"),
    )
    forms: ClassVar[tuple[frozenset[str], ...]] = (
        frozenset({"within", "along"}),
        frozenset({"within", "along", "left_again", "right_again"}),
    )

    within: Tensor
    along: Tensor
    scale: float
    left: Tensor | None  # None where the sizes of the model are not known
    right: Tensor | None
    saved: tuple[str, ...] = ()  # the roles under which the file holds them

    @classmethod
    def facts(cls, shapes: Shapes, alpha: Stated | None = None) -> Facts:
        within, along = shapes["within"], shapes["along"]
        fits = len(within) == len(along) == 2 and within[1] == along[0]
        fits = fits and 0 not in (*within, *along)
        for pair in SAVED:
            if not fits or shapes.keys().isdisjoint(pair):
                continue
            matched(shapes.keys() >= set(pair), " ".join(pair), shapes)
            left, right = (shapes[role] for role in pair)
            fits = len(left) == len(right) == 3 and left[2] == right[0] == within[0]
            fits = fits and right[1] == 1 and left[1] >= along[0] and right[2] >= along[1]
        matched(fits, "within along left right", shapes)
        return Facts(0, 0, (), within[0], 1.0)

    @classmethod
    def settled(cls, facts: Facts, wanted: Wanted) -> Facts:
        said = cls.stated(wanted)
        scale = number(said["randlora_alpha"], "randlora_alpha") / (facts.rank or 1)
        if not math.isfinite(scale):
            raise NotRepresentable(f"adapter_config.json: randlora_alpha makes a scale of {scale}")
        if any(pair[0] in wanted.shapes for pair in SAVED):
            return replace(facts, scale=scale)
        drawn = seed(said["projection_prng_key"], "projection_prng_key")
        thin = "very_sparse" if said["very_sparse"] else "sparse" if said["sparse"] else ""
        return replace(facts, scale=scale, settings=(drawn, thin))

    @classmethod
    def beside(cls, facts: Facts, rows: int, columns: int) -> Facts:
        if not facts.settings:
            return facts
        return replace(facts, settings=(*facts.settings[:2], rows, columns))

    @classmethod
    def decode(cls, tensors: Mapping[str, Tensor], facts: Facts) -> Self:
        own = tensors["within"], tensors["along"], facts.scale
        for pair in SAVED:
            if pair[0] in tensors:
                saved = tuple(role for one in SAVED for role in one if role in tensors)
                return cls(*own, tensors[pair[0]], tensors[pair[1]], saved)
        if len(facts.settings) < 4:
            return cls(*own, None, None)
        left, right = _drawn(int(facts.rank or 0), *facts.settings)
        return cls(*own, left.to(own[0].device), right.to(own[0].device))

    def encode(self) -> dict[str, Tensor]:
        found = {"within": self.within, "along": self.along}
        if self.left is not None and self.right is not None:
            for role in self.saved:
                found[role] = self.left if role.startswith("left") else self.right
        return found

    @classmethod
    def restated(cls, modules: Sequence[Restated]) -> dict[str, Any]:
        return {
            **counted(modules, "r"),
            "save_projection": any(pair[0] in modules[0].shapes for pair in SAVED),
        }

    def times(self, factor: float) -> Self:
        from adaptkit.linalg.precision import upcast

        return replace(self, within=upcast(self.within) * factor)

    def apply(self, base: Tensor, strength: float) -> Tensor:
        if self.left is None or self.right is None:
            raise NotRepresentable("its projections are drawn for a model of unknown size")
        small, large = sorted(base.shape[-2:])
        bases, wide = self.along.shape[-2:]
        held = self.left.shape[-3] >= large and self.left.shape[-2] >= bases
        self._fitting(wide == small and held and self.right.shape[-1] >= small, base)
        within, along, left, right = (
            one.to(base.dtype) for one in (self.within, self.along, self.left, self.right)
        )
        # (r, k, n), flattened q first; left (m, k, r) is flattened b first
        mixed = within.unsqueeze(-1) * right[..., :small] * along.unsqueeze(-3)
        one = left[..., :large, :bases, :].flatten(-2)
        two = mixed.flatten(-3, -2)
        added = one @ two if base.shape[-1] == small else two.mT @ one.mT
        return base.add_(added, alpha=strength * self.scale)


@lru_cache(maxsize=1)
def _drawn(rank: int, seed: int, thin: str, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """(left, right) as PEFT draws them (`tuners/randlora/model.py: _init_randlora_A_randlora_B`).

    In bfloat16, which PEFT takes where the device has it, or ternary numbers in float32.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    small, large = sorted((rows, columns))
    count = -(-small // rank)
    if not thin:
        half = torch.bfloat16
        right = kaiming((rank, 1, small), math.sqrt(5), generator, half)
        parts = [kaiming((large, 1, rank), math.sqrt(5), generator, half) for _ in range(count)]
        left = torch.cat(parts, 1)
    else:
        rare = math.sqrt(small) if thin == "very_sparse" else 3.0
        right = _ternary(torch.rand((rank, 1, small), generator=generator), rare)
        left = _ternary(torch.rand((large, count, rank), generator=generator), rare)
    return left / left.std(), right / right.std()


def _ternary(drawn: Tensor, rare: float) -> Tensor:
    """−1, 0 and 1 in place of numbers between 0 and 1; one in `rare` is not 0."""
    found = drawn.new_zeros(drawn.shape)
    found[drawn < 1 / (2 * rare)] = -1
    found[drawn > 1 - 1 / (2 * rare)] = 1
    return found


ALGORITHM = RandLora
