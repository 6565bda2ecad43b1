"""Plug-in packages: found by their module names, refused where a module does not say what it is."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adaptkit.registry import discover

Make = Callable[..., str]
NUMBERS = itertools.count()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """A package of these modules, each with a `THING` of this name (None: without one)."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(**modules: str | None) -> str:
        name = f"plugged{next(NUMBERS)}"
        folder = tmp_path / name
        folder.mkdir()
        (folder / "__init__.py").touch()
        for module, called in modules.items():
            thing = f"class THING:\n    name = {called!r}\n" if called else "OTHER = 1\n"
            (folder / f"{module}.py").write_text(thing)
        importlib.invalidate_caches()
        return name

    yield make
    for name in [name for name in sys.modules if name.startswith("plugged")]:
        del sys.modules[name]


def test_members_are_found_by_name_in_the_order_of_their_modules(package: Make) -> None:
    found = discover(package(b_two="b-two", a="a", _hidden="anything"), "THING")
    assert list(found) == ["a", "b-two"]
    assert found["b-two"].name == "b-two"
    with pytest.raises(TypeError):
        found["c"] = object()  # type: ignore[index]


def test_a_module_without_the_attribute_is_refused(package: Make) -> None:
    with pytest.raises(TypeError, match=r"\.b has no THING"):
        discover(package(a="a", b=None), "THING")


def test_a_name_that_is_not_the_modules_is_refused(package: Make) -> None:
    with pytest.raises(TypeError, match="calls itself 'other'"):
        discover(package(a="other"), "THING")


@pytest.mark.parametrize(
    ("where", "attribute", "least"),
    [("families", "FAMILY", 20), ("formats", "FORMAT", 11), ("algorithms", "ALGORITHM", 10)],
)
def test_every_module_of_the_tables_is_found(where: str, attribute: str, least: int) -> None:
    folder = Path(importlib.import_module(f"adaptkit.{where}").__file__ or "").parent
    files = sorted(path.stem for path in folder.glob("[!_]*.py") if path.stem != "contract")
    found = discover(f"adaptkit.{where}", attribute)
    assert [name.replace("-", "_") for name in found] == files
    assert len(files) >= least
