"""merge --layout: single files as diffusers folders and back, every row where the family's names say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit.detect import families
from adaptkit.errors import NotRepresentable, Unclaimed, WrongUsage
from adaptkit.files.open import open_source
from adaptkit.keymap import CheckpointMap
from adaptkit.ops import extract, merge
from adaptkit.ops.merge.relayout import MADE_ANEW
from tests.ops.difference.test_pairing import as_folder, save_folder, save_pickle, save_shards
from tests.ops.models import State, changed, lora_delta, matrices, save, small
from tests.synth import FIXTURES, load_listing, shrink

TOUCHED = {
    "sd1": ("input_blocks.1.1", "middle_block.1.proj_in", "out.2", "layers.3.mlp"),
    "sd2": ("input_blocks.1.1", "resblocks.3."),
    "sdxl": (
        "input_blocks.4.1.transformer_blocks.0",
        "in_proj_weight",
        "text_projection",
        "layers.3.mlp",
    ),
    "flux": ("double_blocks.0.", "single_blocks.0.linear", "final_layer", "img_in"),
    "sd3": ("joint_blocks.0.", "final_layer", "x_embedder"),
    "z-image": ("layers.0.", "x_embedder"),
    "lumina2": ("layers.0.",),
    "hunyuan-video": ("double_blocks.0.", "final_layer"),
}


def adapter(folder: Path, family: str, base: Path, state: State) -> Path:
    """A LoRA of rank 2 on some layers, fused ones and swapped ones among them."""
    tuned, _ = changed(state, matrices(state, *TOUCHED[family]), lora_delta(2))
    output = folder / "lora.safetensors"
    other = save(folder / "tuned.safetensors", tuned)
    options = extract.Options(
        output=output,
        rank=2,
        dtype="fp32",
        family=family,
        to="comfy" if family != "sd1" else "kohya",
    )
    extract.run(extract.plan(base, other, options))
    return output


def merged(
    base: Path, lora: Path, output: Path, family: str | None = None, **options: Any
) -> merge.Report:
    chosen = merge.Options(output=output, family=family, overwrite=True, **options)
    return merge.run(merge.plan(base, [(lora, 0.7)], chosen))


def read(path: Path) -> State:
    with open_source(path) as source:
        return {name: source.read(name) for name in source.infos}


def bare(state: State) -> State:
    """Without the prefix that a denoiser by itself need not have."""
    return {key.removeprefix("model.diffusion_model."): tensor for key, tensor in state.items()}


def same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key


@pytest.mark.share(2)
@pytest.mark.parametrize("family", TOUCHED)
def test_both_ways_give_what_a_plain_merge_gives(tmp_path: Path, family: str) -> None:
    state = small(family, torch.float16)
    base = save(tmp_path / "base.safetensors", state)
    lora = adapter(tmp_path, family, base, state)
    assert merged(base, lora, tmp_path / "plain.safetensors", family).tensors_changed > 3
    plain = read(tmp_path / "plain.safetensors")
    split = {
        f"{part}.{key}": t
        for part, held in as_folder(plain, family).items()
        for key, t in held.items()
    }

    report = merged(base, lora, tmp_path / "out", family, layout="folder", verify=True)
    assert report.verified is not None
    same(read(tmp_path / "out"), split)
    assert set(report.files) == {
        p.relative_to(tmp_path / "out").as_posix()
        for p in (tmp_path / "out").rglob("*.safetensors")
    }

    folder = save_folder(tmp_path / "folder", as_folder(state, family))
    report = merged(
        folder, lora, tmp_path / "one.safetensors", family, layout="single-file", verify=True
    )
    assert report.verified is not None
    assert report.verified.merged == report.tensors_changed
    found = read(tmp_path / "one.safetensors")
    same(bare(found), bare(plain))
    if not all(key.startswith("model.diffusion_model.") for key in plain):
        assert found.keys() == plain.keys()


def whole(family: str, dtype: torch.dtype = torch.float16) -> State:
    """Everything that a single file of the family holds, the autoencoder too, narrow."""
    random = np.random.default_rng(7)
    keys = CheckpointMap(families()[family], beside=True)
    listing = shrink(load_listing(FIXTURES / "checkpoints" / f"{family}.tsv"), 32)
    return {
        key: torch.from_numpy(random.standard_normal(shape)).to(dtype)
        for key, (_, shape) in listing.items()
        if keys.parse(key) is not None
    }


CONSTANTS = {
    "alphas_cumprod": torch.ones(4),
    "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(4)[None],
    "model_ema.diffusion_modelout0weight": torch.ones(3),
}


@pytest.mark.share(2)
@pytest.mark.parametrize(
    ("family", "kind"), [("sd1", "file"), ("sd1", "pickle"), ("sd1", "shards"), ("sdxl", "file")]
)
def test_a_whole_pipeline_goes_there_and_back(tmp_path: Path, family: str, kind: str) -> None:
    state = whole(family)
    write = {"file": save, "pickle": save_pickle, "shards": save_shards}[kind]
    base = write(
        tmp_path / {"file": "b.safetensors", "pickle": "b.ckpt", "shards": "shards"}[kind],
        {**state, **CONSTANTS},
    )
    base = base / "model.safetensors.index.json" if kind == "shards" else base
    lora = adapter(tmp_path, family, save(tmp_path / "plain.safetensors", state), state)
    report = merged(base, lora, tmp_path / "out", layout="folder", verify=kind == "file")
    assert {item.key: item.reason for item in report.unused} == dict.fromkeys(CONSTANTS, MADE_ANEW)
    parts = {"unet", "text_encoder", "vae"} | ({"text_encoder_2"} if family == "sdxl" else set())
    assert {path.name for path in (tmp_path / "out").iterdir()} == parts
    vae = load_file(tmp_path / "out/vae/diffusion_pytorch_model.safetensors")
    old = state["first_stage_model.encoder.mid.attn_1.q.weight"]
    assert old.ndim == 4
    assert torch.equal(vae["encoder.mid_block.attentions.0.to_q.weight"], old[:, :, 0, 0])
    assert torch.equal(
        vae["decoder.up_blocks.0.resnets.2.conv1.weight"],
        state["first_stage_model.decoder.up.3.block.2.conv1.weight"],
    )
    merged(
        tmp_path / "out",
        lora,
        tmp_path / "back.safetensors",
        layout="single-file",
        blocks=("unet=0", "te=0"),
    )
    merged(base, lora, tmp_path / "once.safetensors")
    expected = {
        key: t for key, t in read(tmp_path / "once.safetensors").items() if key not in CONSTANTS
    }
    same(read(tmp_path / "back.safetensors"), expected)


def test_names_from_before_0_18_are_read(tmp_path: Path) -> None:
    """Stable Diffusion's own repositories have them still."""
    state = whole("sd1")
    base = save(tmp_path / "b.safetensors", state)
    lora = adapter(tmp_path, "sd1", base, state)
    merged(base, lora, tmp_path / "out", layout="folder")
    path = tmp_path / "out/vae/diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    vae = load_file(path)
    for new, name in old.items():
        vae = {
            key.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): t
            for key, t in vae.items()
        }
    assert any(".query." in key for key in vae)
    save_file(vae, path)
    merged(tmp_path / "out", lora, tmp_path / "back.safetensors", layout="single-file")
    found = read(tmp_path / "back.safetensors")
    assert found.keys() == state.keys()
    assert all(
        torch.equal(found[key], state[key]) for key in state if key.startswith("first_stage_model")
    )


