"""Krylov subspaces of the leading singular vectors of one matrix, and those vectors to float64.

Adaptive: it is looked at after every block. Stacks on accelerators are those of `stacks`.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adaptkit.linalg.precision import (
    ALIGNED,
    each,
    empty,
    norm_squared,
    works_on_stacks,
)
from adaptkit.linalg.split import gram_of_stack

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "BLOCK",
    "Krylov",
    "add_gram",
    "eigenvalues",
    "eigh",
    "explored",
    "gram_columns",
    "gram_of_products",
    "leading_basis",
    "leading_vectors",
    "mirrored",
    "start_block",
    "times",
]

# rows of A at a time, if A is larger than the cache: a step multiplies twice by each cached block
ROWS = 256
LARGE = 1 << 22  # elements
# columns per block there, where reading A takes most of the time: four blocks do as six of 16 do
WIDE = 24
LONG = 1 << 12  # rows of A that are summed in its own dtype
BLOCK = 1 << 18  # elements of A widened to float64 at a time: 2 MB, which stay in the cache
STALL = 1e-5  # of ‖A‖: stop if the error would change by less, whatever its relative change
PACES = 0.1, 0.9  # the ratio of two gains in a row, as far as it is believed
MARGIN = 1.5  # gains may slow down, and what is left then be this much more
NARROW = 0.1  # of θ: gaps are taken as this much wider, since the values of a cluster share a space
ALIKE = 1e-2  # of λ: a block's worth of Ritz values this close may be a part of a larger cluster
# of λ: a block's worth of Ritz values this close may be copies of one λ, of which A has more
EQUAL = 1e-4
WORN = 1e-2  # a direction that keeps less of its length is orthogonalised once more
# of the largest eigenvalue of AᵀA: float64 tells it and its vector to eight digits. Smaller ones
# are sought in what the larger ones leave of A, where they are large.
CLEAR = 1e-8
WIDENED = 256  # rows of A widened at a time: fewer would wait for the Gram matrix to be read
TRIANGLE = 160  # columns of a Gram matrix at a time: those above them are not computed
DEAD = 1e-6  # a direction that keeps less of its length is already in the space


def block_width(n: int, rank: int) -> int:
    """Columns per block, wider for larger ranks (measured)."""
    return min(n, 8 if rank <= 8 else 16 if rank <= 64 else 32)


def start_block(rows: int, width: int, seed: int) -> Tensor:
    """Gaussian (rows, width), drawn on the CPU so that all devices start alike."""
    return torch.randn(
        rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float32
    )


def eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (descending, clamped to ≥ 0) and eigenvectors of a symmetric matrix.

    In the dtype of the matrix. Computed on the CPU: CUDA's looped eigh takes as long at these sizes
    (pytorch#175585). Falls back to a float64 SVD if LAPACK does not converge. Each member of a
    stack is computed by itself.
    """
    host = gram.cpu()
    try:
        # if every matrix is aligned, torch's own loop over LAPACK gives the same bits 10 % faster
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
    """Eigenvalues as of `eigh`, without vectors, in a third of the time."""
    try:
        values: Tensor = torch.linalg.eigvalsh(gram.cpu())
    except RuntimeError:  # torch.linalg.LinAlgError: did not converge
        return eigh(gram)[0]
    return values.flip(-1).clamp_min(0.0).to(gram.device)


