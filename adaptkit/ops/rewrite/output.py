"""Write the rewritten adapter: a file, or the folder that PEFT reads."""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

from adaptkit import __version__
from adaptkit.entries import shared_as
from adaptkit.errors import NotRepresentable
from adaptkit.files.header import DTYPES as WIDTHS
from adaptkit.files.header import TensorSpec
from adaptkit.files.tensors import packed_float32
from adaptkit.formats.contract import Alpha
from adaptkit.meaning import DIFFUSERS_CONFIG, states_alpha
from adaptkit.names import BIAS
from adaptkit.ops.adapter_file.peft_config import PeftModule, diffusers_metadata
from adaptkit.ops.adapter_file.size import exact_size
from adaptkit.ops.adapter_file.writer import AdapterWriter, Meant
from adaptkit.ops.rewrite.plan import Copied, Recast, Written
from adaptkit.ops.rewrite.training import restated
from adaptkit.ops.stages import Tally

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from adaptkit.files.sink import TensorSink
    from adaptkit.files.spool import Spool
    from adaptkit.names import Slot
    from adaptkit.ops.adapter_file.writer import Verify
    from adaptkit.ops.rewrite.state import State
    from adaptkit.ops.stages import Progress

__all__ = ["Output"]

LORA_CONFIG = "LORA"  # the only `peft_type` that diffusers reads from metadata


class Output:
    """The file of all tensors that are copied and stored, or PEFT's folder."""

    def __init__(self, plan: Recast, state: State, spool: Spool | None) -> None:
        self.plan, self.state, self.spool = plan, state, spool
        kept = [task for task in plan.tasks if state.copied(task)]
        ready = [
            item
            for task in kept
            for item in task.ready or ()
            if plan.bears(task) or shared_as(item.key) is None
        ]
        self.copied = [item for item in (*ready, *plan.carried) if isinstance(item, Copied)]
        self.scalars = {
            item.key: packed_float32(item.value, item.key, plan.output)
            for item in ready
            if isinstance(item, Written)
        }

    def size(self) -> int:
        """The exact bytes of the file; nothing is computed for it."""
        return exact_size(self.specs(), self.metadata())

    def write(
        self,
        fill: Callable[[TensorSink], None],
        verify: Verify | None = None,
        progress: Progress | None = None,
    ) -> int:
        """Publish the output; return its bytes.

        `fill` puts the tensors that are neither copied nor in the spool. `verify` sees the file
        before it is published.
        """
        plan, metadata = self.plan, self.metadata()
        modules = self.state.modules() if plan.keys.format.alpha is Alpha.CONFIG else None
        try:
            writer = AdapterWriter(
                plan.output,
                self.specs(),
                metadata,
                modules,
                plan.keys,
                self._meant(),
                overwrite=plan.options.overwrite,
                verify=verify,
            )
        except NotRepresentable as error:  # what PEFT cannot hold
            raise error.at(file=plan.adapter.source.path) from None
        # a lost output can be made again: wait for the disk only if it replaces a file
        sync = plan.output.exists()
        return writer.write(lambda sink: self._fill(sink, metadata, fill, progress), sync=sync)

    def _meant(self) -> dict[Slot, Meant]:
        found = ((task.slot, self.state.outcome(task)) for task in self.plan.tasks)
        return {
            slot: Meant(one.kind, one.rank, one.scale, one.facts.settings if one.facts else ())
            for slot, one in found
            if one
        }

    def _fill(
        self,
        sink: TensorSink,
        metadata: Mapping[str, str],
        fill: Callable[[TensorSink], None],
        progress: Progress | None,
    ) -> None:
        # the second pass is a stage of its own, of modules; its bytes are written all the same
        before = [sink.header]
        sink.wrote = before.append
        fill(sink)
        tally = Tally(progress, "writing", sink.size, "bytes")
        tally.add(sum(before))
        sink.wrote = tally.add
        hashing = _Hashing(self, sink, metadata)
        for number, adapter in enumerate(self.plan.adapters):
            mine = [item for item in self.copied if item.number == number]
            sink.copy_many([(item.key, adapter.source, item.source) for item in mine])
        for key, data in self.scalars.items():
            sink.put_bytes(key, memoryview(data))
        if self.spool is not None:
            self.spool.write_to(sink)
        if hashing.needed:
            sink.restate(hashing.result())

    def specs(self) -> list[TensorSpec]:
        """Every tensor, in the order of safetensors: wide dtypes first, then by name."""
        found = [item.spec for item in self.copied]
        found += [TensorSpec(key, "F32", ()) for key in self.scalars]
        for stored in self.state.stored.values():
            found += stored.specs
        twice = [name for name, n in Counter(spec.name for spec in found).items() if n > 1]
        if twice:
            raise NotRepresentable(
                f"two modules would both be written as {twice[0]}",
                file=self.plan.adapter.source.path,
            )
        return sorted(found, key=lambda spec: (-WIDTHS[spec.dtype], spec.name))

    def metadata(self) -> dict[str, str]:
        """The metadata of the inputs that still holds, and one record of the run."""
        from adaptkit.files.provenance import sshs_places, updated

        plan = self.plan
        kept = {
            name: value
            for name, value in _common(plan).items()
            if name != DIFFUSERS_CONFIG and not states_alpha(name)
        }
        said = restated(plan, self.state)
        kept = {name: value for name, value in kept.items() if said.get(name, value) is not None}
        changed = {name: value for name, value in said.items() if value is not None}
        changed |= self._for_diffusers()
        return updated(kept | changed, _record(plan)) | sshs_places(plan.adapter.metadata)

    def _for_diffusers(self) -> dict[str, str]:
        """LoraConfig fields, if ranks differ.

        diffusers before 0.42 takes the rank of the first module for every alpha without them.
        """
        if self.plan.keys.format.name != "diffusers":
            return {}
        parts: dict[str, list[PeftModule]] = {}
        for task in self.plan.tasks:
            stored = self.state.outcome(task)
            if stored is None:
                continue
            if stored.kind.peft_type != LORA_CONFIG and task.slot.param != BIAS:
                return {}
            parts.setdefault(task.slot.component, []).append(self.state.module(task, stored))
        ranks = ({m.rank for m in modules if not m.kind.dense} for modules in parts.values())
        if all(len(found) == 1 for found in ranks):
            return {}
        return {"lora_adapter_metadata": diffusers_metadata(parts)}

    def data(self, sink: TensorSink) -> Iterator[memoryview]:
        """The bytes of every tensor of the output, in order."""
        copied = {item.key: item for item in self.copied}
        for name in sink.infos:
            if name in copied:
                yield self.plan.adapters[copied[name].number].source.raw(copied[name].source)
            elif name in self.scalars:
                yield memoryview(self.scalars[name])
            elif self.spool is not None and name in self.spool:
                yield self.spool.read(name)
            else:
                yield sink.read(name)


