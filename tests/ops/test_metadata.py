"""metadata: what a file says is shown and changed, and its tensors and their meaning stay."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adaptkit.adapter import Adapter
from adaptkit.errors import NoSuchName, NothingToDo, NotRepresentable, UnreadableFile
from adaptkit.ops import convert, metadata, resize
from tests import made
from tests.cli.test_cli import adaptkit, refused

TAGS = {"10_style": {"girl": 5, " cat": 7}, "5_other": {"girl": 4}}
TRAINED = {
    "format": "pt",
    "ss_network_dim": "6",
    "ss_network_alpha": "4.5",
    "ss_tag_frequency": json.dumps(TAGS),
    "modelspec.title": "Old",
    "modelspec.thumbnail": "data:image/jpeg;base64," + "A" * 4000,
}


def said(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def body(path: Path) -> bytes:
    """The bytes of the tensors, as they lie in the file."""
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return made.adapter(tmp_path / "a.safetensors", metadata=TRAINED)


def test_all_of_it_is_shown_readably(lora: Path) -> None:
    report = metadata.read(lora)
    assert report.tags == [("girl", 9), ("cat", 7)]
    assert report.thumbnail == ("image/jpeg", 3000)
    whole = hashlib.sha256(lora.read_bytes()).hexdigest()
    assert report.hashes["sha256"] == whole
    assert report.hashes["autov2"] == whole[:10].upper()
    assert report.hashes["autov3"] == hashlib.sha256(body(lora)).hexdigest()[:12].upper()
    done = adaptkit("metadata", lora)
    assert "girl 9, cat 7" in done.stdout
    assert "image/jpeg, 3,000 bytes" in done.stdout
    assert "AAAA" not in done.stdout
    assert len(done.stdout.splitlines()) < 15
    assert json.loads(adaptkit("metadata", lora, "--json").stdout)["metadata"] == TRAINED


def test_a_change_leaves_every_byte_of_the_tensors(lora: Path) -> None:
    before = body(lora)
    report = metadata.edit(
        lora, metadata.Options(set={"modelspec.title": "Мой"}, unset=("ss_tag_frequency",))
    )
    assert said(lora) == report.metadata
    assert report.metadata["modelspec.title"] == "Мой"
    assert "ss_tag_frequency" not in report.metadata
    assert body(lora) == before
    assert [path.name for path in lora.parent.iterdir()] == ["a.safetensors"]


def test_an_output_leaves_the_file_alone(lora: Path) -> None:
    whole, output = lora.read_bytes(), lora.with_name("b.safetensors")
    options = metadata.Options(strip="training", output=output)
    metadata.edit(lora, options)
    assert lora.read_bytes() == whole
    assert said(output).keys() == {"format", "modelspec.title", "modelspec.thumbnail"}
    assert body(output) == body(lora)
    refused(adaptkit("metadata", lora, "--strip", "all", "-o", output), "already exists")
    assert adaptkit("metadata", lora, "--strip", "all", "-o", output, "--overwrite").returncode == 0
    assert said(output) == {"format": "pt"}


def test_entries_are_copied_from_another_file_but_not_its_hashes(lora: Path) -> None:
    other = lora.with_name("other.safetensors")
    save_file(load_file(lora), other, metadata={"sshs_model_hash": "1" * 64, "ss_output_name": "x"})
    metadata.edit(lora, metadata.Options(copy_from=other))
    assert said(lora) == {**TRAINED, "ss_output_name": "x"}


def test_stored_hashes_are_checked_and_made_again(lora: Path) -> None:
    save_file(load_file(lora), lora, metadata={**TRAINED, "sshs_model_hash": "0" * 64})
    assert metadata.read(lora).stale == ("sshs_model_hash",)
    report = metadata.edit(lora, metadata.Options(set={"ss_output_name": "x"}))
    assert report.stale == ()
    assert report.metadata["sshs_model_hash"] == hashlib.sha256(body(lora)).hexdigest()


def test_what_gives_the_weights_another_meaning_is_refused(tmp_path: Path) -> None:
    """Alpha that stands in the metadata alone is no decoration."""
    path = tmp_path / "a.safetensors"
    stem = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {f"{stem}.lora_A.weight": torch.ones(4, 8), f"{stem}.lora_B.weight": torch.ones(8, 4)}
    save_file(tensors, path, metadata={"alpha": "2", "rank": "4"})

    def scale() -> float:
        with Adapter.open(path, family="flux") as adapter:
            (entry,) = adapter.entries.values()
            return entry.facts.scale

    assert scale() == 0.5
    whole = path.read_bytes()
    for options in (metadata.Options(unset=("alpha",)), metadata.Options(set={"alpha": "4"})):
        with pytest.raises(NotRepresentable, match="scale of 1 modules"):
            metadata.edit(path, options)
    assert path.read_bytes() == whole
    assert [one.name for one in tmp_path.iterdir()] == ["a.safetensors"]
    metadata.edit(path, metadata.Options(set={"title": "x"}))
    assert scale() == 0.5


def test_refusals(lora: Path, tiny: Path) -> None:
    with pytest.raises(NoSuchName, match="unknown entry 'modelspec.titel'") as caught:
        metadata.edit(lora, metadata.Options(unset=("modelspec.titel",)))
    assert "did you mean modelspec.title" in (caught.value.hint or "")
    with pytest.raises(NothingToDo):
        metadata.edit(lora, metadata.Options(set={"modelspec.title": "Old"}))
    with pytest.raises(UnreadableFile, match="one safetensors file"):
        metadata.read(tiny / "tuned.ckpt")
    refused(adaptkit("metadata", lora, "--set", "title"), "KEY=VALUE", code=2)
    refused(adaptkit("metadata", lora, "-o", lora.with_name("b.safetensors")), "nothing to", code=2)


# --- what a conversion or resize makes false -----------------------------------------------------


def written(path: Path, verb: Any, **options: Any) -> dict[str, str]:
    output = path.with_name("o.safetensors")
    verb.run(verb.plan(path, verb.Options(output=output, overwrite=True, **options)))
    return said(output)


def test_the_record_of_the_training_stays_true(tmp_path: Path) -> None:
    args = {"conv_dim": "6", "conv_alpha": "4.5", "algo": "locon", "dropout": "0.1"}
    trained = TRAINED | {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps(args)}
    path = made.adapter(tmp_path / "a.safetensors", metadata=trained)
    # renamed: everything holds
    found = written(path, convert, to="comfy")
    assert {k: found[k] for k in trained} == trained
    found = written(path, resize, rank=3, conv_rank=2)
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("3", "3")
    assert json.loads(found["ss_network_args"]) == args | {"conv_dim": "2", "conv_alpha": "2"}
    found = written(path, convert, algo="full")
    assert not {"ss_network_dim", "ss_network_alpha"} & found.keys()
    assert json.loads(found["ss_network_args"]) == {"dropout": "0.1"}
    # without convolutions there is no conv_dim
    found = written(path, convert, to="kohya", only=("*to_q", "*proj*"))
    assert json.loads(found["ss_network_args"]) == {"algo": "locon", "dropout": "0.1"}
    assert found["ss_network_dim"] == "6"


def test_the_record_names_the_family_where_the_input_tells_it(tmp_path: Path) -> None:
    """XLabs' names are FLUX.1's alone, those that they become are its kin's too; a guess is not written down."""
    tensors = {
        f"double_blocks.0.processor.qkv_lora1.{end}.weight": torch.ones(shape)
        for end, shape in (("down", (2, 3072)), ("up", (9216, 2)))
    }
    source, sure, again = (tmp_path / f"{name}.safetensors" for name in "abc")
    save_file(tensors, source)
    convert.run(convert.plan(source, convert.Options(to="diffusers", output=sure)))
    assert made.provenance(sure)["family"] == "flux"
    with Adapter.open(sure) as adapter:
        assert (adapter.family.name, adapter.detection.alternatives) == ("flux", ())
    save_file(load_file(sure), source)  # without the record
    with Adapter.open(source) as adapter:
        assert adapter.detection.alternatives
    for options, family in ((convert.Options(dtype="fp16"), None), (convert.Options(dtype="fp16", family="framepack"), "framepack")):  # fmt: skip
        convert.run(convert.plan(source, replace(options, output=again, overwrite=True)))
        assert made.provenance(again).get("family") == family
