"""Algorithms: what an adapter's tensors mean. One file each, attribute `ALGORITHM`."""
