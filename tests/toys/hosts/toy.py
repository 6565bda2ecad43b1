"""A toy host: loads the toy format of the toy family."""

from __future__ import annotations

from adaptkit.hosts.contract import MEASURED, Cell, Host

HOST = Host(
    name="toy",
    title="Toy host",
    measured="in a test",
    cells=(Cell("toy", ("toy",)),),
    writes={"": ("toy",)},
    algorithms=(*MEASURED, "toy"),
)
