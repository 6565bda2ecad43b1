"""The entries of an adapter: its adapted weights, found in a header by their keys."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, cached_property, lru_cache, partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

from adaptkit.algorithms._exchanged import with_halves_exchanged
from adaptkit.algorithms._settings import CONFIG_HINT, Unsettled, Wanted
from adaptkit.algorithms.contract import ALPHA, Stated
from adaptkit.errors import AdaptkitError, NotRepresentable
from adaptkit.files.quantized import FLOATS, FP8
from adaptkit.files.tensors import SCALARS
from adaptkit.keymap import KeyMap, Parsed, RoleName, algorithms, label
from adaptkit.meaning import SAY, Meaning, Problem
from adaptkit.names import Slot

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping

    from torch import Tensor

    from adaptkit.algorithms.contract import Facts, Shapes, Weights
    from adaptkit.files.header import TensorInfo

__all__ = [
    "Entry",
    "Header",
    "alike",
    "as_part",
    "entries_of",
    "is_carried",
    "read_entries",
    "shared_as",
    "shared_name",
    "weights_of",
    "without_carried",
]

# roles of one number, which may be an integer or a flag
SINGLE = (ALPHA, "on_input")
# AdaLoRA takes all ranks from some modules
HOLLOW = "some modules have rank 0: their tensors are empty, and they change nothing"
INTEGERS = ("U8", "I8", "I16", "I32", "I64")
PEFT_BIAS = "lora_B.bias"
# OneTrainer's embeddings, and tensors that other tools store in adapter files
CARRIED = ("bundle_emb.", "_aux.")
REDUNDANT = (".lora_rank",)  # FastVideo's, which the factors' shapes tell
# ComfyUI's size of a widened layer, of any module
BESIDE = (*REDUNDANT, ".reshape_weight")


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

    def likeness(self, infos: Mapping[str, TensorInfo]) -> Hashable:
        """All that decides how it is computed, names aside: equal in what is computed as one.

        `infos` are those of its file. Every field counts, so that one that is added does too.
        """
        stored = tuple((role, infos[key].shape, infos[key].dtype) for role, key in self.tensors())
        return stored, tuple(self._replace(slot=None, keys=None))  # type: ignore[arg-type]

    def decode(self, tensors: Mapping[str, Tensor]) -> Weights:
        """Decode stored tensors (perhaps stacked), rows in target order."""
        weights = self.kind.decode(tensors, self.facts)
        return with_halves_exchanged(weights) if self.swapped else weights


def entries_of(
    header: Header, keys: KeyMap, metadata: Mapping[str, str], config: Mapping[str, object] | None
) -> dict[Slot, Entry]:
    """The entries that a reader finds in a file of this key map; `config` is PEFT's, if any."""
    _, found = read_entries(header, keys, Meaning.of(metadata, config), without_carried(header))
    return found


