"""Kinds of PEFT written back: PEFT loads what adaptkit wrote, and computes what it did before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adaptkit.adapter import Adapter
from adaptkit.errors import AdaptkitError, NothingToDo, NotRepresentable
from adaptkit.ops import combine, convert, metadata, resize
from tests.interop.test_peft_read import CASES, Case, Model

peft = pytest.importorskip("peft")

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

KEPT = [name for name in CASES if not name.startswith("lora")]
# where a strength s means W + s · ΔW, exactly
TURNS = ("hra", "ia3", "oft", "boft", "road", "psoft", "osf", "deft", "vblora")
LINEAR = [n for n in KEPT if not n.startswith(TURNS)]
NAMING = {
    "target_modules", "rank_pattern", "feedforward_modules", "n_frequency_pattern",
    "lambda_pattern", "base_model_name_or_path", "n_frequency", "proportional_parameters",
    "block_size", "block_size_pattern",
}  # fmt: skip


def loaded(case: Case, adapter: Path, *, strict: bool = True) -> torch.Tensor:
    """What PEFT's model computes with an adapter that adaptkit wrote."""
    model = peft.PeftModel.from_pretrained(Model(conv=case.conv, bias=case.bias), adapter)
    kept = load_file(adapter / "adapter_model.safetensors")
    if strict:  # PEFT ignores the keys that it does not know
        own = peft.get_peft_model_state_dict(model)
        assert own.keys() == kept.keys()
        for key in kept:  # shares of a VB-LoRA are kept as logits
            torch.testing.assert_close(own[key].to(kept[key]), kept[key], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        found: torch.Tensor = model.eval()(case.x)
    return found


def written(case: Case, output: str, verb: Any = convert, **options: Any) -> Path:
    out = case.base.with_name(output)
    given = dict(to="peft", family="flux", output=out, overwrite=True) | options
    strength = given.pop("strength", None)
    source: Any = case.adapter if strength is None else [(case.adapter, strength)]
    verb.run(verb.plan(source, verb.Options(**given)))
    return out


@pytest.fixture(params=KEPT)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    found = Case(request.param, tmp_path)
    found.name = request.param
    return found


@pytest.mark.share(2)
def test_peft_computes_the_same_with_what_is_written(case: Case) -> None:
    """Copied, respelled from tensors in other names, cast, and at half the strength."""
    size = float((case.expected - case.before).norm())
    out = written(case, "same", verify=True)
    old = load_file(case.adapter / "adapter_model.safetensors")
    new = load_file(out / "adapter_model.safetensors")
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old)
    assert float((loaded(case, out) - case.expected).norm()) < 1e-5 * size
    # seeds and settings stay
    was, now = (json.loads((p / "adapter_config.json").read_text()) for p in (case.adapter, out))
    assert was["peft_type"] == now["peft_type"]
    lost = {k for k, v in was.items() if now.get(k) != v} - NAMING - {"inference_mode", "r"}
    assert not {k for k in lost if was[k]}
    # computed instead of copied
    wide = written(case, "wide", dtype="fp32", overwrite=True)
    assert float((loaded(case, wide) - case.expected).norm()) < 1e-5 * size
    half = loaded(case, written(case, "half", dtype="bf16"), strict=False)
    assert 0 < float((half - case.expected).norm()) < 0.05 * size


def test_half_the_strength(case: Case) -> None:
    if case.name not in LINEAR:
        with pytest.raises(NotRepresentable, match="depends on the weight|add up to 1"):
            written(case, "half", combine, strength=0.5)
        assert not case.base.with_name("half").exists()
        return
    out = written(case, "half", combine, strength=0.5)
    model, merged = Model(conv=case.conv, bias=case.bias), case.merged(case.adapter)
    blended = {k: (merged[k] + case.state[k]) / 2 for k in merged}
    model.load_state_dict(blended)
    with torch.no_grad():
        exact = model(case.x)
    size = float((exact - case.before).norm())
    assert float((loaded(case, out) - exact).norm()) < 1e-5 * size