def gram_columns(a: Tensor) -> Tensor:
    """AᵀA (..., N, N) of a (..., M, N) in float64, widened in blocks of rows.

    On other accelerators large ones are made of exact float32 products, see `split`.
    """
    if works_on_stacks(a.device):
        return gram_of_stack(a)
    wide = torch.float64
    total = torch.zeros(*a.shape[:-2], a.shape[-1], a.shape[-1], dtype=wide, device=a.device)
    step = max(1, BLOCK // max(1, a.shape[-1]))
    for start in range(0, a.shape[-2], step):
        add_gram(total, a[..., start : start + step, :].to(wide))
    return mirrored(total)


def add_gram(total: Tensor, rows: Tensor) -> None:
    """Add rowsᵀ·rows to the lower triangle of total (..., N, N): in 0.55 to 0.65 of the time."""
    for start in range(0, rows.shape[-1], TRIANGLE):
        stop = start + TRIANGLE
        place, some = total[..., start:stop, :stop], rows[..., start:stop].mT
        if rows.ndim == 2 and rows.dtype == total.dtype:
            place.addmm_(some, rows[:, :stop])
        else:
            place += some @ rows[..., :stop]


def mirrored(total: Tensor) -> Tensor:
    """Fill the upper triangle of total (..., N, N)."""
    for start in range(TRIANGLE, total.shape[-1], TRIANGLE):
        stop = start + TRIANGLE
        total[..., :start, start:stop] = total[..., start:stop, :start].mT
    return total


def gram_of_products(a: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """AᵀA (N, N) of a (M, N), on a CPU of products in the dtype of A, summed in `dtype`.

    In half the time of `gram_columns`. Float32 moves the leading eigenvalues by 1e-7 of the first,
    and their vectors capture as much.
    """
    if works_on_stacks(a.device) or a.ndim > 2:
        return gram_columns(a)
    total = a.new_zeros(a.shape[1], a.shape[1], dtype=dtype)
    for start in range(0, len(a), LONG):
        add_gram(total, a[start : start + LONG])
    return mirrored(total)


def power_of_two(total: Tensor) -> Tensor:
    """About 1/‖A‖ from ‖A‖² (...,), as an exact power of two.

    AᵀA x squares σ, which overflows float32 beyond 3e9 and underflows below 3e-10.
    """
    # powers of two scale without rounding
    exponent = total.clamp_min(torch.finfo(torch.float32).tiny).log2().mul(-0.5).round()
    return exponent.clamp(-120, 120).exp2()


class Krylov:
    """Block Lanczos on AᵀA with full reorthogonalisation on the small side.

    v spans the space, w = A·v, gram = wᵀw = vᵀAᵀA v. `back` = scale · Aᵀw, which each step computes
    for the next; `total` is ‖A‖².

    Vectors are stored as rows. Both products of a step with a block of A's rows then run at
    60 GFLOPS; A·x and then Aᵀ·y with columns ran at 42 (one core, 11520 × 1280, 16 vectors).
    """

    def __init__(self, a: Tensor, rank: int, seed: int, total: Tensor) -> None:
        m, n = a.shape
        self.a, self.rank = a, rank
        self.large = a.numel() > LARGE and a.device.type == "cpu"
        self.width = max(block_width(n, rank), WIDE if self.large and rank > WIDE else 0)
        # bounds memory for spectra that barely decay; other matrices converge earlier
        self.limit = min(n, 6 * rank + 64)
        self._v = empty((self.limit, n), a.dtype, a.device)
        self._w = empty((self.limit, m), a.dtype, a.device)
        self._back = empty((self.limit, n), a.dtype, a.device)
        self.gram = torch.zeros(self.limit, self.limit, dtype=torch.float64, device=a.device)
        self.size = 0
        self._solved: tuple[int, tuple[Tensor, Tensor]] | None = None
        self.total = total
        self.scale = power_of_two(self.total).to(a.dtype)
        # a random block times A already leans towards the leading directions: one step is saved
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
        """Add a block; False if the space is invariant or at its limit.

        An invariant space lacks only directions that the start block lacks.
        """
        x = self._orthonormal(self._next[: self.limit - self.size])
        if x.shape[0] == 0:
            return False
        old, new = slice(0, self.size), slice(self.size, self.size + x.shape[0])
        self._v[new] = x
        y, self._next = self._w[new], self._back[new].zero_()
        m = self.a.shape[0]
        step = ROWS if self.large else m
        for start in range(0, m, step):
            rows = self.a[start : start + step]
            part = x @ rows.mT
            y[:, start : start + step] = part
            self._next.addmm_(part.mul_(self.scale), rows)
        # products in the compute dtype, summed by BLAS; the polish step corrects their rounding
        self.gram[new, new] = (y @ y.mT).to(self.gram.dtype)
        if self.size:
            border = (self._w[old] @ y.mT).to(self.gram.dtype)
            self.gram[old, new], self.gram[new, old] = border, border.mT
        self.size = new.stop
        return self.size < self.limit

    def _orthonormal(self, x: Tensor) -> Tensor:
        """Orthonormalise the rows of x; drop those in the space already."""
        before = x.norm(dim=1).max()
        if not bool(before > 0):
            return x[:0]
        old = self._v[: self.size]
        # one pass leaves rounding of the size it removes; twice is enough (Kahan and Parlett)
        x = x - (x @ old.mT) @ old
        x = x - (x @ old.mT) @ old
        q, r = torch.linalg.qr(x.mT)
        lengths = r.diagonal().abs()
        x = q.mT
        # the rest of a worn direction is half rounding: orthogonalise once more
        if bool(lengths.min() < WORN * before):
            x = x[lengths > DEAD * before]
            x = x - (x @ old.mT) @ old
            q, r = torch.linalg.qr(x.mT)
            x = q.mT[r.diagonal().abs() > DEAD]
        return x.contiguous()

    def reopened(self, seed: int) -> bool:
        """Add a random block if A has energy outside an invariant space.

        The space has only one copy of a repeated σ per column of its start block.
        """
        # the trace is the energy that the space holds
        held = float(self.gram.diagonal().sum())
        if self.size >= self.limit or held >= (1 - EQUAL) * float(self.total):
            return False
        self.refresh(seed + self.size)
        return True

    def refresh(self, seed: int) -> None:
        """Make the next block random."""
        self._next = start_block(self.a.shape[1], self.width, seed).to(self.a).mT.contiguous()

    def _eigh(self) -> tuple[Tensor, Tensor]:
        """All Ritz values and their vectors (size, size), kept until the space grows."""
        if self._solved is None or self._solved[0] != self.size:
            self._solved = self.size, eigh(self.gram[: self.size, : self.size])
        return self._solved[1]

    def values(self, size: int | None = None) -> Tensor:
        """Leading Ritz values (k,): λ of AᵀA in the space, never above the true ones.

        `size`: in the space of its first columns only, as it was before.
        """
        if size is None or size == self.size:
            return self._eigh()[0][: self.rank]
        return eigenvalues(self.gram[:size, :size])[: self.rank]

    def lacking(self) -> float:
        """About the energy that the leading Ritz values lack, from the residuals of their vectors.

        A Ritz vector x with AᵀA x = θ x + r lacks about ‖r‖² / (θ − θ'), with θ' the first value
        that is not sought. `back` holds AᵀA of every column, so that no pass over A is needed.
        """
        values, vectors = self._eigh()
        sought = values[: self.rank]
        gap = sought - (values[self.rank] if self.size > self.rank else 0.0)
        y = vectors[:, : self.rank].to(self.a.dtype)
        rest = self.back @ y / self.scale - (self.v @ y) * sought.to(self.a.dtype)
        squares = rest.square().sum(0).to(sought.dtype)
        wide = (gap + NARROW * sought).clamp_min(torch.finfo(sought.dtype).tiny)
        return float((squares / wide).sum())

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Leading Ritz values (k,) and vectors (size, k), never above the true values."""
        values, vectors = self._eigh()
        return values[: self.rank], vectors[:, : self.rank]


def explored(a: Tensor, rank: int, tol: float, seed: int, norm: Tensor | None = None) -> Krylov:
    """Grow the space until what it would still gain is below `tol` of the error.

    Two measures have to agree on that: the gains of the last blocks, extrapolated, and the
    residuals of the Ritz vectors. On 354 spectra, among them clusters, steps, plateaus and noise,
    the error of the polished result exceeds the optimum by more than 0.1 % once (0.108 %). Of a
    power-law spectrum with noise, 80 columns suffice for rank 32. `norm` is ‖A‖², if known.
    """
    space = Krylov(a, rank, seed, norm_squared(a) if norm is None else norm)
    total = float(space.total)
    sizes, begin = [0], 0
    known = 0.0  # energy found before the last random block
    while space.grow() or space.reopened(seed):
        sizes.append(space.size)
        # of fewer columns neither residuals nor gains say much: a cluster may not be seen yet
        if space.size < 2 * rank:
            continue
        error = total - float(space.values().sum())
        if space.lacking() > 2 * max(0.0, error) ** 0.5 * max(
            tol * max(0.0, error) ** 0.5, STALL * total**0.5
        ):
            continue
        looks = [size for size in sizes[-3:] if size >= max(rank, begin)]
        errors = [max(0.0, total - float(space.values(size).sum())) for size in looks]
        if not _settled(errors, total, tol):
            continue
        if not bool(_repeated(space.values(), space.width, ALIKE)) or (
            total - errors[-1] <= known * (1 + EQUAL)
        ):
            break
        known, begin = total - errors[-1], space.size
        space.refresh(seed + space.size)
    return space


def _repeated(values: Tensor, width: int, alike: float = EQUAL) -> Tensor:
    """Whether as many Ritz values (..., k) as a block has columns are equal.

    One start block finds no more copies of a repeated λ than it has columns.
    """
    if values.shape[-1] < width:
        return values.new_zeros(values.shape[:-1], dtype=torch.bool)
    first, last = values[..., : values.shape[-1] - width + 1], values[..., width - 1 :]
    return (last > (1 - alike) * first).any(-1)


def _settled(errors: list[float], total: float, tol: float) -> bool:
    """Whether extrapolating the last two decrements of the squared error predicts under `tol`."""
    error = errors[-1]
    # nothing is left but rounding
    if error <= 1e-12 * total:
        return True
    if len(errors) < 3:
        return False
    before, last = errors[-3] - errors[-2], errors[-2] - errors[-1]
    # early ratios are erratic: clamped, they neither stop too soon nor never
    rho = min(PACES[1], max(PACES[0], last / before if before > 0 else PACES[1]))
    gain = MARGIN * last * rho / (1 - rho) / 2
    return gain < tol * error or gain / math.sqrt(error) < STALL * math.sqrt(total)


# to float64, without a copy of the matrix: its smaller Gram matrix is decomposed in its place


def leading_vectors(gram: Callable[[], Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues (N,), descending, and `count` leading eigenvectors (N, count) of a Gram matrix.

    As of `eigh`. On a CPU they overwrite what `gram` makes, which saves half of the memory.
    """
    made = gram()
    if works_on_stacks(made.device):
        values, vectors = eigh(made)
        return values, vectors[:, :count]
    values, columns = torch.empty_like(made[0]), made.mT  # LAPACK's order: nothing is copied
    try:
        torch.linalg.eigh(columns, out=(values, columns))
    except RuntimeError:  # torch.linalg.LinAlgError: did not converge
        values, vectors = eigh(gram())
        return values, vectors[:, :count]
    return values.flip(-1).clamp_min(0.0), columns[:, columns.shape[1] - count :].flip(-1)


def leading_basis(a: Tensor, rank: int) -> Tensor:
    """Orthonormal v (N, rank) in float64: the leading right singular vectors of a (M, N).

    Eigenvectors of AᵀA alone would lose σ below 1e-8 σ₁. So those of 1e-4 σ₁ and more are taken
    first, and then those of A (I − v vᵀ) in the same way. The error of the best approximation in
    this space is that of LAPACK's SVD in float64.
    """
    found = a.new_zeros(a.shape[1], 0, dtype=torch.float64)
    while (left := rank - found.shape[1]) > 0:
        values, vectors = leading_vectors(partial(_gram_beside, a, found), left)
        clear = int((values >= CLEAR * values[0]).sum())
        # QR: where nothing is left of A, the vectors are any, also those found before
        before, found = found.shape[1], torch.cat([found, vectors[:, :clear]], 1)
        found = torch.linalg.qr(found).Q if before else found
    return found


def _gram_beside(a: Tensor, found: Tensor) -> Tensor:
    """BᵀB (N, N) in float64 for B = A (I − v vᵀ), with a (M, N) and v = `found` (N, k)."""
    total = a.new_zeros(a.shape[1], a.shape[1], dtype=torch.float64)
    for start in range(0, len(a), WIDENED):
        block = a[start : start + WIDENED].to(torch.float64)
        if found.shape[1]:
            block = block - (block @ found) @ found.mT
        add_gram(total, block)
    return mirrored(total)


def times(a: Tensor, v: Tensor) -> Tensor:
    """A · v (M, k) in float64, of a (M, N) and v (N, k) in float64, a block of rows at a time."""
    result = v.new_empty(len(a), v.shape[1])
    for start in range(0, len(a), WIDENED):
        rows = slice(start, start + WIDENED)
        torch.mm(a[rows].to(v.dtype), v, out=result[rows])
    return result
