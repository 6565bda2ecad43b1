"""Discover the members of a plug-in package by one attribute per module."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["discover"]


@cache
def discover(package: str, attribute: str, *, required: bool = True) -> Mapping[str, Any]:
    """Collect the `attribute` of every public module, by its `name`.

    Order is that of the module names. `contract` modules are not members. Raises TypeError for a
    module without the attribute (if `required`), for a module and object of different names (a
    name on the command line can be found with `ls`), and for a name that occurs twice.
    """
    found: dict[str, Any] = {}
    for info in sorted(
        pkgutil.iter_modules(importlib.import_module(package).__path__), key=lambda item: item.name
    ):
        if info.name.startswith("_") or info.name == "contract":
            continue
        member = getattr(importlib.import_module(f"{package}.{info.name}"), attribute, None)
        if member is None and not required:
            continue
        if member is None:
            raise TypeError(f"{package}.{info.name} has no {attribute}")
        if member.name.replace("-", "_") != info.name:
            raise TypeError(f"{package}.{info.name}.{attribute} calls itself {member.name!r}")
        if member.name in found:
            raise TypeError(f"{package} has two members named {member.name!r}")
        found[member.name] = member
    return MappingProxyType(found)
