"""Read an adapter file: its slots, their tensors, and their weights."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from adaptkit.algorithms.contract import ALPHA, Stated
from adaptkit.detect import ENOUGH, Detection, chosen, detect_adapter, formats, is_adapter
from adaptkit.errors import AdaptkitError, UnknownAdapter
from adaptkit.files.open import open_source
from adaptkit.keymap import KeyMap, Parsed, RoleName, algorithms, compile_keys, label, split_suffix
from adaptkit.meaning import PEFT_CONFIG, SAY, Meaning, Problem, refuse_errors
from adaptkit.unknown import fallback

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torch import Tensor

    from adaptkit.algorithms.contract import Facts, Weights
    from adaptkit.families.contract import ModelFamily
    from adaptkit.files.header import TensorInfo
    from adaptkit.files.source import TensorSource
    from adaptkit.formats.contract import KeyFormat
    from adaptkit.names import Slot

__all__ = ["Adapter", "Entry", "Header", "entries_of", "open_adapter_source", "weights_of"]

PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PEFT_BIAS = "lora_B.bias"
# OneTrainer's embeddings, and tensors that other tools store in adapter files
CARRIED = ("bundle_emb.", "_aux.")


class Header(Protocol):
    """The tensors of a file by name, of which single numbers can be read."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Dtype, shape and place of each tensor."""

    def scalar(self, name: str) -> float:
        """The number in a tensor of one element."""


class Entry(NamedTuple):
    """One adapted weight, from the header alone.

    `keys` maps each role to its key in the file.
    """

    slot: Slot
    kind: type[Weights]
    keys: Mapping[str, str]
    facts: Facts
    alpha: float | None = None
    alpha_source: str = "none"  # tensor | metadata | given | none
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
    keys: KeyMap  # of this file's own family and format
    metadata: Mapping[str, str] = field(default_factory=dict)
    carried: tuple[str, ...] = ()

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
        except AdaptkitError as error:
            source.close()
            raise error.at(file=path) from None

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
            infos = _weights_of(source)
            found = cls._read(source, config, infos, *_by_names(infos, family, format), alpha)
            refuse_errors(found.problems, Path(path))
            return found
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
        alpha: str | None = None,
    ) -> Adapter:
        """Parse the adapter in an open source; `config` is PEFT's adapter_config.json, if any."""
        infos = _weights_of(source)
        found = detect_adapter(infos, source.metadata, family=family, format=format)
        if found.family is not None and found.format is not None:
            keys = compile_keys(found.family, found.format)
        else:
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
        meaning = Meaning.of(source.metadata, config, alpha)
        reader, entries = _entries(source, keys, meaning, infos)
        reader.problems += meaning.problems()
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
            tuple(name for name in source.infos if name not in infos),
        )

    @property
    def known(self) -> bool:
        """Whether adaptkit has a table for the family."""
        return self.detection.family is not None

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
        return _alike({role: self.source.read(key) for role, key in entry.tensors()})

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


def entries_of(
    header: Header, keys: KeyMap, metadata: Mapping[str, str], config: Mapping[str, object] | None
) -> dict[Slot, Entry]:
    """The entries that a reader finds in a file of this key map; `config` is PEFT's, if any."""
    _, found = _entries(header, keys, Meaning.of(metadata, config), _weights_of(header))
    return found


def _entries(
    header: Header, keys: KeyMap, meaning: Meaning, names: Iterable[str]
) -> tuple[_Reader, dict[Slot, Entry]]:
    """The entries of a file. An alpha for the whole file counts only where there is no other."""
    reader = _Reader(header, keys, meaning)
    found = reader.entries(names)
    ranked = [entry for entry in found.values() if entry.facts.rank is not None]
    if not ranked or any(entry.alpha is not None for entry in ranked):
        return reader, found
    ranks = {entry.facts.rank for entry in ranked if entry.facts.rank is not None}
    alpha, problem = meaning.flat_alpha(ranks)
    if alpha is not None:
        reader = _Reader(header, keys, replace(meaning, configs={"": {"lora_alpha": alpha}}))
        found = reader.entries(names)
    reader.problems += () if problem is None else (problem,)
    return reader, found


