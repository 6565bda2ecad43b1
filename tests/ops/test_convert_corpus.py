"""convert on the real key lists of ../shared/corpus: there and back, and the names that real trainers and loaders use."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from adaptkit.adapter import Adapter
from adaptkit.detect import formats
from adaptkit.formats.contract import Alpha
from adaptkit.keymap import split_suffix
from adaptkit.ops import convert
from tests.ops.test_convert import equal
from tests.synth import CORPUS, Listing, corpus_listing, shrink, write_header_only

LISTS = sorted(path.stem for path in (CORPUS / "adapters").glob("*.json"))
# the same model, all its modules, in two namings: what is converted is named as the other list names it
SAME = [
    ("gen__comfynative_anima_allmodules", "gen__diffusers_peft_anima_allmodules", "diffusers"),
    (
        "gen__comfynative_flux1_dev_allmodules",
        "gen__diffusers_peft_flux1_dev_allmodules",
        "diffusers",
    ),
    (
        "gen__comfynative_flux2_klein_4b_allmodules",
        "gen__diffusers_peft_flux2_klein_4b_allmodules",
        "diffusers",
    ),
    (
        "gen__comfynative_hunyuan_video_allmodules",
        "gen__diffusers_peft_hunyuan_video_allmodules",
        "diffusers",
    ),
    ("gen__comfynative_krea2_allmodules", "gen__diffusers_peft_krea2_allmodules", "diffusers"),
    (
        "gen__comfynative_sd3_medium_allmodules",
        "gen__diffusers_peft_sd3_medium_allmodules",
        "diffusers",
    ),
    (
        "gen__comfynative_wan21_t2v_14b_allmodules",
        "gen__diffusers_peft_wan21_t2v_14b_allmodules",
        "diffusers",
    ),
    ("gen__comfynative_z_image_allmodules", "gen__diffusers_peft_z_image_allmodules", "diffusers"),
    ("gen__diffusers_peft_flux1_dev_allmodules", "gen__comfynative_flux1_dev_allmodules", "comfy"),
    (
        "gen__diffusers_peft_flux2_klein_4b_allmodules",
        "gen__comfynative_flux2_klein_4b_allmodules",
        "comfy",
    ),
    ("gen__diffusers_peft_krea2_allmodules", "gen__comfynative_krea2_allmodules", "comfy"),
    ("gen__diffusers_peft_lumina2_allmodules", "gen__comfynative_lumina2_allmodules", "comfy"),
    (
        "gen__diffusers_peft_sd3_medium_allmodules",
        "gen__comfynative_sd3_medium_allmodules",
        "comfy",
    ),
    (
        "gen__diffusers_peft_wan21_t2v_14b_allmodules",
        "gen__comfynative_wan21_t2v_14b_allmodules",
        "comfy",
    ),
    ("gen__diffusers_peft_z_image_allmodules", "gen__comfynative_z_image_allmodules", "comfy"),
    ("gen__lycoris_wrapper_sdxl_locon", "gen__comfynative_sdxl_unet_allmodules", "comfy"),
    ("invokeai__flux_lora_aitoolkit_format", "gen__musubi_flux_kontext_lora", "kohya"),
    ("gen__musubi_flux_kontext_lora", "invokeai__flux_lora_aitoolkit_format", "comfy"),
]


@pytest.mark.parametrize(("source", "target", "format"), SAME)
def test_names_are_those_of_real_files(
    source: str, target: str, format: str, corpus: Path, tmp_path: Path
) -> None:
    listing = corpus_listing(corpus / "adapters" / f"{source}.json")
    path = write_header_only(tmp_path / "a.safetensors", listing)
    family = None
    if "chroma" not in source:
        with Adapter.open(path) as adapter:
            family = adapter.family.name
    plan = convert.plan(
        path, convert.Options(to=format, family=family, output=tmp_path / "b.safetensors")
    )
    ours = {plan.keys.stem(task.slot) for task in plan.tasks}
    plan.close()
    theirs = {
        found[0]
        for key in corpus_listing(corpus / "adapters" / f"{target}.json")
        if (found := split_suffix(key))
    }
    assert ours == theirs


def fill(path: Path, listing: Listing) -> Path:
    draw = torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    for key, (_, shape) in listing.items():
        if key.endswith("alpha"):
            tensors[key] = torch.tensor(4.0)
        else:
            made = torch.randn(shape, generator=draw)
            tensors[key] = (made.abs() if "dora_scale" in key else made).half()
    save_file(tensors, path)
    return path


def whole(path: Path, family: str, format: str) -> dict[str, np.ndarray]:
    """ΔW by target and rows, parts put in their places; of kinds that are no difference, the bytes."""
    found: dict[str, np.ndarray] = {}
    with Adapter.open(path, family=family, format=format) as adapter:
        assert not adapter.unclaimed
        for slot, entry in adapter.entries.items():
            if not entry.kind.additive:
                stored = adapter.read(entry)
                found |= {
                    f"{slot}/{entry.kind.stored_as(r, peft=False)}": t.flatten().numpy()
                    for r, t in stored.items()
                }
                continue
            delta = adapter.weights(entry).delta().numpy()
            if slot.rows is None:
                found[str(slot.target)] = delta
                continue
            total = entry.facts.rows * slot.rows.total // (slot.rows.stop - slot.rows.start)
            rows = found.setdefault(str(slot.target), np.zeros((total, delta.shape[1]), np.float32))
            rows[slice(*slot.rows.bounds(total))] = delta  # type: ignore[misc]
    return found


@pytest.mark.share(5)
@pytest.mark.parametrize("name", LISTS)
def test_there_and_back(name: str, corpus: Path, tmp_path: Path) -> None:
    """Every list, its widths divided by 32 and filled with random numbers, to another format and back."""
    described = json.loads((corpus / "adapters" / f"{name}.json").read_text())
    if described["shape_check"]["inconsistent"]:
        pytest.skip("a made-up list whose shapes fit nothing")
    listing = corpus_listing(corpus / "adapters" / f"{name}.json")
    with Adapter.open(write_header_only(tmp_path / "h.safetensors", listing)) as adapter:
        family, first = adapter.family.name, adapter.format.name
    if first == "kohya-oft":
        pytest.skip("no other format holds it")
    source = fill(tmp_path / "a.safetensors", shrink(listing))
    second = (
        "comfy"
        if first == "onetrainer"
        else "diffusers"
        if first not in ("diffusers", "xlabs")
        else "kohya"
    )
    if name == "gen__simpletuner_lycoris_flux1_lokr":
        second = "onetrainer"  # whose modules are cut alike: LoKr in parts with different factors cannot be fused
    if name == "invokeai__flux_dora_onetrainer_format":
        second = "lycoris"  # magnitudes on the input axis can be neither fused nor written as PEFT has them
    options = {"family": family, "allow_unused": second == "lycoris"}
    report = run(source, tmp_path / "b.safetensors", second, first, **options)
    assert report.modules > 0
    mine, theirs = whole(source, family, first), whole(tmp_path / "b.safetensors", family, second)
    fused = "fused" in report.changes
    folded = report.relative_error or 0.0
    # a DoRA without a place is lost, and how much that is, only the base weight tells
    assert (report.relative_error is None) == (second == "lycoris")
    assert folded == 0.0 or formats()[second].alpha is Alpha.NONE
    assert second == "lycoris" or mine.keys() == theirs.keys()
    for key, delta in theirs.items():
        equal(delta, mine[key], fused=fused or folded > 0)
    back = tmp_path / ("c" if first == "peft" else "c.safetensors")
    run(tmp_path / "b.safetensors", back, first, second, **options)
    again = whole(back, family, first)
    for key, delta in theirs.items():
        equal(again[key], delta, fused=fused)


def run(source: Path, output: Path, to: str, format: str, **options: object) -> convert.Report:
    plan = convert.plan(source, convert.Options(to=to, format=format, output=output, **options))  # type: ignore[arg-type]
    try:
        return convert.run(plan)
    finally:
        plan.close()
