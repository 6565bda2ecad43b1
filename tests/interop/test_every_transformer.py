"""Every transformer class that a LoRA loader of diffusers serves, with a file that diffusers itself saved.

A small model of the class is built. Its adapter, on all its linear and convolutional layers, is read with the right family,
goes to every format that holds it and comes back with the same bytes, and is merged into what `fuse_lora` makes.
"""

from __future__ import annotations

import logging
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit.detect import detect_adapter, families, formats
from adaptkit.errors import AdaptkitError
from adaptkit.ops import convert, merge
from tests.generate import CASCADE
from tests.interop import test_family_models as small
from tests.interop.test_lora_mixins import ALIKE, MODELS, layers
from tests.interop.test_strangers import infos

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

RANK = 2
HEADS = small.HEADS
WAN: dict[str, Any] = small.MODELS["wan"][1]
UNET: dict[str, Any] = dict(
    sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
)  # fmt: skip
SANA: dict[str, Any] = dict(
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=4, num_layers=1, num_cross_attention_heads=2,
    cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=6, sample_size=8,
)  # fmt: skip


def _of_wan(*less: str, **more: Any) -> dict[str, Any]:
    return {name: value for name, value in WAN.items() if name not in less} | more


# classes that test_family_models does not build
SMALL: dict[str, dict[str, Any]] = {
    "AnyFlowFARTransformer3DModel": _of_wan("image_dim", "added_kv_proj_dim"),
    "AnyFlowTransformer3DModel": _of_wan("image_dim", "added_kv_proj_dim"),
    "ChronoEditTransformer3DModel": _of_wan(),
    "ConsisIDTransformer3DModel": small.MODELS["cogvideox"][1] | dict(
        is_train_face=True, is_kps=False, cross_attn_dim_head=4, cross_attn_num_heads=2, LFE_id_dim=8, LFE_vit_dim=8,
        LFE_depth=5, LFE_dim_head=4, LFE_num_heads=2, LFE_num_querie=4, LFE_output_dim=8, LFE_ff_mult=2,
    ),
    "GlmImageTransformer2DModel": dict(
        in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2, text_embed_dim=8,
        time_embed_dim=8, condition_dim=4, prior_vq_quantizer_codebook_size=8,
    ),
    "HeliosTransformer3DModel": _of_wan("image_dim", "added_kv_proj_dim", rope_dim=(4, 4, 4)),
    "HunyuanDiT2DModel": dict(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, patch_size=2, sample_size=8, hidden_size=16,
        num_layers=4, cross_attention_dim=8, cross_attention_dim_t5=8, pooled_projection_dim=8, text_len=4, text_len_t5=4,
    ),
    "HunyuanVideoFramepackTransformer3DModel": small.MODELS["hunyuan-video"][1] | dict(
        has_image_proj=True, has_clean_x_embedder=True, image_proj_dim=8, patch_size=2,
    ),
    "HunyuanVideoTransformer3DModel": small.MODELS["hunyuan-video"][1] | dict(patch_size=2),
    "Ideogram4Transformer2DModel": dict(
        in_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2, intermediate_size=48, adaln_dim=8,
        llm_features_dim=24, mrope_section=(2, 3, 3),
    ),
    "Krea2Transformer2DModel": dict(
        in_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, timestep_embed_dim=8, text_hidden_dim=16, num_text_layers=3, text_num_attention_heads=2,
        text_num_key_value_heads=2, text_intermediate_size=24, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(8, 4, 4),
    ),
    "LongCatImageTransformer2DModel": dict(
        in_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=32, axes_dims_rope=[4, 4, 8], **HEADS,
    ),
    "OvisImageTransformer2DModel": dict(
        in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=32, axes_dims_rope=(4, 4, 8),
        **HEADS,
    ),
    "PRXTransformer2DModel": dict(
        in_channels=4, context_in_dim=8, hidden_size=16, num_heads=2, depth=1, axes_dim=[4, 4],
    ),
    "PixArtTransformer2DModel": dict(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, cross_attention_dim=16, sample_size=8,
        caption_channels=8,
    ),
    "SanaTransformer2DModel": SANA,
    "SanaVideoTransformer3DModel": SANA,
    "SkyReelsV2Transformer3DModel": _of_wan("image_dim", "added_kv_proj_dim", inject_sample_info=True),
    "StableCascadeUNet": CASCADE | dict(
        in_channels=4, out_channels=4, timestep_ratio_embedding_dim=4, conditioning_dim=8, block_out_channels=(8, 8),
        num_attention_heads=(2, 2), down_num_layers_per_block=(1, 1), up_num_layers_per_block=(1, 1),
        clip_text_in_channels=4, clip_text_pooled_in_channels=4, clip_image_in_channels=4, clip_seq=1,
    ),
    "UNet2DConditionModel": UNET | dict(
        cross_attention_dim=8, block_out_channels=(8, 8, 8, 8), down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    ),
    "WanAnimate2Transformer3DModel": dict(
        text_len=8, in_dim=4, dim=24, ffn_dim=32, freq_dim=32, text_dim=16, out_dim=4, num_heads=2, num_layers=1,
    ),
    "WanAnimateTransformer3DModel": _of_wan(
        in_channels=12, latent_channels=4, motion_encoder_size=8, motion_style_dim=8, motion_dim=2, motion_encoder_dim=8,
        motion_encoder_channel_sizes={"4": 8, "8": 8}, face_encoder_hidden_dim=8, face_encoder_num_heads=2,
        inject_face_latents_blocks=1,
    ),
    "WanVACETransformer3DModel": _of_wan(vace_layers=[0], vace_in_channels=4),
}  # fmt: skip
# told apart by widths, which small models have not
NARROW = ALIKE | {
    "longcat-image": {"bria-fibo"},
    "ltx": {"ltx-13b", "ltx2"},
    "cosmos-14b": {"cosmos", "anima"},
}
MIDDLE = re.compile(r"transformer_blocks\.([1-9]|[1-3]\d|4[0-6])\.")
CLASSES = {name: family for name, _, family in reversed(MODELS)}


