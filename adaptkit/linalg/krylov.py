"""Subspaces that hold the leading singular vectors: block Lanczos, adaptive for one matrix, of fixed size for a stack."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adaptkit.linalg.precision import ALIGNED, accumulate_dtype, each, empty, norm_squared

__all__ = ["BLOCK", "Krylov", "eigenvalues", "eigh", "explored", "fixed_basis", "gram_columns"]

ROWS = 512  # of A at a time, where A is larger than the cache: both products of a step while they are in it
LARGE = 1 << 22  # elements
BLOCK = 1 << 18  # elements of A widened to float64 at a time: 2 MB, which stay in the cache
STALL = 1e-5  # stop where the error would change by less than this share of ‖A‖, whatever its relative change
EQUAL = 1e-4  # of λ: a block's worth of Ritz values as close as this may be the copies of one λ, with more left out
WORN = 1e-2  # a direction that loses all but this share of its length is made orthogonal once more
DEAD = 1e-6  # a direction that loses all but this share of its length to the space is in it already


def block_width(n: int, rank: int) -> int:
    """Columns a block: wider for larger ranks, as measured in the reference (§2.2)."""
    return min(n, 8 if rank <= 8 else 16 if rank <= 64 else 32)


def start_block(rows: int, width: int, seed: int) -> Tensor:
    """Gaussian (rows, width), drawn on the CPU so that every device starts alike."""
    return torch.randn(
        rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float32
    )


def eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending and clamped to ≥ 0, and eigenvectors of a symmetric matrix, in its dtype.

    Done on the CPU: CUDA's looped eigh costs as much for these sizes (pytorch#175585). Where LAPACK does not converge, a
    float64 SVD decides. Each of a stack by itself.
    """
    host = gram.cpu()
    try:
        # LAPACK takes one matrix after another; where they all begin well, torch's own loop saves a tenth
        well = host.shape[-1] ** 2 * host.itemsize % ALIGNED == 0
        values, vectors = torch.linalg.eigh(host) if well else each(torch.linalg.eigh, host)
        values, vectors = values.flip(-1), vectors.flip(-1)
    except RuntimeError:  # torch.linalg.LinAlgError: did not converge
        if host.ndim > 2:
            values, vectors = each(eigh, host)
            return values.to(gram.device), vectors.to(gram.device)
        u, values, _ = torch.linalg.svd(host.double())
        values, vectors = values.to(host.dtype), u.to(host.dtype)
    return values.clamp_min(0.0).to(gram.device), vectors.to(gram.device)


def eigenvalues(gram: Tensor) -> Tensor:
    """As `eigh`, descending, without vectors: a third of the time."""
    try:
        values: Tensor = torch.linalg.eigvalsh(gram.cpu())
    except RuntimeError:  # torch.linalg.LinAlgError: did not converge
        return eigh(gram)[0]
    return values.flip(-1).clamp_min(0.0).to(gram.device)


