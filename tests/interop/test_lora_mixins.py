"""Every transformer that a LoRA loader of the installed diffusers serves has a family here.

Which classes those are is read from diffusers' own pipelines. Of each published model the class is built without numbers:
its parameters are in the table, its layers are matrices of the table's sizes, and its adapters are named.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptkit.detect import detect_adapter, detect_checkpoint, families
from adaptkit.families.contract import Kind
from adaptkit.keymap import compile_checkpoint, compile_keys, find_row
from tests.generate import (
    CASCADE,
    COSMOS_25,
    HIDREAM,
    HUNYUAN_DIT,
    KANDINSKY_PRO,
    LONGCAT,
    SD1_BLOCKS,
    SDXL,
)
from tests.interop.test_strangers import infos
from tests.synth import Listing, lora_shapes

diffusers = pytest.importorskip("diffusers")

LTX23: dict[str, Any] = dict(
    gated_attn=True, cross_attn_mod=True, audio_gated_attn=True, audio_cross_attn_mod=True, use_prompt_embeddings=False
)  # fmt: skip
KANDINSKY: dict[str, Any] = dict(model_dim=2560, ff_dim=10240, num_visual_blocks=50)
SANA_06B: dict[str, Any] = dict(
    num_attention_heads=36, num_layers=28, num_cross_attention_heads=16, cross_attention_head_dim=72, cross_attention_dim=1152
)  # fmt: skip
SD15: dict[str, Any] = dict(cross_attention_dim=768, **SD1_BLOCKS)
KOLORS: dict[str, Any] = SDXL | dict(
    encoder_hid_dim=4096, encoder_hid_dim_type="text_proj", projection_class_embeddings_input_dim=5632
)  # fmt: skip
VACE_14B: dict[str, Any] = dict(
    num_attention_heads=40, num_layers=40, ffn_dim=13824, vace_layers=list(range(0, 40, 5)), vace_in_channels=96
)  # fmt: skip
LTX_13B: dict[str, Any] = dict(num_layers=48, attention_head_dim=128, cross_attention_dim=4096)

# class, configuration (where the class's own is no published model's) -> family
MODELS: list[tuple[str, dict[str, Any], str]] = [
    ("AceStepTransformer1DModel", {}, "ace-step"),
    ("AnyFlowFARTransformer3DModel", {}, "wan"),
    ("AnyFlowTransformer3DModel", {}, "wan"),
    ("AuraFlowTransformer2DModel", {}, "auraflow"),
    ("BriaFibo2Transformer2DModel", {}, "bria-fibo2"),
    ("BriaFiboTransformer2DModel", dict(num_layers=8, num_single_layers=38), "bria-fibo"),
    ("ChromaTransformer2DModel", {}, "chroma"),
    ("ChronoEditTransformer3DModel", {}, "wan"),
    ("CogVideoXTransformer3DModel", {}, "cogvideox"),
    ("CogVideoXTransformer3DModel",
     dict(patch_size_t=2, ofs_embed_dim=512, num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True),
     "cogvideox"),
    ("CogView4Transformer2DModel", dict(num_layers=28, num_attention_heads=32, attention_head_dim=128), "cogview4"),
    ("ConsisIDTransformer3DModel",
     dict(num_attention_heads=48, num_layers=42, is_train_face=True, is_kps=False), "cogvideox"),
    ("CosmosTransformer3DModel", {}, "cosmos-14b"),
    ("CosmosTransformer3DModel", dict(num_attention_heads=40, num_layers=36, extra_pos_embed_type=None), "cosmos-14b"),
    ("CosmosTransformer3DModel", COSMOS_25, "cosmos"),
    ("ErnieImageTransformer2DModel", {}, "ernie-image"),
    ("Flux2Transformer2DModel", {}, "flux2"),
    ("Flux3Transformer2DModel", dict(flow_map=True), "flux3"),
    ("FluxTransformer2DModel", dict(guidance_embeds=True), "flux"),
    ("FluxTransformer2DModel", dict(in_channels=384, out_channels=64, guidance_embeds=True), "flux"),  # Fill
    ("FluxTransformer2DModel", dict(in_channels=128, out_channels=64, guidance_embeds=True), "flux"),  # Control
    ("GlmImageTransformer2DModel", dict(num_attention_heads=32, attention_head_dim=128), "glm-image"),
    ("HeliosTransformer3DModel", {}, "wan"),
    ("HiDreamImageTransformer2DModel", HIDREAM, "hidream"),
    ("HunyuanDiT2DModel", HUNYUAN_DIT, "hunyuan-dit"),
    ("HunyuanVideoFramepackTransformer3DModel", dict(has_image_proj=True, has_clean_x_embedder=True), "framepack"),
    ("HunyuanVideoTransformer3DModel", {}, "hunyuan-video"),
    ("Ideogram4Transformer2DModel", {}, "ideogram4"),
    ("Kandinsky5Transformer3DModel", dict(model_dim=1792, ff_dim=7168), "kandinsky5"),
    ("Kandinsky5Transformer3DModel", KANDINSKY, "kandinsky5"),
    ("Kandinsky5Transformer3DModel", KANDINSKY_PRO, "kandinsky5"),
    ("Krea2Transformer2DModel", {}, "krea2"),
    ("LTX2VideoTransformer3DModel", {}, "ltx2"),
    ("LTX2VideoTransformer3DModel", LTX23, "ltx2"),
    ("LTX2VideoTransformer3DModel",
     LTX23 | dict(use_prompt_adaln_single=False, use_keyframes_abs_pos_embedding=True), "ltx2"),
    ("LTXVideoTransformer3DModel", {}, "ltx"),
    ("LTXVideoTransformer3DModel", LTX_13B, "ltx-13b"),
    ("LongCatImageTransformer2DModel", LONGCAT, "longcat-image"),
    ("Lumina2Transformer2DModel", {}, "lumina2"),
    ("MiniMaxH3Transformer3DModel", {}, "minimax-h3"),
    ("MochiTransformer3DModel", {}, "mochi"),
    ("OvisImageTransformer2DModel", {}, "ovis-image"),
    ("PRXTransformer2DModel", {}, "prx"),
    ("PRXTransformer2DModel", dict(bottleneck_size=768, resolution_embeds=True), "prx"),
    ("PixArtTransformer2DModel", {}, "pixart"),
    ("QwenImage21Transformer2DModel", {}, "qwen-image-21"),
    ("QwenImageTransformer2DModel", {}, "qwen-image"),
    ("SD3Transformer2DModel", dict(num_layers=24, num_attention_heads=24, caption_projection_dim=1536), "sd3"),
    ("SanaTransformer2DModel", {}, "sana"),
    ("SanaTransformer2DModel", SANA_06B, "sana"),
    ("SanaTransformer2DModel", dict(guidance_embeds=True, qk_norm="rms_norm_across_heads"), "sana"),
    ("SanaVideoTransformer3DModel", {}, "sana"),
    ("SkyReelsV2Transformer3DModel",
     dict(num_attention_heads=40, num_layers=40, ffn_dim=13824, inject_sample_info=True), "wan"),
    ("StableCascadeUNet", CASCADE, "stable-cascade"),
    ("UNet2DConditionModel", SD15, "sd1"),
    ("UNet2DConditionModel", SDXL, "sdxl"),
    ("UNet2DConditionModel", KOLORS, "sdxl"),
    ("WanAnimate2Transformer3DModel", {}, "wan-animate2"),
    ("WanAnimateTransformer3DModel", {}, "wan"),
    ("WanTransformer3DModel", {}, "wan"),
    ("WanVACETransformer3DModel", {}, "wan"),
    ("WanVACETransformer3DModel", VACE_14B, "wan"),
    ("ZImageTransformer2DModel", {}, "z-image"),
    ("ZImageTransformer2DModel", dict(siglip_feat_dim=1152), "z-image"),  # Omni
]  # fmt: skip
# served by a loader, and without a table: this list may only become shorter
UNCOVERED = {
    "Kandinsky3UNet", "PriorTransformer", "UNet3DConditionModel", "UNetControlNetXSModel", "UNetMotionModel",
    "WuerstchenPrior",
}  # fmt: skip
# of no image, video or sound
PROTEINS = {"RFD4ProteinaTransformer"}
# the component that a loader is for when only the modular pipelines name it
MODULAR = {
    "AnimaLoraLoaderMixin": "CosmosTransformer3DModel",
    "Flux3LoraLoaderMixin": "Flux3Transformer2DModel",
    "HunyuanVideo15LoraLoaderMixin": "HunyuanVideo15Transformer3DModel",
    "MiniMaxH3LoraLoaderMixin": "MiniMaxH3Transformer3DModel",
}
# loads into several models: the connectors are checked below; AMUSEd has neither noise nor flow
OTHERS = {"AmusedLoraLoaderMixin", "LTX2LoraLoaderMixin"}
# a motion encoder that nobody adapts
FROZEN = r"motion_encoder\."
# what fits as well: Anima has Cosmos-Predict 2's transformer, FramePack HunyuanVideo's
ALIKE = {
    "cosmos": {"anima"}, "chroma": {"flux"}, "hunyuan-video": {"framepack"}, "sd1": {"sd2"},
}  # fmt: skip


def served() -> dict[str, set[str]]:
    """The classes of the denoisers of the pipelines of every LoRA loader."""
    found: dict[str, set[str]] = {}
    for path in Path(diffusers.__file__).parent.glob("pipelines/**/*.py"):
        for item in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(item, ast.ClassDef):
                mixins = [b.id for b in item.bases if isinstance(b, ast.Name) and b.id.endswith("LoraLoaderMixin")]  # fmt: skip
                for mixin in mixins:
                    found.setdefault(mixin, set()).update(_denoisers(item))
    return found


def _denoisers(pipeline: ast.ClassDef) -> set[str]:
    made = (f for f in pipeline.body if isinstance(f, ast.FunctionDef) and f.name == "__init__")
    return {
        name
        for init in made
        for argument in init.args.args
        if argument.arg in ("transformer", "transformer_2", "unet", "prior") and argument.annotation
        for name in re.findall(r"\w+", ast.unparse(argument.annotation))
        if name != "None"
    }


def test_every_lora_loader_s_transformer_has_a_family() -> None:
    from diffusers.loaders import lora_pipeline

    loaders = served()
    assert len(loaders) >= 25
    names = {name for name in vars(lora_pipeline) if name.endswith("LoraLoaderMixin")}
    silent = names - set(loaders) - set(MODULAR) - OTHERS
    assert silent == set(), "a loader that no pipeline here uses: which model is it for?"
    classes = {name for found in loaders.values() for name in found}
    classes |= {name for mixin, name in MODULAR.items() if mixin in names}
    known = {name for name, _, _ in MODELS} | PROTEINS
    assert classes - known == UNCOVERED & classes
    assert not UNCOVERED & known


@cache
def built(number: int) -> torch.nn.Module:
    name, config, _ = MODELS[number]
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    with torch.device("meta"):
        return getattr(diffusers, name)(**config)


def layers(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    kinds = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    return {
        n: tuple(m.weight.shape)
        for n, m in model.named_modules()
        if isinstance(m, kinds) and getattr(m, "groups", 1) == 1
    }


def lora(found: dict[str, tuple[int, ...]], prefix: str) -> Listing:
    listing: Listing = {}
    for module, shape in found.items():
        for role, tensor in lora_shapes(shape, 4).items():
            listing[f"{prefix}.{module}.lora_{'A' if role == 'down' else 'B'}.weight"] = ("F16", tensor)  # fmt: skip
    return listing


@pytest.mark.share(4)
@pytest.mark.parametrize("number", range(len(MODELS)), ids=[f"{c}-{f}" for c, _, f in MODELS])
def test_a_model_is_in_its_table(number: int) -> None:
    model, family = built(number), MODELS[number][2]
    part = families()[family].components[0]
    keys, adapted = compile_checkpoint(family), layers(model)
    check(model, family, part.name)
    adapter = lora(adapted, part.name)
    found = detect_adapter(infos(adapter), {})
    assert family in {found.family, *found.alternatives}
    assert {found.family, *found.alternatives} <= {family, *ALIKE.get(family, ())}
    names = compile_keys(family, "diffusers")
    claimed = {key for key in adapter if names.parse(key) is not None}
    assert not [key for key in adapter.keys() - claimed if not re.search(FROZEN, key)]
    whole = {k: ("BF16", tuple(t.shape)) for k, t in model.state_dict().items()}
    said = detect_checkpoint(infos(whole), {})
    assert family in {said.family, *said.alternatives}
    assert all(keys.claims(f"{part.name}.{key}") or re.search(FROZEN, key) for key in whole)


def check(model: torch.nn.Module, family: str, component: str, prefix: str = "") -> None:
    """Every parameter is in the table, as a matrix if it is a layer's, of one of its sizes."""
    keys, adapted = compile_checkpoint(family), layers(model)
    wrong: dict[str, object] = {}
    for key, tensor in model.state_dict().items():
        place = keys.parse(f"{prefix or component}.{key}")
        if place is None:
            wrong[key] = "not in the table"
        elif place.slot.param == "weight":
            row = find_row(keys.family, *place.slot.target[:2])
            assert row is not None
            matrix = key.removesuffix(".weight") in adapted
            cut, (rows, *rest) = place.slot.rows, tensor.shape
            total = rows if cut is None else rows * cut.total // (cut.stop - cut.start)
            sizes = keys.family.component(place.slot.component).sizes
            if matrix is not (place.kind is Kind.MATRIX):
                wrong[key] = place.kind
            elif matrix and sizes and min(total, rest[0]) > 256 and (total, rest[0]) not in sizes:
                wrong[key] = (total, rest[0])
    assert {key: why for key, why in wrong.items() if not re.search(FROZEN, key)} == {}