def _common(plan: Recast) -> dict[str, str]:
    """The metadata that all inputs share."""
    first, *others = (adapter.metadata for adapter in plan.adapters)
    return {
        name: value
        for name, value in first.items()
        if all(other.get(name) == value for other in others)
    }


def _record(plan: Recast) -> dict[str, Any]:
    """The provenance record of the run; without a date, so that equal inputs give equal bytes."""
    from adaptkit.ops.ranks.options import asked

    sources = [adapter.source.path.name for adapter in plan.adapters]
    record: dict[str, Any] = {"adaptkit": __version__, "command": plan.command}
    if len(sources) == 1 and plan.weights == (1.0,):
        record["source"] = sources[0]
    else:
        record["sources"] = [
            {"file": name, "weight": w} for name, w in zip(sources, plan.weights, strict=True)
        ]
    record |= {**dict(zip(("from", "to"), plan.spellings, strict=True)), **plan.counts()}
    if plan.adapter.known and not plan.adapter.detection.alternatives:
        record["family"] = plan.adapter.family.name  # no guess: other names may tell less
    rule = asked(plan.options)
    if rule is not None:
        record[rule] = getattr(plan.options, rule)
    for name in ("conv_rank", "max_rank", "algo"):
        if getattr(plan.options, name) is not None:
            record[name] = getattr(plan.options, name)
    if plan.mixing is not None:
        record |= {
            "method": plan.mixing.method,
            "density": plan.mixing.density,
            "seed": plan.mixing.seed,
        }
    return record


class _Hashing:
    """The hashes of sd-scripts, if the file had them.

    They are computed in a thread while the tensors are copied.
    """

    def __init__(self, writing: Output, sink: TensorSink, metadata: Mapping[str, str]) -> None:
        from adaptkit.files.provenance import SSHS

        self.metadata = metadata
        self.needed = bool(SSHS.keys() & metadata.keys())
        self._found: dict[str, str] = {}
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(writing, sink), daemon=True)
        if self.needed:
            self._thread.start()

    def _run(self, writing: Output, sink: TensorSink) -> None:
        from adaptkit.files.header import build_header
        from adaptkit.files.provenance import sshs_hashes

        try:
            training = {
                name: value for name, value in self.metadata.items() if name.startswith("ss_")
            }
            header, _ = build_header(sink.infos.values(), training)
            self._found = sshs_hashes(writing.data(sink), len(header))
        except BaseException as error:
            self._failure = error

    def result(self) -> dict[str, str]:
        """The metadata with the hashes in their places."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return {name: self._found.get(name, value) for name, value in self.metadata.items()}
