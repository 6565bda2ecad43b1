"""Faults of disks, injected under whole commands."""
