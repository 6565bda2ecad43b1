"""Print and draw reports, one file per report."""
