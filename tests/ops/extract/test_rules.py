"""extract: rank rules over all layers, auto, alpha and clamping, against what the written files hold, in float64."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from adaptkit.algorithms.lokr import Lokr
from adaptkit.errors import NotRepresentable, WrongUsage
from adaptkit.ops import extract
from tests import oracle
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
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of unlike strength and spectrum: full noise, some of it near rank 2."""
    folder = tmp_path_factory.mktemp("pair")
    base = tiny_base()
    tuned, _ = changed(base, matrices(base, *LAYERS), noise_delta())
    strong, _ = changed(tuned, matrices(base, "attn1.to_q", "fc1"), lora_delta(2))
    save(folder / "base.safetensors", base)
    save(folder / "tuned.safetensors", strong)
    return folder


def run(pair: Path, output: Path, **options: Any) -> extract.Report:
    chosen = extract.Options(output=output, overwrite=True, **options)
    return extract.run(extract.plan(pair / "base.safetensors", pair / "tuned.safetensors", chosen))


def differences(pair: Path) -> dict[str, np.ndarray]:
    base, tuned = load_file(pair / "base.safetensors"), load_file(pair / "tuned.safetensors")
    found = {key: (tuned[key].double() - base[key].double()).numpy() for key in base}
    return {key: delta.reshape(len(delta), -1) for key, delta in found.items() if delta.any()}


def true_error(pair: Path, output: Path) -> float:
    """Of merging the file by hand: NumPy alone, modules matched by their shapes and nearest difference."""
    stored = stored_deltas(output)
    left = total = 0.0
    deltas = differences(pair)
    for delta in deltas.values():
        total += float((delta**2).sum())
        fits = [one for one in stored if one.shape == delta.shape]
        left += min([float((delta**2).sum()), *(float(((delta - one) ** 2).sum()) for one in fits)])
    return math.sqrt(left / total)


def stored_deltas(path: Path) -> list[np.ndarray]:
    tensors = {key: tensor.double().numpy() for key, tensor in load_file(path).items()}
    modules: dict[str, dict[str, np.ndarray]] = {}
    for key, array in tensors.items():
        stem, _, role = key.partition(".")
        modules.setdefault(stem, {})[role] = array
    found = []
    for roles in modules.values():
        if "lora_up.weight" in roles:
            up, down = (roles[f"lora_{side}.weight"] for side in ("up", "down"))
            scale = float(roles["alpha"]) / down.shape[0]
            found.append(scale * up.reshape(len(up), -1) @ down.reshape(len(down), -1))
        elif "diff" in roles:
            found.append(roles["diff"].reshape(len(roles["diff"]), -1))
        else:
            two = roles.get("lokr_w2")
            kernel = two.shape[2:] if two is not None else ()
            named = {role.removeprefix("lokr_"): array for role, array in roles.items()}
            whole = oracle.lokr_stored(
                {k: v for k, v in named.items() if k != "alpha"}, float(named["alpha"]), kernel
            )
            found.append(whole.reshape(len(whole), -1))
    return found


@pytest.mark.share(3)
@pytest.mark.parametrize("algo", ["lora", "lokr", "auto"])
@pytest.mark.parametrize("share", [0.15, 0.4])
def test_a_size_is_kept_to_the_byte_and_used(
    pair: Path, tmp_path: Path, algo: str, share: float
) -> None:
    whole = run(pair, tmp_path / "whole.safetensors", rank=64).bytes
    size = int(whole * share)
    report = run(pair, tmp_path / "out.safetensors", algo=algo, size=size)
    assert report.bytes == (tmp_path / "out.safetensors").stat().st_size <= size
    if algo != "lokr":  # whose layers may all be full at less
        assert report.bytes >= 0.985 * size
    assert report.relative_error == pytest.approx(
        true_error(pair, tmp_path / "out.safetensors"), rel=1e-4
    )
    if algo == "auto":
        assert 0 <= report.optimality_gap < 0.05


