"""Read an adapter file: its slots, their tensors, and their weights."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from adaptkit.algorithms.contract import ALPHA, Stated
from adaptkit.detect import ENOUGH, Detection, chosen, detect_adapter, formats, is_adapter
from adaptkit.errors import AdaptkitError, UnknownAdapter
from adaptkit.files.open import open_source
from adaptkit.keymap import KeyMap, Parsed, RoleName, algorithms, compile_keys, label, split_suffix
from adaptkit.unknown import fallback

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import Tensor

    from adaptkit.algorithms.contract import Facts, Weights
    from adaptkit.families.contract import ModelFamily
    from adaptkit.files.header import TensorInfo
    from adaptkit.files.source import TensorSource
    from adaptkit.formats.contract import KeyFormat
    from adaptkit.names import Slot

__all__ = ["Adapter", "Entry", "Problem", "open_adapter_source"]

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# OneTrainer's embeddings, and tensors that other tools store in adapter files
CARRIED = ("bundle_emb.", "_aux.")
DIFFUSERS_CONFIG = "lora_adapter_metadata"


class Problem(NamedTuple):
    """A fault of a file: an `error` makes it unusable, a `warning` does not."""

    severity: str
    module: str | None
    what: str


class Entry(NamedTuple):
    """One adapted weight, from the header alone.

    `keys` maps each role to its key in the file.
    """

    slot: Slot
    kind: type[Weights]
    keys: Mapping[str, str]
    facts: Facts
    alpha: float | None = None
    alpha_source: str = "none"  # tensor | metadata | none
    naming: str = "diffusers"
    swapped: bool = False  # stored with the halves of its rows swapped

    def tensors(self) -> Iterator[tuple[str, str]]:
        """(role, key) of the tensors with weights, that is, all except alpha."""
        return ((role, key) for role, key in self.keys.items() if role != ALPHA)

    def decode(self, tensors: Mapping[str, Tensor]) -> Weights:
        """Decode stored tensors (perhaps stacked), rows in target order."""
        weights = self.kind.decode(tensors, self.facts)
        return weights.swapped() if self.swapped else weights


@dataclass(frozen=True)
class Adapter:
    """A parsed adapter file.

    `unclaimed` maps each key without a slot to the reason.

    `carried` names tensors of other tools (embeddings) in the file. They hold no weights, and are
    copied to the output.
    """

    source: TensorSource
    family: ModelFamily
    format: KeyFormat
    entries: Mapping[Slot, Entry]
    unclaimed: Mapping[str, str]
    problems: tuple[Problem, ...]
    detection: Detection
    metadata: Mapping[str, str] = field(default_factory=dict)
    carried: tuple[str, ...] = ()

    @classmethod
    def open(
        cls, path: str | Path, *, family: str | None = None, format: str | None = None
    ) -> Adapter:
        """Read the header of an adapter file or PEFT folder.

        Raises `UnknownAdapter` if no (family, format) fits.
        """
        source, config = open_adapter_source(Path(path))
        try:
            return cls.understand(source, config, family=family, format=format)
        except AdaptkitError as error:
            source.close()
            raise error.at(file=path) from None

    @classmethod
    def open_as(
        cls, path: str | Path, family: ModelFamily, *, format: str | None = None
    ) -> Adapter:
        """Read the header of an adapter for a `family` without a table.

        See adaptkit.unknown.

        Raises `UnknownAdapter` if no format spells most keys with the module names of the family.
        """
        source, config = open_adapter_source(Path(path))
        try:
            infos = _weights_of(source)
            return cls._read(source, config, infos, *_by_names(infos, family, format))
        except AdaptkitError as error:
            source.close()
            raise error.at(file=path) from None

    @classmethod
    def understand(
        cls,
        source: TensorSource,
        config: Mapping[str, object] | None = None,
        *,
        family: str | None = None,
        format: str | None = None,
    ) -> Adapter:
        """Parse the adapter in an open source; `config` is PEFT's adapter_config.json, if any."""
        infos = _weights_of(source)
        found = detect_adapter(infos, source.metadata, family=family, format=format)
        if found.family is not None and found.format is not None:
            keys = compile_keys(found.family, found.format)
        else:
            keys, found = _unknown(infos, found, family, format)
        return cls._read(source, config, infos, keys, found)

    @classmethod
    def _read(
        cls,
        source: TensorSource,
        config: Mapping[str, object] | None,
        infos: Mapping[str, TensorInfo],
        keys: KeyMap,
        found: Detection,
    ) -> Adapter:
        reader = _Reader(source, keys, _Configs.of(source.metadata, config))
        entries = reader.entries(infos)
        reader.problems += _unusual(config or {})
        return cls(
            source,
            keys.family,
            keys.format,
            entries,
            reader.unclaimed,
            tuple(reader.problems),
            found,
            source.metadata,
            tuple(name for name in source.infos if name not in infos),
        )

    @property
    def known(self) -> bool:
        """Whether adaptkit has a table for the family."""
        return self.detection.family is not None

    @cached_property
    def keys(self) -> KeyMap:
        """The key map of the file's own family and format."""
        return KeyMap(self.family, self.format)

    @cached_property
    def alpha_source(self) -> str:
        """The source of alpha over all entries that need one.

        `tensor`, `metadata`, `none` or `mixed`.
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
        """Read the stored tensors of an entry by role, without alpha (see `facts.scale`)."""
        return {role: self.source.read(key) for role, key in entry.tensors()}

    def weights(self, entry: Entry) -> Weights:
        """Read and decode the weights of an entry, in their stored dtype."""
        return entry.decode(self.read(entry))

    def close(self) -> None:
        """Close the file."""
        self.source.close()

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _weights_of(source: TensorSource) -> dict[str, TensorInfo]:
    return {name: info for name, info in source.infos.items() if not name.startswith(CARRIED)}


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


def _unknown(
    infos: Mapping[str, TensorInfo], found: Detection, family: str | None, format: str | None
) -> tuple[KeyMap, Detection]:
    """The key map of a family made of the file's own module names.

    Raises `UnknownAdapter` if no format fits either.
    """
    made = fallback(infos, format) if not family and is_adapter(infos) else None
    if made is None:
        first = next(iter(infos), "nothing")
        raise UnknownAdapter(
            "no known family and key format claims these keys",
            hint=f"the first key is {first!r}; see `adaptkit families` and `adaptkit formats`",
        )
    stranger, key_format, claimed = made
    return KeyMap(stranger, key_format), Detection(None, key_format.name, claimed, found.total)


def _unusual(config: Mapping[str, object]) -> list[Problem]:
    """Find PEFT options that adaptkit does not support.

    The tensors do not reveal these options.
    """
    usual: dict[str, object] = {
        "use_cayley_neumann": True,
        "num_cayley_neumann_terms": 5,
        "coft": False,
    }
    if config.get("peft_type") != "OFT":
        return []
    wrong = [name for name, value in usual.items() if config.get(name, value) != value]
    return [
        Problem("error", None, f"{name} = {config[name]}: this kind of OFT is not supported")
        for name in wrong
    ]


def open_adapter_source(path: Path) -> tuple[TensorSource, Mapping[str, object] | None]:
    """Open an adapter file, or a PEFT folder with its configuration."""
    config = path / PEFT_CONFIG
    if not config.is_file():
        return open_source(path), None
    weights = next((path / name for name in PEFT_WEIGHTS if (path / name).is_file()), path)
    try:
        return open_source(weights), json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UnknownAdapter(f"{PEFT_CONFIG} is not valid JSON: {error}", file=config) from None


@dataclass(frozen=True)
class _Configs:
    """Alphas in metadata: PEFT's LoraConfig fields, per component in files of diffusers."""

    configs: Mapping[str, Mapping[str, object]]

    @classmethod
    def of(cls, metadata: Mapping[str, str], config: Mapping[str, object] | None) -> _Configs:
        if config is not None:
            return cls({"": config})
        try:
            stored = json.loads(metadata.get(DIFFUSERS_CONFIG, "{}"))
        except ValueError:
            stored = {}
        parts: dict[str, dict[str, object]] = {}
        for name, value in stored.items() if isinstance(stored, dict) else ():
            component, _, key = name.partition(".")
            parts.setdefault(component, {})[key] = value
        return cls(parts)

    def alpha(self, component: str, module: str) -> Stated | None:
        """Alpha of a module by its name in the file, or None."""
        config = self.configs.get(component) or self.configs.get("") or {}
        alpha = _pattern(
            config.get("alpha_pattern"), module, config.get("lora_alpha", config.get("alpha"))
        )
        if not isinstance(alpha, int | float):
            return None
        rank = _pattern(config.get("rank_pattern"), module, config.get("r"))
        return Stated(
            float(alpha), rank if isinstance(rank, int) else None, bool(config.get("use_rslora"))
        )