def test_redux_is_a_part_of_flux() -> None:
    from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder

    with torch.device("meta"):
        model = ReduxImageEncoder()
    for prefix in ("", "image_embedder."):
        keys = {f"{prefix}{k}": ("BF16", tuple(t.shape)) for k, t in model.state_dict().items()}
        said = detect_checkpoint(infos(keys), {})
        assert (said.family, said.claimed, said.total) == ("flux", 4, 4)
    check(model, "flux", "image_embedder")


@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_the_connectors_of_ltx2(version: str) -> None:
    connectors = pytest.importorskip("diffusers.pipelines.ltx2.connectors")
    config: dict[str, Any] = {}
    if version == "2.3":
        config = dict(
            per_modality_projections=True, proj_bias=True, video_gated_attn=True, audio_gated_attn=True,
            video_connector_num_attention_heads=32, audio_connector_attention_head_dim=64, video_connector_num_layers=8,
            audio_connector_num_attention_heads=32, audio_connector_num_layers=8,
        )  # fmt: skip
    with torch.device("meta"):
        model = connectors.LTX2TextConnectors(**config)
    check(model, "ltx2", "connectors")
    keys = compile_keys("ltx2", "diffusers")
    listing = lora(layers(model), "connectors")
    assert all(keys.parse(key) for key in listing)
    assert {keys.parse(key).slot.component for key in listing} == {"connectors", "text_projection"}  # type: ignore[union-attr]
    # each is written back as it was read, here and in ComfyUI's names
    comfy = compile_keys("ltx2", "comfy")
    for key in listing:
        parsed = keys.parse(key)
        assert parsed is not None
        role = parsed.roles[0][1]
        assert keys.spell(parsed.slot, "lora", role) == key
        again = comfy.parse(comfy.spell(parsed.slot, "lora", role))
        assert again is not None
        assert again.slot == parsed.slot
