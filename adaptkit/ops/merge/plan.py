"""The plan of a merge: its options and the tensors it computes, from headers only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adaptkit.files.header import nbytes
from adaptkit.ops.shared import Closing, Shared, chosen_by
from adaptkit.steps import peak_memory

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from adaptkit.adapter import Adapter
    from adaptkit.checkpoint import Checkpoint, Piece
    from adaptkit.entries import Entry
    from adaptkit.files.header import TensorSpec
    from adaptkit.files.packing import Packed
    from adaptkit.files.source import TensorSource
    from adaptkit.ops.merge.layout import Layout
    from adaptkit.ops.shared import LeftOut, Unused
    from adaptkit.steps import Step

__all__ = ["Contribution", "Options", "Plan", "TensorMerge", "kept"]


@dataclass(frozen=True)
class Options(Shared):
    """Options of merge.

    `blocks` are rules for the strength of modules (see adaptkit.ops.block_weights).
    `shard_size` is the maximum size of a shard in bytes. `layout` is
    `single-file` (original names) or `folder` (diffusers' names). `alpha_in` is the alpha of every
    module of the adapters, whatever their files say: a number, or `as-rank`. `pad_inputs` lets a
    layer of the checkpoint have more inputs than the adapter, which leaves the last ones as they
    are.
    """

    blocks: tuple[str, ...] = ()
    shard_size: int | None = None
    layout: str | None = None
    alpha_in: str | None = None
    pad_inputs: bool = False


@dataclass(frozen=True)
class Contribution:
    """One entry of an adapter, added to `rows` of a tensor (None: all).

    `cut` selects rows of the entry. `strength` is the adapter's times the block weight. `slot` are
    all tensors of the layer if what these rows become depends on the others too. `columns` are
    those of the tensor if the entry has fewer and zeros take the place of the others, else 0.
    `bias`: the tensor is the bias of the layer whose weight is `slot`.
    """

    adapter: int
    entry: Entry
    rows: tuple[int, int] | None
    cut: tuple[int, int] | None
    label: str
    strength: float
    slot: tuple[Piece, ...] = ()
    columns: int = 0
    bias: bool = False


@dataclass(frozen=True)
class TensorMerge:
    """One tensor of the base, its new dtype and the contributions to it.

    `scale` names its scale tensor, which is computed again. `packed` says how it is packed again.
    """

    name: str
    dtype: str
    contributions: tuple[Contribution, ...]
    scale: str | None = None
    packed: Packed | None = None

    @property
    def changes(self) -> bool:
        """Return whether any contribution has a strength other than 0."""
        return any(c.strength for c in self.contributions)

    def writes(self) -> tuple[str, ...]:
        """Return the names of the tensors that it writes."""
        if self.packed is not None:
            return self.packed.rewritten()
        return (self.name,) if self.scale is None else (self.name, self.scale)


def kept(base: Checkpoint, options: Options) -> TensorSource:
    """Return the tensors of the base as the output names them."""
    return base.source.stored if options.dtype == "keep" else base.source


@dataclass(frozen=True, repr=False)
class Plan(Closing):
    """The state of a merge before any weight is read; `strengths` are those of `adapters`.

    `merges` are the tensors that adapters have modules for. `steps` are the tensors to compute:
    those with something to add or with a new dtype. All others are copied. `verified` are the
    steps that compare what is written, if it is to be verified.
    """

    base: Checkpoint
    adapters: tuple[Adapter, ...]
    strengths: tuple[float, ...]
    options: Options
    output: Path
    merges: tuple[TensorMerge, ...]
    specs: tuple[TensorSpec, ...]
    unused: tuple[Unused, ...]
    steps: tuple[Step[TensorMerge], ...]
    layout: Layout
    rules: tuple[Mapping[str, Any], ...] = ()
    left_out: LeftOut | None = None
    verified: tuple[Step[TensorMerge], ...] = ()

    @property
    def computed(self) -> tuple[TensorMerge, ...]:
        """Return the tensors that are computed, not copied."""
        return tuple(step.payload for step in self.steps)

    @property
    def kept(self) -> TensorSource:
        """Return the source of the tensors that are copied."""
        return kept(self.base, self.options)

    def to_dict(self) -> dict[str, Any]:
        """Return what `--dry-run` prints."""
        return {
            "output": str(self.output),
            "family": self.base.family.name,
            "modules": sum(len(merge.contributions) for merge in self.merges),
            **chosen_by(self.left_out),
            "tensors_changed": sum(merge.changes for merge in self.merges),
            "tensors_copied": len(self.specs) - sum(len(merge.writes()) for merge in self.computed),
            "bytes_in": self.base.source.size
            + sum(adapter.source.size for adapter in self.adapters),
            "bytes_out": sum(nbytes(spec.dtype, spec.shape) for spec in self.specs),
            "peak_memory": max(
                peak_memory(steps, self.options.memory) for steps in (self.steps, self.verified)
            ),
            "device": self.options.device,
            "adapters": self.described(),
            "block_weights": [
                f"{r['rule']} = {r['weight']:g}: {r['modules']} modules" for r in self.rules
            ],
            "files": self.layout.files(),
            "unused": [item.to_dict() for item in self.unused],
            "details": [
                {
                    "module": c.label,
                    "tensor": merge.name,
                    "algorithm": c.entry.kind.name,
                    "rank": c.entry.facts.rank,
                    "strength": c.strength,
                }
                for merge in self.merges
                for c in merge.contributions
            ],
        }

    def described(self) -> list[dict[str, Any]]:
        """Return path, format, strength and number of applied modules of each adapter."""
        counts = [
            sum(c.adapter == n for merge in self.merges for c in merge.contributions)
            for n in range(len(self.adapters))
        ]
        return [
            {"path": str(a.source.path), "format": a.format.name, "strength": s, "modules": n}
            for a, s, n in zip(self.adapters, self.strengths, counts, strict=True)
        ]

    def close(self) -> None:
        """Close all inputs."""
        self.base.close()
        for adapter in self.adapters:
            adapter.close()
