from __future__ import annotations

import pytest
import torch

from adaptkit.errors import NonFinite
from adaptkit.linalg import precision
from adaptkit.linalg.precision import (
    ALIGNED,
    cast,
    compute_dtype,
    difference,
    entry_sum,
    members,
    norm_squared,
    product,
    streamed_difference,
    supports_float64,
    upcast,
    works_on_stacks,
)


def test_compute_dtype() -> None:
    assert compute_dtype(torch.zeros(1, dtype=torch.bfloat16)) == torch.float32
    assert compute_dtype(torch.zeros(1), torch.zeros(1, dtype=torch.float64)) == torch.float64
    kept = torch.zeros(3)
    assert upcast(kept) is kept


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_are_accurate_in_blocks(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(precision, "CHUNK", 70)
    x = (1e3 * torch.randn(2, 37, 11)).to(dtype)
    torch.testing.assert_close(
        norm_squared(x), x.double().square().sum((-1, -2)), rtol=1e-7, atol=0
    )
    assert norm_squared(x).dtype == torch.float64


def test_sums_are_accurate_at_size() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(300, 5000, generator=draw) * torch.logspace(-4, 4, 5000)
    # up to 1e-8 in forty draws: a tenth of the entries carry the sum
    torch.testing.assert_close(norm_squared(x), x.double().square().sum(), rtol=3e-8, atol=0)
    assert float(norm_squared(torch.zeros(0, 5))) == 0.0


@pytest.mark.parametrize("shape", [(2, 3, 130, 150), (2, 17, 1024), (1, 16_385)])
def test_sums_of_stacks_are_those_of_their_members(shape: tuple[int, ...]) -> None:
    """In runs and a tail, of members of very different lengths."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=draw)
    x *= 10.0 ** torch.arange(x[..., :1, :1].numel()).reshape(*shape[:-2], 1, 1)
    found = norm_squared(x)
    assert found.shape == shape[:-2]
    torch.testing.assert_close(found, x.double().square().sum((-1, -2)), rtol=2e-7, atol=0)
    torch.testing.assert_close(found, norm_squared(x.mT.contiguous().mT), rtol=2e-7, atol=0)


def test_devices_differ_in_what_they_are_good_at() -> None:
    """A CPU takes one matrix at a time, an accelerator stacks; MPS has no float64."""
    good = {device: works_on_stacks(device) for device in ("cpu", "mps", "cuda", "cuda:1", "xpu")}
    assert good == {"cpu": False, "mps": True, "cuda": True, "cuda:1": True, "xpu": True}
    wide = {device: supports_float64(device) for device in good}
    assert wide == {"cpu": True, "mps": False, "cuda": True, "cuda:1": True, "xpu": True}


def test_small_sums_are_as_accurate() -> None:
    """A single float32 run errs by up to 3e-7; nothing averages that out."""
    draw = torch.Generator().manual_seed(0)
    x = 1e3 * torch.randn(200, 5, 11, generator=draw)
    torch.testing.assert_close(
        norm_squared(x), x.double().square().sum((-1, -2)), rtol=1e-12, atol=0
    )


def test_difference_is_widened_first(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(3, 17, 9).bfloat16(), torch.randn(3, 17, 9).half()
    monkeypatch.setattr(precision, "SCRATCH", 20)
    assert torch.equal(difference(x, y), x.float() - y.float())
    assert torch.equal(difference(x, y.double()), x.double() - y.double())
    assert not torch.equal(difference(x, y.bfloat16()), (x - y.bfloat16()).float())


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float64, torch.float16),
    ],
)
@pytest.mark.parametrize("rows", [1, 5, 17, 100])
def test_a_difference_in_blocks_is_the_difference(
    rows: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    x, y = torch.randn(17, 9).to(dtypes[0]), torch.randn(17, 9).to(dtypes[1])
    found, norm = streamed_difference(zip(x.split(rows), y.split(rows), strict=True), (17, 9))
    assert torch.equal(found, difference(x, y))
    assert found.dtype == compute_dtype(x, y)
    assert float(norm) == pytest.approx(float((x.double() - y.double()).square().sum()), rel=1e-6)
    nothing, zero = streamed_difference(iter(()), (0, 9))
    assert (tuple(nothing.shape), float(zero)) == ((0, 9), 0.0)


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


@pytest.mark.parametrize("other", [float("nan"), float("inf"), -float("inf"), 1.0])
@pytest.mark.parametrize("value", [7e4, -7e4])
def test_cast_sees_overflow_beside_what_is_not_finite(other: float, value: float) -> None:
    with pytest.raises(NonFinite, match="7e\\+04 does not fit float16"):
        cast(torch.tensor([other, value, 1.0]), torch.float16)


def test_cast_lets_through_what_was_not_finite_and_what_rounds_down() -> None:
    x = torch.tensor(
        [float("inf"), float("nan"), 65519.0]
    )  # 65520 is the first to round to infinity
    found = cast(x, torch.float16)
    assert torch.isinf(found[0])
    assert torch.isnan(found[1])
    assert float(found[2]) == 65504.0
    with pytest.raises(NonFinite, match="6.552e\\+04"):
        cast(torch.tensor([65520.0]), torch.float16)


def test_cast_to_and_from_float8_and_integers() -> None:
    narrow = cast(torch.tensor([1.0, -448.0]), torch.float8_e4m3fn)
    assert narrow.dtype == torch.float8_e4m3fn
    assert torch.equal(cast(narrow, torch.float16).float(), torch.tensor([1.0, -448.0]))
    with pytest.raises(NonFinite, match="1000 does not fit float8_e4m3fn"):
        cast(torch.tensor([1000.0]), torch.float8_e4m3fn)
    assert torch.equal(cast(torch.tensor([1, 2]), torch.float16), torch.tensor([1.0, 2.0]).half())
    with pytest.raises(NonFinite, match="does not fit"):
        cast(torch.tensor([70000]), torch.float16)


@pytest.mark.parametrize("shape", [(5, 7, 6), (3, 16, 8), (4, 9, 1), (2, 3, 5, 4)])
@pytest.mark.parametrize("turned", [False, True])
def test_members_lie_in_memory_as_if_they_were_alone(shape: tuple[int, ...], turned: bool) -> None:
    x = torch.randn(*shape)
    x = x.mT.contiguous().mT if turned else x
    found = [member for (member,) in members(x)]
    assert len(found) == x[..., 0, 0].numel()
    for member, expected in zip(found, x.reshape(-1, *shape[-2:]), strict=True):
        assert torch.equal(member, expected)
        assert member.data_ptr() % ALIGNED == 0
        assert member.stride() == next(members(member.clone().unsqueeze(0)))[0].stride()
    pieces = [member for (member,) in members(x[..., :-1, :])]
    assert all(member.data_ptr() % ALIGNED == 0 for member in pieces)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_of_a_stack_are_those_of_its_members(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    for m, k, n in ((3, 3, 3), (90, 6, 3), (1, 640, 1), (64, 320, 16), (320, 3, 1), (5, 1, 4)):
        x = torch.randn(5, m, k, generator=draw, dtype=dtype)
        y = torch.randn(5, n, k, generator=draw, dtype=dtype).mT
        found, sums = product(x, y), entry_sum(x)
        for i in range(5):
            one, two = x[i : i + 1].clone(), y[i : i + 1].mT.clone().mT
            assert torch.equal(found[i], product(one, two)[0]), (m, k, n)
            assert torch.equal(sums[i], entry_sum(one)[0]), (m, k, n)
        torch.testing.assert_close(found, x @ y)
        torch.testing.assert_close(sums, x.sum((1, 2)))
