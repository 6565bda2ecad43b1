from __future__ import annotations

import pytest
import torch

from adaptkit.errors import NonFinite
from adaptkit.linalg import precision
from adaptkit.linalg.precision import cast, compute_dtype, dot, norm_squared, upcast


def test_compute_dtype() -> None:
    assert compute_dtype(torch.zeros(1, dtype=torch.bfloat16)) == torch.float32
    assert compute_dtype(torch.zeros(1), torch.zeros(1, dtype=torch.float64)) == torch.float64
    kept = torch.zeros(3)
    assert upcast(kept) is kept


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_are_accurate_in_blocks(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(precision, "CHUNK", 70)
    x, y = (1e3 * torch.randn(2, 37, 11)).to(dtype), torch.randn(2, 37, 11).to(dtype)
    torch.testing.assert_close(norm_squared(x), x.double().square().sum((-1, -2)), rtol=1e-12, atol=0)
    torch.testing.assert_close(dot(x, y), (x.double() * y.double()).sum((-1, -2)), rtol=1e-12, atol=1e-9)
    assert norm_squared(x).dtype == torch.float64


def test_norms_see_what_is_not_finite() -> None:
    x = torch.ones(4, 4)
    x[2, 2] = float("nan")
    assert torch.isnan(norm_squared(x))
    x[2, 2] = float("-inf")
    assert torch.isinf(norm_squared(x))


def test_cast_rounds_to_nearest_and_refuses_overflow() -> None:
    x = torch.tensor([1.0, 1.0 + 2**-11, 1.0 + 3 * 2**-12])
    assert torch.equal(cast(x, torch.float16), x.half())
    assert cast(x, torch.float32) is x
    with pytest.raises(NonFinite, match=r"7e\+04 does not fit float16"):
        cast(torch.tensor([70000.0]), torch.float16)
    assert torch.equal(cast(torch.tensor([65504.0]), torch.float16), torch.tensor([65504.0]).half())
    assert cast(torch.zeros(0), torch.float16).numel() == 0
