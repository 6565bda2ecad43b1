"""A toy host: loads the toy format of the toy family. What it reads is in `measured/toy.json`."""

from __future__ import annotations

from adaptkit.hosts.contract import MEASURED, Cell, Host

HOST = Host(
    name="toy",
    title="Toy host",
    cells=(Cell("toy", ("toy",)),),
    writes={"": ("toy",)},
    algorithms=(*MEASURED, "toy"),
)
