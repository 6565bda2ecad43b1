"""float64 NumPy answers from the papers and upstream sources; imports nothing from adaptkit, shares no code with it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

Array = np.ndarray


def factorization(dimension: int, factor: int) -> tuple[int, int]:
    """(small, large) with small · large = dimension and small the greatest divisor ≤ factor and ≤ large.

    What LyCORIS' `factorization` gives for a positive factor (checked against it in tests/interop).
    """
    if factor < dimension and dimension % factor == 0:
        return min(factor, dimension // factor), max(factor, dimension // factor)
    if dimension % factor == 0:
        return 1, dimension
    small = max(n for n in range(1, int(dimension**0.5) + 1) if dimension % n == 0 and n <= factor)
    return small, dimension // small


def lora(up: Array, down: Array, scale: float, mid: Array | None = None) -> Array:
    """ΔW[o, i, …] = scale Σ_r up[o, r] down[r, i, …]; with mid, Σ_pq up[o, p] mid[p, q, …] down[q, i]."""
    out, rank = up.shape[:2]
    flat_up = up.reshape(out, rank).astype(np.float64)
    if mid is None:
        return scale * np.einsum("or,r...->o...", flat_up, down.astype(np.float64))
    flat_down = down.reshape(down.shape[0], down.shape[1]).astype(np.float64)
    return scale * np.einsum("op,pq...,qi->oi...", flat_up, mid.astype(np.float64), flat_down)


def lokr(w1: Array, w2: Array, scale: float = 1.0) -> Array:
    """W1 ⊗ W2 by its definition: block (i, j) of the result is w1[i, j] · w2; w2 may carry kernel dimensions."""
    a, b = w1.shape
    c, d, *kernel = w2.shape
    result = np.zeros((a * c, b * d, *kernel))
    for i in range(a):
        for j in range(b):
            result[i * c : (i + 1) * c, j * d : (j + 1) * d] = float(w1[i, j]) * w2.astype(np.float64)
    return scale * result


def lokr_stored(tensors: Mapping[str, Array], alpha: float | None, kernel: tuple[int, ...] = ()) -> Array:
    """ΔW from stored LoKr tensors, as LyCORIS `modules/lokr.py` builds it in its forward pass."""
    t = {role: value.astype(np.float64) for role, value in tensors.items()}
    rank = None
    if "w1" in t:
        w1 = t["w1"]
    else:
        rank = t["w1_b"].shape[0]
        w1 = t["w1_a"] @ t["w1_b"]
    if "w2" in t:
        w2 = t["w2"]
    elif "t2" in t:
        rank = t["w2_b"].shape[0]
        w2 = np.einsum("pq...,pc,qd->cd...", t["t2"], t["w2_a"], t["w2_b"])
    else:
        rank = t["w2_b"].shape[0]
        flat = t["w2_a"] @ t["w2_b"].reshape(rank, -1)
        w2 = flat.reshape(flat.shape[0], -1, *kernel)
    scale = 1.0 if rank is None or alpha is None else alpha / rank
    return lokr(w1, w2, scale)


def loha(tensors: Mapping[str, Array], alpha: float | None, kernel: tuple[int, ...] = ()) -> Array:
    """ΔW from stored LoHa tensors, as LyCORIS `modules/loha.py` builds it in its forward pass."""
    t = {role: value.astype(np.float64) for role, value in tensors.items()}
    sides = []
    for n in "12":
        if f"t{n}" in t:
            sides.append(np.einsum("pq...,po,qi->oi...", t[f"t{n}"], t[f"w{n}_a"], t[f"w{n}_b"]))
        else:
            flat = t[f"w{n}_a"] @ t[f"w{n}_b"]
            sides.append(flat.reshape(flat.shape[0], -1, *kernel))
    scale = 1.0 if alpha is None else alpha / t["w1_b"].shape[0]
    return scale * sides[0] * sides[1]


def best_rank(matrix: Array, rank: int) -> float:
    """‖M − M_k‖_F of the best rank-k approximation (Eckart–Young)."""
    sigma = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    return float(np.sqrt((sigma[rank:] ** 2).sum()))


def best_kron(matrix: Array, a: int, b: int) -> float:
    """‖M − A ⊗ B‖_F of the nearest Kronecker product with A of a × b (Van Loan and Pitsianis 1993)."""
    rows, columns = matrix.shape
    c, d = rows // a, columns // b
    blocks = [matrix[i * c : (i + 1) * c, j * d : (j + 1) * d].ravel() for i in range(a) for j in range(b)]
    sigma = np.linalg.svd(np.array(blocks, dtype=np.float64), compute_uv=False)
    return float(np.sqrt((sigma[1:] ** 2).sum()))
