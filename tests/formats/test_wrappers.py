"""Prefixes that wrappers leave before names, and tensors that tools store beside a module's factors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit.adapter import Adapter
from adaptkit.detect import detect_adapter, families
from adaptkit.files.header import TensorInfo
from adaptkit.hosts import judge
from adaptkit.keymap import compile_keys
from adaptkit.ops import convert, resize
from tests.synth import FIXTURES, Listing, load_listing, write_header_only

# how a stem of the diffusers file is wrapped, the wrapper as it is said, and the format below it
WRAPPED = [
    ("transformer.base_model.model.{}", "base_model.model.", "diffusers"),
    ("base_model.model.transformer.{}", "base_model.model.", "diffusers"),
    ("transformer._orig_mod.{}", "_orig_mod.", "diffusers"),
    ("module.transformer.{}", "module.", "diffusers"),
    ("base_model.model.diffusion_model.{}", "base_model.model.", "comfy"),
    ("diffusion_model._orig_mod.{}", "_orig_mod.", "comfy"),
    ("unet.base_model.model.{}", "unet.base_model.model.", "bare"),
    ("pipe.dit.{}", "pipe.dit.", "bare"),
    ("dit.{}", "dit.", "bare"),
    ("model.{}", "model.", "bare"),
    ("net.{}", "net.", "bare"),
    ("module.{}", "module.", "bare"),
    ("_orig_mod.{}", "_orig_mod.", "bare"),
    ("module._orig_mod.{}", "module._orig_mod.", "bare"),
    ("transformer.{}_", "_", "diffusers"),
]


def factors(family: str) -> Listing:
    """A LoRA on some blocks, in diffusers' names without a prefix."""
    listing = load_listing(FIXTURES / "keys" / f"{family}-diffusers.tsv")
    return {key.removeprefix("transformer."): v for key, v in listing.items() if "blocks.0" in key}


def wrapped(listing: Listing, form: str) -> Listing:
    found: Listing = {}
    for key, value in listing.items():
        stem, _, factor = key.partition(".lora_")
        found[f"{form.format(stem)}.lora_{factor}"] = value
    return found


@pytest.mark.parametrize("family", ["qwen-image", "flux2", "minimax-h3"])
@pytest.mark.parametrize(("form", "said", "format"), WRAPPED)
def test_a_wrapper_is_taken_away_and_said(
    family: str, form: str, said: str, format: str, tmp_path: Path
) -> None:
    listing = factors(family)
    path = write_header_only(tmp_path / "a.safetensors", wrapped(listing, form))
    plain = compile_keys(family, "diffusers")
    slots = {plain.parse(f"transformer.{key}").slot for key in listing}  # type: ignore[union-attr]
    with Adapter.open(path) as adapter:
        assert (adapter.family.name, adapter.format.name) == (family, format)
        assert adapter.detection.wrapper == said
        assert not adapter.unclaimed
        assert set(adapter.entries) == slots
        assert not adapter.own
        # no host was tried with such names
        verdicts = judge(adapter).values()
        assert {verdict.loads for verdict in verdicts} <= {None, False}
        assert any(said in verdict.why for verdict in verdicts)


def test_names_without_a_wrapper_have_none(tmp_path: Path) -> None:
    for name in ("qwen-image-diffusers", "sd1-peft", "anima-kohya", "ltx2-comfy"):
        path = write_header_only(
            tmp_path / "a.safetensors", load_listing(FIXTURES / "keys" / f"{name}.tsv")
        )
        with Adapter.open(path) as adapter:
            assert (adapter.detection.wrapper, adapter.keys.wrapped) == ("", False)


def test_what_is_written_has_no_wrapper(tmp_path: Path) -> None:
    """A resized file has the names of its format; a converted one those of the file without its wrapper."""
    shapes = wrapped(factors("qwen-image"), "pipe.dit.{}")
    draw = torch.Generator().manual_seed(0)
    tensors = {k: torch.randn(*(min(n, 64) for n in s), generator=draw) for k, (_, s) in shapes.items()}  # fmt: skip
    save_file(tensors, tmp_path / "a.safetensors")
    save_file({k.removeprefix("pipe.dit."): t for k, t in tensors.items()}, tmp_path / "b.safetensors")  # fmt: skip
    for name in "ab":
        options = convert.Options(
            to="comfy", family="qwen-image", output=tmp_path / f"{name}2.safetensors"
        )
        plan = convert.plan(tmp_path / f"{name}.safetensors", options)
        convert.run(plan)
        plan.close()
    one, two = (load_file(tmp_path / f"{name}2.safetensors") for name in "ab")
    assert one.keys() == two.keys()
    assert all(key.startswith("diffusion_model.transformer_blocks.0.") for key in one)
    assert all(torch.equal(one[key], two[key]) for key in one)
    plan = resize.plan(
        tmp_path / "a.safetensors",
        resize.Options(rank=2, family="qwen-image", output=tmp_path / "c.safetensors"),
    )
    resize.run(plan)
    plan.close()
    assert all(key.startswith("transformer_blocks.") for key in load_file(tmp_path / "c.safetensors"))  # fmt: skip


