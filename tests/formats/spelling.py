"""What the tests of every key format ask: hand-written keys both ways, and real key lists.

The parameters are named as the model's own checkpoint names them (`unet.….to_q.weight` in
diffusers' folders, `model.diffusion_model.…` in single files), never as the format does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

from adaptkit.detect import formats
from adaptkit.errors import NotRepresentable
from adaptkit.formats.contract import Alpha
from adaptkit.keymap import compile_checkpoint, compile_keys
from adaptkit.names import Slot
from tests.synth import CORPUS


@dataclass(frozen=True)
class Key:
    """One adapter key, and the parameter, algorithm and role that it stands for."""

    key: str
    family: str
    parameter: str
    algorithm: str = "lora"
    role: str = "up"


def slot(family: str, parameter: str) -> Slot:
    place = compile_checkpoint(family).parse(parameter)
    assert place is not None, parameter
    return place.slot


def check_written(format: str, keys: Iterable[Key]) -> None:
    """Each parameter is written under this key, and the key is read as that parameter."""
    seen = 0
    for one in keys:
        table, expected = compile_keys(one.family, format), slot(one.family, one.parameter)
        assert table.spell(expected, one.algorithm, one.role) == one.key
        check_read(format, [one])
        seen += 1
    assert seen


def check_read(format: str, keys: Iterable[Key]) -> None:
    """Each key is read as this parameter, whatever the format itself writes."""
    seen = 0
    for one in keys:
        parsed = compile_keys(one.family, format).parse(one.key)
        assert parsed is not None, one.key
        assert parsed.slot == slot(one.family, one.parameter), one.key
        assert (one.algorithm, one.role) in parsed.roles, one.key
        seen += 1
    assert seen


def check_foreign(format: str, family: str, keys: Iterable[str]) -> None:
    """None of these keys is claimed."""
    listed = list(keys)
    assert listed
    assert [key for key in listed if compile_keys(family, format).parse(key) is not None] == []


def check_no_place(format: str, family: str, parameters: Iterable[str]) -> None:
    """The format has no key for any of these, and says so."""
    listed = list(parameters)
    assert listed
    for parameter in listed:
        where = slot(family, parameter)
        with pytest.raises(NotRepresentable, match=f"the {format} format has no (name|place)"):
            compile_keys(family, format).spell(where, "lora", "up")


def check_alone(format: str, keys: Iterable[Key], *, shared: Iterable[str] = ()) -> None:
    """Only this format, and those it shares names with, reads these keys."""
    for one in keys:
        readers = {name for name in formats() if compile_keys(one.family, name).parse(one.key)}
        assert readers == {format, *shared}, one.key


def real_list(name: str) -> list[str]:
    """The keys of a real file, or a skip that says which list is missing."""
    path: Path = CORPUS / "adapters" / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"no real key list at {path}")
    keys: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))["keys"]
    return list(keys)


def check_real(format: str, family: str, name: str, algorithm: str) -> None:
    """A real file's keys come out as they went in, and alpha stands where the format says."""
    keys, table = real_list(name), compile_keys(family, format)
    assert len(keys) > 8
    alphas, modules = set(), set()
    for key in keys:
        parsed = table.parse(key)
        assert parsed is not None, key
        roles = [role for kind, role in parsed.roles if kind == algorithm]
        assert len(roles) == 1, (key, parsed.roles)
        assert table.spell(parsed.slot, algorithm, roles[0]) == key, key
        (alphas if roles == ["alpha"] else modules).add(parsed.slot.target)
    match formats()[format].alpha:
        case Alpha.TENSOR:
            assert alphas == modules, "every module has its alpha"
        case Alpha.NONE | Alpha.CONFIG:
            assert not alphas, "no module has an alpha"
        case Alpha.OPTIONAL:
            assert alphas in (set(), modules)
