"""Kronecker products: their blocks, the nearest one to a matrix, and how to detect one."""
