"""Every family whose diffusers class builds from a small configuration: diffusers and PEFT load what convert writes.

Loaders report success with nothing loaded, so layers are counted, and their ΔW compared; what the packages save is read.
"""

from __future__ import annotations

import inspect
import json
import logging
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit.adapter import Adapter
from adaptkit.detect import families
from adaptkit.families.contract import Kind
from adaptkit.keymap import compile_keys
from adaptkit.ops import convert
from tests.synth import Parameter, parameters

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

HEADS: dict[str, Any] = {"attention_head_dim": 16, "num_attention_heads": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "flux": (
        "FluxTransformer2DModel",
        dict(patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=32, guidance_embeds=True,
             pooled_projection_dim=32, axes_dims_rope=[4, 4, 8], **HEADS),
    ),
    "chroma": (
        "ChromaTransformer2DModel",
        dict(patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=32,
             axes_dims_rope=[4, 4, 8], approximator_hidden_dim=32, approximator_layers=1, **HEADS),
    ),
    "flux2": (
        "Flux2Transformer2DModel",
        dict(in_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=32, timestep_guidance_channels=16,
             axes_dims_rope=[4, 4, 4, 4], **HEADS),
    ),
    "sd3": (
        "SD3Transformer2DModel",
        dict(sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
             joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=16, out_channels=4,
             pos_embed_max_size=8, dual_attention_layers=(0,)),
    ),
    "qwen-image": (
        "QwenImageTransformer2DModel",
        dict(patch_size=2, in_channels=16, out_channels=4, num_layers=1, joint_attention_dim=16,
             axes_dims_rope=(8, 4, 4), **HEADS),
    ),
    "wan": (
        "WanTransformer3DModel",
        dict(patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
             freq_dim=32, ffn_dim=32, num_layers=1, image_dim=16, added_kv_proj_dim=24),
    ),
    "hunyuan-video": (
        "HunyuanVideoTransformer3DModel",
        dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1, num_single_layers=1,
             num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True, text_embed_dim=16,
             pooled_projection_dim=8, rope_axes_dim=(2, 4, 4)),
    ),
    "z-image": (
        "ZImageTransformer2DModel",
        dict(all_patch_size=(2,), all_f_patch_size=(1,), in_channels=16, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2,
             n_kv_heads=2, cap_feat_dim=16, siglip_feat_dim=16, axes_dims=[8, 4, 4], axes_lens=[32, 16, 16]),
    ),
    "lumina2": (
        "Lumina2Transformer2DModel",
        dict(sample_size=4, patch_size=2, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1,
             num_attention_heads=3, num_kv_heads=1, multiple_of=2, cap_feat_dim=8, scaling_factor=1.0,
             axes_dim_rope=[4, 2, 2]),
    ),
    "auraflow": (
        "AuraFlowTransformer2DModel",
        dict(sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
             joint_attention_dim=16, caption_projection_dim=16, attention_head_dim=8, num_attention_heads=2, out_channels=4,
             pos_embed_max_size=16),
    ),
    "ltx": (
        "LTXVideoTransformer3DModel",
        dict(in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
             num_layers=1, caption_channels=16),
    ),
    "ltx2": (
        "LTX2VideoTransformer3DModel",
        dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
             audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
             audio_cross_attention_dim=8, num_layers=1, caption_channels=16, gated_attn=True, cross_attn_mod=True,
             audio_gated_attn=True, audio_cross_attn_mod=True),
    ),
    "minimax-h3": (
        "MiniMaxH3Transformer3DModel",
        dict(hidden_size=24, num_layers=1, num_refiner_layers=1, ffn_dim=32, in_channels=2, audio_in_channels=2, text_dim=16,
             freq_dim=16, time_embed_hidden_dim=24, time_embed_dim=8, rope_freq_dim=2, **HEADS),
    ),
    "qwen-image-21": (
        "QwenImage21Transformer2DModel",
        dict(patch_size=1, in_channels=4, out_channels=4, num_layers=1, context_in_dim=16, mlp_ratio=2,
             axes_dims_rope=(8, 4, 4), **HEADS),
    ),
    "ernie-image": (
        "ErnieImageTransformer2DModel",
        dict(hidden_size=32, num_attention_heads=2, num_layers=1, ffn_hidden_size=48, in_channels=4, out_channels=4,
             text_in_dim=16, rope_axes_dim=(8, 4, 4)),
    ),
    "hidream": (
        "HiDreamImageTransformer2DModel",
        dict(patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
             num_attention_heads=4, caption_channels=[32, 16], text_emb_dim=64, num_routed_experts=4,
             num_activated_experts=2, axes_dims_rope=(4, 2, 2), max_resolution=(32, 32), llama_layers=(0, 1)),
    ),
    "ace-step": (
        "AceStepTransformer1DModel",
        dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
             head_dim=16, in_channels=12, audio_acoustic_hidden_dim=4),
    ),
    "kandinsky5": (
        "Kandinsky5Transformer3DModel",
        dict(in_visual_dim=4, in_text_dim=12, in_text_dim2=14, time_dim=16, out_visual_dim=4, patch_size=(1, 2, 2),
             model_dim=16, ff_dim=32, num_text_blocks=1, num_visual_blocks=1, axes_dims=(2, 2, 4)),
    ),
    "cogvideox": (
        "CogVideoXTransformer3DModel",
        dict(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=8,
             num_layers=1, sample_width=8, sample_height=8, sample_frames=9, max_text_seq_length=8),
    ),
    "cogview4": (
        "CogView4Transformer2DModel",
        dict(patch_size=2, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=2,
             text_embed_dim=8, time_embed_dim=8, condition_dim=4),
    ),
    "mochi": (
        "MochiTransformer3DModel",
        dict(patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=48, pooled_projection_dim=16,
             in_channels=4, text_embed_dim=16, time_embed_dim=4, max_sequence_length=16),
    ),
    "flux3": (
        "Flux3Transformer2DModel",
        dict(in_channels=4, cond_in_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=16,
             timestep_channels=16, mlp_ratio=2.0, axes_dims_rope=(4, 4, 4, 4), **HEADS),
    ),
    "bria-fibo": (
        "BriaFiboTransformer2DModel",
        dict(patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=32, text_encoder_dim=16,
             axes_dims_rope=[4, 4, 8], **HEADS),
    ),
    "bria-fibo2": (
        "BriaFibo2Transformer2DModel",
        dict(in_channels=4, patch_size=1, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, cap_feat_dim=16,
             injection_layer_ids=(1,), perceiver_num_layers=1, min_num_gist_tokens=4, max_num_gist_tokens=8, gist_step=4,
             axes_dims=(8, 4, 4), axes_lens=(16, 16, 16)),
    ),
    "cosmos": (
        "CosmosTransformer3DModel",
        dict(in_channels=4, out_channels=4, num_layers=1, text_embed_dim=16, adaln_lora_dim=4, max_size=(4, 32, 32),
             extra_pos_embed_type=None, **HEADS),
    ),
}  # fmt: skip
FIRST = {"auraflow": "comfy", "ltx": "comfy"}  # what no kohya trainer knows
# whose PEFT files are the original's, not those of diffusers' class
ORIGINALS = {"ace-step"}
RANK = 2
PIPELINES = {
    "flux": "FluxPipeline", "chroma": "ChromaPipeline", "flux2": "Flux2Pipeline", "sd3": "StableDiffusion3Pipeline",
    "qwen-image": "QwenImagePipeline", "wan": "WanPipeline", "hunyuan-video": "HunyuanVideoPipeline",
    "z-image": "ZImagePipeline", "lumina2": "Lumina2Pipeline", "auraflow": "AuraFlowPipeline", "ltx": "LTXPipeline",
    "ltx2": "LTX2Pipeline", "qwen-image-21": "QwenImage21Pipeline", "ernie-image": "ErnieImagePipeline",
    "hidream": "HiDreamImagePipeline", "ace-step": "AceStepPipeline", "kandinsky5": "Kandinsky5T2VPipeline",
    "cogvideox": "CogVideoXPipeline", "cogview4": "CogView4Pipeline", "mochi": "MochiPipeline",
    "bria-fibo": "BriaFiboPipeline", "bria-fibo2": "BriaFibo2Pipeline", "cosmos": "Cosmos2_5_PredictBasePipeline",
}  # fmt: skip


