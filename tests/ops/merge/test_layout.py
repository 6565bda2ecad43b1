"""merge keeps the layout of its base: a diffusers folder, shards with their index, a folder of one file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adaptkit.checkpoint import Checkpoint
from adaptkit.errors import NotRepresentable, WouldOverwrite
from adaptkit.files.open import open_source
from adaptkit.names import Slot
from adaptkit.ops import merge
from adaptkit.ops.merge import kernel
from tests.ops.models import tiny_base
from tests.synth import FIXTURES

State = dict[str, torch.Tensor]
FOLDERS = {"unet": "diffusion_pytorch_model", "text_encoder": "model"}


def parts() -> dict[str, State]:
    """The tiny SD 1 checkpoint under diffusers' names, a state for each folder."""
    from adaptkit.detect import families

    found: dict[str, State] = {name: {} for name in FOLDERS}
    base = tiny_base()
    with Checkpoint.open(FIXTURES / "tiny" / "base.safetensors") as opened:
        keys = {place.slot: name for name, place in opened.places.items()}
    part = {component.name: component for component in families()["sd1"].components}
    for slot, name in keys.items():
        assert slot.component in part
        assert slot.rows is None
        found[slot.component][f"{slot.target.module}.{slot.target.param}"] = base[name]
    return found


def pipeline(folder: Path, *, shards: bool = False, pickled: bool = False) -> Path:
    for name, state in parts().items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps({"of": name}))
        stem = FOLDERS[name]
        if pickled:
            torch.save(state, folder / name / f"{'pytorch_model' if stem == 'model' else stem}.bin")
        elif shards and name == "unet":
            sharded(folder / name, stem, state)
        else:
            save_file(
                state, folder / name / f"{stem}.safetensors", metadata={"format": "pt", "of": name}
            )
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text("{}")
    (folder / "safety_checker").mkdir()
    save_file({"concept": torch.ones(3)}, folder / "safety_checker" / "model.safetensors")
    return folder


def sharded(folder: Path, stem: str, state: State, count: int = 3) -> None:
    names = list(state)
    files = {f"{stem}-{n + 1:05}-of-{count:05}.safetensors": names[n::count] for n in range(count)}
    for file, held in files.items():
        save_file({name: state[name] for name in held}, folder / file, metadata={"format": "pt"})
    place = {name: file for file, held in files.items() for name in held}
    index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": place}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2))


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def run(base: Path, adapter: Path, **options: Any) -> merge.Report:
    return merge.run(merge.plan(base, [(adapter, 0.5)], merge.Options(verify=True, **options)))


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Mapping[Slot, torch.Tensor]:
    """What merging into one file gives, by slot."""
    output = tmp_path_factory.mktemp("single") / "o.safetensors"
    run(tiny / "base.safetensors", tiny / "lora-kohya.safetensors", output=output)
    return weights(output)


def weights(path: Path) -> dict[Slot, torch.Tensor]:
    with Checkpoint.open(path) as opened:
        return {place.slot: opened.source.read(name) for name, place in opened.places.items()}


def same(path: Path, single: Mapping[Slot, torch.Tensor]) -> None:
    found = weights(path)
    assert found.keys() == single.keys()
    # half of the base is fp16 in the fixture and everything float32 here: compared as numbers
    for slot, tensor in found.items():
        torch.testing.assert_close(
            tensor.float(), single[slot].float(), rtol=1e-3, atol=1e-4, msg=str(slot)
        )


@pytest.mark.parametrize("shards", [False, True])
def test_a_diffusers_folder_becomes_one(
    tmp_path: Path, tiny: Path, single: Mapping[Slot, torch.Tensor], shards: bool
) -> None:
    base = pipeline(tmp_path / "base", shards=shards)
    report = run(base, tiny / "lora-kohya.safetensors")
    output = tmp_path / "base-merged"
    assert report.output == output
    assert files(output) == files(base)
    same(output, single)
    for path in (
        "model_index.json",
        "unet/config.json",
        "tokenizer/vocab.json",
        "safety_checker/model.safetensors",
    ):
        assert (output / path).read_bytes() == (base / path).read_bytes()
    for file in output.glob("unet/*.safetensors"):
        with safe_open(file, "pt") as merged, safe_open(base / "unet" / file.name, "pt") as before:
            assert list(merged.keys()) == list(before.keys())
            assert merged.metadata()["format"] == "pt"
            assert "adaptkit" in merged.metadata()
    if shards:
        name = "unet/diffusion_pytorch_model.safetensors.index.json"
        assert json.loads((output / name).read_text()) == json.loads((base / name).read_text())
    assert report.bytes == sum((output / f).stat().st_size for f in report.files)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "base-merged"]


