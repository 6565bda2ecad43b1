"""Compare two checkpoints layer by layer: what extract, advise and compare share."""
