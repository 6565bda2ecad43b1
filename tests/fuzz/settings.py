"""Settings of PEFT's kinds, changed: files whose tensors mean nothing without their configuration."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from adaptkit.errors import AdaptkitError, InternalError
from adaptkit.ops import convert, inspect, merge

ODD: tuple[Any, ...] = (
    0, -1, 1, 2, 7, 10**9, 2**63, 10**30, 10**350, 1.5, 0.0, -2.0, 1e-300, 1e308, float("nan"), float("inf"),
    True, False, None, "", "x", "full", [], [1], ["to_q"], {}, {"to_q": 3}, {"to_q": 10**9}, {"(a+)+$": 2},
    {"to_q": "x"}, [[]], {"a": {"b": 1}},
)  # fmt: skip


class Settings:
    """A folder with one adapter of each kind, as PEFT saved it."""

    def __init__(self, folder: Path) -> None:
        from tests.interop.test_peft_read import CASES

        self.folder, self.names = folder, list(CASES)
        self.cases: dict[str, Any] = {}

    def once(self, name: str, draw: random.Random) -> str:
        """Change one to three settings of a kind, and run a verb."""
        from tests.interop.test_peft_read import Case

        del name
        kind = draw.choice(self.names)
        if kind not in self.cases:
            folder = self.folder / kind
            folder.mkdir()
            case = Case(kind, folder)
            config = case.adapter / "adapter_config.json"
            self.cases[kind] = case, config, json.loads(config.read_text(encoding="utf-8"))
        case, config, said = self.cases[kind]
        changed = {
            draw.choice(list(said)): draw.choice(ODD) for _ in range(draw.choice((1, 1, 2, 3)))
        }
        config.write_text(json.dumps(said | changed), encoding="utf-8")
        out = self.folder / f"out{draw.randrange(10**9)}"
        try:
            self._run(draw.choice(("inspect", "merge", "convert", "lora")), case, out)
        except AdaptkitError as error:
            if isinstance(error, InternalError):
                raise
            assert not out.exists()
            return f"refused {type(error).__name__}"
        return "read"

    @staticmethod
    def _run(verb: str, case: Any, out: Path) -> None:
        shared: dict[str, Any] = {"family": "flux", "output": out}
        if verb == "inspect":
            error = inspect.run(case.adapter, inspect.Options(stats=True, family="flux")).error
            if error is not None:
                raise error
        elif verb == "merge":
            shared["output"] = out.with_suffix(".safetensors")
            merge.run(merge.plan(case.base, [(case.adapter, 1.0)], merge.Options(**shared)))
            shared["output"].unlink()
        else:
            more = {} if verb == "convert" else {"algo": "lora", "base": case.base}
            convert.run(convert.plan(case.adapter, convert.Options(to="peft", **shared, **more)))
            for path in out.iterdir():
                path.unlink()
            out.rmdir()
