"""Two outcomes are accepted: a result whose measured error is the reported one, or a refusal whose
hints work.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tests.matrix import host, spelling
from tests.matrix.spelling import Effect
from tests.matrix.st import UNIT, read

DEPTH = 3  # a hint may lead to another refusal, whose hint is followed too
TOLERANCE = (
    2e-3,
    3e-7,
)  # reported against measured: relative, and absolute for what float32 computes


@dataclass
class Verdict:
    """How one cell ended."""

    refused: str = ""  # the message, digits and names taken out
    hints: int = 0
    problems: list[str] = field(default_factory=list)


Judge = Callable[[host.Run, list[str]], list[str]]


def norm(effect: Effect, biases: bool = True) -> float:
    parts = [v for k, v in effect.items() if biases or not k.endswith("|bias")]
    return float(np.sqrt(sum((v**2).sum() for v in parts)))


def minus(one: Effect, other: Effect) -> Effect:
    names = one.keys() | other.keys()
    return {n: one.get(n, np.zeros(())) - other.get(n, np.zeros(())) for n in sorted(names)}


def scaled(one: Effect, factor: float) -> Effect:
    return {name: factor * value for name, value in one.items()}


def plus(*effects: Effect) -> Effect:
    total: Effect = {}
    for one in effects:
        for name, value in one.items():
            total[name] = total.get(name, 0.0) + value
    return total


def relative(found: Effect, meant: Effect, biases: bool = True) -> float:
    whole = norm(meant, biases)
    lost = norm(minus(found, meant), biases)
    return lost / whole if whole else (0.0 if lost == 0 else float("inf"))


def near(one: float, other: float, least: float = TOLERANCE[1]) -> bool:
    return abs(one - other) <= max(TOLERANCE[0] * max(one, other), least)


def agrees(reported: float | None, found: Effect, meant: Effect, unknown: bool) -> list[str]:
    """Reported = measured; biases may stand in the figure or not. `unknown`: no figure is a right
    answer too.
    """
    measured = relative(found, meant), relative(found, meant, biases=False)
    if reported is None:
        return [] if unknown else [f"nothing reported, {measured[0]:.3g} measured"]
    if any(near(reported, one) for one in measured):
        return []
    worst = max(
        sorted(found.keys() | meant.keys()),
        key=lambda n: float(np.linalg.norm(minus({n: found.get(n, 0)}, {n: meant.get(n, 0)})[n])),
    )
    return [f"{reported:.4g} reported, {measured[0]:.4g} measured (most in {worst})"]


def biases_kept(found: Effect, meant: Effect, bound: float) -> list[str]:
    """A bias has no rank: it arrives, to the rounding of its numbers."""
    lost = []
    for name in sorted(n for n in found.keys() | meant.keys() if n.endswith("|bias")):
        one, other = found.get(name, np.zeros(1)), meant.get(name, np.zeros(1))
        if np.abs(one - other).max() > bound * max(np.abs(other).max(), 1e-30):
            lost.append(f"{name}: off by {np.abs(one - other).max():.3g}")
    return lost


def adapter(path: Path, family: str, format: str, base: dict) -> tuple[Effect, list[str], int]:
    """What the written file does to the base, and what is wrong with its spelling."""
    file = read(path)
    content = spelling.content(file, family, format)
    wrong = [f"no reader of {format} knows {key}" for key in content.strange]
    return spelling.effect(content.modules.values(), base), wrong, len(content.modules)


def stored(path: Path, dtype: str) -> list[str]:
    """--dtype holds for every tensor but alpha and flags."""
    if dtype == "keep":
        return []
    wanted = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}[dtype]
    file = read(path)
    other = {
        key: kind
        for key, kind in file.dtypes.items()
        if kind not in (wanted, "BOOL") and not key.endswith((".alpha", "on_input"))
    }
    return [f"--dtype {dtype}: {key} is {kind}" for key, kind in list(other.items())[:2]]


def precision(path: Path) -> float:
    """The coarsest rounding among the stored tensors."""
    kinds = {k for n, k in read(path).dtypes.items() if not n.endswith((".alpha", "on_input"))}
    return max((UNIT[kind] for kind in kinds if kind in UNIT), default=0.0)


def _plain(message: str) -> str:
    """A message without what differs from cell to cell."""
    message = re.sub(r"tensor '[^']*'", "tensor", message)
    message = re.sub(r"\S*/\S+", "PATH", message)
    return re.sub(r"\d+", "N", message)[:140]


def _refusal(ran: host.Run, names: list[str]) -> list[str]:
    problems = []
    usage = ran.code == 2 and ran.error.startswith("--")  # options that exclude each other
    if ran.code != 1 and not usage:
        problems.append(f"exit {ran.code}: {(ran.error or ran.err)[:200]}")
    if not ran.error:
        problems.append("refused without a message")
    if "bug" in ran.hint or "unexpected" in ran.error:
        problems.append(f"crash: {ran.error[:200]}")
    named = "tensor '" in ran.error or any(name in ran.error for name in names)
    if names and not named and not usage:
        problems.append(f"the message names no file or tensor: {ran.error[:160]}")
    return problems


def drive(
    arguments: list[str], output: Path | None, judge: Judge, base: Path, names: list[str]
) -> Verdict:
    """Run; judge the result, or follow the hints of the refusal to their end."""
    verdict = Verdict()
    folder = output.parent if output is not None else base.parent
    before = set(folder.rglob("*"))

    def attempt(command: list[str], more: list[str], seen: tuple[str, ...]) -> None:
        ran = host.run(command)
        said = f" [after {' '.join(more)}]".replace(str(base), "BASE") if more else ""
        if ran.code == 0:
            try:
                verdict.problems += [p + said for p in judge(ran, command)]
            finally:
                _remove(output)
            return
        message = _plain(ran.error)
        verdict.refused = verdict.refused or message
        if message in seen:
            verdict.problems.append(f"the hint does not help: {message}{said}")
            return
        verdict.problems += [p + said for p in _refusal(ran, names)]
        if left := set(folder.rglob("*")) - before:
            verdict.problems.append(f"refused, but left {sorted(p.name for p in left)}{said}")
            _remove(output)
        if len(seen) == DEPTH or ran.code != 1:
            return
        for option in host.suggestions(ran.hint, base):
            kept = host.without(command, option)
            verdict.hints += 1
            if sorted([*kept, *option]) == sorted(command) or set(option) <= {
                "--allow-unused"
            } & set(command):
                verdict.problems.append(f"the hint names what was given: {message}: {option}{said}")
                continue
            attempt([*kept, *option], [*more, *option], (*seen, message))

    attempt(arguments, [], ())
    return verdict


def _remove(output: Path | None) -> None:
    if output is not None and output.exists():
        shutil.rmtree(output) if output.is_dir() else output.unlink()
