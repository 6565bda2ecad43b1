"""Hosts: the programs that load adapters, and what each really loads.

One file per host, with the attribute `HOST`: what makes it refuse or misread a file. Which names it
reads is a table in `measured/`, written by `python -m tests.interop.hosts --record`: diffusers,
mflux, SD.Next, stable-diffusion.cpp and Wan2GP are run, the others are described from their code in
`tests/interop/hosts`.
"""

from __future__ import annotations

from adaptkit.hosts._judge import (
    complete,
    format_for,
    hosts,
    judge,
    losses,
    named,
    recipe,
    usual_format,
)
from adaptkit.hosts._measured import measured_with

__all__ = [
    "complete",
    "format_for",
    "hosts",
    "judge",
    "losses",
    "measured_with",
    "named",
    "recipe",
    "usual_format",
]
