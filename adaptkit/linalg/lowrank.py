"""Low-rank approximation: truncated SVD of a dense matrix, exact SVD of a factored one, all on (..., m, n)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adaptkit.linalg.precision import accumulate_dtype, compute_dtype, norm_squared, supports_float64, upcast

__all__ = ["LowRank", "Method", "SvdSpec", "energies", "factored_svd", "truncated_svd"]

Method = Literal["auto", "exact", "lanczos", "gram"]

SMALL = 128  # up to this smaller side the Gram matrix costs nothing
EXPLICIT = 1e-2  # a residual below this share of ‖A‖² is recomputed: float32 σ limit the difference to 3e-7‖A‖²
BLOCK = 1 << 22  # elements of A widened to float64 at a time
STALL = 1e-5  # stop where the error would change by less than this share of ‖A‖, whatever its relative change


@dataclass(frozen=True)
class LowRank:
    """A ≈ u · diag(s) · vh.   u: (..., m, k)   s: (..., k), descending   vh: (..., k, n)   residual: (...,) ‖A − u s vh‖²

    u, s, vh in A's compute dtype; residual in float64 (float32 on MPS). The largest entry of each column of u is positive.
    """

    u: Tensor
    s: Tensor
    vh: Tensor
    residual: Tensor

    def balanced(self) -> tuple[Tensor, Tensor]:
        """(left (..., m, k), right (..., k, n)) with √s on both sides, which suits fp16 best (reference §6)."""
        root = self.s.sqrt()
        return self.u * root.unsqueeze(-2), root.unsqueeze(-1) * self.vh


@dataclass(frozen=True)
class SvdSpec:
    """How to approximate: `rank`, `method`, `tol` on the relative excess error of Lanczos, and the seed of its start."""

    rank: int
    method: Method = "auto"
    tol: float = 1e-3
    seed: int = 0


def truncated_svd(a: Tensor, spec: SvdSpec) -> LowRank:
    """The leading `rank` singular triplets of a (..., m, n), rank clipped to min(m, n).

    auto: a float64 Gram matrix where the smaller side N is at most 128 or 4k + 32 > N/2 (exact, and cheaper there), else
    seeded adaptive block Lanczos with a polish step: at most 0.1 % above the Eckart–Young optimum in 69 of 70 cases of the
    reference's measurements (Musco and Musco 2015 for the method; Halko, Martinsson and Tropp 2011). exact: LAPACK in
    float64. Equal input gives equal bits, whatever its position in a batch. Inputs must be finite.
    """
    a = upcast(a)
    if a.ndim > 2:
        return _batched(a, spec)
    rank = min(spec.rank, *a.shape)
    wide = a if a.shape[0] >= a.shape[1] else a.mT  # (M, N), N the smaller side
    u, s, v = _solver(spec.method, rank, wide.shape[1])(wide, rank, spec)
    if wide is not a:
        u, v = v, u
    return _finish(a, u, s, v)


def _batched(a: Tensor, spec: SvdSpec) -> LowRank:
    """Member by member: on a CPU that is faster than stacking, and results cannot depend on the batch."""
    batch = a.shape[:-2]
    found = [truncated_svd(member, spec) for member in a.reshape(-1, *a.shape[-2:])]
    if not found:
        rank = min(spec.rank, *a.shape[-2:])
        empty = a.new_zeros
        wide = torch.zeros(batch, dtype=accumulate_dtype(a.device), device=a.device)
        return LowRank(empty(*batch, a.shape[-2], rank), empty(*batch, rank), empty(*batch, rank, a.shape[-1]), wide)

    def stacked(name: str) -> Tensor:
        whole = torch.stack([getattr(one, name) for one in found])
        return whole.reshape(*batch, *whole.shape[1:])

    return LowRank(stacked("u"), stacked("s"), stacked("vh"), stacked("residual"))


Solver = Callable[[Tensor, int, SvdSpec], tuple[Tensor, Tensor, Tensor]]  # → u (M, k), s (k,), v (N, k)


def _solver(method: Method, rank: int, smaller: int) -> Solver:
    if method == "auto":
        method = "gram" if smaller <= SMALL or 4 * rank + 32 > smaller / 2 else "lanczos"
    if method not in _SOLVERS:
        raise ValueError(f"unknown SVD method {method!r}")
    return _SOLVERS[method]


def _finish(a: Tensor, u: Tensor, s: Tensor, v: Tensor) -> LowRank:
    """Fix signs, and state what is left of A exactly."""
    top = u.gather(-2, u.abs().argmax(dim=-2, keepdim=True))
    sign = torch.where(top < 0, -1.0, 1.0).to(u.dtype)
    u, vh = u * sign, (v * sign).mT
    total = norm_squared(a)
    residual = total - s.to(total.dtype).square().sum(dim=-1)
    if bool(residual < EXPLICIT * total):
        residual = _explicit(a, u * s.unsqueeze(-2), vh)
    return LowRank(u, s, vh.contiguous(), residual.clamp_min(0.0))


def _explicit(a: Tensor, left: Tensor, right: Tensor) -> Tensor:
    total = torch.zeros((), dtype=accumulate_dtype(a.device), device=a.device)
    step = max(1, BLOCK // a.shape[1])
    for start in range(0, a.shape[0], step):
        rows = slice(start, start + step)
        total = total + norm_squared(torch.addmm(a[rows], left[rows], right, alpha=-1.0))
    return total


def eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending and clamped to ≥ 0, and eigenvectors of a symmetric matrix, in its dtype.

    Done on the CPU: CUDA's looped eigh costs as much for these sizes (pytorch#175585). Where LAPACK does not converge, a
    float64 SVD decides.
    """
    host = gram.cpu()
    try:
        values, vectors = torch.linalg.eigh(host)
        values, vectors = values.flip(-1), vectors.flip(-1)
    except RuntimeError:  # torch.linalg.LinAlgError: did not converge
        u, values, _ = torch.linalg.svd(host.double())
        values, vectors = values.to(host.dtype), u.to(host.dtype)
    return values.clamp_min(0.0).to(gram.device), vectors.to(gram.device)


