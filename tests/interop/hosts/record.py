"""Measure which names each host loads, and write the tables in `adaptkit/hosts/measured`.

A name counts as loaded if one file of plain LoRAs was loaded with the module in its place. What makes a host refuse a
whole file, or misread an algorithm, stands in the hosts' own modules; `verdicts` compares both with the loaders.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from adaptkit.detect import families, formats
from adaptkit.hosts import hosts
from adaptkit.hosts._measured import FOLDER
from adaptkit.hosts.contract import UNETS
from adaptkit.keymap import prefixes
from tests.interop.hosts import (
    a1111,
    comfyui,
    diffusers,
    forge,
    invokeai,
    kohya,
    mflux,
    sdcpp,
    sdnext,
    wan2gp,
)
from tests.interop.hosts.files import CHOICES as CHOSEN
from tests.interop.hosts.files import File, Part, make, namings
from tests.interop.hosts.loaded import Loaded, RefusedError

BLOCKS = 2  # of each kind: those after the first are named like it
CHOICES = ("everything", "denoiser", "layers", "image", "core", "attention", "blocks", "main")


@dataclass(frozen=True)
class Loader:
    """A host's loader, real or described; `blocks` is how many blocks of each kind its model has.

    `lenient` is the loader that does not refuse a file for the number of names that it does not know.
    `there`: whether what it needs is on this machine. `apart`: a module that it does not load beside all others, it does
    not load alone, unless it refuses the file.
    """

    load: Callable[[File, int | None], Loaded]
    version: str
    date: str
    how: str
    lenient: Callable[[File], Loaded] | None = None
    there: Callable[[], bool] = lambda: True
    apart: bool = False


LOADERS: Mapping[str, Loader] = {
    "comfyui": Loader(
        lambda file, blocks: comfyui.load(file), comfyui.VERSION, comfyui.DATE, "described"
    ),
    "invokeai": Loader(
        lambda file, blocks: invokeai.load(file), invokeai.VERSION, invokeai.DATE, "described"
    ),
    "kohya": Loader(lambda file, blocks: kohya.load(file), kohya.VERSION, kohya.DATE, "described"),
    "a1111": Loader(lambda file, blocks: a1111.load(file), a1111.VERSION, a1111.DATE, "described"),
    "forge": Loader(
        lambda file, blocks: forge.load(file), forge.VERSION, forge.DATE, "described", forge.places
    ),
    "diffusers": Loader(diffusers.load, diffusers.version(), "2026-11", "run"),
    "sdnext": Loader(sdnext.load, sdnext.version(), sdnext.DATE, "run"),
    "wan2gp": Loader(wan2gp.load, wan2gp.version(), wan2gp.DATE, "run"),
    "mflux": Loader(
        mflux.load, mflux.VERSION, mflux.DATE, "run", there=mflux.available, apart=True
    ),
    "sdcpp": Loader(
        sdcpp.load, sdcpp.VERSION, sdcpp.DATE, "run", there=sdcpp.available, apart=True
    ),
}


def spellings(format: str) -> tuple[str, ...]:
    """The plain LoRAs to try in a format."""
    if formats()[format].owns:
        return ("oft_blocks",)
    spelling = formats()[format].spelling.get("lora", {}).get("up", "")
    if spelling == "up.weight":
        return ("up",)
    if formats()[format].joiner == "_":
        return ("lora_up, alpha", "lora_up", "lora_B")
    return ("lora_B", "lora_up, alpha", "lora_up", "lora.up")


def wanted_prefixes(host: str, family: str, format: str) -> tuple[str, ...]:
    """None, and those that a host reads for a component besides the one that the format writes."""
    dialect = hosts()[host].dialect
    known = [prefixes(part, formats()[format]) for part in families()[family].components]
    other = {prefix for found in known for prefix in found[1:]} - {p for f in known for p in f[:1]}
    return ("", *(other & set(dialect.prefixes if dialect else ())))


def outcome(host: str, file: File, blocks: int | None) -> frozenset[str]:
    """The stems that a host loads right; none of a file that it refuses."""
    return _right(host, file, blocks) or frozenset()


def _right(host: str, file: File, blocks: int | None) -> frozenset[str] | None:
    loader = LOADERS[host]
    try:
        return (loader.lenient(file) if loader.lenient else loader.load(file, blocks)).right
    except RefusedError:
        return None


def names(host: str, family: str) -> dict[str, Any]:
    """The table of a family: format -> component -> naming -> all, none, or the names that are not loaded."""
    table: dict[str, Any] = {}
    for format in formats():
        found: dict[str, dict[str, dict[str, bool]]] = defaultdict(lambda: defaultdict(dict))
        for naming in (*namings(family), "flat"):
            for part, right in _tried(host, family, format, naming):
                if part.slot.component in UNTRIED.get((host, family), ()):
                    continue
                known = found[part.slot.component][part.naming]
                known[part.name] = known.get(part.name, False) or right
        if found:
            table[format] = {
                component: {naming: _short(known) for naming, known in sorted(by.items())}
                for component, by in found.items()
            }
    return table


def _tried(host: str, family: str, format: str, naming: str) -> Iterator[tuple[Part, bool]]:
    """Every module under one naming, and whether some file with it was loaded, it in its place."""
    for wanted in wanted_prefixes(host, family, format):
        yield from _tried_under(wanted, host, family, format, naming)


def _tried_under(
    wanted: str, host: str, family: str, format: str, naming: str
) -> Iterator[tuple[Part, bool]]:
    # a loader may want all the blocks of the real model
    for blocks in (BLOCKS, None) if (format, family) in COMPLETE else (BLOCKS,):
        for form in spellings(format):
            whole = make(family, format, naming, form, "everything", blocks, wanted)
            if whole is None:
                return
            if host == "wan2gp":  # one strange name, and it refuses a file
                kept = tuple(p for p in whole.parts if wan2gp.has(family, p.slot.target))
                whole = replace(whole, parts=kept)
            yield from ((part, False) for part in whole.parts)
            taken = _taken(host, whole, blocks)
            if taken is None:
                continue
            right = outcome(host, taken, blocks)
            yield from ((part, part.stem in right) for part in taken.parts)
            if (host, format, family) in APART:
                yield from _chosen(host, whole, blocks)
            else:
                yield from _others(host, family, whole, taken, blocks)
            if (host, format, family) not in SPELLED:
                break
        for form in DIFFERENCES if (host, family) in WINDOWED else ():
            full = make(family, format, naming, form, "everything", blocks, wanted)
            right = outcome(host, full, blocks) if full else frozenset[str]()
            yield from ((part, part.stem in right) for part in (full.parts if full else ()))


def _chosen(host: str, whole: File, blocks: int | None) -> Iterator[tuple[Part, bool]]:
    """Every choice of a file's modules that is loaded by itself."""
    for choice in CHOICES:
        kept = tuple(part for part in whole.parts if CHOSEN[choice](part))
        right = outcome(host, replace(whole, choice=choice, parts=kept), blocks) if kept else set()
        yield from ((part, part.stem in right) for part in kept)


