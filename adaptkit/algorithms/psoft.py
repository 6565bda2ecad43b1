"""PSOFT: the leading singular directions of a weight are turned into each other."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from adaptkit.algorithms._foreign import Applied, OfPeft, count, number, seed
from adaptkit.algorithms._record import record
from adaptkit.algorithms._restated import one_for_all
from adaptkit.algorithms._stored import matched, roles
from adaptkit.algorithms.contract import Facts, Role, Shapes, Stated
from adaptkit.errors import NotRepresentable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from adaptkit.algorithms._restated import Restated
    from adaptkit.algorithms._settings import Wanted

_SEEDED = threading.Lock()  # torch.svd_lowrank takes no generator of its own


@record
class Psoft(OfPeft, Applied):
    """ΔW = U diag(s) (diag(outs) R diag(ins) − I) Vᵀ, with U s V of the leading r triplets of W.

    packed: (..., r(r − 1)/2)   or whole: (..., r, r)   outs, ins: (..., r)

    R is `whole`, or (I + Q)(I − Q)⁻¹ with Q skew-symmetric and `packed` above its diagonal, or a
    Neumann series of that. With `pissa_init`, √s stands on both sides instead of s (Wu et al.,
    arXiv:2505.11235; huggingface/peft `tuners/psoft/layer.py`, checked with 0.21.2). The triplets
    are computed in float32, as there: what R means depends on their signs. Of linear layers only.
    """

    name: ClassVar[str] = "psoft"
    title: ClassVar[str] = "PSOFT"
    peft_type: ClassVar[str] = "PSOFT"
    caveat: ClassVar[str] = (
        "what a PSOFT means depends on the signs that the singular value decomposition of this "
        "machine gives to the vectors of the base weight, here as in PEFT; the file does not tell "
        "those of the training"
    )
    settings: ClassVar[Mapping[str, object]] = MappingProxyType(
        {
            "ab_svd_init": "psoft_init",
            "psoft_svd": "full",
            "psoft_svd_lowrank_niter": 10,
            "random_seed": 0,
            "use_cayley_neumann": False,
            "num_cayley_neumann_terms": 5,
            "cayley_neumann_eps": None,
        }
    )
    roles: ClassVar[Mapping[str, Role]] = roles(
        turn=Role("psoft_R.weight"), outs=Role("psoft_R.vector_b"), ins=Role("psoft_R.vector_a")
    )
    forms: ClassVar[tuple[frozenset[str], ...]] = tuple(
        frozenset({"turn", *scaled}) for scaled in ((), ("outs",), ("ins",), ("outs", "ins"))
    )

    turn: Tensor
    outs: Tensor | None
    ins: Tensor | None
    packed: bool
    rank: int
    said: tuple[Any, ...]

    @classmethod
    def facts(cls, shapes: Shapes, alpha: Stated | None = None) -> Facts:
        turn = shapes["turn"]
        packed = len(turn) == 1
        rank = (1 + math.isqrt(1 + 8 * turn[0])) // 2 if packed else turn[0]
        fits = turn == (rank * (rank - 1) // 2,) if packed else turn == (rank, rank)
        fits = fits and all(shapes.get(role, (rank,)) == (rank,) for role in ("outs", "ins"))
        matched(fits and rank > 0, "turn outs ins", shapes)
        return Facts(0, 0, (), rank, 1.0, settings=(packed,))

    @classmethod
    def settled(cls, facts: Facts, wanted: Wanted) -> Facts:
        said = cls.stated(wanted)
        known = {"ab_svd_init": ("psoft_init", "pissa_init"), "psoft_svd": ("full", "lowrank")}
        for name, allowed in known.items():
            if said[name] not in allowed:
                raise NotRepresentable(f"adapter_config.json: {name} is {said[name]!r}")
        bound = said["cayley_neumann_eps"]
        values = (
            said["ab_svd_init"] == "pissa_init",
            said["psoft_svd"] == "lowrank",
            count(said["psoft_svd_lowrank_niter"], "psoft_svd_lowrank_niter"),
            seed(said["random_seed"], "random_seed"),
            count(said["num_cayley_neumann_terms"], "num_cayley_neumann_terms")
            if said["use_cayley_neumann"]
            else 0,
            None if bound is None else number(bound, "cayley_neumann_eps"),
        )
        return replace(facts, settings=(*facts.settings[:1], *values))

    @classmethod
    def decode(cls, tensors: Mapping[str, Tensor], facts: Facts) -> Self:
        packed, *said = facts.settings
        outs, ins = tensors.get("outs"), tensors.get("ins")
        return cls(tensors["turn"], outs, ins, packed, facts.rank or 0, tuple(said))

    def encode(self) -> dict[str, Tensor]:
        found = {"turn": self.turn, "outs": self.outs, "ins": self.ins}
        return {role: tensor for role, tensor in found.items() if tensor is not None}

    @classmethod
    def restated(cls, modules: Sequence[Restated]) -> dict[str, Any]:
        return {
            "r": one_for_all("rank", (m.facts.rank for m in modules)),
            "psoft_orth": one_for_all("psoft_orth", (bool(m.facts.settings[0]) for m in modules)),
            "psoft_mag_b": one_for_all("psoft_mag_b", ("outs" in m.shapes for m in modules)),
            "psoft_mag_a": one_for_all("psoft_mag_a", ("ins" in m.shapes for m in modules)),
        }

    @classmethod
    def applying(cls, rows: int, columns: int) -> int:
        return 20 * rows * columns  # the singular value decomposition of the weight

    def apply(self, base: Tensor, strength: float) -> Tensor:
        import torch

        self._fitting(self.rank <= min(base.shape[-2:]), base)
        rooted, approximate, steps, drawn, terms, bound = self.said
        whole = base.reshape(-1, *base.shape[-2:])
        turns = self._matrix(terms, bound, base).reshape(-1, self.rank, self.rank)
        turns = turns - torch.eye(self.rank, dtype=base.dtype, device=base.device)
        for weight, turn in zip(whole, turns.expand(len(whole), -1, -1), strict=True):
            u, s, v = self._triplets(weight.float(), (steps, drawn) if approximate else None)
            u, s, v = (one.to(base.dtype) for one in (u, s, v))
            if rooted:
                left, right = u * s.sqrt(), s.sqrt().unsqueeze(-1) * v
            else:
                left, right = u * s, v
            weight.add_(left @ turn @ right, alpha=strength)
        return base if whole.data_ptr() == base.data_ptr() else whole.reshape(base.shape)

    def _triplets(self, weight: Tensor, how: tuple[int, int] | None) -> tuple[Tensor, ...]:
        """U (m, r), s (r) and Vᵀ (r, n) of a float32 weight, as PEFT computes them."""
        import torch

        if how is None:
            u, s, v = torch.linalg.svd(weight, full_matrices=False)
            return u[:, : self.rank], s[: self.rank], v[: self.rank]
        with _SEEDED, torch.random.fork_rng(devices=[]):
            torch.manual_seed(how[1])
            u, s, v = torch.svd_lowrank(weight.cpu(), q=self.rank, niter=how[0])
        return u.to(weight.device), s.to(weight.device), v.mT.to(weight.device)

    def _matrix(self, terms: int, bound: float | None, like: Tensor) -> Tensor:
        """diag(outs) R diag(ins)."""
        import torch

        turn = self.turn.to(like.dtype)
        if self.packed:
            above = torch.triu_indices(self.rank, self.rank, 1, device=like.device)
            skew = like.new_zeros(*turn.shape[:-1], self.rank, self.rank)
            skew[..., above[0], above[1]] = turn
            turn = _turned(skew - skew.mT, terms, bound)
        if self.outs is not None:
            turn = self.outs.to(like.dtype).unsqueeze(-1) * turn
        return turn if self.ins is None else turn * self.ins.to(like.dtype).unsqueeze(-2)


def _turned(skew: Tensor, terms: int, bound: float | None) -> Tensor:
    """(I + Q)(I − Q)⁻¹, or I + 2Q + 2Q² + … + Qᵗ⁻¹ of so many terms with ‖Q‖ at most `bound`."""
    import torch

    eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    if not terms:
        found: Tensor = torch.linalg.solve(eye - skew, eye + skew, left=False)
        return found
    if bound is not None:
        norm = torch.linalg.matrix_norm(skew, keepdim=True)
        skew = skew * torch.where(norm > bound, bound / (norm + 1e-12), 1.0)
    turn, power = eye.expand_as(skew).clone(), skew
    if terms > 1:
        turn += 2 * skew
    if terms > 2:
        power = skew @ skew
        turn += 2 * power
        for _ in range(3, terms - 1):
            power = power @ skew
            turn += 2 * power
        turn += power @ skew
    return turn


ALGORITHM = Psoft
