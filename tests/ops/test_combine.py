"""combine: linear in ΔW for every pair of kinds, exact, and what the other methods keep."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adaptkit.errors import NonFinite, NothingToDo, NotRepresentable, ShapeMismatch, WrongUsage
from adaptkit.linalg.mixing import mix, thinned, trimmed
from adaptkit.ops import combine, convert
from tests import oracle
from tests.made import KINDS, LINEAR, WIDE, adapter, deltas, module, provenance, relative


def run(inputs: list[tuple[Path, float]], output: Path, **options: object) -> combine.Report:
    plan = combine.plan(inputs, combine.Options(output=output, overwrite=True, **options))  # type: ignore[arg-type]
    try:
        return combine.run(plan)
    finally:
        plan.close()


def summed(inputs: list[tuple[Path, float]]) -> dict[str, np.ndarray]:
    total: dict[str, np.ndarray] = {}
    for path, weight in inputs:
        for name, delta in deltas(path).items():
            total[name] = total.get(name, 0.0) + weight * delta
    return total


@pytest.mark.parametrize(("one", "two"), list(product(KINDS, KINDS)))
def test_two_of_any_kind_add_up(one: str, two: str, tmp_path: Path) -> None:
    a = adapter(tmp_path / "a.safetensors", one, seed=1)
    b = adapter(tmp_path / "b.safetensors", two, seed=2)
    inputs = [(a, 0.5), (b, -1.25)]
    report = run(inputs, tmp_path / "c.safetensors")
    expected, found = summed(inputs), deltas(tmp_path / "c.safetensors")
    assert relative(found, expected) < 1e-6
    assert report.relative_error == pytest.approx(relative(found, expected), abs=1e-7)
    assert not report.unused


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight", [0.5, -1.0, 0.3, 1.0])
def test_one_at_a_weight(kind: str, weight: float, tmp_path: Path) -> None:
    source = adapter(tmp_path / "a.safetensors", kind)
    run([(source, weight)], tmp_path / "b.safetensors")
    assert relative(deltas(tmp_path / "b.safetensors"), summed([(source, weight)])) < 1e-6


@pytest.mark.parametrize("kind", ["lora", "lokr", "full"])
@pytest.mark.parametrize("ranks", [{}, {"rank": 2}, {"size": 50_000}])
def test_an_adapter_minus_itself_is_zero(kind: str, ranks: dict[str, int], tmp_path: Path) -> None:
    source = adapter(tmp_path / "a.safetensors", kind)
    report = run([(source, 1.0), (source, -1.0)], tmp_path / "b.safetensors", **ranks)
    assert "cancel out" in " ".join(report.notes)
    assert all(not delta.any() for delta in deltas(tmp_path / "b.safetensors").values())
    assert report.relative_error == 0.0


def test_ranks_add_up_and_rules_cut_them_to_the_optimum(tmp_path: Path) -> None:
    a, b = (adapter(tmp_path / f"{n}.safetensors", seed=n) for n in (1, 2))
    inputs = [(a, 1.0), (b, 0.5)]
    exact = run(inputs, tmp_path / "c.safetensors")
    assert {item["rank"] for item in exact.details} == {12}
    cut = run(inputs, tmp_path / "d.safetensors", rank=4)
    expected, found = summed(inputs), deltas(tmp_path / "d.safetensors")
    for name, delta in expected.items():
        assert np.linalg.norm(delta - found[name]) == pytest.approx(
            oracle.best_rank(delta, 4), rel=1e-5
        )
    assert cut.relative_error == pytest.approx(relative(found, expected), rel=1e-6)


def test_modules_of_one_input_alone_are_kept(tmp_path: Path) -> None:
    a = adapter(tmp_path / "a.safetensors", names=[LINEAR], seed=1)
    b = adapter(tmp_path / "b.safetensors", "lokr", names=[LINEAR, WIDE], seed=2)
    inputs = [(a, 1.0), (b, 1.0)]
    report = run(inputs, tmp_path / "c.safetensors")
    assert report.modules == 2
    assert relative(deltas(tmp_path / "c.safetensors"), summed(inputs)) < 1e-6
    same = {key: tensor for key, tensor in load_file(b).items() if key.startswith(WIDE)}
    written = load_file(tmp_path / "c.safetensors")
    assert all(torch.equal(written[key], tensor) for key, tensor in same.items()), (
        "what nobody changes is copied"
    )


def test_formats_may_differ(tmp_path: Path) -> None:
    a, b = adapter(tmp_path / "a.safetensors", seed=1), adapter(tmp_path / "b.safetensors", seed=2)
    other = tmp_path / "b-diffusers.safetensors"
    convert.run(convert.plan(b, convert.Options(to="diffusers", output=other)))
    run([(a, 1.0), (other, 2.0)], tmp_path / "c.safetensors")
    assert relative(deltas(tmp_path / "c.safetensors"), summed([(a, 1.0), (b, 2.0)])) < 1e-6
    report = run([(other, 2.0), (a, 1.0)], tmp_path / "d.safetensors")
    assert report.format == "diffusers"
    report = run([(other, 2.0), (a, 1.0)], tmp_path / "e.safetensors", to="kohya")
    assert relative(deltas(tmp_path / "e.safetensors"), summed([(a, 1.0), (b, 2.0)])) < 1e-6


def test_vectors_add_up(tmp_path: Path) -> None:
    one, two = torch.randn(24), torch.randn(24)
    a = adapter(tmp_path / "a.safetensors", extra={f"{LINEAR}.diff_b": one})
    b = adapter(tmp_path / "b.safetensors", extra={f"{LINEAR}.diff_b": two})
    run([(a, 1.0), (b, -0.5)], tmp_path / "c.safetensors", rank=3)
    torch.testing.assert_close(
        load_file(tmp_path / "c.safetensors")[f"{LINEAR}.diff_b"], one - 0.5 * two
    )


def test_metadata_that_differs_is_dropped_and_the_recipe_told(tmp_path: Path) -> None:
    a = adapter(
        tmp_path / "a.safetensors", metadata={"ss_sd_model_name": "sd15", "ss_output_name": "one"}
    )
    b = adapter(
        tmp_path / "b.safetensors", metadata={"ss_sd_model_name": "sd15", "ss_output_name": "two"}
    )
    run([(a, 0.5), (b, 0.25)], tmp_path / "c.safetensors")
    with safe_open(tmp_path / "c.safetensors", "pt") as file:
        found = file.metadata()
    assert found["ss_sd_model_name"] == "sd15"
    assert "ss_output_name" not in found
    assert provenance(tmp_path / "c.safetensors")["sources"] == [
        {"file": "a.safetensors", "weight": 0.5},
        {"file": "b.safetensors", "weight": 0.25},
    ]


def test_refusals(tmp_path: Path, tiny: Path) -> None:
    a = adapter(tmp_path / "a.safetensors")
    out = tmp_path / "c.safetensors"
    with pytest.raises(ShapeMismatch, match="one family|Stable Diffusion"):
        run([(a, 1.0), (tiny / "sdxl.safetensors", 1.0)], out)
    with pytest.raises(NothingToDo, match="weight is 0"):
        run([(a, 0.0)], out)
    with pytest.raises(WrongUsage, match="--density"):
        run([(a, 1.0)], out, method="ties", density=0.0)
    with pytest.raises(WrongUsage, match="--density"):
        run([(a, 1.0)], out, density=0.5)
    tensors = load_file(a)
    tensors[f"{LINEAR}.lora_up.weight"][0] = float("inf")
    bad = tmp_path / "bad.safetensors"
    save_file(tensors, bad)
    with pytest.raises(NonFinite, match="bad.safetensors.*lora_up"):
        run([(a, 1.0), (bad, 1.0)], out, rank=2)
    with pytest.raises(NonFinite):
        run([(a, 1.0), (bad, 1.0)], out)
    assert not out.exists()


def test_kinds_without_a_difference_need_the_base(tmp_path: Path, tiny: Path) -> None:
    draw = np.random.default_rng(3)
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    with safe_open(tiny / "base.safetensors", "pt") as file:
        weight = file.get_tensor(key).double().numpy()
    rows, inputs = weight.shape
    up, down = 0.1 * draw.standard_normal((rows, 2)), 0.1 * draw.standard_normal((2, inputs))
    magnitude = np.linalg.norm(weight + up @ down, axis=1, keepdims=True) * 1.05
    dora = {
        "lora_up.weight": up,
        "lora_down.weight": down,
        "dora_scale": magnitude,
        "alpha": np.float64(2.0),
    }
    other = module("lora", LINEAR, weight.shape, draw, 2)
    one, two = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file({f"{LINEAR}.{k}": torch.tensor(t, dtype=torch.float32) for k, t in dora.items()}, one)
    save_file({k: torch.tensor(t, dtype=torch.float32) for k, t in other.items()}, two)
    inputs_ = [(one, 0.5), (two, 1.0)]
    with pytest.raises(NotRepresentable, match="depends on the weight") as caught:
        run(inputs_, tmp_path / "c.safetensors", family="sd1")
    assert "--base" in (caught.value.hint or "")
    run(inputs_, tmp_path / "c.safetensors", family="sd1", base=tiny / "base.safetensors")
    changed = oracle.dora(weight, up @ down, magnitude, 0) - weight
    shapes = {LINEAR: weight.shape}
    expected = 0.5 * changed + deltas(two, shapes)[LINEAR]
    np.testing.assert_allclose(
        deltas(tmp_path / "c.safetensors", shapes)[LINEAR], expected, atol=1e-6
    )


# the other methods ---------------------------------------------------------------------------------------------------


def test_trimmed_keeps_the_largest() -> None:
    x = torch.tensor([[3.0, -5.0], [1.0, 0.5]])
    assert trimmed(x, 0.5).tolist() == [[3.0, -5.0], [0.0, 0.0]]
    assert trimmed(x, 0.3).tolist() == [[3.0, -5.0], [0.0, 0.0]]
    assert trimmed(x, 0.25).tolist() == [[0.0, -5.0], [0.0, 0.0]]
    assert torch.equal(trimmed(x, 1.0), x)


def test_thinned_is_right_on_average_and_repeatable() -> None:
    x = torch.ones(400, 500)
    found = thinned(x, 0.3, "a")
    assert found.unique().tolist() == pytest.approx([0.0, 1 / 0.3])
    assert float(found.mean()) == pytest.approx(1.0, abs=0.01)
    assert torch.equal(found, thinned(x, 0.3, "a"))
    assert not torch.equal(found, thinned(x, 0.3, "b"))


def test_ties_elects_signs_and_averages() -> None:
    """The example of the paper's figure 1: redundant entries go, conflicts are settled, agreeing entries are averaged."""
    one, two = torch.tensor([[4.0, 1.0, -2.0, 0.1]]), torch.tensor([[2.0, -3.0, -4.0, 0.1]])
    found = mix([one, two], "ties", 0.75, ["", ""])
    assert found.tolist() == [[3.0, -3.0, -3.0, 0.0]]


