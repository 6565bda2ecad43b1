"""Q4_K, Q5_K and Q6_K: blocks of 256 numbers with scales of their parts (ggml `ggml-quants.h`).

Q4_K and Q5_K: eight parts of 32, w = d · s · q - dmin · m with s and m of six bits. Q6_K: sixteen
parts of 16, w = d · s · (q - 32) with s of eight bits. d and dmin are half-precision. As in ggml,
the scale and minimum of a part are those of the least weighted squares among several tries, weights
being larger for larger numbers, and q is the nearest for the scales as they are stored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.files.packing import divided

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["WRITTEN", "allowed", "encode"]

WRITTEN = ("Q4_K", "Q5_K", "Q6_K")
BITS = {"Q4_K": 4, "Q5_K": 5}
MOST = 63  # of six bits
# of half precision: the relative error, half its least number, and its least number of all bits
HALF, LEAST, NORMAL = 2.0**-11, 2.0**-25, 2.0**-14
# the ends of the places that are tried, relative to all places
TRIES = {"Q4_K": (-0.6, -0.2, 0.2, 0.6), "Q5_K": (-0.4, 0.0, 0.4), "Q6_K": (-0.6, -0.2, 0.2, 0.6)}


def encode(blocks: Tensor, dtype: str) -> Tensor:
    """Blocks (n, 256) of float32 as bytes (n, size)."""
    return _six(blocks) if dtype == "Q6_K" else _with_minimum(blocks, BITS[dtype])


# one scale and one minimum for each part


def _with_minimum(blocks: Tensor, bits: int) -> Tensor:
    import torch

    top = (1 << bits) - 1
    parts = blocks.reshape(-1, 8, 32)
    scale, least = _fitted(parts, top, TRIES[f"Q{bits}_K"])
    d, s = _shared(scale)
    dmin, m = _shared(least)
    # of a part whose scale became 0, only the mean can be kept
    mean = divided(-parts.mean(-1), dmin).round_().clamp_(0, MOST)
    m = torch.where(d * s > 0, m, mean)
    step, minimum = (d * s).unsqueeze(-1), (dmin * m).unsqueeze(-1)
    q = divided(parts + minimum, step).round_().clamp_(0, top).byte()
    halves = torch.cat([d, dmin], 1).half().view(torch.uint8)
    quarters = q.reshape(-1, 4, 2, 32)
    low = (quarters[:, :, 0] & 15) | ((quarters[:, :, 1] & 15) << 4)
    found = [halves, _packed_scales(s.byte(), m.byte())]
    if bits == 5:
        shifts = torch.arange(8, dtype=torch.uint8).reshape(1, 8, 1)
        found.append(((q >> 4) << shifts).sum(1, dtype=torch.uint8))
    return torch.cat([*found, low.reshape(-1, 128)], 1)


def _fitted(parts: Tensor, top: int, tries: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Scale and minimum (n, parts), both positive: w ≈ scale · q - minimum, 0 ≤ q ≤ top."""
    import torch

    weights = parts.square().mean(-1, keepdim=True).sqrt() + parts.abs()
    low = parts.amin(-1, keepdim=True).clamp_(max=0.0)
    span = parts.amax(-1, keepdim=True) - low
    one, of_x = weights.sum(-1, keepdim=True), (weights * parts).sum(-1, keepdim=True)
    best, scale, least = None, span / top, low
    for extra in (None, *tries):
        inverse = divided(torch.full_like(span, top + (extra or 0.0)), span)
        q = ((parts - low) * inverse).round_().clamp_(0, top)
        if extra is None:
            fresh, lowest = scale, low
        else:
            weighted = weights * q
            of_q, of_qq = weighted.sum(-1, keepdim=True), (weighted * q).sum(-1, keepdim=True)
            of_qx = (weighted * parts).sum(-1, keepdim=True)
            wide = one * of_qq - of_q * of_q
            lowest = divided(of_qq * of_x - of_q * of_qx, wide)
            free = divided(one * of_qx - of_x * of_q, wide)
            fresh = torch.where(lowest > 0, divided(of_qx, of_qq), free)
            lowest = lowest.clamp(max=0.0)
        error = (weights * (fresh * q + lowest - parts).square()).sum(-1, keepdim=True)
        error = torch.where(fresh >= 0, error, torch.inf)
        if best is None:
            best = error
            continue
        better = error < best
        best = torch.where(better, error, best)
        scale, least = torch.where(better, fresh, scale), torch.where(better, lowest, least)
    return scale.squeeze(-1), -least.squeeze(-1)


