"""`--blocks` of convert, resize and combine writes block weights into the adapter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from adaptkit import ops
from adaptkit.errors import NoSuchName
from tests import made

RULES = ("unet.down_blocks.0.attentions=0.5", "unet.down_blocks.0.resnets=0")


def factor(name: str) -> float:
    return 0.0 if "resnets" in name else 0.5


@pytest.mark.parametrize("kind", ["lora", "tucker", "loha", "lokr", "lokr-factored", "full"])
@pytest.mark.parametrize("to", ["kohya", "comfy"])
def test_weights_are_in_the_file(kind: str, to: str, tmp_path: Path) -> None:
    source, output = made.adapter(tmp_path / "a.safetensors", kind), tmp_path / "b.safetensors"
    options = ops.convert.Options(to=to, output=output, blocks=RULES, family="sd1")
    report = ops.convert.run(ops.convert.plan(source, options))
    assert any("multiplied by 0.5" in note for note in report.notes)
    assert any("left out" in note for note in report.notes)
    if to != "kohya":
        back = tmp_path / "c.safetensors"
        ops.convert.run(
            ops.convert.plan(output, ops.convert.Options(to="kohya", output=back, family="sd1"))
        )
        output = back
    before, after = made.deltas(source), made.deltas(output)
    assert after.keys() == {name for name in before if factor(name)}
    for name, delta in after.items():
        np.testing.assert_allclose(delta, factor(name) * before[name], rtol=0, atol=1e-5)


def test_the_sum_of_weighted_adapters(tmp_path: Path) -> None:
    files = [made.adapter(tmp_path / f"{n}.safetensors", "lora", seed=n) for n in range(2)]
    output = tmp_path / "out.safetensors"
    options = ops.combine.Options(output=output, blocks=RULES, family="sd1")
    ops.combine.run(ops.combine.plan([(files[0], 1.0), (files[1], -2.0)], options))
    one, two, found = (made.deltas(path) for path in (*files, output))
    for name, delta in found.items():
        expected = factor(name) * (one[name] - 2.0 * two[name])
        np.testing.assert_allclose(delta, expected, rtol=0, atol=1e-4)


def test_a_rule_without_a_module_is_an_error(tmp_path: Path) -> None:
    source = made.adapter(tmp_path / "a.safetensors", "lora")
    options = ops.resize.Options(
        output=tmp_path / "b.safetensors", rank=2, blocks=("unet.up_blocks=0.5",), family="sd1"
    )
    with pytest.raises(NoSuchName, match="up_blocks"):
        ops.resize.plan(source, options)