def gram_columns(a: Tensor) -> Tensor:
    """AᵀA (N, N) of a (M, N) in float64, A widened a block of rows at a time."""
    wide = accumulate_dtype(a.device)
    total = torch.zeros(a.shape[1], a.shape[1], dtype=wide, device=a.device)
    step = max(1, BLOCK // max(1, a.shape[1]))
    for start in range(0, a.shape[0], step):
        block = a[start : start + step].to(wide)
        total.addmm_(block.mT, block)
    return total


def _gram(a: Tensor, rank: int, spec: SvdSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvectors of the float64 AᵀA, then one half-step; float32 there would cost 4 % (reference §2.1)."""
    _, vectors = eigh(gram_columns(a))
    return _half_step(a, vectors[:, :rank].to(a.dtype))


def _half_step(a: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best approximation of A (M, N) within the right subspace v (N, k), orthonormal: SVD of the thin A·v.

    Done by QR, so that σ far below σ₁ keep their relative accuracy to about machine precision of A's products.
    """
    wide = accumulate_dtype(a.device)
    q, r = torch.linalg.qr((a @ v).to(wide))
    left, s, right = torch.linalg.svd(r.cpu(), full_matrices=False)
    left, s, right = (t.to(a.device) for t in (left, s, right))
    return (q @ left).to(a.dtype), s.to(a.dtype), (v.to(wide) @ right.mT).to(a.dtype)


def _exact(a: Tensor, rank: int, spec: SvdSpec) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(a.to(accumulate_dtype(a.device)), full_matrices=False)
    return u[:, :rank].to(a.dtype), s[:rank].to(a.dtype), vh[:rank].mT.to(a.dtype)


class _Krylov:
    """Block Lanczos on AᵀA with full reorthogonalisation on the small side: v spans, w = A·v, gram = wᵀw = vᵀAᵀA v."""

    def __init__(self, a: Tensor, rank: int, seed: int) -> None:
        m, n = a.shape
        self.a, self.rank = a, rank
        self.width = min(n, 8 if rank <= 8 else 16 if rank <= 64 else 32)
        self.limit = min(n, 6 * rank + 64)
        self.v = a.new_empty(n, self.limit)
        self.w = a.new_empty(self.limit, m).mT  # columns contiguous, so that growing it moves nothing
        self.gram = torch.zeros(self.limit, self.limit, dtype=accumulate_dtype(a.device), device=a.device)
        self.size = 0
        draw = torch.Generator().manual_seed(seed)
        start = torch.randn(m, self.width, generator=draw, dtype=torch.float32).to(a)
        self.next = a.mT @ start

    def grow(self) -> bool:
        """One block more; False where the space is exhausted (invariant: then it holds the answer) or the limit reached."""
        room = self.limit - self.size
        x = self._orthonormal(self.next[:, :room])
        if x.shape[1] == 0:
            return False
        old, new = slice(0, self.size), slice(self.size, self.size + x.shape[1])
        y = self.a @ x
        self.v[:, new], self.w[:, new] = x, y
        # products in the compute dtype, sums by BLAS; the polish step removes what that costs
        self.gram[new, new] = (y.mT @ y).to(self.gram.dtype)
        if self.size:
            border = (self.w[:, old].mT @ y).to(self.gram.dtype)
            self.gram[old, new], self.gram[new, old] = border, border.mT
        self.size = new.stop
        self.next = self.a.mT @ y
        return self.size < self.limit

    def _orthonormal(self, x: Tensor) -> Tensor:
        """x made orthonormal, and orthogonal to the space; directions that are already in it are dropped."""
        before = x.norm(dim=0).max()
        if not bool(before > 0):
            return x[:, :0]
        old = self.v[:, : self.size]
        for _ in range(2):
            x = x - old @ (old.mT @ x)
            x, r = torch.linalg.qr(x)
            kept = r.diagonal().abs() > 1e-6 * before
            x = x[:, kept]
            before = before.new_ones(())
            if x.shape[1] == 0:
                break
        return x

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Leading Ritz values (k,) and vectors (size, k): λ of AᵀA in the space, never above the true ones."""
        values, vectors = eigh(self.gram[: self.size, : self.size])
        return values[: self.rank], vectors[:, : self.rank]


def _explored(a: Tensor, rank: int, spec: SvdSpec) -> _Krylov:
    """Grow the space until the predicted further gain is below `tol` of the error (reference §2.2)."""
    space = _Krylov(a, rank, spec.seed)
    total = float(norm_squared(a))
    pace, errors, looked = max(space.width, rank // 4), [], 0
    while space.grow():
        if space.size < 1.5 * rank or space.size - looked < pace:
            continue
        looked = space.size
        errors.append(max(0.0, total - float(space.ritz()[0].sum())))
        if _settled(errors, total, spec.tol):
            break
    return space


def _settled(errors: list[float], total: float, tol: float) -> bool:
    """Whether the geometric extrapolation of the last two decrements of the squared error promises less than `tol`."""
    error = errors[-1]
    if error <= 1e-12 * total:
        return True
    if len(errors) < 3:
        return False
    before, last = errors[-3] - errors[-2], errors[-2] - errors[-1]
    rho = min(0.9, max(0.4, last / before if before > 0 else 0.4))
    gain = 1.5 * last * rho / (1 - rho) / 2
    return gain < tol * error or gain / math.sqrt(error) < STALL * math.sqrt(total)


def _lanczos(a: Tensor, rank: int, spec: SvdSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Block Lanczos, then the polish: one half-step of subspace iteration from the left Ritz vectors.

    The polish makes exactly low-rank inputs accurate (1.8e-5 → 2.7e-7 in the reference) and halves the excess.
    """
    space = _explored(a, rank, spec)
    if space.size < rank:  # the space is invariant: A has no more rank than this
        return _padded(a, space, rank)
    _, vectors = space.ritz()
    q, _ = torch.linalg.qr(space.w[:, : space.size] @ vectors.to(a.dtype))
    v, s, u = _half_step(a.mT, q)
    return u, s, v


def _padded(a: Tensor, space: _Krylov, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """All of A's rank, and zeros for the rest that was asked for."""
    u, s, v = _half_step(a, space.v[:, : space.size])
    missing = rank - s.shape[0]
    pad = torch.nn.functional.pad
    return pad(u, (0, missing)), pad(s, (0, missing)), pad(v, (0, missing))


_SOLVERS: dict[str, Solver] = {"gram": _gram, "exact": _exact, "lanczos": _lanczos}


def energies(a: Tensor, rank: int, spec: SvdSpec | None = None) -> Tensor:
    """The `rank` leading squared singular values of a (..., m, n), (..., k), in float64: what a LoRA of each rank keeps.

    Ritz values: never above the true ones, and near enough that the error they leave is within `tol` of the least.
    """
    a = upcast(a)
    if a.ndim > 2:
        members = [energies(member, rank, spec) for member in a.reshape(-1, *a.shape[-2:])]
        return torch.stack(members).reshape(*a.shape[:-2], -1)
    rank = min(rank, *a.shape)
    spec = spec or SvdSpec(rank)
    wide = a if a.shape[0] >= a.shape[1] else a.mT
    if _solver(spec.method, rank, wide.shape[1]) is not _lanczos:
        return eigh(gram_columns(wide))[0][:rank]
    found = _explored(wide, rank, spec).ritz()[0]
    return torch.nn.functional.pad(found, (0, rank - found.shape[0]))


def factored_svd(left: Tensor, right: Tensor) -> LowRank:
    """Exact SVD of left (..., m, r) · right (..., r, n), k = r, without forming the product.

    Gram matrices and eigendecompositions of r × r cores in float64: rank-revealing, as accurate as float64 QR down to
    σ/σ₁ of about 1e-7, as cheap as float32 QR (reference §1.1). Without float64 (MPS), by QR in float32.
    """
    dtype = compute_dtype(left, right)
    if not supports_float64(left.device):
        return _factored_qr(left.to(dtype), right.to(dtype))
    up, down = left.double(), right.double()
    values, vectors = eigh(up.mT @ up)
    h = values.sqrt()
    alive = values > up.shape[-1] * torch.finfo(torch.float64).eps * values.amax(-1, keepdim=True)
    inverse = torch.where(alive, 1.0 / torch.where(alive, h, 1.0), 0.0)
    b = vectors * h.unsqueeze(-2)
    squares, y = eigh(b.mT @ (down @ down.mT) @ b)
    s = squares.sqrt()
    kept = squares > up.shape[-1] * torch.finfo(torch.float64).eps * squares.amax(-1, keepdim=True)
    s_inverse = torch.where(kept, 1.0 / torch.where(kept, s, 1.0), 0.0)
    u = up @ (vectors * inverse.unsqueeze(-2)) @ y
    vh = s_inverse.unsqueeze(-1) * (y.mT @ b.mT @ down)
    s = torch.where(kept, s, 0.0)
    return LowRank(u.to(dtype), s.to(dtype), vh.to(dtype), torch.zeros(s.shape[:-1], dtype=s.dtype, device=s.device))


def _factored_qr(left: Tensor, right: Tensor) -> LowRank:
    q1, r1 = torch.linalg.qr(left)
    q2, r2 = torch.linalg.qr(right.mT)
    u, s, vh = torch.linalg.svd(r1 @ r2.mT, full_matrices=False)
    return LowRank(q1 @ u, s, vh @ q2.mT, torch.zeros(s.shape[:-1], dtype=s.dtype, device=s.device))