def _shared(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Positive scales (n, 8) as a number in half precision (n, 1) times 0 to 63."""
    whole = (scales.amax(1, keepdim=True) / MOST).half().float()
    return whole, divided(scales, whole).round_().clamp_(0, MOST)


def _packed_scales(s: Tensor, m: Tensor) -> Tensor:
    """Eight scales and eight minima of six bits in twelve bytes."""
    import torch

    high = (s[:, :4] | ((s[:, 4:] >> 4) << 6), m[:, :4] | ((m[:, 4:] >> 4) << 6))
    return torch.cat([*high, (s[:, 4:] & 15) | ((m[:, 4:] & 15) << 4)], 1)


def _scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima (n, 8) out of twelve bytes."""
    import torch

    a, b, c = packed[:, :4], packed[:, 4:8], packed[:, 8:12]
    s = torch.cat([a & 63, (c & 15) | ((a >> 6) << 4)], 1)
    return s.float(), torch.cat([b & 63, (c >> 4) | ((b >> 6) << 4)], 1).float()


# one scale for each part, with a sign


def _six(blocks: Tensor) -> Tensor:
    import torch

    parts = blocks.reshape(-1, 16, 16)
    scale = _signed(parts, TRIES["Q6_K"])
    place = scale.abs().argmax(1, keepdim=True)
    # the largest scale becomes -128, as in ggml
    d = (scale.gather(1, place) / -128).half().float()
    s = divided(scale, d).round_().clamp_(-128, 127)
    q = divided(parts, (d * s).unsqueeze(-1)).round_().clamp_(-32, 31).add_(32).byte()
    halves = q.reshape(-1, 2, 4, 32)  # two halves, each of four rows of 32
    low = torch.cat(
        [
            (halves[:, :, 0] & 15) | ((halves[:, :, 2] & 15) << 4),
            (halves[:, :, 1] & 15) | ((halves[:, :, 3] & 15) << 4),
        ],
        2,
    )
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).reshape(1, 1, 4, 1)
    high = ((halves >> 4) << shifts).sum(2, dtype=torch.uint8)
    found = [low.reshape(-1, 128), high.reshape(-1, 64), s.to(torch.int8).view(torch.uint8)]
    return torch.cat([*found, d.half().view(torch.uint8)], 1)


def _signed(parts: Tensor, tries: tuple[float, ...]) -> Tensor:
    """The scale of each part (n, 16): w ≈ scale · q, -32 ≤ q ≤ 31."""
    import torch

    weights = parts.square()
    place = parts.abs().argmax(-1, keepdim=True)
    top = parts.gather(-1, place)  # becomes -32
    best, scale = None, top / -32
    for extra in (0.0, *tries):
        q = (parts * divided(torch.full_like(top, -32 - extra), top)).round_().clamp_(-32, 31)
        weighted = weights * q
        of_qx = (weighted * parts).sum(-1, keepdim=True)
        of_qq = (weighted * q).sum(-1, keepdim=True)
        gain = divided(of_qx.square(), of_qq)
        fresh = divided(of_qx, of_qq)
        if best is None:
            best, scale = gain, fresh
            continue
        better = gain > best
        best, scale = torch.where(better, gain, best), torch.where(better, fresh, scale)
    return scale.squeeze(-1)


# verification


def allowed(raw: Tensor, numbers: Tensor, dtype: str) -> Tensor:
    """Half a step of each number (n, 256); the ends of a part may have cut off half the range."""
    import torch

    if dtype == "Q6_K":
        d = raw[:, 208:].clone().view(torch.float16).float()
        step = (d * raw[:, 192:208].view(torch.int8).float()).unsqueeze(-1)
        least = unit = torch.zeros_like(step)
        lowest, most = -32, 31
    else:
        halves = raw[:, :4].clone().view(torch.float16).float()
        d, dmin = halves[:, :1], halves[:, 1:]
        s, m = _scales(raw[:, 4:16])
        step, least = (d * s).unsqueeze(-1), (dmin * m).unsqueeze(-1)
        lowest, most, unit = 0, (1 << BITS[dtype]) - 1, dmin.abs().unsqueeze(-1) * 0.6
    place = divided(numbers.reshape(len(raw), step.shape[1], -1) + least, step)
    inner = (place > lowest + 0.25) & (place < most - 0.25)
    step, d = step.abs(), d.abs().unsqueeze(-1)
    # a part whose scale became 0 is lost, and all numbers if the one scale did; a minimum is
    # rounded to half of its unit
    ends = torch.maximum(step, d) * (most + 1) / 2 + unit
    found = torch.where(inner & (step > 0), step / 2, ends).add_(step * (most + 1) * HALF)
    return found.add_((d < NORMAL) * (most * MOST * LEAST)).reshape(numbers.shape)
