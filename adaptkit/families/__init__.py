"""Model families: the modules of each model, and their names in each naming.

One file per family, with the attribute `FAMILY`.
"""