def _others(
    host: str, family: str, whole: File, taken: File, blocks: int | None
) -> Iterator[tuple[Part, bool]]:
    """The modules beside those that a host takes: those of a component at once, if it refuses them one by one."""
    rest: dict[str, dict[str, list[Part]]] = defaultdict(lambda: defaultdict(list))
    for part in set(whole.parts) - set(taken.parts):
        rest[part.slot.component][_kind(family, part.name)].append(part)
    for kinds in rest.values():
        every = [part for parts in kinds.values() for part in parts]
        right = outcome(host, replace(taken, parts=(*taken.parts, *every)), blocks)
        if right:
            yield from ((part, part.stem in right) for part in every)
            continue
        for parts in kinds.values() if blocks else ():
            right = outcome(host, replace(taken, parts=(*taken.parts, *parts)), blocks)
            yield from ((part, part.stem in right) for part in parts)


def _kind(family: str, name: str) -> str:
    """What is tried at once: a name, in a U-Net those that differ in the numbers of their blocks."""
    return re.sub(r"\d+", "#", name) if family in UNETS else name


def _taken(host: str, whole: File, blocks: int | None) -> File | None:
    """The largest choice of a file's modules of which a host loads any."""
    for choice in CHOICES:
        kept = tuple(part for part in whole.parts if CHOSEN[choice](part))
        file = replace(whole, choice=choice, parts=kept)
        right = _right(host, file, blocks) if kept else None
        if right:
            return file
        if right is not None and LOADERS[host].apart:
            return None
    return None


