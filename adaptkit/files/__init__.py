"""Tensor files: safetensors, shards, folders and torch pickles. Knows nothing about adapters."""
