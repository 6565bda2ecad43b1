"""resize: the optimum at every rank for every kind, rules over the whole file, and what is said of it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from adaptkit import engine
from adaptkit.errors import NonFinite, NothingToDo, NotRepresentable, WrongUsage
from adaptkit.ops import resize
from adaptkit.ops.rewrite import run as rewriting
from adaptkit.ops.rewrite.compute import Rewriter
from tests import made, oracle
from tests.made import CONV, KINDS, LINEAR, POINT, SHAPES, WIDE, adapter, deltas, relative


def run(path: Path, **options: object) -> resize.Report:
    output = options.pop("output", path.with_name("out.safetensors"))
    plan = resize.plan(path, resize.Options(output=output, overwrite=True, **options))  # type: ignore[arg-type]
    try:
        return resize.run(plan)
    finally:
        plan.close()


def optimum(kind: str, delta: np.ndarray, rank: int, shape: tuple[int, ...]) -> float:
    """The least error that this kind can have at this rank, squared: of a LoKr, by the rank of its second factor.

    Where a first factor stored as a product is worth a quarter of the module, it is cut to the same rank.
    """
    if not kind.startswith("lokr"):
        return oracle.best_rank(delta, rank) ** 2
    c, d = shape[0] // 4, delta.shape[1] // 4
    if rank >= max(c, shape[1] // 4) / 2 or rank >= c:
        return 0.0
    blocks = delta.reshape(4, c, 4, -1).transpose(0, 2, 1, 3)  # all multiples of the second factor
    i, j = np.unravel_index(np.abs(blocks).sum((2, 3)).argmax(), (4, 4))
    second = blocks[i, j]
    first = (blocks * second).sum((2, 3)) / (second**2).sum()
    cut = kind == "lokr-factored" and rank < 2 and rank * (c + d) < 64
    kept = ((first**2).sum() - (oracle.best_rank(first, rank) ** 2 if cut else 0.0)) * (
        (second**2).sum() - oracle.best_rank(second, rank) ** 2
    )
    return float(max(0.0, (delta**2).sum() - kept))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_every_kind_is_cut_to_the_optimum(kind: str, rank: int, tmp_path: Path) -> None:
    source = adapter(tmp_path / "a.safetensors", kind)
    report = run(source, rank=rank)
    before, after = deltas(source), deltas(tmp_path / "out.safetensors")
    assert after.keys() == before.keys()
    for name, delta in before.items():
        size = np.linalg.norm(delta)
        error = np.linalg.norm(delta - after[name])
        assert error == pytest.approx(
            optimum(kind, delta, rank, SHAPES[name]) ** 0.5, rel=1e-5, abs=2e-6 * size
        ), name
    measured = relative(after, before)
    assert report.relative_error == pytest.approx(measured, rel=1e-6, abs=1e-7)
    for item, name in zip(report.details, before, strict=True):
        error = np.linalg.norm(before[name] - after[name]) / np.linalg.norm(before[name])
        assert item["relative_error"] == pytest.approx(error, rel=1e-6, abs=2e-7), item
    kept = {key.rpartition(".")[2] for key in load_file(tmp_path / "out.safetensors")}
    assert any(key.startswith("lokr") for key in kept) == kind.startswith("lokr")


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr-factored", "lokr-low"])
def test_how_factors_share_a_term_changes_nothing(kind: str, tmp_path: Path) -> None:
    """Columns graded by 2^26 in one factor and the other way in the other: ΔW is the same."""
    source = adapter(tmp_path / "a.safetensors", kind)
    tensors = load_file(source)
    for one, other in (("up.weight", "down.weight"), ("w1_a", "w1_b"), ("w2_a", "w2_b")):
        for key in [key for key in tensors if key.endswith(one)]:
            second = key.removesuffix(one) + other
            graded = torch.ones(tensors[key].shape[1])
            graded[0], graded[-1] = 2.0**13, 2.0**-13
            tensors[key] = tensors[key] * graded.reshape(1, -1, *[1] * (tensors[key].ndim - 2))
            rows = graded.reshape(-1, *[1] * (tensors[second].ndim - 1))
            tensors[second] = tensors[second] / rows
    save_file(tensors, source)
    run(source, rank=2)
    before, after = deltas(source), deltas(tmp_path / "out.safetensors")
    for name, delta in before.items():
        error, size = np.linalg.norm(delta - after[name]), np.linalg.norm(delta)
        least = optimum(kind, delta, 2, SHAPES[name]) ** 0.5
        assert error == pytest.approx(least, rel=1e-5, abs=2e-6 * size), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reported_errors_count_the_rounding(dtype: torch.dtype, tmp_path: Path) -> None:
    source = adapter(tmp_path / "a.safetensors", dtype=dtype)
    for rank in (2, 5):
        report = run(source, rank=rank)
        measured = relative(torch_deltas(tmp_path / "out.safetensors"), torch_deltas(source))
        assert report.relative_error == pytest.approx(measured, rel=1e-6)


def torch_deltas(path: Path) -> dict[str, np.ndarray]:
    """As `deltas`, of LoRA in any dtype: NumPy has no bfloat16."""
    tensors = load_file(path)
    wide = path.with_suffix(".wide")
    save_file({key: tensor.double() for key, tensor in tensors.items()}, wide)
    return deltas(wide)


def test_a_lokr_in_both_factors_stays_one(tmp_path: Path) -> None:
    """Readers want one rank for both factors, and a full one from half its side on."""
    draw = np.random.default_rng(0)
    tensors = {
        f"{LINEAR}.lokr_w1_a": draw.standard_normal((8, 3)),
        f"{LINEAR}.lokr_w1_b": draw.standard_normal((3, 8)),
        f"{LINEAR}.lokr_w2_a": draw.standard_normal((16, 3)),
        f"{LINEAR}.lokr_w2_b": draw.standard_normal((3, 16)),
        f"{LINEAR}.alpha": np.float64(3.0),
    }
    save_file(
        {k: torch.tensor(t, dtype=torch.float32) for k, t in tensors.items()},
        tmp_path / "a.safetensors",
    )
    run(tmp_path / "a.safetensors", rank=2)
    kept = load_file(tmp_path / "out.safetensors")
    assert kept[f"{LINEAR}.lokr_w1_a"].shape == (8, 2)
    assert kept[f"{LINEAR}.lokr_w2_b"].shape == (2, 16)
    assert float(kept[f"{LINEAR}.alpha"]) == 2.0


def test_conv_rank_and_clipping(tmp_path: Path) -> None:
    source = adapter(tmp_path / "a.safetensors", rank=12)
    report = run(source, rank=10, conv_rank=3)
    ranks = {item["module"]: item["rank"] for item in report.details}
    assert sorted(ranks.values()) == [3, 10, 10, 10]
    assert ranks[next(m for m in ranks if m.endswith("conv1"))] == 3
    report = run(source, rank=500)
    assert all(item["rank"] == 12 for item in report.details)
    assert "nothing was cut" in report.notes[0]
    assert load_file(source).keys() == load_file(tmp_path / "out.safetensors").keys()
    for key, tensor in load_file(source).items():
        assert torch.equal(tensor, load_file(tmp_path / "out.safetensors")[key])


def test_dead_directions_are_cut_without_loss(tmp_path: Path) -> None:
    source = adapter(tmp_path / "a.safetensors")
    tensors = load_file(source)
    for name in SHAPES:
        tensors[f"{name}.lora_up.weight"][:, 4:] = 0
    save_file(tensors, source)
    report = run(source, rank=6)
    assert {item["rank"] for item in report.details} == {4}
    assert relative(deltas(tmp_path / "out.safetensors"), deltas(source)) < 1e-6


@pytest.mark.parametrize("error", [0.05, 0.2, 0.5])
def test_error_is_held_over_the_whole_file_with_the_fewest_bytes(
    error: float, tmp_path: Path
) -> None:
    source = adapter(tmp_path / "a.safetensors")
    report = run(source, error=error)
    measured = relative(deltas(tmp_path / "out.safetensors"), deltas(source))
    assert measured <= error * (1 + 1e-6)
    assert report.relative_error == pytest.approx(measured, rel=1e-6)
    # no uniform rank with so small an error takes fewer bytes
    for rank in range(1, 7):
        other = run(source, rank=rank, output=tmp_path / "uniform.safetensors")
        assert other.relative_error > error or other.bytes >= report.bytes


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr-low"])
def test_size_is_never_exceeded_and_used(kind: str, tmp_path: Path) -> None:
    source = adapter(
        tmp_path / "a.safetensors", kind, metadata={"ss_network_dim": "6", "ss_network_alpha": "3"}
    )
    sizes = []
    whole = run(source, rank=500).bytes
    for share in (0.35, 0.5, 0.8):
        budget = int(share * whole)
        report = run(source, size=budget)
        assert report.bytes == (tmp_path / "out.safetensors").stat().st_size <= budget
        sizes.append(report.relative_error)
        assert report.relative_error == pytest.approx(
            relative(deltas(tmp_path / "out.safetensors"), deltas(source)), rel=1e-6
        )
    assert sizes == sorted(sizes, reverse=True)


def test_size_uses_its_budget(tmp_path: Path) -> None:
    """With enough ranks to choose from, at least 99 % of it."""
    draw = torch.Generator().manual_seed(0)
    names = [
        f"lora_unet_down_blocks_{a}_attentions_{b}_transformer_blocks_0_attn1_to_{p}"
        for a in (0, 1, 2)
        for b in (0, 1)
        for p in "qkv"
    ]
    tensors = {}
    for name in names:
        tensors[f"{name}.lora_up.weight"] = torch.randn(160, 32, generator=draw) * torch.arange(
            1, 33
        ).pow(-0.7)
        tensors[f"{name}.lora_down.weight"] = torch.randn(32, 120, generator=draw)
        tensors[f"{name}.alpha"] = torch.tensor(16.0)
    source = tmp_path / "a.safetensors"
    save_file(tensors, source)
    for budget in (100_000, 234_567, 500_000):
        report = run(source, size=budget)
        assert 0.99 * budget <= report.bytes <= budget


PROJECTIONS = [
    f"lora_unet_down_blocks_{a}_attentions_{b}_transformer_blocks_0_{module}"
    for a in (0, 1, 2)
    for b in (0, 1)
    for module in ("attn1_to_k", "attn1_to_q", "attn1_to_v", "ff_net_2")
]


def many(path: Path, kind: str = "lora", *, alpha: float = 6.0, seed: int = 0) -> Path:
    """Modules of equal shapes and unequal spectra: what is computed as stacks."""
    draw = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for n, name in enumerate(PROJECTIONS):
        columns = 96 if name.endswith("net_2") else 64
        spectrum = torch.arange(1, 9).pow(-0.2 - 0.05 * n)
        if kind == "lora":
            tensors[f"{name}.lora_up.weight"] = torch.randn(80, 8, generator=draw) * spectrum
            tensors[f"{name}.lora_down.weight"] = torch.randn(8, columns, generator=draw)
        else:
            for side in "12":
                tensors[f"{name}.hada_w{side}_a"] = (
                    torch.randn(80, 4, generator=draw) * spectrum[:4]
                )
                tensors[f"{name}.hada_w{side}_b"] = torch.randn(4, columns, generator=draw)
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(
        {key: tensor.half() if tensor.ndim else tensor for key, tensor in tensors.items()}, path
    )
    return path


def many_deltas(path: Path) -> dict[str, np.ndarray]:
    return deltas(path, {name: (80, 96 if name.endswith("net_2") else 64) for name in PROJECTIONS})


@pytest.mark.parametrize("kind", ["lora", "loha"])
@pytest.mark.parametrize(
    "rule",
    [{"rank": 3}, {"energy": 0.8}, {"size": 40_000}, {"error": 0.3}, {"rank": 3, "dtype": "fp32"}],
)
def test_stacks_give_what_modules_give_one_by_one(
    kind: str, rule: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = many(tmp_path / "a.safetensors", kind)
    reports = {}
    for stack in (1, 4, 100):
        monkeypatch.setattr(rewriting, "STACK", stack)
        reports[stack] = run(source, output=tmp_path / f"{stack}.safetensors", **rule)
    stacked = [(tmp_path / f"{stack}.safetensors").read_bytes() for stack in reports]
    assert stacked[0] == stacked[1] == stacked[2]
    assert reports[1].details == reports[4].details == reports[100].details
    monkeypatch.setattr(Rewriter, "_stacked", lambda *_: None)
    reports[0] = run(source, output=tmp_path / "0.safetensors", **rule)
    before = many_deltas(source)
    for stack, report in reports.items():
        after = many_deltas(tmp_path / f"{stack}.safetensors")
        assert (
            relative(after, many_deltas(tmp_path / "0.safetensors")) < 5e-4
        )  # another rounding of the same numbers
        assert report.relative_error == pytest.approx(relative(after, before), rel=1e-6)
        for item, other, name in zip(report.details, reports[0].details, before, strict=True):
            assert (item["module"], item["rank"]) == (other["module"], other["rank"])
            error = np.linalg.norm(before[name] - after.get(name, 0.0)) / np.linalg.norm(
                before[name]
            )
            assert item["relative_error"] == pytest.approx(error, rel=1e-6)


def test_stacks_are_really_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    first = Rewriter._first_stack

    def counted(self: Rewriter, tasks: Sequence[Any], tensors: Any) -> Any:
        sizes.append(len(tasks))
        return first(self, tasks, tensors)

    monkeypatch.setattr(Rewriter, "_first_stack", counted)
    run(many(tmp_path / "a.safetensors"), rank=2)
    assert sum(sizes) == len(PROJECTIONS)
    each = len(PROJECTIONS) // (
        engine.ROUNDS * torch.get_num_threads()
    )  # so that no worker waits for the others
    assert max(sizes) == min(rewriting.STACK, max(1, each))


def test_a_stack_with_one_bad_member_names_it(tmp_path: Path) -> None:
    source = many(tmp_path / "a.safetensors")
    tensors = load_file(source)
    tensors[f"{PROJECTIONS[5]}.lora_down.weight"][2, 3] = float("inf")
    save_file(tensors, source)
    for rule in ({"rank": 2}, {"size": 20_000}):
        with pytest.raises(NonFinite, match=rf"{PROJECTIONS[5]}\.lora_down"):
            run(source, **rule)
    assert not (tmp_path / "out.safetensors").exists()


def test_stacks_may_hold_zeros_and_what_needs_no_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = many(tmp_path / "a.safetensors")
    tensors = load_file(source)
    tensors[f"{PROJECTIONS[0]}.lora_up.weight"].zero_()
    tensors[f"{PROJECTIONS[1]}.lora_up.weight"][:, 2:] = 0
    tensors[f"{PROJECTIONS[2]}.lora_up.weight"][:, 4:] = 0
    save_file(tensors, source)
    report = run(source, rank=3)
    assert [item["rank"] for item in report.details[:4]] == [1, 2, 3, 3]
    before, after = many_deltas(source), many_deltas(tmp_path / "out.safetensors")
    assert report.relative_error == pytest.approx(relative(after, before), rel=1e-6)
    assert not after[PROJECTIONS[0]].any()
    whole = (tmp_path / "out.safetensors").read_bytes()
    monkeypatch.setattr(rewriting, "STACK", 1)
    alone = run(source, rank=3)
    assert (tmp_path / "out.safetensors").read_bytes() == whole, "no member steers another"
    for one, other in zip(alone.details, report.details, strict=True):
        # measured in another order: processors differ in the last bit
        assert one == {**other, "relative_error": pytest.approx(other["relative_error"], rel=1e-12)}


def test_hashes_are_of_what_the_second_pass_wrote(tmp_path: Path) -> None:
    """sd-scripts' hash covers every tensor, also those that go into the file without waiting in memory."""
    source = many(tmp_path / "a.safetensors")
    save_file(
        load_file(source),
        source,
        {"sshs_model_hash": "0" * 64, "sshs_legacy_hash": "0" * 8, "ss_lr": "1"},
    )
    run(source, size=20_000)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        metadata = file.metadata()
    training = {name: value for name, value in metadata.items() if name.startswith("ss_")}
    bytes_ = save(load_file(tmp_path / "out.safetensors"), training)
    length = int.from_bytes(bytes_[:8], "little")
    assert metadata["sshs_model_hash"] == hashlib.sha256(bytes_[8 + length :]).hexdigest()