# families of which it could not be established what a host does: the lists may only become shorter
UNMEASURED: Mapping[str, frozenset[str]] = {
    # the newest musubi-tuner knows the first three, by its documentation, not the one that was read
    "kohya": frozenset({"minimax-h3", "qwen-image-21", "ernie-image", "hidream-o1"}),
    # what it makes of FLUX.1's names for it, and whether its names are ours, was not read
    "comfyui": frozenset({"ovis-image", "hidream-o1"}),
    # its names are in a file that was not found
    "a1111": frozenset({"sd3"}),
    # it gives the files of these to diffusers, in a version that it pins
    "sdnext": frozenset(families()) - set(sdnext.TYPES),
    # of its models these alone were built
    "wan2gp": frozenset(families()) - set(wan2gp.MODELS) - set(hosts()["wan2gp"].unsupported),
}
# parts of a model of which the code that was read does not tell how they are adapted
UNTRIED = {("comfyui", "ltx2"): ("connectors", "text_projection")}
# converters that go over the blocks of the real model
COMPLETE = {("peft", "flux"), ("peft", "chroma"), ("xlabs", "flux")}
# converters that lose what they know beside anything else
APART = {("sdnext", "kohya", "flux"), ("sdnext", "kohya", "sd3"), ("sdnext", "kohya", "sd35-large")}
# loaders that end at a LoRA of a window in three dimensions: its name is tried with a difference
WINDOWED = {("sdcpp", "wan"), ("sdcpp", "hunyuan-video-15")}
DIFFERENCES = ("full",)
# converters that know other names when the factors are called otherwise
SPELLED = {("diffusers", "comfy", "z-image"), ("mflux", "bare", "flux")}


def _short(known: Mapping[str, bool]) -> bool | list[str]:
    if all(known.values()):
        return True
    return (
        sorted(name for name, right in known.items() if not right) if any(known.values()) else False
    )


def record(only: str = "", *chosen: str) -> None:
    """Write the tables of all hosts, or of one, for all families or some."""
    for host in LOADERS:
        if only and host != only:
            continue
        if not LOADERS[host].there():
            print(f"{host} is not here: see tests/interop/hosts/{host}.py", flush=True)
            continue
        loader, path = LOADERS[host], FOLDER / f"{host}.json"
        table = {}
        for family in chosen or families():
            unknown = family in UNMEASURED.get(host, ())
            if not unknown and family not in hosts()[host].unsupported:
                table[family] = names(host, family)
                print(host, family, flush=True)
        if chosen and path.is_file():
            table = json.loads(path.read_text(encoding="utf-8"))["names"] | table
        FOLDER.mkdir(exist_ok=True)
        made = {
            "version": loader.version,
            "date": loader.date,
            "how": loader.how,
            "names": {family: table[family] for family in families() if table.get(family)},
        }
        path.write_text(dump(made), encoding="utf-8", newline="\n")


def dump(made: Mapping[str, Any]) -> str:
    """One line per family and format, so that a difference shows."""
    lines = []
    for family, table in made["names"].items():
        rows = [f"   {json.dumps(format)}: {json.dumps(by)}" for format, by in table.items()]
        lines.append(f"  {json.dumps(family)}: {{\n" + ",\n".join(rows) + "\n  }")
    head = "".join(f" {json.dumps(k)}: {json.dumps(v)},\n" for k, v in made.items() if k != "names")
    return "{\n" + head + ' "names": {\n' + ",\n".join(lines) + "\n }\n}\n"