def read_entries(
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
    return entry.decode(alike({role: tensor(key) for role, key in entry.tensors()}))


def without_carried(source: Header) -> dict[str, TensorInfo]:
    """The tensors of a file without those that other tools left there."""
    return {
        name: info
        for name, info in source.infos.items()
        if not name.startswith(CARRIED) and not name.endswith(BESIDE) and not shared_as(name)
    }


def is_carried(name: str) -> bool:
    """Whether a tensor without weights is worth a copy."""
    return not name.endswith(REDUNDANT) and shared_as(name) is None


def as_part(entries: Mapping[Slot, Entry], part: str) -> dict[Slot, Entry]:
    """Entries of one expert of a model as those of another, which has the same modules."""
    moved = {slot: Slot(slot.target._replace(component=part), slot.rows) for slot in entries}
    return {moved[slot]: entry._replace(slot=moved[slot]) for slot, entry in entries.items()}


class _Reader:
    """Groups keys by slot into entries; lists keys that do not fit."""

    def __init__(self, source: Header, keys: KeyMap, meaning: Meaning) -> None:
        self.source = source
        self.keys = keys
        self.meaning = meaning
        self.unclaimed: dict[str, str] = {}
        self.problems: list[Problem] = []
        self.contradicts = False
        # a file has many modules of few shapes
        self._facts: dict[object, Facts] = {}
        self._lacking: dict[object, str] = {}

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
        if all(self._hollow(key) for key in group):
            self._note(Problem("warning", None, HOLLOW))
            return None
        first = next(iter(group.values()))
        failures: list[str] = []
        names = tuple(group)
        for plain, places in _whole(tuple(parsed.roles for parsed in group.values())):
            rebased = self.meaning.rebased(slot.component, plain)
            kind = algorithms()[rebased] if rebased else plain
            keys = {role: names[n] for role, n in places.items()} | self._shared(kind)
            if odd := self._odd(kind, keys):
                failures.append(odd)
                continue
            stored = self.source.scalar(keys[ALPHA]) if ALPHA in keys else None
            if kind.bounded:  # a bound, not a scale
                alpha, origin = (None, "none") if stored is None else (Stated(stored), "tensor")
            else:
                alpha, origin = self.meaning.alpha(slot.component, first.module, stored)
            shapes = {
                role: self.source.infos[key].shape for role, key in keys.items() if role != ALPHA
            }
            try:
                known = self._facts_of(kind, shapes, alpha)
                facts = self._settled(slot, known, kind, shapes, first.module)
                facts = self._with_kernel(slot, facts)
                facts = self._with_bias_scale(slot, facts, keys, first.module)
                window = len(facts.kernel or ())
                if wrong := self.meaning.misread(slot.component, kind, shapes, window):
                    raise NotRepresentable(wrong)
            except Unsettled as error:  # told once, of the whole file
                self.unclaimed |= dict.fromkeys(group, error.message)
                return None
            except AdaptkitError as error:
                failures.append(error.message)
            except (ArithmeticError, LookupError, TypeError, ValueError):
                # shapes are a stranger's: those that no check foresaw fit no algorithm either
                failures.append(f"{plain.name} has no tensors of shapes {list(shapes.values())}")
            else:
                if kind.caveat:
                    self._note(Problem("warning", None, kind.caveat))
                value = alpha.value if alpha else None
                if stored is not None and not kind.bounded:
                    self._compare(slot, facts, stored, first.module)
                return Entry(slot, kind, keys, facts, value, origin, first.naming, first.swapped)
        self._refuse(slot, group, failures[0] if failures else self._lacks(slot, group))
        return None

    def _hollow(self, key: str) -> bool:
        """Whether a tensor is a factor of rank 0."""
        shape = self.source.infos[key].shape
        return len(shape) == 2 and 0 in shape and shape != (0, 0)

    def _lacks(self, slot: Slot, group: Mapping[str, Parsed]) -> str:
        """`_what`, worked out once for all modules with the same tensors."""
        roles = tuple(parsed.roles for parsed in group.values())
        known = (roles, slot.param, self.keys.normed(slot.target))
        if known not in self._lacking:
            self._lacking[known] = self._what(slot, group)
        return self._lacking[known]

    def _what(self, slot: Slot, group: Mapping[str, Parsed]) -> str:
        """Why the tensors of a slot are no module: what is missing, if that makes one."""
        roles = [dict(parsed.roles) for parsed in group.values()]
        lacking: list[tuple[str, frozenset[str]]] = []
        for name in sorted(set.intersection(*(set(found) for found in roles))):
            have = frozenset(found[name] for found in roles) - {ALPHA}
            lacking += [(name, form - have) for form in algorithms()[name].forms if have < form]
        if not lacking:
            found = ", ".join(sorted({parsed.roles[0][1] for parsed in group.values()}))
            return f"tensors of several kinds in one module: {found}"
        name, absent = min(lacking, key=lambda one: len(one[1]))
        stem = f"{self.keys.stem(slot)}."
        keys = [self.keys.spell(slot, name, role).removeprefix(stem) for role in sorted(absent)]
        return f"{' and '.join(keys)} {'is' if len(keys) == 1 else 'are'} missing"

    def _odd(self, kind: type[Weights], keys: Mapping[str, str]) -> str | None:
        """Why a tensor cannot be what its name says, whatever the algorithm; None if it can."""
        for role, key in keys.items():
            info = self.source.infos[key]
            if role in SINGLE:
                if info.numel != 1 or info.dtype not in SCALARS:
                    return f"{key} is {info.dtype} {list(info.shape)}, not a single number"
            elif role in kind.roles and kind.roles[role].integers:
                if info.dtype not in (*INTEGERS, "F32") or not info.numel:
                    return f"{key} is {info.dtype} {list(info.shape)}, not integers"
            elif info.dtype not in FLOATS + FP8:
                return f"{key} is stored as {info.dtype}, not as floating-point numbers"
            elif not info.numel or not info.shape:
                return f"{key} has the shape {list(info.shape)}, which is no matrix or vector"
        return None

    @cached_property
    def _ends(self) -> dict[str | None, str]:
        """The tensors that all modules share, by their names in the model."""
        return {shared_as(name): name for name in self.source.infos}

    def _shared(self, kind: type[Weights]) -> dict[str, str]:
        """The tensors that all modules of a kind share, by role."""
        shared = kind.shared.items()
        return {role: self._ends[end] for role, end in shared if end in self._ends}

    def _settled(
        self, slot: Slot, facts: Facts, kind: type[Weights], shapes: Shapes, module: str
    ) -> Facts:
        """The facts of a module with what the configuration says beside its tensors."""
        config = self.meaning.settings(slot.component)
        listed = partial(self.meaning.listed, slot.component, module=module)
        try:
            return kind.settled(facts, Wanted(config, shapes, listed))
        except Unsettled as error:
            self._note(Problem("error", None, error.message, error.hint or CONFIG_HINT))
            raise

    def _facts_of(self, kind: type[Weights], shapes: Shapes, alpha: Stated | None) -> Facts:
        known = (kind, *shapes.items(), alpha)
        if known not in self._facts:
            self._facts[known] = kind.facts(shapes, alpha)
        return self._facts[known]

    def _note(self, problem: Problem) -> None:
        """Add a problem of the whole file, once."""
        if problem not in self.problems:
            self.problems.append(problem)

    def _with_kernel(self, slot: Slot, facts: Facts) -> Facts:
        """Add the table's kernel if flat factors do not determine it."""
        if facts.kernel is not None:
            return facts
        row = self.keys.row(slot.target)
        # rows made of an adapter's names know no kernels
        if row is None or row.own or not self.keys.family.component(slot.component).checkpoints:
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


@cache
def _shared_names() -> frozenset[str]:
    return frozenset(end for kind in algorithms().values() for end in kind.shared.values())


def shared_as(name: str) -> str | None:
    """The name in the model of a tensor that all modules share; None if it is of one module.

    `base_model.vera_A`, perhaps followed by PEFT's name of the adapter.
    """
    if not name.startswith("base_model."):  # asked of every tensor
        return None
    parts = name.split(".", 3)
    if not 1 < len(parts) < 4 or parts[0] != "base_model":
        return None
    return parts[1] if parts[1] in _shared_names() else None


def shared_name(kind: type[Weights], role: str) -> str:
    """The name that a tensor is written under that all modules of a kind share."""
    return f"base_model.{kind.shared[role]}"


def alike(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
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