def test_a_size_too_small_for_anything_is_refused(tmp_path: Path) -> None:
    source = adapter(tmp_path / "a.safetensors")
    with pytest.raises(NotRepresentable, match="least|smallest"):
        run(source, size=100)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    "rule", [{"energy": 0.9}, {"sv_ratio": 3.0}, {"sv_fro": 0.9}, {"sv_cumulative": 0.7}]
)
def test_rules_for_each_module(rule: dict[str, float], tmp_path: Path) -> None:
    source = adapter(tmp_path / "a.safetensors")
    report = run(source, **rule)
    for item, delta in zip(report.details, deltas(source).values(), strict=True):
        sigma = np.linalg.svd(delta, compute_uv=False)
        ((name, value),) = rule.items()
        kept = {
            "energy": lambda k: (sigma[:k] ** 2).sum() >= value * (sigma**2).sum(),  # noqa: B023
            "sv_fro": lambda k: (sigma[:k] ** 2).sum() ** 0.5 >= value * (sigma**2).sum() ** 0.5,  # noqa: B023
            "sv_cumulative": lambda k: sigma[:k].sum() >= value * sigma.sum(),  # noqa: B023
            "sv_ratio": lambda k: k == (sigma >= sigma[0] / value).sum(),  # noqa: B023
        }[name]
        assert item["rank"] == next(k for k in range(1, 50) if kept(k))