@pytest.mark.parametrize("algo", ["lora", "auto"])
@pytest.mark.parametrize("error", [0.6, 0.3])
def test_an_error_is_kept_on_what_is_stored(
    pair: Path, tmp_path: Path, algo: str, error: float
) -> None:
    report = run(pair, tmp_path / "out.safetensors", algo=algo, error=error)
    assert 0.9 * error < report.relative_error <= error
    assert true_error(pair, tmp_path / "out.safetensors") <= error * (1 + 1e-6)


def test_auto_is_never_worse_than_one_algorithm(pair: Path, tmp_path: Path) -> None:
    for size in (60_000, 150_000):
        found = {
            algo: run(pair, tmp_path / f"{algo}.safetensors", algo=algo, size=size)
            for algo in ("lora", "lokr", "auto")
        }
        assert found["auto"].relative_error <= min(
            found[a].relative_error for a in ("lora", "lokr")
        ) * (1 + 1e-3)
        assert {one["algorithm"] for one in found["auto"].details} <= {"lora", "lokr", "full"}


def test_an_error_out_of_reach_is_refused(pair: Path, tmp_path: Path) -> None:
    with pytest.raises(NotRepresentable, match="the least is"):
        run(pair, tmp_path / "out.safetensors", error=0.05, max_rank=2)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.share(2)
@pytest.mark.parametrize(
    ("rule", "value"), [("energy", 0.7), ("sv_ratio", 3.0), ("sv_fro", 0.8), ("sv_cumulative", 0.5)]
)
def test_local_rules_give_the_least_ranks_that_the_spectrum_says(
    pair: Path, tmp_path: Path, rule: str, value: float
) -> None:
    report = run(pair, tmp_path / "out.safetensors", **{rule: value})
    spectra = sorted(tuple(np.linalg.svd(d, compute_uv=False)) for d in differences(pair).values())
    wanted = sorted(_least(np.array(sigma), rule, value) for sigma in spectra)
    assert [
        abs(a - b) <= 1
        for a, b in zip(wanted, sorted(d["rank"] for d in report.details), strict=True)
    ].count(False) == 0


def _least(sigma: np.ndarray, rule: str, value: float) -> int:
    squares = sigma**2
    if rule == "sv_ratio":
        return int((sigma >= sigma[0] / value).sum())
    if rule == "sv_cumulative":
        return int(np.argmax(np.cumsum(sigma) / sigma.sum() >= value)) + 1
    share = value if rule == "energy" else value**2
    return int(np.argmax(np.cumsum(squares) / squares.sum() >= share)) + 1


def test_alpha_changes_what_is_stored_and_not_what_it_means(pair: Path, tmp_path: Path) -> None:
    plain = run(pair, tmp_path / "a.safetensors", rank=4)
    other = run(pair, tmp_path / "b.safetensors", rank=4, alpha=1.0)
    assert other.relative_error == pytest.approx(plain.relative_error, rel=1e-4)
    alphas = {
        float(t)
        for key, t in load_file(tmp_path / "b.safetensors").items()
        if key.endswith("alpha")
    }
    assert alphas == {1.0}
    assert true_error(pair, tmp_path / "b.safetensors") == pytest.approx(
        other.relative_error, rel=1e-4
    )


def test_clamping_costs_what_the_report_says(pair: Path, tmp_path: Path) -> None:
    plain = run(pair, tmp_path / "a.safetensors", rank=4)
    clamped = run(pair, tmp_path / "b.safetensors", rank=4, clamp_quantile=0.9)
    assert clamped.relative_error > plain.relative_error * 1.01
    assert true_error(pair, tmp_path / "b.safetensors") == pytest.approx(
        clamped.relative_error, rel=1e-4
    )


def test_both_factors_of_a_lokr(pair: Path, tmp_path: Path) -> None:
    report = run(
        pair, tmp_path / "out.safetensors", algo="lokr", rank=2, factor=8, decompose_both=True
    )
    keys = load_file(tmp_path / "out.safetensors")
    assert any(key.endswith("lokr_w1_a") for key in keys)
    for key, tensor in keys.items():
        if key.endswith("lokr_w1_b"):
            assert tensor.shape[0] == keys[key.replace("w1_b", "w2_b")].shape[0]
    assert true_error(pair, tmp_path / "out.safetensors") == pytest.approx(
        report.relative_error, rel=1e-4
    )


