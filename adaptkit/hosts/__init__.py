"""Hosts: programs that load adapters, what each really loads. One file each, attribute `HOST`.

Measured by running the hosts' own loaders over real key lists; see each file for the version.
"""

from __future__ import annotations

from adaptkit.hosts._judge import complete, hosts, judge, recipe

__all__ = ["complete", "hosts", "judge", "recipe"]
