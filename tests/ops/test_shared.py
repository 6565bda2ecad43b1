"""Helpers of every verb: sizes, and plans that close their files."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from adaptkit.ops import compare, merge
from adaptkit.ops.shared import Closing, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("10", 10),
        ("10B", 10),
        ("500KB", 500_000),
        (" 1.5 GB ", 1_500_000_000),
        ("64mib", 2**26),
        ("2T", 2 * 10**12),
        ("5 furlongs", None),
        ("iB", None),
        ("5iB", None),
        ("-1KB", None),
        ("", None),
    ],
)
def test_sizes(text: str, size: int | None) -> None:
    assert parse_size(text) == size


def test_a_context_closes_once_even_after_an_error() -> None:
    class Held(Closing):
        closed = 0

        def close(self) -> None:
            self.closed += 1

    with Held() as held:
        assert held.closed == 0
    with pytest.raises(ZeroDivisionError), held:
        1 / 0  # noqa: B018
    assert held.closed == 2


def test_plans_are_context_managers(tiny: Path) -> None:
    adapter = tiny / "lora-kohya.safetensors"
    options = merge.Options(output=tiny / "never.safetensors")
    with merge.plan(tiny / "base.ckpt", [(adapter, 1.0)], options) as planned:
        assert planned.to_dict()["modules"] > 0
    with compare.plan(adapter, (adapter, 0.5), compare.Options()) as matched:
        assert matched.inputs.b is not None
        assert (matched.inputs.a.strength, matched.inputs.b.strength) == (1.0, 0.5)


@pytest.mark.parametrize(
    "verb", ["advise", "combine", "compare", "convert", "extract", "merge", "resize"]
)
def test_the_plan_of_every_verb_closes(verb: str) -> None:
    plan = importlib.import_module(f"adaptkit.ops.{verb}").Plan
    assert issubclass(plan, Closing)
    assert plan.close is not Closing.close
