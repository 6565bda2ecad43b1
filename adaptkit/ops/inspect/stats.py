"""Norm and spectrum of every ΔW of an adapter, one module in memory at a time."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field
from statistics import median, median_high
from typing import TYPE_CHECKING, Any

from adaptkit.errors import NotRepresentable
from adaptkit.files.dtypes.widening import widen
from adaptkit.meaning import Problem
from adaptkit.ops.blocks import KINDS, NUMBERED, STAGES, block_of, kind_of
from adaptkit.ops.stages import counting

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor

    from adaptkit.adapter import Adapter
    from adaptkit.algorithms.contract import Facts, Weights
    from adaptkit.entries import Entry
    from adaptkit.ops.stages import Progress

__all__ = ["Measured", "measure", "problems", "rolled_up", "total_norm"]

# the largest float16
HALF = 65504.0
# share of the energy: sums of equal parts may miss a share by their rounding
EDGE = 1e-12


@dataclass(frozen=True)
class Measured:
    """Statistics of one module: `norm` is ‖ΔW‖_F, `sigma` its descending singular values.

    Without a ΔW that is finite and independent of the base, `norm` is None and `sigma` is empty.
    `outputs` is the effective number of outputs that ΔW changes: (Σe)² / Σe² of the energies e of
    its rows. `shape` is that of ΔW as a matrix.
    """

    module: str
    component: str
    block: str
    kind: str
    norm: float | None
    sigma: Sequence[float] = ()
    # keys of tensors with NaN or infinity
    non_finite: tuple[str, ...] = ()
    # number of tensors that are zero throughout
    zero: int = 0
    problem: Problem | None = None
    outputs: float | None = None
    shape: tuple[int, int] = (0, 0)
    # partial sums of (σ / σ₁)²
    energies: Sequence[float] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        total, sums = 0.0, array("d")
        # relative to the largest: squares of numbers that a float holds may be none
        top = self.sigma[0] if self.sigma else 0.0
        for value in self.sigma:
            total += (value / top) ** 2 if top else 0.0
            sums.append(total)
        object.__setattr__(self, "energies", sums)

    @property
    def spectral_norm(self) -> float | None:
        """Return σ₁."""
        return self.sigma[0] if self.sigma else None

    @property
    def stable_rank(self) -> float | None:
        """Return ‖ΔW‖²_F / σ₁², between 1 and the rank; 0 for ΔW = 0."""
        if not self.sigma:
            return None
        return self.energies[-1]

    def rank(self, share: float) -> int | None:
        """Return the least rank that holds this share of ‖ΔW‖²; 0 for ΔW = 0."""
        if not self.sigma:
            return None
        wanted = (share - EDGE) * self.energies[-1]
        return 1 + sum(held < wanted for held in self.energies) if self.sigma[0] > 0 else 0

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that `inspect --stats` adds to a module."""
        return {
            "block": self.block,
            "kind": self.kind,
            "norm": self.norm,
            "spectral_norm": self.spectral_norm,
            "stable_rank": self.stable_rank,
            "rank_90": self.rank(0.9),
            "rank_99": self.rank(0.99),
            "outputs": self.outputs,
            "non_finite_tensors": len(self.non_finite),
            "zero_tensors": self.zero,
        }


def measure(adapter: Adapter, progress: Progress | None = None) -> tuple[Measured, ...]:
    """Measure every module, in file order."""
    found = []
    told = counting(progress, "reading", len(adapter.entries), "modules")
    for done, entry in enumerate(adapter.entries.values(), 1):
        found.append(_measured(adapter, entry))
        if told is not None:
            told(done)
    return tuple(found)


def _measured(adapter: Adapter, entry: Entry) -> Measured:
    label = adapter.label(entry.slot)
    block = block_of(label, entry.slot.component)
    kind = kind_of(label.removeprefix(block), entry.slot.param, entry.facts)
    tensors = adapter.read(entry)
    extremes = {
        entry.keys[role]: _extremes(tensor) for role, tensor in tensors.items() if tensor.numel()
    }
    bad = tuple(key for key, found in extremes.items() if not all(map(math.isfinite, found)))
    zero = sum(found == (0.0, 0.0) for found in extremes.values())
    norm, sigma, outputs = (None, (), None) if bad else _sizes(entry.decode(tensors), entry.facts)
    return Measured(
        label,
        entry.slot.component,
        block,
        kind,
        _finite(norm),
        sigma,
        bad,
        zero,
        _problem(label, norm, bad),
        outputs,
        (entry.facts.rows, entry.facts.columns),
    )


def _extremes(tensor: Tensor) -> tuple[float, float]:
    """Return the least and the greatest entry; NaN if there is one."""
    import torch

    wide = (
        tensor
        if tensor.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        else widen(tensor, torch.float32)
    )
    low, high = torch.aminmax(wide)
    return float(low), float(high)


