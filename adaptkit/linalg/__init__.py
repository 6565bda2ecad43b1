"""Batched low-rank and Kronecker kernels on plain tensors (..., m, n). Knows no adapters."""