@pytest.mark.parametrize("method", ["ties", "dare", "dare-ties", "magnitude"])
def test_methods_over_files(method: str, tmp_path: Path) -> None:
    a, b = (
        adapter(tmp_path / "a.safetensors", seed=1),
        adapter(tmp_path / "b.safetensors", "lokr", seed=2),
    )
    inputs = [(a, 1.0), (b, 0.5)]
    report = run(inputs, tmp_path / "c.safetensors", method=method, density=1.0)
    found, expected = deltas(tmp_path / "c.safetensors"), summed(inputs)
    if not method.endswith("ties"):
        assert relative(found, expected) < 1e-5, "with every entry kept, the sum"
    thin = run(inputs, tmp_path / "d.safetensors", method=method, density=0.3, seed=1)
    again = run(inputs, tmp_path / "e.safetensors", method=method, density=0.3, seed=1)
    assert (tmp_path / "d.safetensors").read_bytes() == (tmp_path / "e.safetensors").read_bytes()
    assert (
        {item["algorithm"] for item in thin.details}
        == {"full"}
        == {item["algorithm"] for item in report.details}
    )
    assert again.relative_error == thin.relative_error
    low = run(inputs, tmp_path / "f.safetensors", method=method, density=0.3, seed=1, rank=3)
    assert {item["rank"] for item in low.details} == {3}
    exact = deltas(tmp_path / "d.safetensors")
    for name, delta in deltas(tmp_path / "f.safetensors").items():
        assert np.linalg.norm(exact[name] - delta) == pytest.approx(
            oracle.best_rank(exact[name], 3), rel=1e-4
        )