@cache
def built(family: str) -> torch.nn.Module:
    name, config = MODELS[family]
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    torch.manual_seed(0)
    return getattr(diffusers, name)(**config)


def model(family: str) -> torch.nn.Module:
    name, config = MODELS[family]
    fresh = getattr(diffusers, name)(**config)
    fresh.load_state_dict(built(family).state_dict())
    return fresh


def layers(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Every linear and convolutional layer with its weight's shape."""
    kinds = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    return {
        name: tuple(layer.weight.shape)
        for name, layer in module.named_modules()
        if isinstance(layer, kinds)
    }


def matrices(family: str) -> list[Parameter]:
    shapes = {f"{name}.weight": shape for name, shape in layers(built(family)).items()}
    part = families()[family].component("transformer")
    return [
        p for p in parameters(part, shapes) if p.kind is Kind.MATRIX and p.target.param == "weight"
    ]


def source(family: str, path: Path) -> Path:
    """A LoRA on every layer, as trainers spell it: alpha is half the rank."""
    keys, draw = compile_keys(family, FIRST.get(family, "kohya")), torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    for parameter in matrices(family):
        for slot in keys.slots(parameter.target):
            start, stop = (
                (0, parameter.shape[0])
                if slot.rows is None
                else slot.rows.bounds(parameter.shape[0])
            )  # type: ignore[misc]
            ones = (1,) * (len(parameter.shape) - 2)
            tensors[keys.spell(slot, "lora", "up")] = torch.randn(
                stop - start, RANK, *ones, generator=draw
            )
            tensors[keys.spell(slot, "lora", "down")] = torch.randn(
                RANK, *parameter.shape[1:], generator=draw
            )
            tensors[keys.spell(slot, "lora", "alpha")] = torch.tensor(RANK / 2)
    save_file(tensors, path)
    return path


def converted(path: Path, output: Path, family: str, to: str, format: str) -> convert.Report:
    plan = convert.plan(path, convert.Options(to=to, family=family, format=format, output=output))
    try:
        return convert.run(plan)
    finally:
        plan.close()


def deltas(path: Path, family: str, format: str) -> dict[tuple[str, str], np.ndarray]:
    with Adapter.open(path, family=family, format=format) as adapter:
        assert not adapter.unclaimed
        return {
            (slot.target.module, str(slot.rows)): adapter.weights(entry).delta().numpy()
            for slot, entry in adapter.entries.items()
        }


def loaded(module: torch.nn.Module, prefix: str = "") -> dict[str, np.ndarray]:
    """ΔW of every LoRA layer that is really there, by the module's name."""
    found: dict[str, np.ndarray] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer) and layer.lora_A:
            (adapter,) = layer.lora_A
            up, down = layer.lora_B[adapter].weight.detach(), layer.lora_A[adapter].weight.detach()
            delta = up.flatten(1) @ down.flatten(1) * layer.scaling[adapter]
            found[name.removeprefix(prefix)] = delta.numpy()
    return found


