"""Read an adapter file: its slots, their tensors, and their weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from adaptkit.detect import (
    ENOUGH,
    Detection,
    chosen,
    detect_adapter,
    detect_checkpoint,
    families,
    foreign,
    formats,
    hint_for,
    is_adapter,
)
from adaptkit.entries import (
    Entry,
    alike,
    as_part,
    is_carried,
    read_entries,
    without_carried,
)
from adaptkit.errors import (
    AdaptkitError,
    InternalError,
    NoSuchName,
    NotRepresentable,
    UnknownAdapter,
)
from adaptkit.files.arranged import by_heads, plain_factors
from adaptkit.files.limits import read_json
from adaptkit.files.open import open_source
from adaptkit.keymap import KeyMap, compile_keys, keys_for, label, split_suffix
from adaptkit.meaning import PEFT_CONFIG, Meaning, Problem, refuse_errors
from adaptkit.suggest import CUTOFF, nearest
from adaptkit.unknown import fallback, own_modules, own_of, with_dots, with_own

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from adaptkit.algorithms.contract import Weights
    from adaptkit.families.contract import ModelFamily
    from adaptkit.files.header import TensorInfo
    from adaptkit.files.source import TensorSource
    from adaptkit.formats.contract import KeyFormat
    from adaptkit.names import Slot

__all__ = ["Adapter", "open_adapter_source"]

FEW = 16  # names of weights: fewer are no proof that a file is a checkpoint
PACKED = "nunchaku"  # the layout whose tensors alone count
# what is said of a file in an arrangement of its own (see adaptkit.files.arranged)
LAYOUTS = {
    PACKED: "it is packed for nunchaku, beside the factors of a quantised base: these are left "
    "out, and what is written is plain, unless --to nunchaku and --base say otherwise",
    "forge": "its names are those of Forge's patches: they are read as ComfyUI's, and written so",
    "diffsynth": "q, k and v are stored head by head, as DiffSynth-Studio has them: they are read "
    "and written in the order of all other tools, which DiffSynth-Studio does not read",
}
# what a layout says of the family
ARCHITECTURES = {PACKED: {"modelspec.architecture": "flux-1"}}
PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True, repr=False)
class Adapter:
    """A parsed adapter file.

    A module that the family's table does not name is read under its own name, see `own`.

    `unclaimed` maps each key without a slot to the reason.

    `carried` names tensors of other tools (embeddings) in the file. They hold no weights, and are
    copied to the output. `configs` are the fields of PEFT's configuration, by component.
    """

    source: TensorSource
    family: ModelFamily
    format: KeyFormat
    entries: Mapping[Slot, Entry]
    unclaimed: Mapping[str, str]
    problems: tuple[Problem, ...]
    detection: Detection
    keys: KeyMap  # of this file's own family and format
    metadata: Mapping[str, str] = field(default_factory=dict)
    carried: tuple[str, ...] = ()
    configs: Mapping[str, Mapping[str, object]] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        family: str | None = None,
        format: str | None = None,
        alpha: str | None = None,
    ) -> Adapter:
        """Read the header of an adapter file or PEFT folder.

        `alpha` is that of every module, whatever the file says: a number, or `as-rank`.

        Raises `UnknownAdapter` if no (family, format) fits.
        """
        source, config = open_adapter_source(Path(path))
        try:
            found = cls.understand(source, config, family=family, format=format, alpha=alpha)
            refuse_errors(found.problems, Path(path))
            return found
        except Exception as error:
            source.close()
            told = InternalError.of(error).at(file=path)
            raise told from told.__cause__

    @classmethod
    def open_as(
        cls,
        path: str | Path,
        family: ModelFamily,
        *,
        format: str | None = None,
        alpha: str | None = None,
    ) -> Adapter:
        """Read the header of an adapter for a `family` without a table.

        See adaptkit.unknown.

        Raises `UnknownAdapter` if no format spells most keys with the module names of the family.
        """
        source, config = open_adapter_source(Path(path))
        try:
            infos = without_carried(source)
            found = cls._read(source, config, infos, *_by_names(infos, family, format), alpha)
            refuse_errors(found.problems, Path(path))
            return found
        except Exception as error:
            source.close()
            told = InternalError.of(error).at(file=path)
            raise told from told.__cause__

    @classmethod
    def understand(
        cls,
        source: TensorSource,
        config: Mapping[str, object] | None = None,
        *,
        family: str | None = None,
        format: str | None = None,
        alpha: str | None = None,
    ) -> Adapter:
        """Parse the adapter in an open source; `config` is PEFT's adapter_config.json, if any."""
        source = plain_factors(source)
        infos = without_carried(source)
        metadata = {**source.metadata, **ARCHITECTURES.get(source.layout, {})}
        found = detect_adapter(infos, metadata, family=family, format=format)
        if found.family is not None and found.format is not None:
            source = by_heads(source, families()[found.family].interleaved)
            known = compile_keys(found.family, found.format, wrapped=bool(found.wrapper))
            keys = _with_own(known, infos)
        else:
            _refuse_foreign(infos or source.infos, config)
            keys, found = _unknown(infos, found, family, format)
        return cls._read(source, config, infos, keys, found, alpha)

    @classmethod
    def _read(
        cls,
        source: TensorSource,
        config: Mapping[str, object] | None,
        infos: Mapping[str, TensorInfo],
        keys: KeyMap,
        found: Detection,
        alpha: str | None,
    ) -> Adapter:
        # nunchaku reads no metadata, and its ranks are filled up
        stated = {} if source.layout == PACKED else source.metadata
        meaning = Meaning.of(stated, config, alpha)
        reader, entries = read_entries(source, keys, meaning, infos)
        reader.problems += (*meaning.problems(), *_stored_otherwise(source))
        return cls(
            source,
            keys.family,
            keys.format,
            entries,
            reader.unclaimed,
            tuple(reader.problems),
            found,
            keys,
            source.metadata,
            tuple(name for name in source.infos if name not in infos and is_carried(name)),
            meaning.configs,
        )

    def __repr__(self) -> str:
        kinds = ", ".join(f"{name} {count}" for name, count in self.algorithms().items())
        family = self.family.name if self.known else "unknown family"
        path = str(self.source.path)
        return f"Adapter({path!r}: {family}, {self.format.name} keys, modules: {kinds or 0})"

    @property
    def known(self) -> bool:
        """Whether adaptkit has a table for the family."""
        return self.detection.family is not None

    @cached_property
    def own(self) -> tuple[Slot, ...]:
        """The slots of modules that the table of a known family does not name."""
        named = {(one.component, one.module) for one in own_of(self.family)}
        return tuple(s for s in self.entries if (s.component, s.target.module) in named)

    def nearest(self, key: str, cutoff: float = CUTOFF) -> str | None:
        """The name in the table that is most like that of a key, if the table has not the key's."""
        keys = compile_keys(self.family.name, self.format.name) if self.known else self.keys
        return nearest(keys, key, cutoff)

    def as_part(self, part: str) -> Adapter:
        """This adapter as one of another expert of its model, such as `transformer_2` of Wan.

        Raises NoSuchName if the family has no such component, NotRepresentable if this adapter is
        for a component with other modules.
        """
        known = [component.name for component in self.family.components]
        if part not in known:
            raise NoSuchName.among("component", part, known)
        for slot in self.entries:
            if slot.component not in self.family.experts(part):
                raise NotRepresentable(
                    f"its {slot.component} has other modules than {part}",
                    hint=f"--skip {slot.component} leaves it out",
                    file=self.source.path,
                )
        return replace(self, entries=as_part(self.entries, part))

    def with_dots(self, family: ModelFamily) -> Adapter:
        """This adapter with the dots of its own modules, as another file of the family has them.

        Names in kohya's spelling do not tell which underscores stand for dots.
        """
        named, found = with_dots(self.family, family)
        if not found:
            return self
        entries: dict[Slot, Entry] = {}
        for slot, entry in self.entries.items():
            name = found.get(f"{slot.component}.{slot.target.module}", slot.target.module)
            moved = slot._replace(target=slot.target._replace(module=name))
            entries[moved] = entry._replace(slot=moved)
        return replace(self, family=named, entries=entries, keys=keys_for(named, self.format))

    def sized(self, shapes: Mapping[Slot, tuple[int, int]]) -> Adapter:
        """This adapter with the (rows, columns) of its layers where its tensors do not tell them.

        0 stands for a number that is not known.
        """
        most = max(rows for rows, _ in shapes.values()), max(n for _, n in shapes.values())
        entries = dict(self.entries)
        for slot, (rows, _) in shapes.items():
            entry = entries[slot]
            facts = entry.kind.beside(entry.facts, *most)
            entries[slot] = entry._replace(facts=replace(facts, rows=facts.rows or rows))
        return replace(self, entries=entries)

    @cached_property
    def alpha_source(self) -> str:
        """The source of alpha over all entries that need one.

        `tensor`, `metadata`, `given`, `none` or `mixed`.
        """
        sources = {
            entry.alpha_source for entry in self.entries.values() if entry.facts.rank is not None
        }
        return sources.pop() if len(sources) == 1 else ("mixed" if sources else "none")

    def label(self, slot: Slot) -> str:
        """The display name of a slot, in the file's own naming."""
        entry = self.entries.get(slot)
        return label(self.family, slot, entry.naming if entry else "diffusers")

    def algorithms(self) -> dict[str, int]:
        """Number of slots per algorithm."""
        return dict(Counter(entry.kind.name for entry in self.entries.values()).most_common())

    def read(self, entry: Entry) -> dict[str, Tensor]:
        """The tensors of an entry by role, alpha left out (it is in `facts.scale`).

        They keep their stored dtype if all share one that torch computes with. Others come in the
        narrowest float dtype that holds them all.
        """
        return alike({role: self.source.read(key) for role, key in entry.tensors()})

    def weights(self, entry: Entry) -> Weights:
        """Read and decode the weights of an entry, in their stored dtype."""
        return entry.decode(self.read(entry))

    def configuration(self, component: str) -> Mapping[str, object]:
        """PEFT's configuration of a component; empty without one."""
        return self.configs.get(component) or self.configs.get("") or {}

    def close(self) -> None:
        """Close the file."""
        self.source.close()

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _stored_otherwise(source: TensorSource) -> Iterator[Problem]:
    """What to know of a file whose tensors are not read as they are stored."""
    if source.layout:
        yield Problem("warning", None, LAYOUTS[source.layout])


