"""Hosts: the programs that load adapters, and what each really loads.

One file per host, with the attribute `HOST`. Measured by running the hosts' own loaders on real
key lists; each file states the version.
"""

from __future__ import annotations

from adaptkit.hosts._judge import complete, hosts, judge, losses, recipe

__all__ = ["complete", "hosts", "judge", "losses", "recipe"]