def test_shards_of_a_folder_have_an_index_each(tmp_path: Path) -> None:
    state = small("flux", torch.float16)
    base = save(tmp_path / "b.safetensors", state)
    lora = adapter(tmp_path, "flux", base, state)
    merged(base, lora, tmp_path / "whole", layout="folder")
    report = merged(base, lora, tmp_path / "cut", layout="folder", shard_size=100_000, verify=True)
    assert len(report.files) > 3
    index = json.loads(
        (tmp_path / "cut/transformer/diffusion_pytorch_model.safetensors.index.json").read_text()
    )
    files = {path.name for path in (tmp_path / "cut/transformer").glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files
    same(read(tmp_path / "cut"), read(tmp_path / "whole"))


def test_the_number_format_may_change_too(tmp_path: Path) -> None:
    state = small("sdxl", torch.float32)
    base = save(tmp_path / "b.safetensors", state)
    lora = adapter(tmp_path, "sdxl", base, state)
    merged(base, lora, tmp_path / "plain.safetensors", dtype="bf16")
    merged(base, lora, tmp_path / "out", dtype="bf16", layout="folder", verify=True)
    merged(
        tmp_path / "out",
        lora,
        tmp_path / "back.safetensors",
        layout="single-file",
        blocks=("unet=0", "te=0"),
    )
    same(read(tmp_path / "back.safetensors"), read(tmp_path / "plain.safetensors"))


def test_parts_in_two_number_formats_make_no_whole(tmp_path: Path) -> None:
    state = small("sdxl", torch.float16)
    folders = as_folder(state, "sdxl")
    key = "text_model.encoder.layers.3.self_attn.q_proj.weight"
    folders["text_encoder_2"][key] = folders["text_encoder_2"][key].float()
    folder = save_folder(tmp_path / "folder", folders)
    lora = adapter(tmp_path, "sdxl", save(tmp_path / "b.safetensors", state), state)
    with pytest.raises(NotRepresentable, match="F16 and F32") as caught:
        merged(folder, lora, tmp_path / "x.safetensors", layout="single-file")
    assert caught.value.hint == "pass --dtype to choose one"
    del folders["text_encoder_2"][key]
    with pytest.raises((NotRepresentable, Unclaimed)):
        merged(
            save_folder(tmp_path / "less", folders),
            lora,
            tmp_path / "x.safetensors",
            layout="single-file",
        )
    assert not (tmp_path / "x.safetensors").exists()


def test_what_has_no_place_is_refused_or_listed(tmp_path: Path) -> None:
    state = small("flux", torch.float16) | {"extra.thing.weight": torch.ones(2, 2)}
    base = save(tmp_path / "b.safetensors", state)
    lora = adapter(tmp_path, "flux", base, state)
    with pytest.raises(Unclaimed, match=r"extra\.thing\.weight"):
        merged(base, lora, tmp_path / "out", layout="folder")
    assert not (tmp_path / "out").exists()
    report = merged(base, lora, tmp_path / "out", layout="folder", allow_unused=True)
    assert [item.key for item in report.unused] == ["extra.thing.weight"]


def test_options_that_contradict_each_other(tmp_path: Path, tiny: Path) -> None:
    base, lora = tiny / "base.safetensors", tiny / "lora-kohya.safetensors"
    with pytest.raises(NotRepresentable, match="has the name of a file"):
        merged(base, lora, tmp_path / "x.safetensors", layout="folder")
    with pytest.raises(NotRepresentable, match="shards need a folder"):
        merged(base, lora, tmp_path / "x", layout="single-file", shard_size=1000)
    with pytest.raises(WrongUsage, match="single-file or folder"):
        merged(base, lora, tmp_path / "x", layout="zip")
    stranger = save(
        tmp_path / "s.safetensors", {f"a.{n}.weight": torch.ones(4, 4) for n in range(4)}
    )
    other = save(
        tmp_path / "l.safetensors",
        {f"a.{n}.{ab}.weight": torch.ones(4, 4) for n in range(4) for ab in ("lora_A", "lora_B")},
    )
    with pytest.raises(NotRepresentable, match="family is unknown"):
        merged(stranger, other, tmp_path / "x", layout="folder")


def test_the_layout_it_has_stays_as_it_is(tmp_path: Path, tiny: Path) -> None:
    base, lora = tiny / "base.safetensors", tiny / "lora-kohya.safetensors"
    merged(base, lora, tmp_path / "a.safetensors")
    merged(base, lora, tmp_path / "b.safetensors", layout="single-file")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    shards = save_shards(tmp_path / "shards", load_file(base))
    merged(shards, lora, tmp_path / "c.safetensors", layout="single-file")
    same(read(tmp_path / "c.safetensors"), read(tmp_path / "a.safetensors"))