def compare(family: str, path: Path, format: str, found: dict[str, np.ndarray]) -> None:
    """Every layer of the file was loaded, with the file's ΔW, names apart."""
    keys = compile_keys(family, format)
    with Adapter.open(path, family=family, format=format) as adapter:
        expected = {keys.module(slot): load_delta(adapter, slot) for slot in adapter.entries}
    assert found.keys() == expected.keys()
    for name, delta in found.items():
        np.testing.assert_allclose(delta, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


def load_delta(adapter: Adapter, slot: Any) -> np.ndarray:
    """As the file's own tensors multiply, without the order of rows that the table knows."""
    stored = adapter.read(adapter.entries[slot])
    scale = adapter.entries[slot].facts.scale
    return (stored["up"].flatten(1) @ stored["down"].flatten(1) * scale).numpy()


@pytest.mark.parametrize("family", MODELS)
def test_the_table_has_every_layer_of_the_model(family: str) -> None:
    keys = compile_keys(family, "diffusers")
    named = {
        keys.module(slot) for parameter in matrices(family) for slot in keys.slots(parameter.target)
    }
    assert named == layers(built(family)).keys()


@pytest.mark.share(4)
@pytest.mark.parametrize("family", MODELS)
def test_diffusers_loads_what_convert_writes(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = FIRST.get(family, "kohya")
    path, output = source(family, tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    report = converted(path, output, family, "diffusers", first)
    fresh = model(family)
    with caplog.at_level(logging.WARNING):
        fresh.load_lora_adapter(load_file(output), prefix="transformer")
    assert not [
        record.message for record in caplog.records if "unexpected" in record.message.lower()
    ]
    found = loaded(fresh)
    assert len(found) == report.modules == len(layers(built(family)))
    compare(family, output, "diffusers", found)
    assert_same(deltas(path, family, first), deltas(output, family, "diffusers"), family)


@pytest.mark.share(4)
@pytest.mark.parametrize("family", PIPELINES)
def test_the_pipelines_own_loader_takes_the_file(family: str, tmp_path: Path) -> None:
    """`load_lora_weights` in its two steps: read and convert the keys, load them into the transformer."""
    pipeline = getattr(diffusers, PIPELINES[family], None)
    if pipeline is None:
        pytest.skip(f"this diffusers has no {PIPELINES[family]}")
    output = tmp_path / "b.safetensors"
    converted(
        source(family, tmp_path / "a.safetensors"),
        output,
        family,
        "diffusers",
        FIRST.get(family, "kohya"),
    )
    state = pipeline.lora_state_dict(str(output))
    state = state[0] if isinstance(state, tuple) else state
    assert state.keys() == load_file(output).keys()
    fresh = model(family)
    alphas = (
        {"network_alphas": None}
        if "network_alphas" in inspect.signature(pipeline.load_lora_into_transformer).parameters
        else {}
    )
    pipeline.load_lora_into_transformer(state, transformer=fresh, **alphas)
    compare(family, output, "diffusers", loaded(fresh))


def assert_same(
    ours: dict[tuple[str, str], np.ndarray], theirs: dict[tuple[str, str], np.ndarray], family: str
) -> None:
    """The same ΔW of every target, parts put one below the other in the family's order."""
    for found in (ours, theirs):
        for (module, rows), delta in list(found.items()):
            if rows != "None":
                found.setdefault((module, "parts"), np.zeros((0, delta.shape[1])))
        for module in {module for module, rows in found if rows == "parts"}:
            parts = sorted(
                (start(rows), d)
                for (m, rows), d in found.items()
                if m == module and rows.startswith("Rows")
            )
            found[module, "None"] = np.concatenate([d for _, d in parts])
    wholes = {module for module, rows in ours if rows == "None"}
    assert wholes == {module for module, rows in theirs if rows == "None"}, family
    for module in wholes:
        np.testing.assert_allclose(
            theirs[module, "None"], ours[module, "None"], rtol=1e-4, atol=1e-5, err_msg=module
        )


def start(rows: str) -> int:
    return int(rows.partition("start=")[2].partition(",")[0])


@pytest.mark.share(4)
@pytest.mark.parametrize("family", [family for family in MODELS if family not in ORIGINALS])
def test_peft_loads_what_convert_writes(family: str, tmp_path: Path) -> None:
    path = source(family, tmp_path / "a.safetensors")
    report = converted(path, tmp_path / "made", family, "peft", FIRST.get(family, "kohya"))
    wrapped = peft.PeftModel.from_pretrained(model(family), str(tmp_path / "made"))
    found = loaded(wrapped, "base_model.model.")
    assert len(found) == report.modules == len(layers(built(family)))
    compare(family, tmp_path / "made", "peft", found)
    fresh = peft.get_peft_model(
        model(family), peft.PeftConfig.from_pretrained(str(tmp_path / "made"))
    )
    state = load_file(tmp_path / "made" / "adapter_model.safetensors")
    result = peft.set_peft_model_state_dict(fresh, state)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key]


@pytest.mark.share(4)
@pytest.mark.parametrize("family", MODELS)
def test_what_diffusers_and_peft_save_is_read(family: str, tmp_path: Path) -> None:
    fresh = model(family)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=3, target_modules=sorted(layers(fresh)), init_lora_weights=False
    )
    fresh.add_adapter(config)
    fresh.save_lora_adapter(tmp_path, weight_name="saved.safetensors")
    expected = loaded(fresh)
    state = {
        f"transformer.{key}": tensor
        for key, tensor in load_file(tmp_path / "saved.safetensors").items()
    }
    told = {
        f"transformer.{key}": value
        for key, value in config.to_dict().items()
        if isinstance(value, int | str)
    }
    save_file(state, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(told)})
    compare(family, tmp_path / "a.safetensors", "diffusers", expected)
    if family in ORIGINALS:
        return
    wrapped = peft.get_peft_model(model(family), config)
    wrapped.save_pretrained(tmp_path / "peft")
    compare(family, tmp_path / "peft", "peft", loaded(wrapped, "base_model.model."))
    first = FIRST.get(family, "kohya")
    converted(tmp_path / "peft", tmp_path / "b.safetensors", family, first, "peft")
    assert_same(
        deltas(tmp_path / "peft", family, "peft"),
        deltas(tmp_path / "b.safetensors", family, first),
        family,
    )