def _with_own(keys: KeyMap, infos: Mapping[str, TensorInfo]) -> KeyMap:
    """A key map with the modules of a file that the family's table does not name."""
    family = with_own(keys.family, own_modules(keys, infos))
    return keys if family is keys.family else KeyMap(family, keys.format, wrapped=keys.wrapped)


def _by_names(
    infos: Mapping[str, TensorInfo], family: ModelFamily, format: str | None
) -> tuple[KeyMap, Detection]:
    """The key map of the format that claims most of a family's names.

    Raises `UnknownAdapter` if it claims at most half of the keys.
    """
    stems = Counter(found[0] for name in infos if (found := split_suffix(name)) is not None)
    maps = [KeyMap(family, formats()[name]) for name in chosen("format", formats(), format)]
    claimed = [sum(n for stem, n in stems.items() if keys.claims(stem)) for keys in maps]
    most = max(claimed)
    if most <= ENOUGH * len(infos):
        first = next(iter(infos), "nothing")
        raise UnknownAdapter(
            "module names match no module of this (unknown-family) checkpoint",
            hint=f"the first key is {first!r}; only names that occur in both files can be matched",
        )
    keys = maps[claimed.index(most)]
    return keys, Detection(None, keys.format.name, most, len(infos))


def _refuse_foreign(infos: Mapping[str, TensorInfo], config: Mapping[str, object] | None) -> None:
    """UnknownAdapter for a kind that can be named, but not read."""
    kind = foreign(infos, config)
    if kind is not None:
        raise UnknownAdapter(
            f"an adapter of a kind that adaptkit does not read: {kind}",
            hint=hint_for(kind),
        )