def test_max_rank_bounds_any_rule(tmp_path: Path) -> None:
    report = run(adapter(tmp_path / "a.safetensors"), error=0.01, max_rank=2)
    assert max(item["rank"] for item in report.details) == 2


def test_modules_not_worth_their_bytes_are_left_out_and_named(tmp_path: Path) -> None:
    source = adapter(tmp_path / "a.safetensors")
    tensors = load_file(source)
    tensors[f"{WIDE}.lora_up.weight"] *= 1e-4
    save_file(tensors, source)
    report = run(source, error=0.1)
    left = [item for item in report.details if item["rank"] == 0]
    assert [item["change"] for item in left] == ["left out"]
    assert report.modules == 3
    assert "left out" in report.notes[0]
    assert not any(key.startswith(WIDE) for key in load_file(tmp_path / "out.safetensors"))
    measured = relative(deltas(tmp_path / "out.safetensors"), deltas(source))
    assert report.relative_error == pytest.approx(measured, rel=1e-6)


def test_dora_keeps_its_magnitudes_and_a_base_measures_the_merged_weight(
    tmp_path: Path, tiny: Path
) -> None:
    name = f"{BASE_MODULE}"
    with safe_open(tiny / "base.safetensors", "pt") as file:
        weight = file.get_tensor(BASE_KEY).double().numpy()
    draw = np.random.default_rng(1)
    up, down = (
        draw.standard_normal((weight.shape[0], 4)) * [1, 0.5, 0.2, 0.1],
        draw.standard_normal((4, weight.shape[1])),
    )
    size = 0.2 * np.linalg.norm(weight) / np.linalg.norm(up @ down)
    up *= size
    magnitude = np.linalg.norm(weight + up @ down, axis=1, keepdims=True) * draw.uniform(
        0.9, 1.1, (weight.shape[0], 1)
    )
    tensors = {
        "lora_up.weight": up,
        "lora_down.weight": down,
        "dora_scale": magnitude,
        "alpha": np.float64(4.0),
    }
    source = tmp_path / "a.safetensors"
    save_file(
        {f"{name}.{k}": torch.tensor(t, dtype=torch.float32) for k, t in tensors.items()}, source
    )
    plain = run(source, rank=2, family="sd1")
    after = {
        k.removeprefix(f"{name}."): t.double().numpy()
        for k, t in load_file(tmp_path / "out.safetensors").items()
    }
    np.testing.assert_array_equal(after["dora_scale"], np.float32(magnitude))
    kept = after["lora_up.weight"] @ after["lora_down.weight"]
    assert np.linalg.norm(up @ down - kept) == pytest.approx(
        oracle.best_rank(up @ down, 2), rel=1e-5
    )
    assert "--base" in " ".join(plain.notes)
    assert plain.details[0]["relative_error"] is None
    assert plain.relative_error is None
    based = run(source, rank=2, family="sd1", base=tiny / "base.safetensors")
    one, two = (oracle.dora(weight, delta, magnitude, 0) for delta in (up @ down, kept))
    expected = np.linalg.norm(one - two) / np.linalg.norm(one - weight)
    assert based.relative_error == pytest.approx(expected, rel=1e-4)


