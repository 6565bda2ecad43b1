"""merge --verify: what is right passes, and each way an output can be wrong is named, with the old output left alone."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit.errors import CorruptFile, NotEnoughMemory
from adaptkit.files.sink import Pieces
from adaptkit.ops import merge
from adaptkit.ops.merge import kernel, verify
from adaptkit.ops.merge.output import Output
from tests import made, oracle
from tests.cli.test_cli import adaptkit

UNET = "model.diffusion_model.input_blocks.1."
PLACES = {
    made.LINEAR: f"{UNET}1.transformer_blocks.0.attn1.to_q.weight",
    made.WIDE: f"{UNET}1.transformer_blocks.0.ff.net.0.proj.weight",
    made.CONV: f"{UNET}0.in_layers.2.weight",
    made.POINT: f"{UNET}1.proj_in.weight",
}
VAE = "first_stage_model.encoder.conv_in.weight"
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def base_file(folder: Path, dtype: torch.dtype = torch.float16) -> Path:
    draw = torch.Generator().manual_seed(1)
    state = {
        PLACES[n]: torch.randn(shape, generator=draw).to(dtype) for n, shape in made.SHAPES.items()
    }
    state[VAE] = torch.randn(5, 3, 3, 3, generator=draw).to(dtype)
    save_file(state, folder / "base.safetensors")
    return folder / "base.safetensors"


def run(base: Path, *adapters: tuple[Path, float], **options: Any) -> merge.Report:
    options = {
        "output": base.with_name("out.safetensors"),
        "family": "sd1",
        "verify": True,
        **options,
    }
    return merge.run(merge.plan(base, adapters, merge.Options(**options)))


@pytest.mark.parametrize("block", [1 << 16, 64], ids=["whole", "rows"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", made.KINDS)
def test_every_kind_in_every_dtype_passes(
    tmp_path: Path, kind: str, dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "BLOCK", block)
    adapter = made.adapter(tmp_path / "a.safetensors", kind)
    other = made.adapter(tmp_path / "b.safetensors", seed=1)
    report = run(base_file(tmp_path, dtype), (adapter, -0.7), (other, 0.3))
    assert report.verified is not None
    assert (report.verified.merged, report.verified.copied) == (4, 1)
    assert report.verified.bytes == report.bytes
    assert 0 < report.verified.largest <= 1
    # and the verifier's rule is ours: float64 NumPy
    base, found = load_file(tmp_path / "base.safetensors"), load_file(tmp_path / "out.safetensors")
    first, second = made.deltas(adapter), made.deltas(other)
    for name, key in PLACES.items():
        exact = base[key].double().numpy() + (-0.7 * first[name] + 0.3 * second[name]).reshape(
            base[key].shape
        )
        error = np.abs(found[key].double().numpy() - exact)
        assert (error <= torch.finfo(dtype).eps / 2 * 1.001 * np.abs(exact) + 5e-6).all(), key


def _dora(axis: int) -> Callable[[np.ndarray, dict[str, np.ndarray]], np.ndarray]:
    return lambda weight, t: oracle.dora(
        weight,
        t["alpha"] / len(t["lora_down.weight"]) * t["lora_up.weight"] @ t["lora_down.weight"],
        t["dora_scale"],
        axis,
    )


@pytest.mark.parametrize("kind", ["dora-out", "dora-in", "oft", "glora"])
def test_kinds_that_turn_the_weight_pass(tmp_path: Path, kind: str) -> None:
    draw = np.random.default_rng(0)
    shape = made.SHAPES[made.LINEAR]
    tensors = {
        k.split(".", 1)[1]: v for k, v in made.module("lora", made.LINEAR, shape, draw).items()
    }
    if kind == "dora-out":
        tensors["dora_scale"] = 1 + draw.random((shape[0], 1))
    elif kind == "dora-in":
        tensors["dora_scale"] = 1 + draw.random((1, shape[1]))
    elif kind == "oft":
        tensors = {"oft_blocks": 0.1 * draw.standard_normal((4, 6, 6)), "alpha": np.float64(10.0)}
    else:
        tensors = {
            "a1.weight": draw.standard_normal((shape[1], 3)) / 6,
            "a2.weight": draw.standard_normal((3, shape[1])) / 6,
            "b1.weight": draw.standard_normal((shape[0], 3)) / 6,
            "b2.weight": draw.standard_normal((3, shape[1])) / 6,
        }
    save_file(
        {f"{made.LINEAR}.{k}": torch.tensor(v, dtype=torch.float32) for k, v in tensors.items()},
        tmp_path / "a.safetensors",
    )
    for dtype in (torch.float32, torch.bfloat16):
        base = base_file(tmp_path, dtype)
        report = run(base, (tmp_path / "a.safetensors", 0.6), overwrite=True)
        assert report.verified is not None
        assert (report.verified.merged, report.tensors_changed) == (1, 1)
        if kind.startswith("dora"):
            weight = load_file(base)[PLACES[made.LINEAR]].double().numpy()
            whole = _dora(0 if kind == "dora-out" else 1)(weight, tensors)
            exact = weight + 0.6 * (whole - weight)
            found = load_file(tmp_path / "out.safetensors")[PLACES[made.LINEAR]].double().numpy()
            assert (
                np.abs(found - exact) <= torch.finfo(dtype).eps / 2 * 1.01 * np.abs(exact) + 3e-6
            ).all()


def test_a_weight_that_is_off_by_two_steps_is_named_and_the_old_output_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = base_file(tmp_path), made.adapter(tmp_path / "a.safetensors")
    (tmp_path / "out.safetensors").write_bytes(b"old")
    key, honest = PLACES[made.WIDE], Pieces.put

    def put(self: Pieces, tensor: torch.Tensor, first: int, *, copied: bool) -> None:
        if self._info.name == key and first <= 77 < first + tensor.numel():
            tensor = tensor.clone()
            tensor.view(torch.int16).view(-1)[77 - first] += 2
        honest(self, tensor, first, copied=copied)

    monkeypatch.setattr(Pieces, "put", put)
    with pytest.raises(CorruptFile, match=r"differs from base \+ ΔW") as caught:
        run(base, (adapter, 1.0), overwrite=True)
    assert caught.value.tensor == key
    assert Path(str(caught.value.file)) == tmp_path / "out.safetensors"
    assert (tmp_path / "out.safetensors").read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a.safetensors",
        "base.safetensors",
        "out.safetensors",
    ]
    run(base, (adapter, 1.0), overwrite=True, verify=False)  # unseen without


def test_a_merge_that_forgets_an_adapter_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = base_file(tmp_path, torch.bfloat16), made.adapter(tmp_path / "a.safetensors")
    monkeypatch.setattr(kernel.Blender, "_parts", lambda *_: iter(()))
    with pytest.raises(CorruptFile, match="--verify"):
        run(base, (adapter, 0.05))
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    honest = Pieces.put
    monkeypatch.setattr(
        Pieces,
        "put",
        lambda self, tensor, at, copied: honest(
            self, tensor.index_fill(0, torch.tensor([0]), value), at, copied=copied
        ),
    )
    with pytest.raises(CorruptFile, match="--verify"):
        run(base_file(tmp_path), (made.adapter(tmp_path / "a.safetensors"), 1.0))


def test_one_flipped_bit_of_an_untouched_tensor_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = base_file(tmp_path), made.adapter(tmp_path / "a.safetensors")
    honest = Output.finish

    def finish(self: Output) -> None:
        honest(self)
        path = self.at("")
        from adaptkit.files.header import read_header

        at = read_header(path).infos[VAE].start + 9
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(Output, "finish", finish)
    with pytest.raises(CorruptFile, match="an unchanged tensor differs") as caught:
        run(base, (adapter, 1.0))
    assert caught.value.tensor == VAE
    assert not (tmp_path / "out.safetensors").exists()


def test_verifying_over_the_base_itself(tmp_path: Path) -> None:
    base, adapter = base_file(tmp_path), made.adapter(tmp_path / "a.safetensors")
    run(base, (adapter, 1.0))
    report = run(base, (adapter, 1.0), output=base, overwrite=True)
    assert report.verified is not None
    assert base.read_bytes() == (tmp_path / "out.safetensors").read_bytes()


def test_verify_keeps_the_bound_on_memory_or_is_refused_before_anything_is_read(
    tmp_path: Path,
) -> None:
    base, adapter = base_file(tmp_path), made.adapter(tmp_path / "a.safetensors")
    options = merge.Options(output=tmp_path / "out.safetensors", family="sd1", verify=True)
    plan = merge.plan(base, [(adapter, 1.0)], options)
    least = max(step.bytes for step in (*plan.steps, *plan.verified))
    plan.close()
    assert least > max(step.bytes for step in plan.steps), "float64 takes more"
    assert run(base, (adapter, 1.0), memory=least).verified is not None
    with pytest.raises(NotEnoughMemory):
        merge.plan(base, [(adapter, 1.0)], replace(options, memory=least - 1, overwrite=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adapters_that_cancel_pass_and_leave_the_base(tmp_path: Path, dtype: torch.dtype) -> None:
    """`merge BASE X:1` then `merge OUT X:-1`, and both at once: the base again, to rounding."""
    base, adapter = base_file(tmp_path, dtype), made.adapter(tmp_path / "a.safetensors")
    before = load_file(base)
    at_once = run(base, (adapter, 1.0), (adapter, -1.0))
    assert at_once.verified is not None
    once = load_file(at_once.output)
    run(base, (adapter, 1.0), output=tmp_path / "plus.safetensors")
    plus = load_file(tmp_path / "plus.safetensors")
    run(tmp_path / "plus.safetensors", (adapter, -1.0), output=tmp_path / "minus.safetensors")
    minus = load_file(tmp_path / "minus.safetensors")
    for key, tensor in before.items():
        steps = torch.finfo(dtype).eps * plus[key].double().abs().clamp_min(tensor.double().abs())
        assert ((minus[key].double() - tensor.double()).abs() <= steps + 3e-6).all(), key
        assert (
            (once[key].double() - tensor.double()).abs()
            <= torch.finfo(dtype).eps * tensor.abs().double() + 3e-6
        ).all()


def test_on_the_command_line(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--blocks and --verify: what the JSON says, what people see, and what a mismatch looks like."""
    arguments = ("merge", tiny / "base.safetensors", tiny / "lora-kohya.safetensors:0.8")
    rules = ("--blocks", "te=0,unet.up_blocks.0-1=0.5", "--blocks", "mid=2")
    done = adaptkit(*arguments, *rules, "--verify", "--json", "-o", tmp_path / "o.safetensors")
    report = json.loads(done.stdout)
    assert report["verified"]["merged"] == report["tensors_changed"] == 80
    assert report["verified"]["copied"] == report["tensors"] - 80
    weights = [(rule["rule"], rule["weight"]) for rule in report["block_weights"]]
    assert weights == [("te", 0), ("unet.up_blocks.0-1", 0.5), ("mid", 2), ("(no rule)", 1)]
    assert sum(rule["modules"] for rule in report["block_weights"]) == report["modules"]
    (middle,) = [block for block in report["blocks"] if block["block"] == "unet.mid_block"]
    assert middle["tensors_changed"] == middle["tensors"] == 5
    vector = ",".join(["0.5"] * 17)
    shown = adaptkit(
        *arguments, "--blocks", vector, "--verify", "-o", tmp_path / "v.safetensors"
    ).stderr
    assert "BASE IN01 IN02 IN04 IN05 IN07 IN08 M00 OUT03" in shown
    assert "OUT11 = 0.5: 104 modules" in shown
    assert "tensors equal base + ΔW within one rounding" in shown
    monkeypatch.setattr(kernel.Blender, "_parts", lambda *_: iter(()))
    failed = adaptkit(*arguments, "--verify", "-o", tmp_path / "bad.safetensors")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "error: " in failed.stderr
    assert "differs from base + ΔW" in failed.stderr
    assert not (tmp_path / "bad.safetensors").exists()


def test_a_full_disk_gives_one_clear_error_and_no_file(tmp_path: Path, tiny: Path) -> None:
    """A disk of one megabyte, where this machine lets us have one."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(small)]
    if (
        shutil.which("mount") is None
        or subprocess.run(mount, capture_output=True, check=False).returncode
    ):
        pytest.skip("no disk can be mounted here")
    try:
        for more in ((), ("--shard-size", "300kB")):
            name = "shards" if more else "o.safetensors"
            arguments = (
                tiny / "base.safetensors",
                tiny / "lora-kohya.safetensors",
                "-o",
                small / name,
                *more,
            )
            done = adaptkit("merge", *arguments)
            assert done.returncode == 1
            assert done.stderr.count("error:") == 1
            assert "full" in done.stderr
            assert not list(small.iterdir())
    finally:
        subprocess.run(["umount", str(small)], check=True)