def gram_columns(a: Tensor) -> Tensor:
    """AᵀA (..., N, N) of a (..., M, N) in float64 (float32 on MPS), A widened a block of rows at a time."""
    wide = accumulate_dtype(a.device)
    total = torch.zeros(*a.shape[:-2], a.shape[-1], a.shape[-1], dtype=wide, device=a.device)
    step = max(1, BLOCK // max(1, a.shape[-1]))
    for start in range(0, a.shape[-2], step):
        block = a[..., start : start + step, :].to(wide)
        total += block.mT @ block
    return total


def power_of_two(total: Tensor) -> Tensor:
    """About 1/‖A‖ from ‖A‖² (...,): AᵀA x squares σ, which leaves float32's range beyond 3e9 or below 3e-10. Exact factors."""
    exponent = total.clamp_min(torch.finfo(torch.float32).tiny).log2().mul(-0.5).round()
    return exponent.clamp(-120, 120).exp2()


class Krylov:
    """Block Lanczos on AᵀA with full reorthogonalisation on the small side: v spans, w = A·v, gram = wᵀw = vᵀAᵀA v.

    `back` = scale · Aᵀw, which each step makes for the next one; `total` is ‖A‖². Vectors are kept as rows: so both products
    of a step with one block of A's rows run at 60 GFLOPS where A·x and then Aᵀ·y, with columns, ran at 42 (one core,
    11520 × 1280, 16 vectors).
    """

    def __init__(self, a: Tensor, rank: int, seed: int, total: Tensor) -> None:
        m, n = a.shape
        self.a, self.rank = a, rank
        self.width = block_width(n, rank)
        self.limit = min(n, 6 * rank + 64)
        self._v = empty((self.limit, n), a.dtype, a.device)
        self._w = empty((self.limit, m), a.dtype, a.device)
        self._back = empty((self.limit, n), a.dtype, a.device)
        self.gram = torch.zeros(
            self.limit, self.limit, dtype=accumulate_dtype(a.device), device=a.device
        )
        self.size = 0
        self.total = total
        self.scale = power_of_two(self.total).to(a.dtype)
        self._next = start_block(m, self.width, seed).to(a).mT @ a

    @property
    def v(self) -> Tensor:
        """(n, size)."""
        return self._v[: self.size].mT

    @property
    def w(self) -> Tensor:
        """(m, size)."""
        return self._w[: self.size].mT

    @property
    def back(self) -> Tensor:
        """(n, size)."""
        return self._back[: self.size].mT

    def grow(self) -> bool:
        """One block more; False where the space is invariant (what it lacks, its start lacks) or the limit reached."""
        x = self._orthonormal(self._next[: self.limit - self.size])
        if x.shape[0] == 0:
            return False
        old, new = slice(0, self.size), slice(self.size, self.size + x.shape[0])
        self._v[new] = x
        y, self._next = self._w[new], self._back[new].zero_()
        m = self.a.shape[0]
        step = ROWS if self.a.numel() > LARGE and self.a.device.type == "cpu" else m
        for start in range(0, m, step):
            rows = self.a[start : start + step]
            part = x @ rows.mT
            y[:, start : start + step] = part
            self._next.addmm_(part.mul_(self.scale), rows)
        # products in the compute dtype, sums by BLAS; the polish step removes what that costs
        self.gram[new, new] = (y @ y.mT).to(self.gram.dtype)
        if self.size:
            border = (self._w[old] @ y.mT).to(self.gram.dtype)
            self.gram[old, new], self.gram[new, old] = border, border.mT
        self.size = new.stop
        return self.size < self.limit

    def _orthonormal(self, x: Tensor) -> Tensor:
        """The rows of x made orthonormal, and orthogonal to the space; directions that are already in it are dropped."""
        before = x.norm(dim=1).max()
        if not bool(before > 0):
            return x[:0]
        old = self._v[: self.size]
        x = x - (x @ old.mT) @ old
        x = x - (x @ old.mT) @ old
        q, r = torch.linalg.qr(x.mT)
        lengths = r.diagonal().abs()
        x = q.mT
        if bool(
            lengths.min() < WORN * before
        ):  # what is left of a direction is half rounding: once more
            x = x[lengths > DEAD * before]
            x = x - (x @ old.mT) @ old
            q, r = torch.linalg.qr(x.mT)
            x = q.mT[r.diagonal().abs() > DEAD]
        return x.contiguous()

    def reopened(self, seed: int) -> bool:
        """A fresh block for a space that is invariant without holding all of A: it has one copy of repeated σ a column."""
        held = float(self.gram.diagonal().sum())
        if self.size >= self.limit or held >= (1 - EQUAL) * float(self.total):
            return False
        self.refresh(seed + self.size)
        return True

    def refresh(self, seed: int) -> None:
        """Let the next block be a fresh one."""
        self._next = start_block(self.a.shape[1], self.width, seed).to(self.a).mT.contiguous()

    def values(self) -> Tensor:
        """Leading Ritz values (k,): λ of AᵀA in the space, never above the true ones."""
        return eigenvalues(self.gram[: self.size, : self.size])[: self.rank]

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Leading Ritz values (k,) and vectors (size, k): λ of AᵀA in the space, never above the true ones."""
        values, vectors = eigh(self.gram[: self.size, : self.size])
        return values[: self.rank], vectors[:, : self.rank]


def explored(a: Tensor, rank: int, tol: float, seed: int, norm: Tensor | None = None) -> Krylov:
    """Grow the space until the predicted further gain is below `tol` of the error (reference §2.2). `norm`: ‖A‖², if known."""
    space = Krylov(a, rank, seed, norm_squared(a) if norm is None else norm)
    total = float(space.total)
    pace, errors, looked = max(space.width, rank // 4), [], 0
    known = 0.0  # the energy found before the last fresh start
    while space.grow() or space.reopened(seed):
        if space.size < 1.5 * rank or space.size - looked < pace:
            continue
        looked = space.size
        values = space.values()
        errors.append(max(0.0, total - float(values.sum())))
        if _settled(errors, total, tol):
            if not bool(_repeated(values, space.width)) or total - errors[-1] <= known * (
                1 + EQUAL
            ):
                break
            known, errors = total - errors[-1], errors[-1:]
            space.refresh(seed + looked)
    return space


def _repeated(values: Tensor, width: int) -> Tensor:
    """Whether as many of the Ritz values (..., k) as a block has columns are one: one start finds no more copies of a λ."""
    if values.shape[-1] < width:
        return values.new_zeros(values.shape[:-1], dtype=torch.bool)
    first, last = values[..., : values.shape[-1] - width + 1], values[..., width - 1 :]
    return (last > (1 - EQUAL) * first).any(-1)


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


def fixed_basis(a: Tensor, rank: int, seed: int) -> Tensor:
    """An orthonormal (B, M, k) that holds the leading left singular vectors of each a (B, M, N), M ≥ N.

    Block Lanczos of fixed dimension 4k + 32 in matrix products and Cholesky factors only, which accelerators run
    stacked: at most 0.02 % above the optimum at k = 32 in the reference's prototype (§2.2). A member whose space holds all
    that its start reaches, or a repeated σ as often as a block can, gets a fresh block. No member steers another.
    """
    m, n = a.shape[-2:]
    width, limit = block_width(n, rank), min(n, 4 * rank + 32)
    v, w = a.new_zeros(*a.shape[:-2], n, limit), a.new_zeros(*a.shape[:-2], m, limit)
    following = a.mT @ start_block(m, width, seed).to(a)
    scale = power_of_two(norm_squared(a)).to(a.dtype)[..., None, None]
    size = looked = 0
    while size < limit:
        x = stacked_orthonormal(following[..., : limit - size], v[..., :size])
        y = a @ x
        new = slice(size, size + x.shape[-1])
        v[..., new], w[..., new] = x, y
        size = new.stop
        following = a.mT @ (y * scale)
        spent = x.abs().amax((-2, -1)) == 0
        if size - looked >= limit // 3:
            looked = size
            spent = spent | _repeated(eigh(gram_columns(w[..., :size]))[0][..., :rank], width)
        if bool(spent.any()):
            fresh = start_block(n, following.shape[-1], seed + size).to(a)
            following = torch.where(spent[..., None, None], fresh, following)
    _, vectors = eigh(gram_columns(w))
    left = w @ vectors[..., :rank].to(a.dtype)
    return stacked_orthonormal(left, left[..., :0])


def stacked_orthonormal(x: Tensor, space: Tensor) -> Tensor:
    """x (B, n, b) made orthonormal and orthogonal to `space` (B, n, s); directions already in it become zero.

    Twice: project, scale columns, Cholesky-QR with the b × b Gram matrix in float64 (`qr` runs one by one on CUDA).
    """
    for dead in (DEAD, 0.1):  # the second time lengths are 1, or those of rounding noise
        before = x.norm(dim=-2, keepdim=True).amax(-1, keepdim=True)
        x = x - space @ (space.mT @ x)
        size = x.norm(dim=-2, keepdim=True)
        alive = size > dead * before
        x = torch.where(alive, x / torch.where(alive, size, 1.0), 0.0)
        gram = gram_columns(x)
        gram = gram + 1e-10 * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        factor, failed = torch.linalg.cholesky_ex(gram)
        solved = torch.linalg.solve_triangular(
            factor.mT, x.to(gram.dtype), upper=True, left=False
        ).to(x.dtype)
        x = torch.linalg.qr(x)[0] if bool(failed.any()) else solved
    return x