def test_a_language_model_s_own_adapter_is_not_a_text_encoder_s() -> None:
    """PEFT wraps both; Qwen3 4B is Z-Image's text encoder too."""
    infos = {}
    for n in range(36):
        stem = f"base_model.model.model.layers.{n}.self_attn.q_proj"
        for factor, shape in (("A", (4, 2560)), ("B", (4096, 4))):
            key = f"{stem}.lora_{factor}.weight"
            infos[key] = TensorInfo(key, "F16", shape, 0, 0)
    assert detect_adapter(infos, {}).family is None


def test_fastvideo_states_rank_and_alpha_beside_the_factors(tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for name in ("self_attn.q", "self_attn.k", "cross_attn.q", "ffn.0"):
        stem = f"blocks.0.{name}"
        tensors[f"{stem}.lora_A.weight"] = torch.ones(4, 1536)
        tensors[f"{stem}.lora_B.weight"] = torch.ones(8960 if name == "ffn.0" else 1536, 4)
        tensors[f"{stem}.lora_rank"] = torch.tensor(4, dtype=torch.int32)
        tensors[f"{stem}.lora_alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "a.safetensors")
    with Adapter.open(tmp_path / "a.safetensors") as adapter:
        assert (adapter.family.name, adapter.format.name) == ("wan", "bare")
        assert not adapter.unclaimed
        assert not adapter.carried
        assert {e.facts.scale for e in adapter.entries.values()} == {0.5}
    options = convert.Options(to="comfy", output=tmp_path / "b.safetensors")
    plan = convert.plan(tmp_path / "a.safetensors", options)
    convert.run(plan)
    plan.close()
    written = load_file(tmp_path / "b.safetensors")
    assert not [key for key in written if "lora_rank" in key or "lora_alpha" in key]
    assert written["diffusion_model.blocks.0.ffn.0.alpha"].item() == 2.0


def test_comfyui_s_reshape_weight_is_kept(tmp_path: Path) -> None:
    """A control LoRA widens a layer, and says its new size beside the factors."""
    key = "diffusion_model.img_in.reshape_weight"
    listing = load_listing(FIXTURES / "keys" / "flux-kohya.tsv")
    assert "lora_unet_img_in.lora_down.weight" in listing
    tensors = {key: torch.tensor([3072, 128])}
    for name in ("double_blocks.0.img_attn.qkv", "double_blocks.0.img_mlp.0", "single_blocks.0.linear1", "img_in"):  # fmt: skip
        rows = {"img_attn.qkv": 9216, "img_mlp.0": 12288, "blocks.0.linear1": 21504}
        out = next((n for end, n in rows.items() if name.endswith(end)), 3072)
        columns = 128 if name == "img_in" else 3072
        tensors[f"diffusion_model.{name}.lora_A.weight"] = torch.ones(4, columns)
        tensors[f"diffusion_model.{name}.lora_B.weight"] = torch.ones(out, 4)
    save_file(tensors, tmp_path / "a.safetensors")
    with Adapter.open(tmp_path / "a.safetensors") as adapter:
        assert (adapter.family.name, adapter.carried) == ("flux", (key,))
        assert not adapter.unclaimed
    plan = resize.plan(
        tmp_path / "a.safetensors",
        resize.Options(rank=1, output=tmp_path / "b.safetensors"),
    )
    resize.run(plan)
    plan.close()
    assert load_file(tmp_path / "b.safetensors")[key].tolist() == [3072, 128]


def test_every_adapter_name_between_factor_and_weight() -> None:
    keys = compile_keys("qwen-image", "diffusers")
    for name in ("default", "default_0", "my-style", "Anna 2"):
        parsed = keys.parse(f"transformer.transformer_blocks.0.attn.to_q.lora_A.{name}.weight")
        assert parsed is not None
        assert parsed.slot.target.module == "transformer_blocks.0.attn.to_q"
    assert "qwen-image" in families()
