"""`--verify`: the values of the finished file are read back, and a wrong one stops the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit.checkpoint import Checkpoint
from adaptkit.errors import CorruptFile
from adaptkit.files.sink import TensorSink
from adaptkit.keymap import algorithms
from adaptkit.ops import combine, convert, extract, resize
from adaptkit.ops.adapter_file import verified
from adaptkit.ops.extract import verify as extract_verify
from adaptkit.ops.rewrite import verify as rewrite_verify
from tests import made
from tests.cli.test_cli import adaptkit
from tests.ops.models import changed, lora_delta, matrices, tiny_base

ROW = made.LINEAR


def source(path: Path) -> Path:
    return made.adapter(path, "lora")


def converting(path: Path, out: Path, **options: Any) -> Any:
    chosen = convert.Options(to="kohya", dtype="fp16", output=out, verify=True, **options)
    return convert.run(convert.plan(path, chosen))


def resizing(path: Path, out: Path, **options: Any) -> Any:
    chosen = resize.Options(rank=3, dtype="fp32", output=out, verify=True, **options)
    return resize.run(resize.plan(path, chosen))


def combining(path: Path, out: Path, **options: Any) -> Any:
    chosen = combine.Options(rank=3, dtype="fp32", output=out, verify=True, **options)
    return combine.run(combine.plan([(path, 0.5), (path, 0.5)], chosen))


WRITERS: list[Callable[..., Any]] = [converting, resizing, combining]


@pytest.mark.parametrize("write", WRITERS)
def test_the_figure_is_that_of_the_file(tmp_path: Path, write: Callable[..., Any]) -> None:
    path, out = source(tmp_path / "a.safetensors"), tmp_path / "out.safetensors"
    report = write(path, out)
    mine, theirs = made.deltas(path), made.deltas(out)
    norm = sum(float((delta**2).sum()) for delta in mine.values())
    rest = sum(float(((delta - theirs[name]) ** 2).sum()) for name, delta in mine.items())
    assert report.measured == pytest.approx((rest / norm) ** 0.5, rel=1e-4)
    assert report.measured == pytest.approx(report.relative_error, rel=1e-3)
    assert report.to_dict()["verified"] == {"relative_error": report.measured}


def spoiled(monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    """Write one tensor with a wrong number in it, as a faulty disk or kernel would."""
    put = TensorSink.put

    def wrong(self: TensorSink, name: str, tensor: torch.Tensor) -> None:
        if name.endswith(suffix):
            tensor = tensor.clone()
            tensor.view(-1)[0] += 1.0
        put(self, name, tensor)

    monkeypatch.setattr(TensorSink, "put", wrong)
    write_to = "adaptkit.files.spool.Spool.write_to"

    def each(self: Any, sink: TensorSink) -> None:
        for spec in self.specs():
            dtype = {"F32": torch.float32, "F16": torch.float16}[spec.dtype]
            sink.put(
                spec.name,
                torch.frombuffer(bytearray(self.read(spec.name)), dtype=dtype).reshape(spec.shape),
            )

    monkeypatch.setattr(write_to, each)


@pytest.mark.parametrize("write", WRITERS)
def test_a_wrong_number_in_the_file_stops_it(
    tmp_path: Path, write: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = source(tmp_path / "a.safetensors"), tmp_path / "out.safetensors"
    spoiled(monkeypatch, "lora_up.weight")
    with pytest.raises(CorruptFile, match=r"verification failed: read back, its relative error"):
        write(path, out)
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("algo", ["lora", "lokr"])
def test_an_extraction_is_measured_on_its_file(tmp_path: Path, algo: str) -> None:
    base = tiny_base()
    tuned, _ = changed(base, matrices(base, "attn1"), lora_delta(6))
    for name, state in (("base", base), ("tuned", tuned)):
        save_file(state, tmp_path / f"{name}.safetensors")
    out = tmp_path / "out.safetensors"
    found = adaptkit(
        "extract", tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", "--algo", algo,
        "--rank", 2, "--verify", "-o", out, "--json",
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    verified, reported = (
        (record := json.loads(found.stdout))["verified"]["relative_error"],
        record["relative_error"],
    )
    assert 0.1 < reported < 1.0
    assert verified == pytest.approx(reported, rel=1e-3)
    plain = extract.Options(algo=algo, rank=2, output=out, overwrite=True)
    plan = extract.plan(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", plain)
    assert "verified" not in extract.run(plan).to_dict()
    assert np.isfinite([float(t.float().sum()) for t in load_file(out).values()]).all()


@pytest.fixture
def largest(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Blocks of 64 entries; the entries of each piece of ΔW that is formed."""
    monkeypatch.setattr(verified, "BLOCK", 64)
    monkeypatch.setattr("adaptkit.ops.rewrite.verify.BLOCK", 64)
    found: list[int] = []
    for kind in (*algorithms().values(), *algorithms()["lora+dora"].__mro__):
        for name in {"delta", "apply"} & vars(kind).keys():
            monkeypatch.setattr(kind, name, _seen(getattr(kind, name), found))
    return found