def test_parts_that_nothing_touches_are_the_same_files(tmp_path: Path, tiny: Path) -> None:
    base = pipeline(tmp_path / "base", shards=True)
    run(base, tiny / "lora-kohya.safetensors", only=("text_encoder",))
    for file in (base / "unet").iterdir():
        assert (tmp_path / "base-merged" / "unet" / file.name).read_bytes() == file.read_bytes()
    name = "text_encoder/model.safetensors"
    assert (tmp_path / "base-merged" / name).read_bytes() != (base / name).read_bytes()


def test_pickled_parts_become_safetensors_where_they_change(tmp_path: Path, tiny: Path) -> None:
    base = pipeline(tmp_path / "base", pickled=True)
    run(base, tiny / "lora-kohya.safetensors", only=("text_encoder",))
    found = files(tmp_path / "base-merged")
    assert "unet/diffusion_pytorch_model.bin" in found
    assert "text_encoder/model.safetensors" in found
    assert "text_encoder/pytorch_model.bin" not in found


def test_other_copies_of_the_weights_are_left_out_and_named(tmp_path: Path, tiny: Path) -> None:
    base = pipeline(tmp_path / "base")
    save_file({"x": torch.ones(1)}, base / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    report = run(base, tiny / "lora-kohya.safetensors")
    assert report.left_out == ("unet/diffusion_pytorch_model.fp16.safetensors",)
    assert set(files(base)) - set(files(tmp_path / "base-merged")) == set(report.left_out)


@pytest.mark.parametrize("by_index", [False, True])
def test_shards_stay_shards(
    tmp_path: Path, tiny: Path, single: Mapping[Slot, torch.Tensor], by_index: bool
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    sharded(folder, "model", tiny_base())
    base = folder / "model.safetensors.index.json" if by_index else folder
    report = run(base, tiny / "lora-kohya.safetensors", output=tmp_path / "out", dtype="bf16")
    assert files(tmp_path / "out") == files(folder)
    found = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    before = json.loads((folder / "model.safetensors.index.json").read_text())
    assert found["weight_map"] == before["weight_map"]
    assert found["metadata"]["total_size"] * 2 == before["metadata"]["total_size"]
    assert report.verified is not None
    run(base, tiny / "lora-kohya.safetensors", output=tmp_path / "one.safetensors")
    same(tmp_path / "one.safetensors", single)


@pytest.mark.parametrize("whole", [False, True])
def test_shard_size_cuts_anew(
    tmp_path: Path, tiny: Path, single: Mapping[Slot, torch.Tensor], whole: bool
) -> None:
    base = tiny / "base.safetensors" if whole else pipeline(tmp_path / "base")
    size = 300_000
    report = run(base, tiny / "lora-kohya.safetensors", output=tmp_path / "out", shard_size=size)
    same(tmp_path / "out", single)
    assert len(report.files) > 2
    with open_source(tmp_path / "out") as source:
        largest = max(info.nbytes for info in source.infos.values())
    for name in report.files:
        header = 200_000
        assert (tmp_path / "out" / name).stat().st_size <= max(size, largest) + header
    index = next((tmp_path / "out").rglob("*.index.json"))
    table = json.loads(index.read_text())
    assert {
        name for f in set(table["weight_map"].values()) for name in load_file(index.parent / f)
    } == set(table["weight_map"])


def test_what_one_file_cannot_hold_is_refused(tmp_path: Path, tiny: Path) -> None:
    base = pipeline(tmp_path / "base")
    with pytest.raises(NotRepresentable, match="does not fit into one file"):
        run(base, tiny / "lora-kohya.safetensors", output=tmp_path / "o.safetensors")
    with pytest.raises(NotRepresentable, match="shards need a folder"):
        run(
            base,
            tiny / "lora-kohya.safetensors",
            output=tmp_path / "o.safetensors",
            shard_size=10_000,
        )
    run(
        base / "unet",
        tiny / "lora-kohya.safetensors",
        output=tmp_path / "o.safetensors",
        only=("unet",),
        allow_unused=True,
    )
    assert load_file(tmp_path / "o.safetensors").keys() == parts()["unet"].keys()


def test_an_existing_folder_is_replaced_only_when_asked_and_only_what_we_know(
    tmp_path: Path, tiny: Path
) -> None:
    base = pipeline(tmp_path / "base")
    output = tmp_path / "base-merged"
    run(base, tiny / "lora-kohya.safetensors")
    with pytest.raises(WouldOverwrite, match="exists"):
        run(base, tiny / "lora-kohya.safetensors")
    run(base, tiny / "lora-kohya.safetensors", overwrite=True)
    (output / "notes.txt").write_text("mine")
    with pytest.raises(WouldOverwrite, match=r"other files \('notes.txt'\)"):
        run(base, tiny / "lora-kohya.safetensors", overwrite=True)


def test_a_corrupt_merge_into_a_folder_leaves_nothing(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adaptkit.errors import CorruptFile

    base = pipeline(tmp_path / "base", shards=True)
    monkeypatch.setattr(kernel.Blender, "_parts", lambda *_: iter(()))
    with pytest.raises(CorruptFile, match="--verify"):
        run(base, tiny / "lora-kohya.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]
