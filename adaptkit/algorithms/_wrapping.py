"""Algorithms around another one: each pair is a kind of its own, named `<inner>+<this>`."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Self

from adaptkit.algorithms.contract import Weights

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Wrapping"]


class Wrapping(Weights):
    """Weights that hold others (`inner`), whose ΔW they change as the base weight tells."""

    additive: ClassVar[bool] = False
    forms: ClassVar[tuple[frozenset[str], ...]] = ()
    kind: ClassVar[type[Weights]]

    inner: Weights

    @classmethod
    def over(cls, inner: type[Weights]) -> type[Self]:
        return _over(cls, inner)  # type: ignore[return-value, arg-type]

    @classmethod
    def around(cls, inner: type[Weights]) -> Mapping[str, Any]:
        """The attributes of the pair that depend on both."""
        raise NotImplementedError

    @property
    def rows(self) -> int:
        return self.inner.rows


@cache
def _over(cls: type[Wrapping], inner: type[Weights]) -> type[Wrapping]:
    fields: dict[str, Any] = {
        "__doc__": cls.__doc__,
        "name": f"{inner.name}+{cls.name}",
        "kind": inner,
        "wraps": (),
        "roles": inner.roles,
    }
    return type(f"{inner.__name__}{cls.__name__}", (cls,), fields | dict(cls.around(inner)))