def _sizes(weights: Weights, facts: Facts) -> tuple[float | None, Sequence[float], float | None]:
    """Return ‖ΔW‖, its singular values, and the effective number of its outputs.

    A vector has only a norm. The norm is None if ΔW depends on the base, and infinite if
    ΔW is not finite.
    """
    import torch

    try:
        if facts.vector:
            return math.sqrt(weights.norm_squared()), (), None
        sigma = array("d", weights.spectrum().double().tolist())
    except NotRepresentable:
        return None, (), None
    # decompositions raise this for a ΔW that is not finite
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return math.inf, (), None
    norm = math.hypot(*sigma)
    if not math.isfinite(norm):
        return math.inf, (), None
    return norm, sigma, _outputs(weights) if norm else None


def _outputs(weights: Weights) -> float | None:
    from adaptkit.linalg.products import row_energies

    pair = weights.kron_factors()
    thin = None if pair is not None else weights.thin_factors()
    energies = row_energies(weights.delta() if thin is None and pair is None else None, thin, pair)
    energies = energies / energies.max()  # whose squares neither overflow nor vanish
    return _finite(float(energies.sum().square() / energies.square().sum()))


def _finite(norm: float | None) -> float | None:
    return norm if norm is not None and math.isfinite(norm) else None


def _problem(label: str, norm: float | None, bad: tuple[str, ...]) -> Problem | None:
    if bad:
        return Problem("error", label, f"{bad[0]} holds NaN or infinity")
    if norm is None or 0.0 < norm <= HALF:
        return None
    if norm == 0.0:
        return Problem("warning", label, "ΔW is zero: the module has no effect")
    if not math.isfinite(norm):
        return Problem(
            "error", label, "ΔW overflows: the tensors are finite, but their product is not"
        )
    return Problem("warning", label, f"‖ΔW‖ is {norm:.3g} and may overflow when merged into fp16")


def problems(measured: Iterable[Measured]) -> Iterator[Problem]:
    """Yield the problems: NaN and infinity, zeros, overflow of fp16."""
    return (one.problem for one in measured if one.problem is not None)


# blocks


def rolled_up(measured: Sequence[Measured], components: Sequence[str]) -> list[dict[str, Any]]:
    """Return one record per block, in the order of `components`, stages and block numbers.

    `norm` is the root of the sum of squares, `spectral_norm` the maximum. `stable_rank`,
    `rank_90` and `rank_99` are medians. `kinds` maps each kind of layer to the root mean square
    of ‖ΔW‖. A number that no module has is null.
    """
    groups: dict[str, list[Measured]] = {}
    for one in measured:
        groups.setdefault(one.block, []).append(one)
    lists = {name: n for n, name in enumerate(dict.fromkeys(map(_list_of, groups)))}

    def place(block: str) -> tuple[int, ...]:
        component, run, numbered = (
            groups[block][0].component,
            _list_of(block),
            NUMBERED.fullmatch(block),
        )
        stage = next((n for n, names in enumerate(STAGES) if run.endswith(names)), 0)
        part = components.index(component) if component in components else len(components)
        return part, block == component, stage, lists[run], int(numbered[2]) if numbered else 0

    return [_rolled(block, groups[block]) for block in sorted(groups, key=place)]


def _list_of(block: str) -> str:
    """Return `unet.down_blocks` for `unet.down_blocks.1`."""
    found = NUMBERED.fullmatch(block)
    return found[1] if found else block


def _rolled(block: str, group: Sequence[Measured]) -> dict[str, Any]:
    spectral = [one for one in group if one.sigma]
    kinds = {kind: [one for one in group if one.kind == kind] for kind in KINDS}
    return {
        "block": block,
        "modules": len(group),
        "norm": total_norm(group),
        "spectral_norm": max((one.sigma[0] for one in spectral), default=None),
        "stable_rank": median(_numbers(one.stable_rank for one in spectral)) if spectral else None,
        "rank_90": median_high(_numbers(one.rank(0.9) for one in spectral)) if spectral else None,
        "rank_99": median_high(_numbers(one.rank(0.99) for one in spectral)) if spectral else None,
        "non_finite_tensors": sum(len(one.non_finite) for one in group),
        "zero_tensors": sum(one.zero for one in group),
        "kinds": {kind: _typical_norm(found) for kind, found in kinds.items() if found},
    }


def _numbers(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def total_norm(measured: Iterable[Measured]) -> float | None:
    """Return √Σ‖ΔW‖², or None if no module has a norm."""
    norms = _numbers(one.norm for one in measured)
    return math.hypot(*norms) if norms else None


def _typical_norm(measured: Iterable[Measured]) -> float | None:
    norms = _numbers(one.norm for one in measured)
    return math.hypot(*norms) / math.sqrt(len(norms)) if norms else None
