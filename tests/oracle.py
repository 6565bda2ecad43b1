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
            result[i * c : (i + 1) * c, j * d : (j + 1) * d] = float(w1[i, j]) * w2.astype(
                np.float64
            )
    return scale * result


def lokr_stored(
    tensors: Mapping[str, Array], alpha: float | None, kernel: tuple[int, ...] = ()
) -> Array:
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
    blocks = [
        matrix[i * c : (i + 1) * c, j * d : (j + 1) * d].ravel() for i in range(a) for j in range(b)
    ]
    sigma = np.linalg.svd(np.array(blocks, dtype=np.float64), compute_uv=False)
    return float(np.sqrt((sigma[1:] ** 2).sum()))


def best_kron_of_rank(
    matrix: Array, outer: tuple[int, int], inner: tuple[int, int], rank: int, restarts: int
) -> float:
    """The least ‖M − A ⊗ B‖_F found for A of `outer` and B of `inner`, B of at most `rank`.

    Alternating least squares (for B, then for A), 60 times from each random A.
    """
    (a, b), (c, d) = outer, inner
    blocks = np.asarray(matrix, dtype=np.float64).reshape(a, c, b, d).transpose(0, 2, 1, 3)
    draw, kept = np.random.default_rng(0), 0.0
    for _ in range(restarts):
        first = draw.standard_normal((a, b))
        for _ in range(60):
            first = first / np.linalg.norm(first)
            u, s, vh = np.linalg.svd(np.einsum("ab,abcd->cd", first, blocks), full_matrices=False)
            kept = max(kept, float((s[:rank] ** 2).sum()))
            first = np.einsum("abcd,cd->ab", blocks, (u[:, :rank] * s[:rank]) @ vh[:rank])
    return float(np.sqrt((matrix**2).sum() - kept))


# kinds that are no difference: W' from W, float64, one weight at a time


def _rotation(block: np.ndarray) -> np.ndarray:
    skew = block - block.T
    eye = np.eye(len(block))
    return (eye + skew) @ np.linalg.inv(eye - skew)


def _bounded(blocks: np.ndarray, bound: float) -> np.ndarray:
    """Blocks whose skew parts together have a norm of at most `bound` (0: as they are).

    LyCORIS `modules/diag_oft.py: get_r` adds 1e-8 to the norm before it divides by it.
    """
    norm = np.sqrt(sum(((b - b.T) ** 2).sum() for b in blocks.reshape(-1, *blocks.shape[-2:])))
    norm += 1e-8
    return blocks * min(1.0, bound / norm) if bound > 0 else blocks


def oft(
    weight: np.ndarray, blocks: np.ndarray, bound: float, rescale: np.ndarray | None
) -> np.ndarray:
    """Every block of rows, turned: x -> R^T x (Qiu et al. 2023, as LyCORIS has it)."""
    merged, size = weight.copy(), blocks.shape[-1]
    for n, block in enumerate(_bounded(blocks, bound)):
        rows = slice(n * size, (n + 1) * size)
        merged[rows] = np.einsum("nm,n...->m...", _rotation(block), weight[rows])
    return merged if rescale is None else merged * rescale.reshape(-1, *[1] * (weight.ndim - 1))


