"""Bytes on disk: safetensors, shards, folders and torch pickles; nothing about adapters."""
