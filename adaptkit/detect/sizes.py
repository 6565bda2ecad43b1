"""How well the names and sizes in a file fit a family's tables."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from adaptkit.algorithms.contract import ALPHA
from adaptkit.errors import AdaptkitError
from adaptkit.families.contract import Kind
from adaptkit.keymap import algorithms, split_suffix
from adaptkit.names import tokenise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from adaptkit.families.contract import Mark, ModelFamily, Row
    from adaptkit.files.header import TensorInfo
    from adaptkit.keymap import Reading, RoleName
    from adaptkit.names import Slot

__all__ = ["Fit", "Module", "Size", "Sizes", "fit"]

# Up to here a size says nothing: latent channels and time frequencies differ within a family, and
# no model is this narrow but the toys of test suites.
NARROW = 256
NAMES = 0.9  # share of the names; other families share up to 87 % of a table's (FIBO, FLUX.1)
SIZES = 0.9  # share of the sizes; variants of a family differ in few layers, such as the first
MARKS = 0.5
MANY = 8  # blocks from which on a module that is missing in all of them is missing on purpose


@dataclass(frozen=True, slots=True)
class Size:
    """The size of a module's weight; None for unknown dimensions."""

    rows: int | None
    columns: int
    kernel: tuple[int, ...] | None


class Fit(NamedTuple):
    """The shares of a file's names, of its sizes and of a family's marks that fit.

    None if no size in the file tells anything.
    """

    names: float
    sizes: float | None
    marks: float | None

    @property
    def good(self) -> bool:
        """Whether the file is of this family."""
        told = ((self.names, NAMES), (self.sizes, SIZES), (self.marks, MARKS))
        return all(share is None or share >= least for share, least in told)


class Sizes:
    """The sizes of the modules in an adapter's header, by stem; computed when asked for."""

    def __init__(self, infos: Mapping[str, TensorInfo]) -> None:
        self._infos = infos
        self._keys: dict[str, list[str]] = {}
        self._found: dict[str, Size | None] = {}

    def __getitem__(self, stem: str) -> Size | None:
        if stem not in self._found:
            if not self._keys:
                self._group()
            self._found[stem] = _size(self._infos[key] for key in self._keys.get(stem, ()))
        return self._found[stem]

    def _group(self) -> None:
        keys: dict[str, list[str]] = {}
        for name in self._infos:
            if (found := split_suffix(name)) is not None:
                keys.setdefault(found[0], []).append(name)
        self._keys = keys  # at once: several threads may ask


def _size(infos: Iterable[TensorInfo]) -> Size | None:
    """The size that the tensors of one module have."""
    found = ((split_suffix(info.name), info.shape) for info in infos)
    return _size_of(tuple((split[2], shape) for split, shape in found if split))


# modules have few sizes; bounded, as a stranger's may have any
@lru_cache(maxsize=4096)
def _size_of(tensors: tuple[tuple[tuple[RoleName, ...], tuple[int, ...]], ...]) -> Size | None:
    """The size in the first algorithm that reads tensors of these roles and shapes."""
    by_algorithm: dict[str, dict[str, tuple[int, ...]]] = {}
    for roles, shape in tensors:
        for algorithm, role in roles:
            by_algorithm.setdefault(algorithm, {})[role] = shape
    size: Size | None = None
    for algorithm, shapes in by_algorithm.items():
        kind = algorithms()[algorithm]
        given = {role: shape for role, shape in shapes.items() if role != ALPHA}
        # an incomplete set of tensors has no reliable shape
        if frozenset(given) not in kind.forms:
            continue
        try:
            said = kind.facts(given)
        except AdaptkitError:
            continue
        if said.columns and not said.vector:
            # columns count every place of the kernel
            columns = said.columns // math.prod(said.kernel or ())
            size = Size(said.rows or None, columns, said.kernel)
    return size


# a file against a family -----------------------------------------------------------------


class Module(NamedTuple):
    """A module of a file as a family's table knows it."""

    slot: Slot
    row: Row
    size: Size | None  # None if the file does not tell


