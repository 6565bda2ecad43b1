"""8-bit floats by their formulas: sign, exponent, mantissa (OCP 8-bit Floating Point, OFP8)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from adaptkit.files.dtypes import widening
from adaptkit.files.dtypes.widening import widen
from adaptkit.files.tensors import finite

# exponent bits, mantissa bits, bias, and the codes (without the sign) that are no numbers
FORMS = {torch.float8_e4m3fn: (4, 3, 7, {0x7F}), torch.float8_e5m2: (5, 2, 15, {0x7D, 0x7E, 0x7F})}


def number(code: int, form: tuple[int, int, int, set[int]]) -> float:
    exponents, mantissas, bias, odd = form
    sign = -1.0 if code & 0x80 else 1.0
    code &= 0x7F
    if code in odd:
        return math.nan
    exponent, mantissa = code >> mantissas, code & ((1 << mantissas) - 1)
    if exponents == 5 and exponent == 31:
        return sign * math.inf
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissas)
    return float(sign * (1 + mantissa / 2**mantissas) * 2.0 ** (exponent - bias))


@pytest.mark.parametrize("wide", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("small", FORMS)
def test_every_number_of_a_format(
    small: torch.dtype, wide: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(widening, "CHUNK", 100)  # the last part is a shorter one
    found = widen(torch.arange(256, dtype=torch.uint8).view(16, 16).view(small), wide)
    assert (found.dtype, found.shape) == (wide, (16, 16))
    expected = [number(code, FORMS[small]) for code in range(256)]
    np.testing.assert_array_equal(found.flatten().double().numpy(), expected)
    assert torch.signbit(found.flatten()[0x80]), "−0 stays what it is"


def test_a_part_that_does_not_lie_together_and_what_is_wide_already() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16).view(torch.float8_e4m3fn)
    found = widen(codes[:, ::3].mT, torch.float32)
    assert torch.equal(found.nan_to_num(7.0), codes.float()[:, ::3].mT.nan_to_num(7.0))
    half = torch.ones(3, dtype=torch.float16)
    assert torch.equal(widen(half, torch.float32), torch.ones(3))
    assert widen(codes[:0], torch.float32).shape == (0, 16)
    with torch.inference_mode():
        assert widen(codes[0], torch.float32)[1] == 2.0**-9


def test_the_largest_scale_of_eight_bits_is_finite_and_nan_is_not() -> None:
    """2^127 is beyond float16."""
    scales = torch.tensor([0, 127, 254], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    assert finite(scales)
    assert not finite(torch.tensor([255], dtype=torch.uint8).view(torch.float8_e8m0fnu))
    assert not finite(torch.tensor([0x7F], dtype=torch.uint8).view(torch.float8_e4m3fn))
    assert not finite(torch.tensor([0x7C], dtype=torch.uint8).view(torch.float8_e5m2))