BASE_KEY = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
BASE_MODULE = LINEAR


def test_to_another_algorithm(tmp_path: Path) -> None:
    source = adapter(tmp_path / "a.safetensors", "lokr")
    before = deltas(source)
    report = run(source, rank=5, algo="lora")
    after = deltas(tmp_path / "out.safetensors")
    for name, delta in before.items():
        assert np.linalg.norm(delta - after[name]) == pytest.approx(
            oracle.best_rank(delta, 5), rel=1e-5
        )
    assert {item["algorithm"] for item in report.details} == {"lora"}
    assert made.provenance(tmp_path / "out.safetensors")["rank"] == 5


def test_metadata_says_what_holds(tmp_path: Path) -> None:
    metadata = {
        "ss_network_dim": "6",
        "ss_network_alpha": "4.5",
        "ss_output_name": "style",
        "ss_network_module": "networks.lora",
    }
    source = adapter(tmp_path / "a.safetensors", metadata=metadata)
    run(source, rank=2)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        found = file.metadata()
    assert (found["ss_network_dim"], found["ss_network_alpha"], found["ss_output_name"]) == (
        "2",
        "2",
        "style",
    )
    run(source, error=0.3)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata()["ss_network_dim"] == "Dynamic"


def test_what_has_no_rank_is_carried_or_refused(tmp_path: Path) -> None:
    bias = {f"{LINEAR}.diff_b": torch.randn(24)}
    source = adapter(tmp_path / "a.safetensors", extra=bias)
    run(source, rank=2)
    assert torch.equal(
        load_file(tmp_path / "out.safetensors")[f"{LINEAR}.diff_b"], bias[f"{LINEAR}.diff_b"]
    )
    save_file(bias, source)
    with pytest.raises(NothingToDo, match="no.* has a rank|none"):
        run(source, rank=2, family="sd1", format="kohya")


