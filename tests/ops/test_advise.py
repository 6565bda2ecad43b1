"""advise: its curves against dense float64 decompositions, against what extract then writes, and against one another."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from adaptkit.errors import NothingToDo, WrongUsage
from adaptkit.ops import advise, extract
from tests import jobs, oracle
from tests.cli.test_cli import adaptkit, refused
from tests.ops.models import changed, lokr_delta, lora_delta, matrices, noise_delta, save, tiny_base

LAYERS = (
    "attn1.to_q",
    "attn2.to_v",
    "proj_in",
    "in_layers.2",
    "skip_connection",
    "self_attn.q_proj",
    "fc1",
)


NAMES = [
    f"lora_unet_{place}_{layer}"
    for place in (
        "down_blocks_1_attentions_0",
        "mid_block_attentions_0",
        "up_blocks_2_attentions_1",
    )
    for layer in (
        *(f"transformer_blocks_0_attn{n}_to_{part}" for n in (1, 2) for part in "qv"),
        "transformer_blocks_0_ff_net_0_proj",
        "proj_in",
    )
]


def advice(
    folder: Path, base: dict[str, torch.Tensor], tuned: dict[str, torch.Tensor], rank: int = 8
) -> advise.Report:
    first, second = (
        save(folder / "base.safetensors", base),
        save(folder / "tuned.safetensors", tuned),
    )
    return advise.run(advise.plan(first, second, advise.Options(max_rank=rank)))


def differences(folder: Path) -> list[np.ndarray]:
    """Of all matrices that differ, dense, in float64."""
    base, tuned = load_file(folder / "base.safetensors"), load_file(folder / "tuned.safetensors")
    found = [
        (tuned[key].double() - base[key].double()).numpy() for key in base if base[key].ndim > 1
    ]
    return [delta.reshape(len(delta), -1) for delta in found if delta.any()]


@pytest.fixture
def noisy(tmp_path: Path) -> advise.Report:
    """Of a difference without structure."""
    base = tiny_base()
    tuned, _ = changed(base, matrices(base, *LAYERS), noise_delta())
    return advice(tmp_path, base, tuned)


def test_the_curve_of_one_rank_is_that_of_the_dense_svd(
    noisy: advise.Report, tmp_path: Path
) -> None:
    deltas = differences(tmp_path)
    assert noisy.layers == len(deltas)
    squares = [np.linalg.svd(delta, compute_uv=False) ** 2 for delta in deltas]
    whole = sum(s.sum() for s in squares)
    assert noisy.norm == pytest.approx(math.sqrt(whole), rel=1e-6)
    for rank, choice in noisy.rank.items():
        left = sum(s[rank:].sum() for s in squares)
        assert choice.relative_error == pytest.approx(math.sqrt(left / whole), rel=1e-3)
        assert choice.relative_error >= math.sqrt(left / whole) * (1 - 1e-6)


def test_the_points_of_lokr_are_those_of_the_nearest_products(
    noisy: advise.Report, tmp_path: Path
) -> None:
    base, whole = load_file(tmp_path / "base.safetensors"), 0.0
    tuned = load_file(tmp_path / "tuned.safetensors")
    left = dict.fromkeys(noisy.lokr, 0.0)
    for key, tensor in base.items():
        delta = (tuned[key].double() - tensor.double()).numpy()
        if tensor.ndim < 2 or not delta.any():
            continue
        delta, window = delta.reshape(len(delta), -1), math.prod(tensor.shape[2:])
        whole += float((delta**2).sum())
        for factor in left:
            a, b = (
                oracle.factorization(len(delta), factor)[0],
                oracle.factorization(tensor.shape[1], factor)[0],
            )
            rows, columns = delta.shape
            blocks = (
                delta.reshape(a, rows // a, b, columns // b)
                .transpose(0, 2, 1, 3)
                .reshape(a * b, -1)
            )
            left[factor] += float((np.linalg.svd(blocks, compute_uv=False)[1:] ** 2).sum())
            assert columns % (b * window) == 0
    for factor, choice in noisy.lokr.items():
        assert choice.relative_error == pytest.approx(math.sqrt(left[factor] / whole), rel=1e-3)


def test_chosen_is_never_worse_than_not(noisy: advise.Report) -> None:
    for rank, choice in noisy.rank.items():
        assert noisy.size[rank].bytes <= choice.bytes
        assert noisy.size[rank].relative_error <= choice.relative_error * (1 + 1e-9)
        assert noisy.auto[rank].bytes <= choice.bytes
        assert noisy.auto[rank].relative_error <= noisy.size[rank].relative_error * (1 + 1e-9)
        assert 0 <= noisy.auto[rank].gap < 0.05
        assert sum(noisy.auto[rank].mix.values()) == noisy.layers
    # whole layers rarely use up a budget, and then the bound of the relaxation is below them
    assert any(point.gap > 0 for point in noisy.auto.values())
    assert noisy.made_by is None
    assert noisy.notes == ()


def test_extract_then_writes_what_was_promised(noisy: advise.Report, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    options = extract.Options(rank=4, conv_rank=4, output=output)
    report = extract.run(
        extract.plan(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", options)
    )
    promised = noisy.rank[4]
    assert promised.relative_error == pytest.approx(report.relative_error, rel=1e-3)
    assert promised.bytes == pytest.approx(report.bytes, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("algorithm", "delta"), [("lora", lora_delta(3)), ("lokr", lokr_delta(8))])
def test_a_merged_adapter_is_recognised(
    tmp_path: Path, algorithm: str, delta: object, dtype: torch.dtype
) -> None:
    base = tiny_base(dtype)
    tuned, _ = changed(base, matrices(base, *LAYERS), delta)  # type: ignore[arg-type]
    report = advice(tmp_path, base, tuned)
    assert report.made_by is not None
    assert report.made_by["algorithm"] == algorithm
    assert report.made_by.get("rank", 3) == 3
    assert report.made_by["layers"] > report.made_by["of"] / 2
    assert report.noise_floor > 0
    best = report.rank[4] if algorithm == "lora" else report.lokr[report.made_by["factor"]]
    assert best.relative_error <= 1.3 * report.noise_floor


@pytest.mark.parametrize("delta", [lora_delta(3), lokr_delta(4), noise_delta()])
def test_the_command_that_is_recommended_loses_what_was_said(tmp_path: Path, delta: object) -> None:
    base = tiny_base(torch.float16)
    tuned, _ = changed(base, matrices(base, *LAYERS), delta)  # type: ignore[arg-type]
    said = advice(tmp_path, base, tuned).recommended
    assert said is not None
    output = tmp_path / "o.safetensors"
    paths = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    done = adaptkit("extract", *paths, *said.options, "-o", output, "--json")
    found = json.loads(done.stdout)
    # the error before rounding, and in float16
    assert found["relative_error"] <= 1.02 * said.point.relative_error + 2e-3
    if said.exact:
        assert found["relative_error"] >= 0.9 * said.point.relative_error
        assert output.stat().st_size == pytest.approx(said.point.bytes, rel=0.05)


def ordinary(shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """A fine-tune: every singular value, falling off as those of trained models do."""
    rows, columns = shape[0], math.prod(shape[1:])
    count = min(rows, columns)
    left, right = (np.linalg.qr(random.standard_normal((n, count)))[0] for n in (rows, columns))
    return 0.05 * ((left * np.arange(1, count + 1) ** -0.8) @ right.T).reshape(shape)


@pytest.mark.parametrize(
    ("made", "delta"), [("--size", ordinary), ("--rank 3", lora_delta(3)), ("lokr", lokr_delta(8))]
)
def test_the_last_lines_are_a_command_that_loses_what_they_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: str, delta: object
) -> None:
    """The printed command is run as it stands, and NumPy measures the file that it writes."""
    base = tiny_base(torch.float16)
    tuned, _ = changed(base, [jobs.original(name) for name in NAMES], delta)  # type: ignore[arg-type]
    for name, state in (("base", base), ("tuned", tuned)):
        save(tmp_path / f"{name}.safetensors", state)
    monkeypatch.chdir(tmp_path)
    said = adaptkit("advise", "base.safetensors", "tuned.safetensors").stdout
    command = re.search(r"recommended +adaptkit (.+)", said)
    loses = re.search(r"loses +([\d.e-]+)(%?) of ‖ΔW‖, in ([\d.]+) kB", said)
    assert command
    assert loses, said
    assert made in command[1]
    promised = float(loses[1]) * (0.01 if loses[2] else 1)
    done = adaptkit(*shlex.split(command[1]), "-o", "out.safetensors")
    assert done.returncode == 0, done.stderr
    found, rest, norm = jobs.deltas(tmp_path / "out.safetensors"), 0.0, 0.0
    for name in NAMES:
        key = jobs.original(name)
        difference = (tuned[key].double() - base[key].double()).numpy()
        norm += float((difference**2).sum())
        held = found.get(jobs.dotted(name), np.zeros(())).reshape(-1)
        rest += float(((difference.reshape(-1) - held) ** 2).sum())
    # printed with three digits; the numbers of the file are float16
    assert (rest / norm) ** 0.5 == pytest.approx(promised, rel=0.03, abs=1.5e-3)
    size = (tmp_path / "out.safetensors").stat().st_size
    assert size == pytest.approx(1000 * float(loses[3]), rel=0.15)


def test_nothing_differs(tmp_path: Path) -> None:
    base = tiny_base()
    with pytest.raises(NothingToDo, match="differs"):
        advice(tmp_path, base, base)
    with pytest.raises(WrongUsage, match="--max-rank"):
        advice(tmp_path, base, base, rank=0)


def test_on_the_command_line(tiny: Path, tmp_path: Path) -> None:
    pair = tiny / "base.ckpt", tiny / "tuned.ckpt"
    done = adaptkit("advise", *pair, "--max-rank", 4, "--plot", tmp_path / "a.svg")
    assert done.returncode == 0, done.stderr
    assert "factor" in done.stdout
    assert "sampled layers are a LoKr of factor 8" in done.stderr
    assert (tmp_path / "a.svg").read_bytes().count(b"<svg") == 1
    record = json.loads(adaptkit("advise", *pair, "--max-rank", 4, "--json").stdout)
    assert record["made_by"]["factor"] == 8
    assert [one["rank"] for one in record["lora"]] == [1, 2, 4]
    assert {"lora_rank", "lora_size", "auto"} <= record["lora"][0].keys()
    refused(adaptkit("advise", *pair, "--plot", tmp_path / "a.svg"), "already exists")
    refused(adaptkit("advise", *pair, "--plot", tmp_path / "a.gif"), ".svg", code=2)
    refused(adaptkit("advise", pair[0], tiny / "nothing.ckpt"), "nothing.ckpt")
