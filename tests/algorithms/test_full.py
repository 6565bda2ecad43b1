from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit.algorithms.contract import FitSpec
from adaptkit.algorithms.full import Full
from adaptkit.errors import ShapeMismatch
from adaptkit.ops import convert, merge
from tests.laws import AlgorithmLaws, Array, Layout

RANDOM = np.random.default_rng(0)


class TestFull(AlgorithmLaws):
    kind = Full
    has_factors = False
    has_alpha = False

    @staticmethod
    def layouts() -> Iterator[Layout]:
        yield Layout("linear", {"diff": RANDOM.standard_normal((8, 6))})
        yield Layout("conv", {"diff": RANDOM.standard_normal((8, 6, 3, 3))}, None, (3, 3))
        yield Layout("bias", {"diff_b": RANDOM.standard_normal(8)})
        yield Layout("norm weight", {"w_norm": RANDOM.standard_normal(8)})
        yield Layout("norm bias", {"b_norm": RANDOM.standard_normal(8)})

    @staticmethod
    def oracle(layout: Layout) -> Array:
        (array,) = layout.tensors.values()
        return array


def test_fit_is_the_difference() -> None:
    delta = torch.randn(8, 54)
    assert torch.equal(
        Full.fit(delta, FitSpec(kernel=(3, 3))).encode()["diff"], delta.reshape(8, 6, 3, 3)
    )


def test_a_scalar_is_refused() -> None:
    with pytest.raises(ShapeMismatch):
        Full.facts({"diff": ()})


@pytest.mark.parametrize("key", ["diff_m", "modulation.diff"])
def test_a_parameter_inside_a_block_is_read_under_both_of_its_names(
    key: str, tmp_path: Path
) -> None:
    """LightX2V's `blocks.N.diff_m` is what others call `blocks.N.modulation.diff`."""
    change = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(1))
    base = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(2))
    save_file({f"diffusion_model.blocks.0.{key}": change}, tmp_path / "a.safetensors")
    save_file({"blocks.0.modulation": base}, tmp_path / "base.safetensors")
    for source, to, written in (
        ("a", "comfy", "diffusion_model.blocks.0.modulation.diff"),
        ("comfy", "diffusers", "transformer.blocks.0.scale_shift_table.diff"),
    ):
        output = tmp_path / f"{to}.safetensors"
        options = convert.Options(to=to, output=output, family="wan")
        convert.run(convert.plan(tmp_path / f"{source}.safetensors", options))
        assert load_file(output).keys() == {written}
        torch.testing.assert_close(load_file(output)[written], change, rtol=0, atol=0)
    for name in ("a", "comfy", "diffusers"):
        output = tmp_path / "merged.safetensors"
        options = merge.Options(output=output, family="wan", overwrite=True)
        merge.run(
            merge.plan(
                tmp_path / "base.safetensors", [(tmp_path / f"{name}.safetensors", 0.5)], options
            )
        )
        found = load_file(output)["blocks.0.modulation"]
        torch.testing.assert_close(found, base + 0.5 * change, rtol=0, atol=1e-6)