def weights_of(entry: Entry, tensor: Callable[[str], Tensor]) -> Weights:
    """The weights of an entry, its tensors read by `tensor`, rows in target order."""
    return entry.decode(_alike({role: tensor(key) for role, key in entry.tensors()}))


def _weights_of(source: Header) -> dict[str, TensorInfo]:
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
        read = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        what = f"{PEFT_CONFIG} is not valid JSON: {error}"
        raise UnknownAdapter(what, file=config) from None
    if not isinstance(read, dict):
        raise UnknownAdapter(f"{PEFT_CONFIG} is not a JSON object", file=config)
    return open_source(weights), read


class _Reader:
    """Groups keys by slot into entries; lists keys that do not fit."""

    def __init__(self, source: Header, keys: KeyMap, meaning: Meaning) -> None:
        self.source = source
        self.keys = keys
        self.meaning = meaning
        self.unclaimed: dict[str, str] = {}
        self.problems: list[Problem] = []
        self.contradicts = False

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
        for plain, places in _whole(tuple(parsed.roles for parsed in group.values())):
            kind = algorithms().get(self.meaning.rebased(slot.component, plain), plain)
            keys = {role: names[n] for role, n in places.items()}
            stored = self.source.scalar(keys[ALPHA]) if ALPHA in keys else None
            if kind.bounded:  # a bound, not a scale
                alpha, origin = (None, "none") if stored is None else (Stated(stored), "tensor")
            else:
                alpha, origin = self.meaning.alpha(slot.component, first.module, stored)
            try:
                shapes = {
                    role: self.source.infos[key].shape
                    for role, key in keys.items()
                    if role != ALPHA
                }
                facts = self._with_kernel(slot, kind.facts(shapes, alpha))
                facts = self._with_bias_scale(slot, facts, keys, first.module)
            except AdaptkitError as error:
                failures.append(error.message)
            else:
                value = alpha.value if alpha else None
                if stored is not None and not kind.bounded:
                    self._compare(slot, facts, stored, first.module)
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

    def _with_bias_scale(
        self, slot: Slot, facts: Facts, keys: Mapping[str, str], module: str
    ) -> Facts:
        key = next(iter(keys.values()))
        if not key.endswith(PEFT_BIAS):
            return facts
        down = self.source.infos.get(f"{key.removesuffix(PEFT_BIAS)}lora_A.weight")
        # without factors PEFT makes some of the usual rank, which add nothing
        scale = self.meaning.bias_scale(slot.component, module, down.shape[0] if down else None)
        return replace(facts, scale=scale)

    def _compare(self, slot: Slot, facts: Facts, stored: float, module: str) -> None:
        """Note a file of which readers of the tensor and of the configuration get two scales."""
        if self.contradicts or facts.rank is None:
            return
        if self.meaning.contradicts(slot.component, module, stored, facts.rank):
            self.contradicts = True
            what = f"{label(self.keys.family, slot)}: alpha is {stored:g} in its tensor"
            what += ", and another in the configuration: readers differ in what they take"
            self.problems.append(Problem("error", None, what, SAY))

    def _refuse(self, slot: Slot, group: Mapping[str, object], what: str) -> None:
        self.problems.append(Problem("error", label(self.keys.family, slot), what))
        self.unclaimed |= dict.fromkeys(group, what)


def _alike(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of one float dtype: torch multiplies no two dtypes, and computes nothing in fp8."""
    import torch

    floats = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if len(floats) < 2 and all(dtype.itemsize > 1 for dtype in floats):
        return tensors
    wide = torch.float64 if torch.float64 in floats else torch.float32
    return {
        role: tensor.to(wide) if tensor.is_floating_point() else tensor
        for role, tensor in tensors.items()
    }


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
