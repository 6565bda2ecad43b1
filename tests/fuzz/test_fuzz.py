"""A seeded share of the fuzzing; `python -m tests.fuzz --minutes N` for the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from adaptkit.errors import AdaptkitError, CorruptFile
from adaptkit.files.pickled.catalogue import read_catalogue
from adaptkit.ops import convert, inspect
from tests.fuzz.files import CONV, STEM, File, lora, torch_zip
from tests.fuzz.readers import TARGETS
from tests.fuzz.run import SETTINGS, VERBS, fuzz
from tests.fuzz.whole import odd_numbers

SHARE = {**dict.fromkeys(TARGETS, 80), **dict.fromkeys(VERBS, 25), **dict.fromkeys(SETTINGS, 12)}


@pytest.mark.parametrize("name", SHARE)
def test_mutated_files_end_in_a_verdict(name: str) -> None:
    told = fuzz(name, SHARE[name])
    assert told.found == {}
    assert told.ends.keys() & {"read", "written"}, "it refuses everything"


def test_a_name_in_a_zip_that_is_no_text(tmp_path: Path) -> None:
    raw = torch_zip().replace(b"a/byteorder", b"a/\x85yteorder")
    at = raw.rindex(b"PK\x01\x02", 0, raw.rindex(b"a/\x85"))
    damaged = bytearray(raw)
    damaged[at + 9] |= 8  # the flag that the name is UTF-8
    (tmp_path / "x.ckpt").write_bytes(damaged)
    with pytest.raises(CorruptFile, match="damaged or truncated: 'utf-8' codec"):
        read_catalogue(tmp_path / "x.ckpt")


def test_the_fuzzer_counts_what_is_not_finite(tmp_path: Path) -> None:
    for dtype in ("F32", "F16", "BF16", "F64"):
        file = lora().add("a", 3, dtype=dtype, value=float("inf")).add("b", 1, value=float("nan"))
        assert odd_numbers(file.save(tmp_path / "a.safetensors")) == 4


FOUND = {
    "a flag of one element": lambda q: File().add(f"{q}.weight", 8).add(f"{q}.on_input", 1),
    "factors of three dimensions": lambda q: (
        File().add(f"{q}.lokr_w1", 2, 2).add(f"{q}.lokr_w2_a", 4, 2, 2).add(f"{q}.lokr_w2_b", 2, 4)
    ),
    "a flat down beside a mid": lambda q: (
        File()
        .add(f"{q}.lora_mid.weight", 2, 2, 3, 3)
        .add(f"{q}.lora_down.weight", 2, 4)
        .add(f"{q}.lora_up.weight", 4, 2)
    ),
    "magnitudes of no elements": lambda q: lora().add(f"{STEM}q.dora_scale", 1, 0),
    "a GLoRA of two layouts": lambda q: (
        File()
        .add(f"{q}.a1.weight", 2, 8)
        .add(f"{q}.a2.weight", 8, 2)
        .add(f"{q}.b1.weight", 2, 8)
        .add(f"{q}.b2.weight", 8, 2, 2)
    ),
    "a bias with columns": lambda q: File().add(f"{q}.diff_b", 8, 8),
    "a down without inputs": lambda q: (
        File().add(f"{q}.lora_down.weight", 2, 0).add(f"{q}.lora_up.weight", 4, 2)
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_once(name: str, tmp_path: Path) -> None:
    """Each once ended in an exception of torch or Python."""
    path = FOUND[name](CONV).save(tmp_path / "a.safetensors")
    assert inspect.run(path).error is None
    out = tmp_path / "out.safetensors"
    with pytest.raises(AdaptkitError, match="fit together|has the shape"):
        convert.plan(path, convert.Options(to="diffusers", output=out, family="sd1", algo="full"))


def test_a_planted_bug_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from adaptkit.algorithms.lora import Lora

    monkeypatch.setattr(Lora, "decode", lambda *_: 1 // 0)
    assert any("ZeroDivisionError" in what for what in fuzz("resize", 40).found)