@pytest.mark.parametrize("rule", [{"energy": 0.2}, {"size": 30_000}, {"sv_ratio": 3.0}])
def test_the_factors_of_a_lokr_are_fitted_to_the_rank_that_was_chosen(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: dict[str, Any]
) -> None:
    """At the same bytes never worse than the truncated product of the full fit, and better over all; beside a LoRA's."""
    output = tmp_path / "a.safetensors"
    found = run(pair, output, algo="lokr", factor=2, dtype="fp32", **rule)
    assert found.relative_error == pytest.approx(true_error(pair, output), rel=1e-5)
    assert found.captured_by_lora_of_same_size is not None
    monkeypatch.setattr(Lokr, "refits", False)
    before = run(pair, tmp_path / "b.safetensors", algo="lokr", factor=2, dtype="fp32", **rule)
    assert before.relative_error == pytest.approx(
        true_error(pair, tmp_path / "b.safetensors"), rel=1e-5
    )
    assert (found.parameters, found.modules) == (before.parameters, before.modules)
    assert found.relative_error < before.relative_error
    for one, other in zip(found.details, before.details, strict=True):
        assert (one["module"], one["rank"]) == (other["module"], other["rank"])
        assert one["relative_error"] <= other["relative_error"] * (1 + 1e-9)


@pytest.mark.parametrize("factor", [4, 8])
def test_the_factor_is_found(tmp_path: Path, factor: int) -> None:
    base = tiny_base(torch.float16)
    tuned, _ = changed(base, matrices(base, *LAYERS), lokr_delta(factor))
    save(tmp_path / "base.safetensors", base)
    save(tmp_path / "tuned.safetensors", tuned)
    report = run(tmp_path, tmp_path / "out.safetensors", algo="lokr")
    assert report.made_by is not None
    assert report.made_by["algorithm"] == "lokr"
    assert report.relative_error < 3 * report.noise_floor + 1e-3


def test_nothing_depends_on_the_memory_bound(pair: Path, tmp_path: Path) -> None:
    for options in ({"algo": "auto", "size": 90_000}, {"energy": 0.8}):
        written = []
        for memory in (None, 4_000_000):
            run(pair, tmp_path / "out.safetensors", memory=memory, **options)
            written.append((tmp_path / "out.safetensors").read_bytes())
        assert written[0] == written[1]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"algo": "auto"}, "--size or --error"),
        ({"algo": "auto", "rank": 4}, "--size or --error"),
        ({"algo": "full", "rank": 4}, "no rank"),
        ({"rank": 4, "size": 1000}, "--rank and --size"),
        ({"algo": "lokr", "alpha": 4.0}, "--alpha"),
        ({"energy": 0.9, "alpha": 4.0}, "--alpha"),
        ({"algo": "lokr", "clamp_quantile": 0.9}, "--clamp-quantile"),
        ({"algo": "lora", "rank": 2, "decompose_both": True}, "--decompose-both"),
        ({"factor": 0}, "--factor"),
    ],
)
def test_options_that_make_no_sense(
    pair: Path, tmp_path: Path, options: dict[str, Any], what: str
) -> None:
    with pytest.raises(WrongUsage) as caught:
        run(pair, tmp_path / "out.safetensors", **options)
    assert what in f"{caught.value} {caught.value.hint}"


def test_on_the_command_line(pair: Path, tmp_path: Path) -> None:
    given = ("extract", pair / "base.safetensors", pair / "tuned.safetensors")
    done = adaptkit(
        *given, "--algo", "auto", "--size", "100KB", "-o", tmp_path / "a.safetensors", "--json"
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["bytes"] <= 100_000
    assert record["optimality_gap"] < 0.05
    assert {"noise_floor", "made_by", "left_out"} <= record.keys()
    refused(adaptkit(*given, "--factor", "x"), "auto", code=2)
    assert adaptkit(*given, "--algo", "lokr", "--factor", "auto", "--dry-run").returncode == 0
