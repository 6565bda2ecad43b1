"""The file that an extraction writes: its tensors, its metadata, its size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from adaptkit import __version__
from adaptkit.algorithms.contract import ALPHA
from adaptkit.errors import NotRepresentable
from adaptkit.files.header import TensorSpec
from adaptkit.files.tensors import packed_float32
from adaptkit.formats.contract import Alpha
from adaptkit.keymap.kinds import network_module
from adaptkit.ops.adapter_file.peft_config import PeftModule
from adaptkit.ops.adapter_file.size import exact_size
from adaptkit.ops.adapter_file.writer import AdapterWriter, Meant
from adaptkit.ops.extract.plan import AUTO, takes_factor
from adaptkit.ops.ranks.options import RULES
from adaptkit.ops.shared import torch_dtype
from adaptkit.ops.stages import Tally

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from adaptkit.files.sink import TensorSink
    from adaptkit.files.spool import Spool
    from adaptkit.names import Slot
    from adaptkit.ops.adapter_file.writer import Verify
    from adaptkit.ops.difference.pairing import Pair
    from adaptkit.ops.extract.plan import Plan
    from adaptkit.ops.ranks.forms import Pick
    from adaptkit.ops.stages import Progress

__all__ = ["Output", "Stored", "spool_key"]


class Stored(NamedTuple):
    """A layer in the file: its pick, and the number of that form among the layer's forms."""

    pair: Pair
    pick: Pick
    form: int

    @property
    def slot(self) -> Slot:
        """The slot it adapts."""
        assert self.pair.slot is not None
        return self.pair.slot


def spool_key(pair: Pair, form: int, role: str) -> str:
    """The name of a fitted tensor in the spool."""
    return f"{pair.number}/{form}/{role}"


class Output:
    """The adapter file of the stored layers, with its relative error in the record."""

    def __init__(self, plan: Plan, stored: Sequence[Stored], relative_error: float) -> None:
        self.plan, self.stored, self.relative_error = plan, stored, relative_error

    def size(self) -> int:
        """The exact bytes of the file; nothing is computed for it."""
        return exact_size(self.specs(), self.metadata())

    def specs(self) -> list[TensorSpec]:
        """Every tensor, in the order of the checkpoint's layers."""
        return [TensorSpec(name, dtype, shape) for name, dtype, shape, _, _ in self._named()]

    def write(
        self, spool: Spool, verify: Verify | None = None, progress: Progress | None = None
    ) -> int:
        """Publish the output; return its bytes. `verify` sees the file before that."""
        plan = self.plan
        try:
            writer = AdapterWriter(
                plan.output,
                self.specs(),
                self.metadata(),
                self._modules(),
                plan.keys,
                self._meant(),
                overwrite=plan.options.overwrite,
                verify=verify,
            )
        except NotRepresentable as error:
            raise error.at(file=plan.tuned.source.path) from None
        return writer.write(lambda sink: self._fill(sink, spool, progress), before=plan.close)

    def _meant(self) -> dict[Slot, Meant]:
        return {
            item.slot: Meant(item.pick.form.kind, item.pick.stored_rank, item.pick.scale)
            for item in self.stored
        }

    def _named(self) -> Iterator[tuple[str, str, tuple[int, ...], Pick, str]]:
        """(name, dtype, shape, pick, key in the spool) of every tensor; alpha has no such key."""
        for item in self.stored:
            spell, pick = self.plan.keys.spell, item.pick
            kind = pick.form.kind.name
            for role, shape in pick.form.shapes(pick.rank).items():
                name = spell(item.slot, kind, role)
                yield name, item.pair.dtype, shape, pick, spool_key(item.pair, item.form, role)
            if self._stores_alpha(pick):
                yield spell(item.slot, kind, ALPHA), "F32", (), pick, ""

    def _stores_alpha(self, pick: Pick) -> bool:
        """Whether the format has a tensor of alpha for this pick."""
        place = self.plan.keys.format.alpha
        if pick.form.alpha is None or place in (Alpha.NONE, Alpha.CONFIG):
            return False
        return place is Alpha.TENSOR or pick.scale != 1.0

    def _fill(self, sink: TensorSink, spool: Spool, progress: Progress | None) -> None:
        import torch

        tally = Tally(progress, "writing", sink.size, "bytes")
        tally.add(sink.header)
        sink.wrote = tally.add
        specs = {spec.name: spec for spec in spool.specs()}
        for name, dtype, _, pick, key in self._named():
            if not key:
                sink.put_bytes(name, memoryview(packed_float32(pick.alpha, name, sink.path)))
                continue
            data, role = spool.read(key), key.rpartition("/")[2]
            if pick.form.ladder:
                whole = torch.frombuffer(data, dtype=torch_dtype(dtype)).reshape(specs[key].shape)
                sink.put(name, pick.form.cut(role, whole, pick.rank))
            else:
                sink.put_bytes(name, data)

    def _modules(self) -> list[PeftModule] | None:
        """The modules of a PEFT configuration, for the format that has one."""
        if self.plan.keys.format.alpha is not Alpha.CONFIG:
            return None
        return [self._module(item) for item in self.stored]

    def _module(self, item: Stored) -> PeftModule:
        pick = item.pick
        rank = pick.stored_rank or 1
        alpha = rank if pick.form.alpha is None else pick.alpha
        name, shapes = self.plan.keys.module(item.slot), pick.form.shapes(pick.rank)
        return PeftModule(name, pick.form.kind, rank, alpha, shapes)

    def metadata(self) -> dict[str, str]:
        """The metadata that hosts show, and one record of the run.

        It has no date, so that equal inputs give equal bytes.
        """
        from adaptkit.files.provenance import updated

        record = {name: value for name, value in self._record().items() if value is not None}
        return updated(self._for_hosts(), record)

    def _for_hosts(self) -> dict[str, str]:
        family, options = self.plan.base.family, self.plan.options
        # biases and norms beside it do not change how an adapter is loaded
        kinds = {item.pick.form.kind.name for item in self.stored}
        found = {
            "ss_network_module": network_module(kinds if options.algo == AUTO else [options.algo])
        }
        if family.modelspec:
            found |= {
                "ss_base_model_version": family.base_version or family.modelspec,
                "modelspec.sai_model_spec": "1.0.1",
                "modelspec.architecture": f"{family.modelspec}/lora",
                "modelspec.title": self.plan.output.stem,
            }
        ranks = {rank for item in self.stored if (rank := item.pick.stored_rank) is not None}
        if ranks:
            dim = str(max(ranks)) if len(ranks) == 1 else "Dynamic"
            alpha = dim if options.alpha is None else f"{options.alpha:g}"
            found |= {"ss_network_dim": dim, "ss_network_alpha": alpha}
        return found

    def _record(self) -> dict[str, Any]:
        plan, options = self.plan, self.plan.options
        return {
            "adaptkit": __version__,
            "command": "extract",
            "base": plan.base.source.path.name,
            "tuned": plan.tuned.source.path.name,
            "family": plan.base.family.name if plan.base.known else None,
            "algorithm": options.algo,
            "rank": options.rank,
            "conv_rank": options.conv_rank,
            "factor": options.factor if takes_factor(options) else None,
            **{name: getattr(options, name) for name in RULES if name != "rank"},
            **{name: getattr(options, name) for name in ("max_rank", "alpha", "clamp_quantile")},
            "relative_error": float(f"{self.relative_error:.6g}"),
            "modules": len(self.stored),
        }