def fit(
    family: ModelFamily,
    names: Mapping[str, int],
    reading: Callable[[str], Reading | None],
    module: Callable[[str], Module | None],
) -> Fit:
    """Measure how well a file fits a family.

    `names` maps the names of modules, as spelled in the file, to their numbers of keys. `reading`
    gives what the family's tables read in a name. `module` is asked for one name of each reading.
    """
    # by identity, which is faster than equality: a row of a table has one reading
    read: dict[int, tuple[Reading, list[str]]] = {}
    strange: dict[str, list[str]] = {}
    for name in names:
        if (found := reading(name)) is None:
            strange.setdefault(tokenise(name)[0], []).append(name)
        else:
            read.setdefault(id(found), (found, []))[1].append(name)
    known = list(read.values())
    claimed = sum(names[name] for _, same in known for name in same)
    # a single stray key is a mistake or an addition; a module of every block is another model
    foreign = sum(names[name] for same in strange.values() if len(same) > 1 for name in same)
    foreign += sum(names[name] for name in _alone(family, known))
    shown = [(made, len(same)) for _, same in known if (made := module(same[0]))]
    return Fit(claimed / max(1, claimed + foreign), _sizes(family, shown), _marks(family, shown))


def _alone(family: ModelFamily, known: Sequence[tuple[Reading, Sequence[str]]]) -> Iterator[str]:
    """Names of modules in many blocks that have a twin in the table, and none in the file."""
    targets = {found.target for found, _ in known}
    for found, names in known:
        for one, twin in family.twins if len(names) >= MANY else ():
            other = found.target.replace(one, twin)
            if other != found.target and other not in targets and _has(family, found, other):
                yield from names


def _has(family: ModelFamily, found: Reading, target: str) -> bool:
    return any(row.target == target for row in family.component(found.component).rows)


def _sizes(family: ModelFamily, modules: Iterable[tuple[Module, int]]) -> float | None:
    """The share of modules whose size is one of its component's; None if none can be told."""
    held: Counter[bool] = Counter()
    for module, count in modules:
        if (fits := _holds(family, module)) is not None:
            held[fits] += count
    return held[True] / held.total() if held else None


def _holds(family: ModelFamily, module: Module) -> bool | None:
    sizes, size = family.component(module.slot.component).sizes, _whole(module)
    if not sizes or module.row.kind is not Kind.MATRIX or size is None or _narrow(size):
        return None
    if size.rows is None:
        return any(columns == size.columns for _, columns in sizes)
    return (size.rows, size.columns) in sizes


def _whole(module: Module) -> Size | None:
    """The size of the target of which a slot is a part."""
    size, cut = module.size, module.slot.rows
    if size is None or cut is None or size.rows is None:
        return size
    return replace(size, rows=size.rows * cut.total // (cut.stop - cut.start))


def _marks(family: ModelFamily, modules: Iterable[tuple[Module, int]]) -> float | None:
    """The share of a family's marks that hold; None if none can be told.

    Each mark is judged by its first module.
    """
    seen: dict[Mark, int] = {}
    for module, _ in modules:
        size, target = _whole(module), module.slot.target
        for mark in family.marks:
            if size and mark.component == target.component and target.module.endswith(mark.suffix):
                seen.setdefault(mark, _score_mark(mark, size))
    shown = [mark for mark in seen.values() if mark]
    return shown.count(1) / len(shown) if shown else None


def _score_mark(mark: Mark, size: Size) -> int:
    """+1 if a shape fits the mark, -1 if not, 0 if unknown."""
    if mark.kernel is not None:
        return 0 if size.kernel is None else (1 if size.kernel == mark.kernel else -1)
    known, value = (mark.rows, size.rows) if mark.columns is None else (mark.columns, size.columns)
    if value is None or known is None:
        return 0
    if value == known if isinstance(known, int) else value in known:
        return 1
    return 0 if _narrow(size) else -1


def _narrow(size: Size) -> bool:
    return size.columns <= NARROW or (size.rows is not None and size.rows <= NARROW)