def boft(
    weight: np.ndarray, blocks: np.ndarray, bound: float, rescale: np.ndarray | None
) -> np.ndarray:
    """Butterfly stages (Liu et al. 2023): stage s turns the rows whose numbers differ by multiples of 2^s b/2."""
    merged, size = weight.copy(), blocks.shape[-1]
    for stage, turns in enumerate(_bounded(blocks, bound)):
        apart = 2**stage * (size // 2)
        order = np.arange(len(weight)).reshape(-1, 2, apart).transpose(0, 2, 1).reshape(-1, size)
        new = merged.copy()
        for rows, block in zip(order, turns, strict=True):
            new[rows] = np.einsum("ij,j...->i...", _rotation(block), merged[rows])
        merged = new
    return merged if rescale is None else merged * rescale.reshape(-1, *[1] * (weight.ndim - 1))


def kohya_oft(weight: np.ndarray, parts: list[np.ndarray], alpha: float) -> np.ndarray:
    """Every part of the rows turned by blocks of its own: x -> R^T x, bounded by alpha times the part's rows.

    sd-scripts `networks/oft_flux.py`: `RW = einsum("k n m, k n p -> k m p", R, W)`.
    """
    merged, at = weight.copy(), 0
    for blocks in parts:
        size = blocks.shape[-1]
        for block in (
            _bounded(blocks, alpha * len(blocks) * size) if alpha else np.zeros_like(blocks)
        ):
            merged[at : at + size] = np.einsum(
                "nm,n...->m...", _rotation(block), weight[at : at + size]
            )
            at += size
    return merged


def dora(weight: np.ndarray, delta: np.ndarray, magnitude: np.ndarray, axis: int) -> np.ndarray:
    """m V / |V| with V = W + dW, the norm over everything but `axis` (Liu et al. 2024)."""
    whole = weight + delta
    others = tuple(n for n in range(weight.ndim) if n != axis)
    shape = [1] * weight.ndim
    shape[axis] = -1
    return magnitude.reshape(shape) * whole / np.sqrt((whole**2).sum(axis=others, keepdims=True))


def glora(weight: np.ndarray, tensors: dict[str, np.ndarray], scale: float) -> np.ndarray:
    """W + s (b1 b2 + W a1 a2), a1 and a2 on the inputs at every kernel position (Chavan et al. 2023)."""
    a1, a2, b1 = (tensors[name].reshape(tensors[name].shape[:2]) for name in ("a1", "a2", "b1"))
    low = np.einsum("or,r...->o...", b1, tensors["b2"])
    through = np.einsum("oi...,ir,rj->oj...", weight, a1, a2)
    return weight + scale * (low + through)


def ia3(weight: np.ndarray, added: np.ndarray, axis: int) -> np.ndarray:
    shape = [1] * weight.ndim
    shape[axis] = -1
    return weight * (1 + added.reshape(shape))


def peft_oft(
    weight: np.ndarray, packed: np.ndarray, size: int, *, scaled: bool = False
) -> np.ndarray:
    """Blocks of the inputs, turned by the series I + 2Q + 2Q^2 + 2Q^3 + Q^4 (PEFT); OneTrainer may scale Q."""
    flat = weight.reshape(len(weight), -1)
    packed = packed / (2 * np.sqrt(size - 1)) if scaled else packed
    merged = flat.copy()
    for n in range(flat.shape[1] // size):
        skew = np.zeros((size, size))
        skew[np.triu_indices(size, 1)] = packed[n if len(packed) > 1 else 0]
        skew -= skew.T
        powers = [np.linalg.matrix_power(skew, k) for k in range(5)]
        turn = powers[0] + 2 * powers[1] + 2 * powers[2] + 2 * powers[3] + powers[4]
        columns = slice(n * size, (n + 1) * size)
        merged[:, columns] = flat[:, columns] @ turn.T
    return merged.reshape(weight.shape)


def peft_boft(weight: np.ndarray, blocks: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """factor · W · rotᵀ, rot = Π P blockdiag(R) Pᵀ, with the permutation matrices PEFT builds."""
    stages, count, size, _ = blocks.shape
    n = count * size
    flat = weight.reshape(len(weight), -1)
    rotation = np.eye(n)
    for stage in range(stages):
        run = size // 2 if stages > 1 else size
        group = size * 2**stage
        order = np.arange(n)
        if stages > 1:
            for start in range(0, n, group):
                runs = order[start : start + group].reshape(-1, run)
                order[start : start + group] = np.concatenate([runs[::2], runs[1::2]]).reshape(-1)
        permutation = np.zeros((n, n))
        permutation[np.arange(n), order] = 1
        diagonal = np.zeros((n, n))
        for k, block in enumerate(blocks[stage]):
            at = slice(k * size, (k + 1) * size)
            diagonal[at, at] = _rotation(-0.5 * block)
        rotation = permutation @ diagonal @ permutation.T @ rotation
    return (factor.reshape(-1, 1) * (flat @ rotation.T)).reshape(weight.shape)
