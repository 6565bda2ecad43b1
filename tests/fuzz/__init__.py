"""Mutated files through every reader and every verb (`python -m tests.fuzz --help`)."""
