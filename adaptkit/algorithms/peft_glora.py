"""GLoRA of PEFT: a weight is multiplied entry by entry and added to, and its bias after it."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar, Self

from adaptkit.algorithms._foreign import Applied, OfPeft
from adaptkit.algorithms._record import record
from adaptkit.algorithms._restated import one_for_all
from adaptkit.algorithms._stored import matched, roles
from adaptkit.algorithms.contract import Facts, Role, Shapes, Stated, Weights

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from adaptkit.algorithms._restated import Restated

LOW = ("Xd", "Xu")
PATHS = "ABCDE"


def _forms() -> Iterator[frozenset[str]]:
    """A and B have one kind of path, D and E too; C has its own. Each path may be zeros."""
    low = {"low": ("d", "u"), "plain": ("x",), "none": ("z",)}
    for both, middle, last in product(low, low, ("plain", "none")):
        kinds = dict(zip(PATHS, (both, both, middle, last, last), strict=True))
        yield frozenset(f"{p.lower()}{end}" for p, kind in kinds.items() for end in low[kind])


SPELLED = {"d": "Xd", "u": "Xu", "x": "X", "z": "zeros"}


@record
class PeftGlora(OfPeft, Applied):
    """W' = W + W ⊙ A + B;   b' = b + b ⊙ D + E + W C.

    A, B: (m, n)   C: (n, 1)   D, E: (m,)

    A, B and C are stored as products (`Xd` · `Xu`), as columns or as one number (`X`), or are 0
    (`zeros`); D and E as vectors or numbers. ⊙ multiplies entry by entry, unlike the GLoRA of
    LyCORIS and of its authors (huggingface/peft `tuners/glora/layer.py`, checked with 0.21.2). Of
    linear layers only.
    """

    name: ClassVar[str] = "peft-glora"
    title: ClassVar[str] = "GLoRA of PEFT"
    peft_type: ClassVar[str] = "GLORA"
    linear: ClassVar[bool] = True
    roles: ClassVar[Mapping[str, Role]] = roles(
        **{
            f"{path.lower()}{end}": Role(f"glora_{path}.{spelled}")
            for path in PATHS
            for end, spelled in SPELLED.items()
        }
    )
    forms: ClassVar[tuple[frozenset[str], ...]] = tuple(_forms())

    paths: tuple[tuple[Tensor, ...] | None, ...]  # A to E; None for zeros
    empty: tuple[Tensor | None, ...] = (None,) * len(PATHS)  # as they are stored

    @classmethod
    def facts(cls, shapes: Shapes, alpha: Stated | None = None) -> Facts:
        rows: set[int] = set()
        columns: set[int] = set()
        rank: set[int] = set()
        for path in (path for path in "abc" if f"{path}d" in shapes):
            up, down = shapes[f"{path}d"], shapes[f"{path}u"]
            matched(len(up) == len(down) == 2, f"{path}d {path}u", shapes)
            rank |= {up[1], down[0]}
            (columns if path == "c" else rows).add(up[0])
            if path != "c":
                columns.add(down[1])
        for role in (
            role for role in ("ax", "bx", "dx", "ex") if math.prod(shapes.get(role, ())) > 1
        ):
            rows.add(math.prod(shapes[role]))
        matched(max(map(len, (rows, columns, rank))) < 2, " ".join(shapes), shapes)
        found = [next(iter(sizes), 0) for sizes in (rows, columns, rank)]
        changes = any(role[0] in "cde" and role[1] != "z" for role in shapes)
        return Facts(found[0], found[1], (), found[2] or None, 1.0, settings=(changes,))

    @classmethod
    def decode(cls, tensors: Mapping[str, Tensor], facts: Facts) -> Self:
        def path(name: str) -> tuple[Tensor, ...] | None:
            if f"{name}d" in tensors:
                return tensors[f"{name}d"], tensors[f"{name}u"]
            return (tensors[f"{name}x"],) if f"{name}x" in tensors else None

        names = PATHS.lower()
        return cls(tuple(map(path, names)), tuple(tensors.get(f"{n}z") for n in names))

    def encode(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, path, zeros in zip(PATHS.lower(), self.paths, self.empty, strict=True):
            if path is not None:
                ends = "du" if len(path) == 2 else "x"
                found |= {f"{name}{end}": one for end, one in zip(ends, path, strict=True)}
            elif zeros is not None:
                found[f"{name}z"] = zeros
        return found

    @classmethod
    def restated(cls, modules: Sequence[Restated]) -> dict[str, Any]:
        """Layers without a bias have zeros for C, D and E, whatever the configuration says."""
        both = one_for_all("config_A_B", (_form(m.shapes, "a") for m in modules))
        found: dict[str, Any] = {"config_A_B": both}
        for name, path in (("config_C", "c"), ("config_D_E", "d")):
            forms = [form for m in modules if (form := _form(m.shapes, path)) != "none"]
            found[name] = one_for_all(name, forms) if forms else "none"
        ranks = [m.facts.rank for m in modules if m.facts.rank is not None]
        return {**found, "r": one_for_all("rank", ranks)} if ranks else found

    def times(self, factor: float) -> Self:
        """One factor of every path is multiplied."""
        from adaptkit.linalg.precision import upcast

        scaled = (path and (upcast(path[0]) * factor, *path[1:]) for path in self.paths)
        return replace(self, paths=tuple(scaled))

    def apply(self, base: Tensor, strength: float) -> Tensor:
        times = self._matrix(self.paths[0], base)
        if times is not None:
            base.addcmul_(base, times, value=strength)
        del times  # as large as W
        plus = self._matrix(self.paths[1], base)
        return base if plus is None else base.add_(plus, alpha=strength)

    @classmethod
    def applying(cls, rows: int, columns: int) -> int:
        return 4 * rows * columns

    def _matrix(self, path: tuple[Tensor, ...] | None, base: Tensor) -> Tensor | None:
        """A path that broadcasts against the weight."""
        if path is None:
            return None
        if len(path) == 2:
            return path[0].to(base.dtype) @ path[1].to(base.dtype)
        (plain,) = path
        # a number has one dimension, a column two; a stack has one more in front
        column = plain.shape[-1] == 1 and plain.ndim == base.ndim
        return plain.to(base.dtype) if column else plain.to(base.dtype).unsqueeze(-1)

    @classmethod
    def changes_bias(cls, facts: Facts) -> bool:
        return bool(facts.settings[0])

    def on_bias(self, weight: Tensor) -> Weights:
        through, times, plus = self.paths[2:]
        added = None if through is None else weight @ _column(through, weight)
        if plus is not None:
            own = _column(plus, weight)
            added = own if added is None else added + own
        return _Bias(None if times is None else _column(times, weight), added)


@record
class _Bias(Applied):
    """b' = b + b ⊙ factors_of + added, columns or numbers."""

    name: ClassVar[str] = PeftGlora.name
    title: ClassVar[str] = PeftGlora.title

    factors_of: Tensor | None
    added: Tensor | None

    def apply(self, base: Tensor, strength: float) -> Tensor:
        if self.factors_of is not None:
            base = base.mul_(self.factors_of.to(base.dtype).mul(strength).add_(1.0))
        return base if self.added is None else base.add_(self.added.to(base.dtype), alpha=strength)


def _form(shapes: Shapes, path: str) -> str:
    """What PEFT's configuration calls the form of a path."""
    if f"{path}d" in shapes:
        return "lora"
    shape = shapes.get(f"{path}x")
    # a number has one entry; so has the vector of a layer with one row, of the same meaning
    return "none" if shape is None else "constant" if shape == (1,) else "vector"


def _column(path: tuple[Tensor, ...], like: Tensor) -> Tensor:
    """C, D or E as a column (..., k, 1) in the dtype of the weight (..., m, n)."""
    if len(path) == 2:
        return path[0].to(like.dtype) @ path[1].to(like.dtype)
    (plain,) = path
    column = plain if plain.ndim == like.ndim else plain.unsqueeze(-1)
    return column.to(like.dtype)


ALGORITHM = PeftGlora
