"""Pickles of torch, read without running their code."""
