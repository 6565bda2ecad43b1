"""Weights stored in fewer bits: what is read as the numbers it means, and what is refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from adaptkit.files.header import TensorInfo
from adaptkit.files.open import open_source
from adaptkit.files.quantized import Quantization, read_widened


def header(**shapes: tuple[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    """`w` stands for `a.weight`, `__` for a dot."""
    names = {name.replace("__", "."): value for name, value in shapes.items()}
    return {name: TensorInfo(name, dtype, shape, 0, 0) for name, (dtype, shape) in names.items()}


MATRIX = ("F8_E4M3", (6, 8))


@pytest.mark.parametrize("kind", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("shape", [(), (1,), (6,), (6, 1), (6, 4, 1), (6, 1, 1)])
def test_scales_of_a_tensor_of_rows_and_of_blocks_are_known(
    kind: str, shape: tuple[int, ...]
) -> None:
    infos = header(a__weight=MATRIX, other__weight=("F16", (2, 2))) | header(
        **{f"a__{kind}": ("F32", shape)}
    )
    found = Quantization.of(infos)
    assert found.scales == {"a.weight": f"a.{kind}"}
    assert (found.refused, found.extras) == ({}, {f"a.{kind}"})
    assert found.widens(infos["a.weight"])
    assert not found.widens(infos["other.weight"])
    assert found.refusal(infos["a.weight"]) is None


@pytest.mark.parametrize("shape", [(8,), (6, 3, 1), (6, 0, 1), (5, 4, 1), (6, 4, 2), (6, 4), (2,)])
def test_scales_that_fit_neither_are_refused_with_both_shapes(shape: tuple[int, ...]) -> None:
    infos = header(a__weight=MATRIX, a__weight_scale=("F32", shape))
    found = Quantization.of(infos)
    assert found.scales == {}
    assert found.refusal(infos["a.weight"]) == (f"F8_E4M3 [6, 8] with scales {list(shape)}")


@pytest.mark.parametrize(
    ("beside", "name"),
    [
        ({"a__weight_scale_2": ("F32", ())}, "nvfp4"),
        (
            {"a__weight_scale_inv": ("F32", (1, 1))},
            "fp8 with a scale per block of rows and columns",
        ),
        ({"a__pre_quant_scale": ("F32", (8,))}, "weights with their input channels rescaled"),
        ({"a__weight_zero_point": ("F32", ())}, "integers with a zero point"),
        ({"a__SCB": ("F32", (6,))}, "int8 (bitsandbytes)"),
        ({"a__weight__absmax": ("F32", (6,))}, "integers (bitsandbytes)"),
        ({"a__weight__quant_state__bitsandbytes__nf4": ("U8", (6,))}, "nf4 (bitsandbytes)"),
        ({"a__weight__quant_state__bitsandbytes__fp4": ("U8", (6,))}, "fp4 (bitsandbytes)"),
        ({"a__weight_scale": ("U8", (6,))}, "mxfp8"),
        (
            {"a__weight_scale": ("F32", ()), "a__scale_weight": ("F32", ())},
            "a weight with two scales",
        ),
    ],
)
def test_other_schemes_are_named_and_never_read(
    beside: dict[str, tuple[str, tuple[int, ...]]], name: str
) -> None:
    names = {key.replace("bitsandbytes__", "bitsandbytes@"): value for key, value in beside.items()}
    infos = {
        key.replace("@", "__"): TensorInfo(key.replace("@", "__"), i.dtype, i.shape, 0, 0)
        for key, i in header(a__weight=MATRIX, **names).items()
    }
    found = Quantization.of(infos)
    assert found.refusal(infos["a.weight"]) == name
    assert found.scales == {}
    assert found.extras == infos.keys() - {"a.weight"}


def test_integers_are_no_weights_and_half_floats_are() -> None:
    infos = header(i__weight=("I8", (6, 8)), u__weight=("U8", (6, 4)), x__weight=("I32", (2,)))
    infos |= header(h__weight=("BF16", (6, 8)), f__weight=("F8_E5M2", (6, 8)))
    found = Quantization.of(infos)
    assert {name: found.refusal(info) for name, info in infos.items()} == {
        "i.weight": "int8",
        "u.weight": "packed integers",
        "x.weight": "I32",
        "h.weight": None,
        "f.weight": None,
    }
    assert found.widens(infos["f.weight"])
    assert not found.widens(infos["h.weight"])


def test_what_tells_no_more_than_the_scales_is_beside_the_weight() -> None:
    """Scales of activations and ComfyUI's marks; a scale without its weight is a tensor by itself."""
    infos = header(
        a__weight=MATRIX,
        a__input_scale=("F32", ()),
        a__comfy_quant=("U8", (9,)),
        scaled_fp8=("F8_E4M3", (0,)),
        b__weight_scale=("F32", ()),
    )
    found = Quantization.of(infos)
    assert found.extras == {"a.input_scale", "a.comfy_quant", "scaled_fp8"}
    assert (found.scales, found.refused) == ({}, {})
    assert found.refusal(infos["a.weight"]) is None


def test_a_tensor_is_read_in_four_bytes_a_number_or_eight() -> None:
    infos = header(a__weight=MATRIX, d__weight=("F64", (3, 5)))
    found = Quantization.of(infos)
    assert found.wide_bytes(infos["a.weight"]) == 4 * 48
    assert found.wide_bytes(infos["d.weight"]) == 8 * 15


@pytest.mark.parametrize("rows", [None, (0, 6), (2, 5)])
@pytest.mark.parametrize("shape", [(), (1,), (6,), (6, 1), (6, 4, 1)])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.float64])
def test_numbers_are_what_scales_make_of_them(
    shape: tuple[int, ...], rows: tuple[int, int] | None, dtype: torch.dtype, tmp_path: Path
) -> None:
    draw = np.random.default_rng(len(shape))
    weight = torch.from_numpy(draw.integers(-8, 8, (6, 8)).astype(np.float64)).to(dtype)
    scale = torch.from_numpy(np.asarray(2.0 ** draw.integers(-3, 4, shape))).float()
    plain = torch.ones(2, 3, dtype=torch.float16)
    path = tmp_path / "a.safetensors"
    tensors = {"a.weight": weight, "a.weight_scale": scale, "b.weight": plain}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    exact = weight.double().numpy().copy()
    for i in range(6):  # one number after the other
        for j in range(8):
            each = scale.numpy()
            match shape:
                case () | (1,):
                    exact[i, j] *= each.reshape(-1)[0]
                case (6, 4, 1):
                    exact[i, j] *= each[i, j // 2, 0]
                case _:
                    exact[i, j] *= each.reshape(-1)[i]
    with open_source(path) as source:
        found = Quantization.of(source.infos)
        read = read_widened(source, found, "a.weight", rows)
        assert read.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        np.testing.assert_array_equal(read.numpy(), exact[slice(*(rows or (0, 6)))])
        assert torch.equal(read_widened(source, found, "b.weight"), plain)
        assert read_widened(source, found, "b.weight").dtype == torch.float16
