"""The matrix sees faults: one is planted in reading, writing and measuring each, and in the
oracle's two outcomes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from adaptkit import meaning
from adaptkit.files.sink import TensorSink
from adaptkit.keymap.adapter_keys import KeyMap
from adaptkit.ops.adapter_file.writer import AdapterWriter
from adaptkit.ops.extract import result as extracted
from adaptkit.ops.merge import report as merged
from adaptkit.ops.rewrite import report as rewritten
from tests.matrix import host, judge
from tests.matrix.build import Adapter
from tests.matrix.verbs import Cell, play

LORA = Adapter("flux", "kohya", "lora", "plain")
SWAPPED = Adapter("flux", "kohya", "lora", "swapped")
HEADER = Adapter("flux", "diffusers", "lora", "plain", alpha="metadata")

CELLS = {
    "convert": Cell("convert", LORA, to="diffusers"),
    "convert metadata": Cell("convert", HEADER, to="kohya"),
    "convert swapped": Cell("convert", SWAPPED, to="diffusers"),
    "resize": Cell("resize", LORA, options=("--rank", "2")),
    "combine": Cell("combine", LORA, Adapter("flux", "kohya", "loha", "plain", seed=1)),
    "compare": Cell("compare", LORA, Adapter("flux", "comfy", "loha", "plain", seed=1)),
    "merge": Cell("merge", LORA, dtype="bf16"),
    "extract": Cell("extract", LORA, to="kohya", options=("--rank", "2")),
    "extract swapped": Cell("extract", SWAPPED, to="diffusers", options=("--rank", "4")),
}


@pytest.mark.parametrize("name", CELLS)
def test_the_cells_hold(name: str, tmp_path: Path) -> None:
    assert play(CELLS[name], tmp_path).problems == []


Patch = Callable[[pytest.MonkeyPatch], None]


def _alpha_is_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(meaning.Meaning, "alpha", lambda *_: (None, "none"))


def _bias_scale_is_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(meaning.Meaning, "bias_scale", lambda *_: 1.0)


def _halves_are_not_exchanged(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(KeyMap, "swapped", lambda *_: False)


def _doubled(patch: pytest.MonkeyPatch, chosen: Callable[[str], bool]) -> None:
    """What is written of the chosen tensors (float32 in these cells) is twice what was meant."""
    put = TensorSink.put_bytes

    def wrong(self: TensorSink, name: str, data: memoryview) -> None:
        twice = (2 * np.frombuffer(data, "<f4")).tobytes() if chosen(name) else data
        put(self, name, memoryview(twice))

    patch.setattr(TensorSink, "put_bytes", wrong)


def _every_factor_is_doubled(patch: pytest.MonkeyPatch) -> None:
    _doubled(patch, lambda name: not name.endswith(".alpha"))


def _alpha_is_doubled(patch: pytest.MonkeyPatch) -> None:
    """… and nobody reads the file again."""
    patch.setattr(AdapterWriter, "_read_back", lambda *_: None)
    _doubled(patch, lambda name: name.endswith(".alpha"))


def _nothing_is_measured(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(rewritten, "total_error", lambda *_: 0.0)
    patch.setattr(extracted.Result, "relative_error", property(lambda _: 0.0))
    patch.setattr(merged, "_ratio", lambda *_: 0.0)


BIASED = Cell("merge", Adapter("flux", "peft", "lora", "plain", alpha="config", bias="lora"))
PLANTED: list[tuple[Patch, str, tuple[str, ...]]] = [
    (_alpha_is_ignored, "reading", ("convert", "convert metadata", "combine", "compare", "merge")),
    (_halves_are_not_exchanged, "writing", ("convert swapped", "extract swapped")),
    (_every_factor_is_doubled, "writing", ("resize", "combine", "extract")),
    (_alpha_is_doubled, "writing", ("resize", "combine", "extract")),
    (_nothing_is_measured, "measuring", ("resize", "extract", "merge")),
]


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        pytest.param(fault, name, id=f"{where}-{fault.__name__[1:]}-{name}")
        for fault, where, names in PLANTED
        for name in names
    ],
)
def test_a_planted_fault_is_found(
    fault: Patch, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    assert play(CELLS[name], tmp_path).problems


def test_a_bias_without_its_scale_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "right").mkdir()
    assert play(BIASED, tmp_path / "right").problems == []
    _bias_scale_is_ignored(monkeypatch)
    (tmp_path / "wrong").mkdir()
    assert play(BIASED, tmp_path / "wrong").problems


def _refusing(text: str, code: int = 1, wrote: bool = False) -> Callable[[list[str]], host.Run]:
    def run(arguments: list[str]) -> host.Run:
        if wrote:
            Path(arguments[arguments.index("-o") + 1]).write_bytes(b"half")
        return host.Run(code, "", text)

    return run


@pytest.mark.parametrize(
    ("run", "problem"),
    [
        (_refusing("error: no\n"), "names no file or tensor"),
        (_refusing(""), "without a message"),
        (_refusing("error: style.safetensors: no\n", code=2), "exit 2"),
        (_refusing("error: style.safetensors: no\n", wrote=True), "left"),
        (_refusing("error: style.safetensors: unexpected KeyError: 'x'\nhint: a bug\n"), "crash"),
        (_refusing("error: style.safetensors: no\nhint: pass --allow-unused\n"), "does not help"),
        (_refusing("error: style.safetensors: no\nhint: use --to diffusers\n"), "what was given"),
    ],
)
def test_a_bad_refusal_is_found(
    run: Callable[[list[str]], host.Run],
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host, "run", run)
    found = play(CELLS["convert"], tmp_path).problems
    assert any(problem in one for one in found), found


@pytest.mark.parametrize(
    ("hint", "options"),
    [
        ("convert with --algo lora or --algo full", [["--algo", "lora"], ["--algo", "full"]]),
        ("use --algo auto or full", [["--algo", "auto"], ["--algo", "full"]]),
        (
            "use --rank; or make it a LoRA: --algo lora and --base",
            [["--rank", "2"], ["--algo", "lora", "--base", "base"]],
        ),
        ("pass --allow-unused to continue without them", [["--allow-unused"]]),
        ("see --only and --skip", []),
        ("is it the right --base?", []),
    ],
)
def test_hints_are_understood(hint: str, options: list[list[str]]) -> None:
    assert host.suggestions(hint, Path("base")) == options


def test_reported_and_measured_must_agree() -> None:
    one, other = {"a": np.ones(4)}, {"a": np.ones(4) * 1.01}
    assert judge.agrees(0.00990099, one, other, unknown=False) == []
    assert judge.agrees(0.0, one, other, unknown=False)
    assert judge.agrees(None, one, other, unknown=False)
    assert judge.agrees(None, one, other, unknown=True) == []


def _reporting(name: str, change: Callable[[float], object]) -> Callable[[list[str]], host.Run]:
    """The command line, with one figure of its report changed."""
    real = host.run

    def run(arguments: list[str]) -> host.Run:
        ran = real(arguments)
        report = ran.report
        return host.Run(ran.code, json.dumps(report | {name: change(report[name])}), ran.err)

    return run


@pytest.mark.parametrize("verb", ["convert", "resize", "combine", "compare", "merge", "extract"])
def test_a_wrong_error_is_found(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = _reporting("relative_error", lambda value: 1.01 * value + 1e-6)
    monkeypatch.setattr(host, "run", wrong)
    assert any("reported" in one for one in play(CELLS[verb], tmp_path).problems)


@pytest.mark.parametrize("figure", ["modules", "bytes"])
def test_a_wrong_count_is_found(
    figure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "run", _reporting(figure, lambda value: value + 1))
    assert any(f"{figure} reported" in one for one in play(CELLS["resize"], tmp_path).problems)


def _given(old: list[str], new: list[str]) -> Callable[[list[str]], host.Run]:
    """The command line, doing something else than it was asked for."""
    real = host.run

    def run(arguments: list[str]) -> host.Run:
        text = "\0".join(arguments)
        return real(text.replace("\0".join(old), "\0".join(new)).split("\0"))

    return run


BF16 = Cell("convert", LORA, to="comfy", options=("--dtype", "bf16"))
WITHIN = Cell("resize", LORA, options=("--error", "0.1"))


@pytest.mark.parametrize(
    ("cell", "old", "new", "problem"),
    [
        (CELLS["resize"], ["--rank", "2"], ["--rank", "1"], "the optimum is"),
        (WITHIN, ["--error", "0.1"], ["--error", "0.4"], "--error 0.1 asked"),
        (BF16, ["--dtype", "bf16"], ["--dtype", "fp16"], "--dtype bf16"),
        (CELLS["convert"], ["--to"], ["--rank", "1", "--to"], "nothing was to be lost"),
        (CELLS["convert"], ["--to", "diffusers"], ["--to", "kohya"], "no reader of diffusers knows"),
        (CELLS["merge"], ["--family"], ["--skip", "*img_attn*", "--family"], "of the largest weight"),
    ],
)  # fmt: skip
def test_another_result_is_found(
    cell: Cell,
    old: list[str],
    new: list[str],
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host, "run", _given(old, new))
    found = play(cell, tmp_path).problems
    assert any(problem in one for one in found), found


def test_a_lost_bias_is_found() -> None:
    meant = {"a|bias": np.ones(4)}
    assert judge.biases_kept(meant, meant, 1e-6) == []
    assert judge.biases_kept({}, meant, 1e-6)
    assert judge.biases_kept({"a|bias": np.ones(4) * 1.001}, meant, 1e-6)