def config(name: str) -> dict[str, Any]:
    family = CLASSES[name]
    known = dict(small.MODELS.values())
    return (
        SMALL[name] if name in SMALL else known[name] if name in known else small.MODELS[family][1]
    )


@cache
def built(name: str) -> torch.nn.Module:
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    torch.manual_seed(0)
    return getattr(diffusers, name)(**config(name)).eval()


def fresh(name: str) -> torch.nn.Module:
    made = getattr(diffusers, name)(**config(name))
    made.load_state_dict(built(name).state_dict())
    return made


def chosen(model: torch.nn.Module) -> list[str]:
    """Every layer; of Mochi, whose last block alone differs, those outside of the blocks between."""
    return sorted(name for name in layers(model) if not MIDDLE.match(name))


@cache
def saved(name: str, folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """An adapter on every layer as diffusers saves it, and the weights that it makes of the model."""
    model = fresh(name)
    torch.manual_seed(1)
    options = peft.LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=chosen(model), init_lora_weights=False
    )
    if hasattr(model, "add_adapter"):
        model.add_adapter(options)
        model.save_lora_adapter(folder, weight_name=f"{name}.safetensors")
        tensors = load_file(folder / f"{name}.safetensors")
        model.fuse_lora(safe_fusing=True)
    else:  # a pipeline loads adapters for it, the class has no method
        peft.inject_adapter_in_model(options, model)
        tensors = dict(peft.get_peft_model_state_dict(model))
        for layer in model.modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                layer.merge(safe_merge=True)
    part = families()[CLASSES[name]].components[0].name
    path = folder / f"{name}-named.safetensors"
    save_file({f"{part}.{key}": tensor for key, tensor in tensors.items()}, path)
    state = model.state_dict()
    return path, {
        key.replace(".base_layer.", "."): tensor
        for key, tensor in state.items()
        if ".lora_" not in key
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    return tmp_path_factory.mktemp("transformers")


def test_every_class_is_built() -> None:
    assert len(CLASSES) >= 44
    assert all(config(name) for name in CLASSES)


@pytest.mark.share(4)
@pytest.mark.parametrize("name", CLASSES)
def test_the_file_goes_to_every_format_and_back(name: str, folder: Path, tmp_path: Path) -> None:
    path, _ = saved(name, folder)
    family, first = CLASSES[name], load_file(path)
    found = detect_adapter(infos({key: ("F32", tuple(t.shape)) for key, t in first.items()}), {})
    assert family in {found.family, *found.alternatives}
    assert {found.family, *found.alternatives} <= {family, *NARROW.get(family, ())}
    reached = set()
    for to in formats():
        there, back = tmp_path / f"{to}.safetensors", tmp_path / f"{to}-back.safetensors"
        if to == "peft":
            there = tmp_path / "peft"
        try:
            run(path, there, family, "diffusers", to)
        except AdaptkitError:
            assert not there.exists()
            continue
        run(there, back, family, to, "diffusers")
        second = load_file(back)
        alphas = {key for key in second if key.endswith(".alpha")}
        assert second.keys() - alphas == first.keys(), to
        for key, tensor in first.items():
            assert torch.equal(second[key], tensor), (to, key)
        reached.add(to)
    assert {"diffusers", "peft"} & reached
    print(name, sorted(reached))


def run(path: Path, output: Path, family: str, format: str, to: str) -> None:
    plan = convert.plan(path, convert.Options(to=to, family=family, format=format, output=output))
    try:
        convert.run(plan)
    finally:
        plan.close()


@pytest.mark.parametrize("name", CLASSES)
def test_merge_makes_what_fuse_lora_makes(name: str, folder: Path, tmp_path: Path) -> None:
    path, expected = saved(name, folder)
    base, output = tmp_path / "base.safetensors", tmp_path / "merged.safetensors"
    state = built(name).state_dict()
    save_file({key: t.contiguous() for key, t in state.items()}, base)
    options = merge.Options(output=output, family=CLASSES[name])
    plan = merge.plan(base, [(path, 1.0)], options)
    try:
        merge.run(plan)
    finally:
        plan.close()
    merged = load_file(output)
    assert merged.keys() == expected.keys()
    changed = 0
    for key, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-5, atol=1e-5, msg=key)
        changed += not torch.equal(tensor, state[key])
    assert changed == len(chosen(built(name)))
