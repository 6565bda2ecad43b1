"""Whole verbs on mutated tiny files, in this process."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from adaptkit.errors import AdaptkitError, InternalError
from adaptkit.files.header import TORCH_NAMES, read_header
from adaptkit.ops import inspect
from adaptkit.ops.verb import verb
from tests.fuzz.files import File, adapters, checkpoint, mutated

OLD = b"the old output"
FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
Options = dict[str, Any]


class Broken(AssertionError):
    """A promise that a verb did not keep."""


def odd_numbers(path: Path) -> int:
    """How many numbers of a safetensors file are NaN or infinite; 0 for any other file."""
    try:
        infos = read_header(path).infos
    except AdaptkitError:
        return 0
    found = 0
    for info in infos.values():
        dtype = getattr(torch, TORCH_NAMES.get(info.dtype, ""), None)
        if info.dtype in FLOATS and info.numel:
            raw = bytearray(path.read_bytes()[info.start : info.stop])
            tensor = torch.frombuffer(raw, dtype=dtype)
            wide = tensor if info.dtype == "F64" else tensor.float()
            found += int((~torch.isfinite(wide)).sum())
    return found


def _convert(draw: random.Random) -> Options:
    to = draw.choice(("diffusers", "comfy", "kohya", "peft", "lycoris"))
    more = draw.choice(
        (
            {},
            {"algo": draw.choice(("lora", "lokr", "full")), "rank": 2},
            {"dtype": "fp16"},
            {"dtype": "bf16"},
            {"verify": True},
        )
    )
    return {"to": to, **more}


def _resize(draw: random.Random) -> Options:
    return draw.choice(
        (
            {"rank": 1},
            {"energy": 0.9},
            {"error": 0.2},
            {"size": 1500},
            {"sv_ratio": 4.0},
            {"rank": 2, "dtype": "fp16"},
            {"rank": 1, "verify": True},
        )
    )


def _combine(draw: random.Random) -> Options:
    method = draw.choice((None, None, "ties", "dare"))
    more: Options = {} if method is None else {"method": method, "density": 0.5}
    return {**more, **draw.choice(({}, {"rank": 2}, {"dtype": "fp16"}))}


def _merge(draw: random.Random) -> Options:
    return draw.choice(({}, {"dtype": "fp16"}, {"dtype": "bf16"}, {"verify": True}))


def _extract(draw: random.Random) -> Options:
    algo = draw.choice(("lora", "lokr", "full", "auto"))
    if algo == "full":
        return {"algo": algo}
    if algo == "auto":
        return {"algo": algo, "error": draw.choice((0.5, 0.05))}
    more = draw.choice(({"rank": 2}, {"energy": 0.9}, {"vectors": True, "rank": 1}))
    return {"algo": algo, **more}


OPTIONS: dict[str, Callable[[random.Random], Options]] = {
    "convert": _convert, "resize": _resize, "combine": _combine, "merge": _merge, "extract": _extract,
}  # fmt: skip
SEEDS = adapters()


class Bench:
    """A folder in which one verb runs after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.a, self.b = folder / "a.safetensors", folder / "b.safetensors"
        self.config = folder / "peft"
        self.config.mkdir(exist_ok=True)

    def once(self, name: str, draw: random.Random) -> str:
        """Run a verb once; says how it ended. Raises Broken for a broken promise."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self._inspected(draw) if name == "inspect" else self._written(name, draw)

    def _adapter(self, draw: random.Random, path: Path) -> File:
        file = mutated(SEEDS[draw.choice(list(SEEDS))], draw)
        file.save(path)
        return file

    def _inspected(self, draw: random.Random) -> str:
        if draw.random() < 0.2:
            mutated(checkpoint(), draw).save(self.a)
        else:
            self._adapter(draw, self.a)
        report = inspect.run(self.a, inspect.Options(stats=draw.random() < 0.5))
        json.dumps(report.to_dict())
        if isinstance(report.error, InternalError):
            raise report.error
        return "refused" if report.error else "read"

    def _inputs(self, name: str, draw: random.Random) -> list[Any]:
        if name == "extract":
            base, tuned = checkpoint(), checkpoint(seed=1)
            one = draw.random()
            (mutated(base, draw) if one < 0.5 else base).save(self.a)
            (mutated(tuned, draw) if one > 0.4 else tuned).save(self.b)
            return [self.a, self.b]
        self._adapter(draw, self.a)
        if name == "merge":
            base = checkpoint(draw.choice(("F32", "F32", "F16", "BF16")))
            (mutated(base, draw) if draw.random() < 0.4 else base).save(self.b)
            return [self.b, [(self.a, draw.choice((1.0, 0.5, -1.0)))]]
        if name == "combine":
            SEEDS[draw.choice(("lora", "peft"))].save(self.b)
            return [[(self.a, 1.0), (self.b, 0.5)]]
        return [self.a]

    def _written(self, name: str, draw: random.Random) -> str:
        inputs, options = self._inputs(name, draw), OPTIONS[name](draw)
        out = self.folder / "out.safetensors"
        if out.is_dir():
            shutil.rmtree(out)
        if options.get("to") == "peft":
            out.unlink(missing_ok=True)
        else:
            out.write_bytes(OLD)
        shared: Options = {
            "output": out,
            "overwrite": True,
            "family": "sd1",
            "allow_unused": draw.random() < 0.7,
        }
        found = verb(name)
        try:
            plan = found.plan(*inputs, found.options(**shared, **options))
            try:
                found.run(plan)
            finally:
                plan.close()
            ended = "written"
        except AdaptkitError as error:
            if isinstance(error, InternalError):
                raise
            ended = f"refused {type(error).__name__}"
        self._check(out, ended, name, options)
        return ended

    def _check(self, out: Path, ended: str, name: str, options: Options) -> None:
        left = sorted(item.name for item in self.folder.iterdir() if item.name.startswith("."))
        if left:
            for item in left:
                (self.folder / item).unlink()
            raise Broken(f"left {left}")
        if ended != "written":
            if options.get("to") == "peft":
                return
            if out.read_bytes() != OLD:
                raise Broken(f"{ended}, and the old output is gone")
            return
        held = sum(map(odd_numbers, (self.a, self.b)))
        if out.is_file() and odd_numbers(out) > held:
            raise Broken(f"more numbers that are none than the inputs held: {options}")