def _pattern(patterns: object, module: str, default: object) -> object:
    """The value of the first pattern that matches a module name.

    The rule is that of PEFT's `get_pattern_key` (`peft/utils/other.py`).
    """
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        # unescaped on purpose: PEFT treats patterns as regular expressions
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default


class _Reader:
    """Groups keys by slot into entries; lists keys that do not fit."""

    def __init__(self, source: TensorSource, keys: KeyMap, configs: _Configs) -> None:
        self.source = source
        self.keys = keys
        self.configs = configs
        self.unclaimed: dict[str, str] = {}
        self.problems: list[Problem] = []

    def entries(self, names: Iterable[str]) -> dict[Slot, Entry]:
        groups: dict[Slot, dict[str, Parsed]] = {}
        for key in names:
            parsed = self.keys.parse(key)
            if parsed is None:
                self.unclaimed[key] = "no such module or tensor in this family and format"
            else:
                groups.setdefault(parsed.slot, {})[key] = parsed
        found = ((slot, self._entry(slot, group)) for slot, group in groups.items())
        return {slot: entry for slot, entry in found if entry is not None}

    def _entry(self, slot: Slot, group: Mapping[str, Parsed]) -> Entry | None:
        first = next(iter(group.values()))
        failures: list[str] = []
        names = tuple(group)
        for kind, places in _whole(tuple(parsed.roles for parsed in group.values())):
            keys = {role: names[n] for role, n in places.items()}
            alpha, origin = self._alpha(slot, keys, first.module)
            try:
                shapes = {
                    role: self.source.infos[key].shape
                    for role, key in keys.items()
                    if role != ALPHA
                }
                facts = self._with_kernel(slot, kind.facts(shapes, alpha))
            except AdaptkitError as error:
                failures.append(error.message)
            else:
                value = alpha.value if alpha else None
                return Entry(slot, kind, keys, facts, value, origin, first.naming, first.swapped)
        found = ", ".join(sorted({parsed.roles[0][1] for parsed in group.values()}))
        self._refuse(slot, group, failures[0] if failures else f"incomplete or mixed: {found}")
        return None

    def _with_kernel(self, slot: Slot, facts: Facts) -> Facts:
        """Add the table's kernel if flat factors do not determine it."""
        if facts.kernel is not None:
            return facts
        row = self.keys.row(slot.target)
        # a family without checkpoints is made of file names: its rows know no kernels
        if row is None or not self.keys.family.component(slot.component).checkpoints:
            return facts
        return replace(facts, kernel=row.kernel)

    def _alpha(self, slot: Slot, keys: Mapping[str, str], module: str) -> tuple[Stated | None, str]:
        if ALPHA in keys:
            return Stated(self.source.scalar(keys[ALPHA])), "tensor"
        alpha = self.configs.alpha(slot.component, module)
        return alpha, "none" if alpha is None else "metadata"

    def _refuse(self, slot: Slot, group: Mapping[str, object], what: str) -> None:
        self.problems.append(Problem("error", label(self.keys.family, slot), what))
        self.unclaimed |= dict.fromkeys(group, what)


@lru_cache(maxsize=4096)
def _whole(
    group: tuple[tuple[RoleName, ...], ...],
) -> tuple[tuple[type[Weights], Mapping[str, int]], ...]:
    """The algorithms that can hold all tensors of a slot.

    Each comes with its tensor index by role.
    """
    found: list[tuple[type[Weights], Mapping[str, int]]] = []
    for name in dict.fromkeys(algorithm for roles in group for algorithm, _ in roles):
        kind = algorithms()[name]
        places = {
            role: n
            for n, roles in enumerate(group)
            for algorithm, role in roles
            if algorithm == name
        }
        if len(places) == len(group) and frozenset(places) - {ALPHA} in kind.forms:
            found.append((kind, places))
    return tuple(found)
