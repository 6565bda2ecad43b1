"""Which hosts load a file, and how to write one for a host: both from the same tables."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from adaptkit.detect import families, formats
from adaptkit.errors import NoSuchName, NotRepresentable
from adaptkit.hosts._host import Recipe, Verdict
from adaptkit.registry import discover

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from adaptkit.adapter import Adapter, Entry
    from adaptkit.hosts._host import Cell, Host

__all__ = ["complete", "hosts", "judge", "recipe"]

SHOWN = 3  # modules named per reason


def hosts() -> Mapping[str, Host]:
    """Every host by name."""
    return discover("adaptkit.hosts", "HOST")


def judge(adapter: Adapter) -> dict[str, Verdict]:
    """What each host makes of a file."""
    return {name: _verdict(host, adapter) for name, host in hosts().items()}


def complete(host: Host, format: str) -> list[str]:
    """The families of which a host loads every module in this format, as adaptkit writes it."""
    style = formats()[format].style
    found: list[str] = []
    for name, family in families().items():
        naming = family.components[0].naming(style)
        cells = (c for c in host.cells if c.format == format and name in c.families and c.naming in ("", naming))
        cell = next(cells, None)
        if cell is not None and not cell.note and name not in host.unsupported:
            found.append(name)
    return found


def _verdict(host: Host, adapter: Adapter) -> Verdict:
    if not adapter.known:
        return Verdict(None, "not measured: the model family is unknown")
    if adapter.family.name in host.unsupported:
        return Verdict(False, host.unsupported[adapter.family.name])
    if adapter.unclaimed:
        return Verdict(False, f"{_some(list(adapter.unclaimed))} cannot be used")
    for reason in _reasons(host, adapter):
        return Verdict(False, reason)
    cell = _cell(host, adapter)
    return Verdict(None, "not measured") if cell is None else Verdict(True)


def _reasons(host: Host, adapter: Adapter) -> Iterator[str]:
    """Why the host does not load all of this file, the most important first."""
    cell = _cell(host, adapter)
    if cell is not None and cell.nothing:
        yield cell.note
    entries = list(adapter.entries.values())
    yield from _algorithms(host, adapter)
    if cell is not None and cell.lost:
        gone = _lost(cell, entries)
        if gone:
            yield f"{len(gone)} of {len(entries)} modules {cell.note}: {_some([adapter.label(e.slot) for e in gone])}"
    yield from _alphas(host, adapter, cell)


def _lost(cell: Cell, entries: Sequence[Entry]) -> list[Entry]:
    """The modules that a cell says are dropped or come out wrong."""
    pattern = re.compile("|".join(cell.lost))
    meant = [e for e in entries if not cell.algorithms or e.kind.name in cell.algorithms]
    return [e for e in meant if pattern.search(f"{e.slot.component}.{e.slot.target.module}")]


def _algorithms(host: Host, adapter: Adapter) -> Iterator[str]:
    for name, count in adapter.algorithms().items():
        if not _loads(host, name, adapter.family.name):
            yield f"{count} modules are {name}, which {host.title} does not load for {adapter.family.title}"
    if not host.tucker and any("mid" in entry.keys for entry in adapter.entries.values()):
        yield f"{host.title} does not load LoRA with Tucker cores"
    wrong = [e for e in adapter.entries.values() if "dora" in e.kind.name and _axis(adapter, e) not in host.axes]
    if wrong:
        yield f"{host.title} divides by another norm on the {_axis(adapter, wrong[0])} axis of {len(wrong)} DoRA modules"


def _loads(host: Host, algorithm: str, family: str) -> bool:
    families = host.algorithms.get(algorithm)
    return families is not None and (not families or family in families)


def _axis(adapter: Adapter, entry: Entry) -> str:
    key = entry.keys.get("magnitude")
    shape = adapter.source.infos[key].shape if key else ()
    return "input" if len(shape) > 1 and shape[0] == 1 and math.prod(shape) > 1 else "output"


def _alphas(host: Host, adapter: Adapter, cell: Cell | None) -> Iterator[str]:
    entries = adapter.entries.values()
    scaled = [e for e in entries if e.facts.scale != 1.0 and not e.kind.bounded]
    stated = [e for e in scaled if e.alpha_source == "metadata"]
    if stated and not host.metadata:
        yield f"the alpha of {len(stated)} modules stands in metadata, which {host.title} does not read"
    if cell is not None and not cell.alpha and any(e.alpha_source == "tensor" for e in entries):
        yield f"{host.title} refuses or ignores alpha tensors under these names"
    scales = {e.facts.scale for e in entries if e.facts.rank is not None}
    if adapter.format.name in host.equal_scales and len(scales) > 1:
        yield f"{host.title} applies one alpha / rank to all attention layers; here there are {len(scales)}"


def _cell(host: Host, adapter: Adapter) -> Cell | None:
    """The first cell that fits the file's format, family and naming."""
    # text encoders have Hugging Face's names in every format
    denoiser = (e for e in adapter.entries.values() if not e.slot.component.startswith("text_encoder"))
    namings = {entry.naming for entry in denoiser}
    for cell in host.cells:
        fits = cell.format == adapter.format.name and adapter.family.name in cell.families
        if fits and (not cell.naming or cell.naming in namings):
            return cell
    return None


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:SHOWN])
    return f"{shown} and {len(names) - SHOWN} more" if len(names) > SHOWN else shown


def recipe(host: str, adapter: Adapter, algorithm: str | None = None) -> Recipe:
    """How to write an adapter for a host, perhaps in another algorithm; NotRepresentable where it loads no form of it."""
    if host not in hosts():
        raise NoSuchName.among("host", host, hosts())
    target = hosts()[host]
    family = adapter.family
    if not adapter.known:
        raise NotRepresentable(
            f"what {target.title} loads is not known for an unknown family",
            hint="say the format: --to",
            file=adapter.source.path,
        )
    format = target.writes.get(family.name, target.writes.get("", ""))
    if family.name in target.unsupported or not format:
        why = target.unsupported.get(family.name, f"{target.title} loads no adapter for {family.title}")
        raise NotRepresentable(why, hint="see `adaptkit inspect` for what does load it", file=adapter.source.path)
    _check_algorithms(target, adapter, algorithm)
    return Recipe(format, fold_alpha=format in target.equal_scales, warnings=tuple(_warnings(target, adapter, format)))


def _check_algorithms(host: Host, adapter: Adapter, algorithm: str | None) -> None:
    for name in adapter.algorithms():
        written = algorithm if algorithm is not None and name != "full" else name
        if not _loads(host, written, adapter.family.name):
            raise NotRepresentable(
                f"{host.title} loads no {written} for {adapter.family.title}",
                hint="--algo lora writes a LoRA where that is exact; --skip leaves modules out",
                file=adapter.source.path,
            )
    if not host.tucker and algorithm is None and any("mid" in entry.keys for entry in adapter.entries.values()):
        raise NotRepresentable(
            f"{host.title} does not load LoRA with Tucker cores", hint="--algo lora", file=adapter.source.path
        )


def _warnings(host: Host, adapter: Adapter, format: str) -> Iterator[str]:
    """What the host still does not load of what is written."""
    for cell in host.cells:
        if cell.format == format and adapter.family.name in cell.families and cell.lost and not cell.naming:
            entries = list(adapter.entries.values())
            gone = _lost(cell, entries)
            if gone:
                names = _some([adapter.label(entry.slot) for entry in gone])
                yield f"{len(gone)} of {len(entries)} modules {cell.note} in {host.title}: {names}"
            return