def test_the_ranks_of_an_adalora_are_cut_by_its_singular_values(tmp_path: Path) -> None:
    """And PEFT computes what the best approximation of rank 2 of every ΔW does."""
    case = Case("adalora", tmp_path)
    exact = dict(case.state)
    with Adapter.open(case.adapter, family="flux") as adapter:
        for slot, entry in adapter.entries.items():
            u, s, v = torch.linalg.svd(adapter.weights(entry).delta().double())
            best = (u[:, :2] * s[:2]) @ v[:2]
            key = f"{adapter.label(slot).removeprefix('transformer.')}.weight"
            exact[key] = (exact[key] + best.reshape(exact[key].shape)).float()
    out = tmp_path / "small"
    options = resize.Options(rank=2, output=out, family="flux", verify=True)
    report = resize.run(resize.plan(case.adapter, options))
    assert {one["algorithm"] for one in report.details} == {"adalora"}
    found, want = loaded(case, out), case.output(exact)
    assert float((found - want).norm()) < 1e-5 * float((want - case.before).norm())
    sized = resize.Options(size=3000, output=tmp_path / "sized", family="flux")
    report = resize.run(resize.plan(case.adapter, sized))
    weights = tmp_path / "sized" / "adapter_model.safetensors"
    assert weights.stat().st_size == report.bytes <= 3000
    loaded(case, tmp_path / "sized")


@pytest.mark.parametrize("name", ["hira", "vera", "ia3-output", "oft"])
def test_kinds_without_a_rank_to_cut_say_what_has_one(name: str, tmp_path: Path) -> None:
    case = Case(name, tmp_path)
    small = dict(rank=1, output=tmp_path / "small.safetensors", family="flux", dtype="fp32")
    with pytest.raises(NothingToDo, match="no") as refused:
        resize.plan(case.adapter, resize.Options(**small | {"output": tmp_path / "folder"}))
    assert "--algo lora" in (refused.value.hint or "")
    lora = resize.Options(**small | {"output": tmp_path / "f"}, algo="lora", base=case.base)
    assert {one["rank"] for one in resize.run(resize.plan(case.adapter, lora)).details} == {1}


@pytest.mark.parametrize("name", ["vera", "vera-drawn"])
def test_a_part_of_the_modules_that_share_projections_is_refused(name: str, tmp_path: Path) -> None:
    """PEFT would make others, of the size of the layers that are left."""
    case = Case(name, tmp_path)
    for options in ({"only": ("*to_q",)}, {"blocks": ("*to_k=0",)}):
        with pytest.raises(NotRepresentable, match="share projections") as refused:
            written(case, "part", **options)
        assert "--algo lora with --base" in (refused.value.hint or "")


def test_metadata_of_a_folder_leave_its_meaning(tmp_path: Path) -> None:
    case = Case("fourierft", tmp_path)
    metadata.edit(case.adapter, metadata.Options(set={"title": "hello"}))
    assert metadata.read(case.adapter).metadata["title"] == "hello"
    assert torch.equal(loaded(case, case.adapter), case.expected)


def test_inputs_with_other_seeds_do_not_make_one_file(tmp_path: Path) -> None:
    """A configuration states the seed once: two disjoint files stay two."""
    case = Case("fourierft", tmp_path)
    parts = []
    for n, name in enumerate(("to_q", "to_k")):
        written(case, name, only=(f"*{name}",))
        path = tmp_path / name / "adapter_config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {"random_loc_seed": 5 + n}))
        parts.append((tmp_path / name, 1.0))
    options = combine.Options(to="peft", family="flux", output=tmp_path / "both")
    with pytest.raises(NotRepresentable, match="random_loc_seed"):
        combine.plan(parts, options)
    path.write_text(json.dumps(config))
    combine.run(combine.plan(parts, options))
    size = float((case.expected - case.before).norm())
    assert float((loaded(case, tmp_path / "both") - case.expected).norm()) < 1e-5 * size


@pytest.mark.parametrize("rank", [10**9, float("inf"), 1.5])
def test_an_odd_rank_costs_neither_time_nor_memory(rank: float, tmp_path: Path) -> None:
    """`rank_pattern` has a mark for each rank of `init_r`."""
    case = Case("adalora", tmp_path)
    path = case.adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_r": rank}))
    with pytest.raises(AdaptkitError, match="init_r"):
        written(case, "out")
    assert not case.base.with_name("out").exists()


@pytest.mark.parametrize(
    ("name", "changed"),
    [("adalora-cut", {"init_r": 1 << 40}), ("shira", {"r": [2]}), ("deft", {"r": {"a": 1}})],
)
def test_a_configuration_that_makes_no_sense_is_not_written_again(
    name: str, changed: dict[str, Any], tmp_path: Path
) -> None:
    """One error, and no output: neither a crash nor a list of a trillion marks."""
    case = Case(name, tmp_path)
    path = case.adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    if name == "deft":  # PEFT caps its r: that of the tensors counts
        assert float((loaded(case, written(case, "out")) - case.expected).norm()) < 1e-4
        return
    with pytest.raises(AdaptkitError, match="init_r|its r"):
        written(case, "out")
    assert not (tmp_path / "out").exists()
