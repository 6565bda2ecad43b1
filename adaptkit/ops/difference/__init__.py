"""Pair and probe two checkpoints, for extract, advise and compare."""
