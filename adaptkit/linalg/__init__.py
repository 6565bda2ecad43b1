"""Batched kernels on plain tensors (..., m, n): low-rank and Kronecker approximation. Knows no adapters."""
