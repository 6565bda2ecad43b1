"""What is written is read back before it appears."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from adaptkit.adapter import Adapter
from adaptkit.errors import NotRepresentable
from adaptkit.files.header import TensorSpec
from adaptkit.keymap import algorithms, compile_keys
from adaptkit.ops import resize
from adaptkit.ops.adapter_file.peft_config import PeftModule
from adaptkit.ops.adapter_file.writer import AdapterWriter, Meant
from tests import made

if TYPE_CHECKING:
    from adaptkit.files.sink import TensorSink
    from adaptkit.names import Slot

ROWS, COLUMNS, RANK = 24, 32, 4
SHAPES = {"up": (ROWS, RANK), "down": (RANK, COLUMNS)}
LORA = algorithms()["lora"]
OTHER = made.LINEAR.replace("to_q", "to_k")


def slot(module: str = made.LINEAR) -> Slot:
    parsed = compile_keys("sd1", "kohya").parse(f"{module}.lora_up.weight")
    assert parsed is not None
    return parsed.slot


def write(output: Path, format: str, meant: dict[Slot, Meant], alpha: float = 2.0) -> None:
    """A LoRA of rank 4, with alpha in a tensor or in PEFT's configuration."""
    keys = compile_keys("sd1", format)
    names = {keys.spell(slot(), "lora", role): shape for role, shape in SHAPES.items()}
    specs = [TensorSpec(name, "F32", shape) for name, shape in names.items()]
    modules = None
    if format == "peft":
        modules = [PeftModule(keys.module(slot()), LORA, RANK, alpha, SHAPES)]
    else:
        specs.append(TensorSpec(keys.spell(slot(), "lora", "alpha"), "F32", ()))

    def fill(sink: TensorSink) -> None:
        for spec in specs:
            data = struct.pack("<f", alpha) if not spec.shape else bytes(4 * math.prod(spec.shape))
            sink.put_bytes(spec.name, memoryview(data))

    AdapterWriter(output, specs, {}, modules, keys, meant, overwrite=False).write(fill)


@pytest.mark.parametrize("format", ["kohya", "peft"])
def test_a_file_that_is_read_as_meant_is_written(tmp_path: Path, format: str) -> None:
    write(tmp_path / "out", format, {slot(): Meant(LORA, RANK, 0.5)})
    with Adapter.open(tmp_path / "out") as found:
        assert {s: (e.kind, e.facts.rank, e.facts.scale) for s, e in found.entries.items()} == {
            slot(): (LORA, RANK, 0.5)
        }


@pytest.mark.parametrize("format", ["kohya", "peft"])
@pytest.mark.parametrize(
    "meant",
    [
        {},
        {slot(): Meant(LORA, RANK, 1.0)},
        {slot(): Meant(LORA, RANK, 0.5 * (1 + 3e-6))},
        {slot(): Meant(LORA, RANK + 1, 0.5)},
        {slot(): Meant(algorithms()["loha"], RANK, 0.5)},
        {
            slot(): Meant(LORA, RANK, 0.5),
            slot(OTHER): Meant(LORA, RANK, 0.5),
        },
    ],
)
def test_a_file_that_would_be_read_differently_does_not_appear(
    tmp_path: Path, format: str, meant: dict[Slot, Meant]
) -> None:
    with pytest.raises(NotRepresentable, match="would be read differently"):
        write(tmp_path / "out", format, meant)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("share", [0.35, 0.5, 0.8])
def test_the_ranks_reported_of_a_lokr_are_those_of_the_file(tmp_path: Path, share: float) -> None:
    """At its full rank a factor is stored as a matrix, which has no rank."""
    source = made.adapter(tmp_path / "a.safetensors", "lokr-low")
    whole = resized(source, tmp_path / "whole.safetensors", rank=500)
    output = tmp_path / "out.safetensors"
    report = resized(source, output, size=int(share * whole.bytes))
    with Adapter.open(output) as found:
        ranks = {found.label(s): e.facts.rank for s, e in found.entries.items()}
    kept = [item for item in report.details if item["change"] != "left out"]
    assert {item["module"]: item["rank"] for item in kept} == ranks


def resized(source: Path, output: Path, **rule: int) -> resize.Report:
    return resize.run(resize.plan(source, resize.Options(output=output, **rule)))