def test_one_rule_exactly(tmp_path: Path) -> None:
    source = adapter(tmp_path / "a.safetensors")
    for options, words in (
        ({}, "no rank rule is given"),
        ({"rank": 2, "error": 0.1}, "contradict"),
        ({"energy": 0.9, "conv_rank": 2}, "--conv-rank"),
        ({"rank": 2, "algo": "full"}, "no rank"),
        ({"energy": 1.5}, "--energy"),
    ):
        with pytest.raises(WrongUsage, match=words):
            run(source, **options)


def test_nan_is_named(tmp_path: Path) -> None:
    source = adapter(tmp_path / "a.safetensors")
    tensors = load_file(source)
    tensors[f"{CONV}.lora_down.weight"][0, 0] = float("nan")
    save_file(tensors, source)
    with pytest.raises(NonFinite, match=rf"{CONV}\.lora_down\.weight"):
        run(source, rank=2)
    assert not (tmp_path / "out.safetensors").exists()


def test_vanished_numbers_are_counted(tmp_path: Path) -> None:
    """Balanced factors keep tiny differences out of fp16's underflow; what still vanishes is said."""
    source = adapter(tmp_path / "a.safetensors", names=[POINT])
    tensors = load_file(source)
    tensors[f"{POINT}.lora_up.weight"] *= 1e-5
    save_file(tensors, source)
    balanced = run(source, rank=4, dtype="fp16")
    assert not balanced.notes
    assert balanced.relative_error == pytest.approx(
        relative(deltas(tmp_path / "out.safetensors"), deltas(source)), rel=1e-6
    )
    tensors[f"{POINT}.lora_up.weight"] *= 1e-9
    save_file(tensors, source)
    lost = run(source, rank=4, dtype="fp16")
    assert "became zero" in " ".join(lost.notes)


def test_results_do_not_depend_on_threads_or_memory(tmp_path: Path) -> None:
    source = adapter(tmp_path / "a.safetensors", "loha")
    found = []
    for threads, memory in ((1, None), (2, None), (2, 400_000)):
        torch.set_num_threads(threads)
        run(source, size=20_000, memory=memory)
        found.append((tmp_path / "out.safetensors").read_bytes())
    torch.set_num_threads(1)
    assert found[0] == found[1] == found[2]
