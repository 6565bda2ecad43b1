"""Draw and print reports: one file per report."""