def _seen(form: Any, found: list[int]) -> Any:
    def seen(*given: Any) -> torch.Tensor:
        made = form(*given)
        found.append(made.numel())
        return made

    return seen


@pytest.mark.parametrize("algo", ["lora", "lokr", "full"])
def test_an_extraction_is_compared_in_blocks(
    tmp_path: Path, algo: str, largest: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the checkpoints' layers nor those of the file are ever whole in memory."""
    base = tiny_base()
    tuned, _ = changed(base, matrices(base, "attn1.to_q", "conv_in", "in_layers"), lora_delta(6))
    for name, state in (("base", base), ("tuned", tuned)):
        save_file(state, tmp_path / f"{name}.safetensors")
    rank = {} if algo == "full" else {"rank": 3}
    options = extract.Options(algo=algo, output=tmp_path / "out.safetensors", verify=True, **rank)
    plan = extract.plan(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", options)
    verify = extract_verify.Verifier.__call__
    read: list[int] = []

    def verifying(self: Any, weights: Any) -> None:
        largest.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Checkpoint, "_read", _seen(Checkpoint._read, read))
            verify(self, weights)
            read.extend(largest)

    monkeypatch.setattr(extract_verify.Verifier, "__call__", verifying)
    report = extract.run(plan)
    assert report.measured == pytest.approx(report.relative_error, rel=1e-3, abs=1e-7)
    widest = max(job.matrix[1] for job in plan.jobs)
    assert read
    assert max(read) <= max(64, widest) < max(t.numel() for t in base.values())


@pytest.mark.parametrize("algo", ["full", "lora+dora", "loha"])
def test_a_rewritten_module_is_compared_in_blocks(
    tmp_path: Path, algo: str, largest: list[int]
) -> None:
    draw = torch.Generator().manual_seed(0)
    rows, columns = 32, 32
    shapes = {
        "full": {"diff": (rows, columns)},
        "lora+dora": {
            "lora_up.weight": (rows, 2), "lora_down.weight": (2, columns), "dora_scale": (rows, 1),
        },
        "loha": {f"hada_w{n}_{side}": (rows, 8) if side == "a" else (8, columns) for n in "12" for side in "ab"},
    }[algo]  # fmt: skip
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    state = {f"{stem}.{role}": torch.randn(shape, generator=draw) for role, shape in shapes.items()}
    save_file(state, tmp_path / "a.safetensors")
    save_file(tiny_base(), tmp_path / "base.safetensors")
    options = convert.Options(
        to="comfy", dtype="bf16", family="sd1", verify=True, output=tmp_path / "b.safetensors",
        base=tmp_path / "base.safetensors" if "dora" in algo else None,
    )  # fmt: skip
    plan = convert.plan(tmp_path / "a.safetensors", options)
    verify = rewrite_verify.Verifier.__call__
    found: list[int] = []

    def verifying(self: Any, stored: Any) -> None:
        largest.clear()
        verify(self, stored)
        found.extend(largest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewrite_verify.Verifier, "__call__", verifying)
        report = convert.run(plan)
    assert 1e-4 < report.measured == pytest.approx(report.relative_error, rel=1e-3)
    assert found
    assert max(found) <= 64
