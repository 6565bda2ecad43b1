"""An adapter file: its slots, what stands in each, and how to read them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from adaptkit.algorithms.contract import ALPHA
from adaptkit.detect import ENOUGH, Detection, chosen, detect_adapter, formats, is_adapter
from adaptkit.errors import AdaptkitError, UnknownAdapter
from adaptkit.files.source import open_source
from adaptkit.keymap import KeyMap, Parsed, RoleName, algorithms, compile_keys, label, split_suffix
from adaptkit.meaning import Meaning
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
CARRIED = (
    "bundle_emb.",
    "_aux.",
)  # OneTrainer's embeddings, and tensors other tools leave beside an adapter


class Problem(NamedTuple):
    """Something wrong with a file: `error` where it cannot be used as it stands, else `warning`."""

    severity: str
    module: str | None
    what: str


class Entry(NamedTuple):
    """Everything the header tells about one adapted weight. `keys` maps each role to its key in the file."""

    slot: Slot
    kind: type[Weights]
    keys: Mapping[str, str]
    facts: Facts
    alpha: float | None = None
    alpha_source: str = "none"  # tensor | metadata | none
    naming: str = "diffusers"
    swapped: bool = False  # stored with the halves of its rows exchanged

    def tensors(self) -> Iterator[tuple[str, str]]:
        """(role, key) of the tensors that hold weights: all but alpha."""
        return ((role, key) for role, key in self.keys.items() if role != ALPHA)

    def decode(self, tensors: Mapping[str, Tensor]) -> Weights:
        """Stored tensors (perhaps stacked) to weights, in the order of rows that the target has."""
        weights = self.kind.decode(tensors, self.facts)
        return weights.swapped() if self.swapped else weights


@dataclass(frozen=True)
class Adapter:
    """An adapter file, understood. `unclaimed` lists the keys that nobody claims, each with the reason.

    `carried` are tensors beside the adapter that other tools put there (embeddings): no weights, but not to be lost.
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
        """Read the header of an adapter file, or of a PEFT folder; UnknownAdapter where no (family, format) fits."""
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
        """Read the header of an adapter for a family without a table (see adaptkit.unknown), which gives the modules' names.

        UnknownAdapter where no format spells most keys by these names.
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
        """The adapter in an open source; `config` is PEFT's adapter_config.json, if any."""
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
        meaning = Meaning.of(source.metadata, config)
        reader = _Reader(source, keys, meaning)
        entries = reader.entries(infos)
        reader.problems += [Problem("error", None, what) for what in meaning.unsupported()]
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
        """Whether the family is one that adaptkit has a table for."""
        return self.detection.family is not None

    @cached_property
    def keys(self) -> KeyMap:
        """The key map of this file's own family and format."""
        return KeyMap(self.family, self.format)

    @cached_property
    def alpha_source(self) -> str:
        """Where alpha comes from: `tensor`, `metadata`, `none` or `mixed`, over the entries whose scale needs one."""
        sources = {
            entry.alpha_source for entry in self.entries.values() if entry.facts.rank is not None
        }
        return sources.pop() if len(sources) == 1 else ("mixed" if sources else "none")

    def label(self, slot: Slot) -> str:
        """What people call a slot: in the file's own naming."""
        entry = self.entries.get(slot)
        return label(self.family, slot, entry.naming if entry else "diffusers")

    def algorithms(self) -> dict[str, int]:
        """How many slots each algorithm has."""
        return dict(Counter(entry.kind.name for entry in self.entries.values()).most_common())

    def read(self, entry: Entry) -> dict[str, Tensor]:
        """The stored tensors of an entry by role, alpha left out (it is in `facts.scale`)."""
        return {role: self.source.read(key) for role, key in entry.tensors()}

    def weights(self, entry: Entry) -> Weights:
        """The weights of an entry, decoded, in their stored dtype."""
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
    """The key map of the format that claims most keys with a family's names; UnknownAdapter where that is not most of them."""
    stems = Counter(found[0] for name in infos if (found := split_suffix(name)) is not None)
    maps = [KeyMap(family, formats()[name]) for name in chosen("format", formats(), format)]
    claimed = [sum(n for stem, n in stems.items() if keys.claims(stem)) for keys in maps]
    most = max(claimed)
    if most <= ENOUGH * len(infos):
        raise UnknownAdapter(
            "its modules are not named as the checkpoint's, whose family adaptkit has no table for",
            hint=f"it begins with {next(iter(infos), 'nothing')!r}; only names that both files use can be matched",
        )
    keys = maps[claimed.index(most)]
    return keys, Detection(None, keys.format.name, most, len(infos))


def _unknown(
    infos: Mapping[str, TensorInfo], found: Detection, family: str | None, format: str | None
) -> tuple[KeyMap, Detection]:
    """The key map of a family made of the file's own module names; UnknownAdapter where no format fits either."""
    made = fallback(infos, format) if not family and is_adapter(infos) else None
    if made is None:
        raise UnknownAdapter(
            "no family and key format adaptkit knows claims these keys",
            hint=f"it begins with {next(iter(infos), 'nothing')!r}; see `adaptkit families` and `adaptkit formats`",
        )
    stranger, key_format, claimed = made
    return KeyMap(stranger, key_format), Detection(None, key_format.name, claimed, found.total)


def open_adapter_source(path: Path) -> tuple[TensorSource, Mapping[str, object] | None]:
    """An adapter's file, and PEFT's adapter_config.json where the path is a folder that has one."""
    config = path / PEFT_CONFIG
    if not config.is_file():
        return open_source(path), None
    weights = next((path / name for name in PEFT_WEIGHTS if (path / name).is_file()), path)
    try:
        return open_source(weights), json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UnknownAdapter(
            f"{PEFT_CONFIG} is not readable as JSON: {error}", file=config
        ) from None


class _Reader:
    """Groups keys by slot and makes entries of them; what does not fit is listed, never dropped."""

    def __init__(self, source: TensorSource, keys: KeyMap, meaning: Meaning) -> None:
        self.source = source
        self.keys = keys
        self.meaning = meaning
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
            stored = self.source.scalar(keys[ALPHA]) if ALPHA in keys else None
            alpha, origin = self.meaning.alpha(slot.component, first.module, stored)
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
        """Where the stored shapes do not tell the kernel (flat factors), a table made for weights does."""
        if facts.kernel is not None:
            return facts
        row = self.keys.row(slot.target)
        if row is None or not self.keys.family.component(slot.component).checkpoints:
            return facts
        return replace(facts, kernel=row.kernel)

    def _refuse(self, slot: Slot, group: Mapping[str, object], what: str) -> None:
        self.problems.append(Problem("error", label(self.keys.family, slot), what))
        self.unclaimed |= dict.fromkeys(group, what)


@lru_cache(maxsize=4096)
def _whole(
    group: tuple[tuple[RoleName, ...], ...],
) -> tuple[tuple[type[Weights], Mapping[str, int]], ...]:
    """The algorithms that all tensors of a slot can belong to, each with the tensor (by number) of every role."""
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