def _unknown(
    infos: Mapping[str, TensorInfo], found: Detection, family: str | None, format: str | None
) -> tuple[KeyMap, Detection]:
    """The key map of a family made of the file's own module names.

    Raises `UnknownAdapter` if no format fits either.
    """
    made = fallback(infos, format) if not family and is_adapter(infos) else None
    whole = detect_checkpoint(infos, {}) if made is None else None
    if whole is not None and whole.family is not None and whole.claimed > FEW:
        raise UnknownAdapter(
            f"this is a checkpoint of {families()[whole.family].title}, "
            "and an adapter belongs here",
            hint="`adaptkit extract BASE TUNED` makes an adapter of two checkpoints; "
            "`merge BASE ADAPTER` takes the checkpoint first",
        )
    if made is None:
        first = next(iter(infos), "nothing")
        raise UnknownAdapter(
            "no known family and key format claims these keys",
            hint=f"the first key is {first!r}; see `adaptkit families` and `adaptkit formats`",
        )
    stranger, key_format, claimed = made
    return KeyMap(stranger, key_format), replace(found, format=key_format.name, claimed=claimed)


def open_adapter_source(path: Path) -> tuple[TensorSource, Mapping[str, object] | None]:
    """An adapter's file, and PEFT's adapter_config.json.

    The configuration is read for a folder that has one, and for weights of PEFT's name beside one:
    alpha stands nowhere else.
    """
    folder = path.parent if path.name in PEFT_WEIGHTS else path
    config = folder / PEFT_CONFIG
    if not config.is_file():
        return open_source(path), None
    weights = path
    if path.is_dir():
        weights = next((path / name for name in PEFT_WEIGHTS if (path / name).is_file()), path)
    try:
        read = read_json(config.read_bytes(), PEFT_CONFIG)
    except AdaptkitError as error:
        raise error.at(file=config) from None
    except (ValueError, OSError) as error:
        what = f"{PEFT_CONFIG} is not valid JSON: {error}"
        raise UnknownAdapter(what, file=config) from None
    if not isinstance(read, dict):
        raise UnknownAdapter(f"{PEFT_CONFIG} is not a JSON object", file=config)
    return open_source(weights), read
