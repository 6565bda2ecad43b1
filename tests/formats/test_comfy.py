"""comfy: the names that ComfyUI's own models have, as ai-toolkit and diffusion-pipe write them."""

from __future__ import annotations

import pytest

from tests.formats.spelling import (
    Key,
    check_alone,
    check_foreign,
    check_no_place,
    check_read,
    check_real,
    check_written,
)

CONV = "unet.down_blocks.0.resnets.0.conv1.weight"
STEM = "diffusion_model.input_blocks.1.0.in_layers.2"
KEYS = [
    Key(
        "diffusion_model.double_blocks.0.img_attn.norm.key_norm.set_weight",
        "flux",
        "model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale",
        "set",
        "value",
    ),
    Key(f"{STEM}.lora_B.weight", "sd1", CONV),
    Key(f"{STEM}.lora_A.weight", "sd1", CONV, role="down"),
    Key(f"{STEM}.lora_mid.weight", "sd1", CONV, role="mid"),
    Key(f"{STEM}.alpha", "sd1", CONV, role="alpha"),
    Key(f"{STEM}.dora_scale", "sd1", CONV, "lora+dora", "magnitude"),
    Key(f"{STEM}.lora_B.weight", "sd1", CONV, "lora+dora"),
    Key(f"{STEM}.lokr_w1", "sd1", CONV, "lokr", "w1"),
    Key(
        "diffusion_model.double_blocks.18.img_attn.qkv.lora_B.weight",
        "flux",
        "model.diffusion_model.double_blocks.18.img_attn.qkv.weight",
    ),
    Key(
        "text_encoders.clip_l.transformer.text_model.encoder.layers.11.mlp.fc1.lora_B.weight",
        "sdxl",
        "text_encoder.text_model.encoder.layers.11.mlp.fc1.weight",
    ),
    Key(
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.lora_B.weight",
        "flux",
        "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.weight",
    ),
]


def test_parameters_are_written_as_comfyui_names_them() -> None:
    check_written("comfy", KEYS)


def test_either_spelling_of_the_factors_is_read() -> None:
    """ai-toolkit writes Z-Image by diffusers' names behind the same prefix."""
    check_read(
        "comfy",
        [
            Key(f"{STEM}.lora_up.weight", "sd1", CONV),
            Key(f"{STEM}.lora_down.weight", "sd1", CONV, role="down"),
            Key(
                "diffusion_model.layers.0.attention.to_q.lora_A.weight",
                "z-image",
                "transformer.layers.0.attention.to_q.weight",
                role="down",
            ),
        ],
    )


def test_no_other_format_reads_them() -> None:
    check_alone("comfy", KEYS)


def test_names_of_other_formats_are_foreign() -> None:
    check_foreign(
        "comfy",
        "sd1",
        [
            STEM.replace(".", "_") + ".lora_B.weight",
            f"{STEM.replace('diffusion_model', 'unet')}.lora_B.weight",
            f"model.{STEM}.lora_B.weight",
            f"{STEM}.lora_C.weight",
        ],
    )


def test_a_part_of_a_fused_layer_has_no_key() -> None:
    check_no_place("comfy", "flux", ["transformer.transformer_blocks.18.attn.to_k.weight"])


@pytest.mark.parametrize(
    ("family", "name", "algorithm"),
    [
        ("sdxl", "gen__comfynative_sdxl_unet_allmodules", "lora"),
        ("flux", "invokeai__flux_lora_aitoolkit_format", "lora"),
        ("flux", "invokeai__flux_lokr_bfl_format", "lokr"),
        ("anima", "gen__comfynative_anima_allmodules", "lora"),
        ("wan", "gen__comfynative_wan21_t2v_14b_allmodules", "lora"),
    ],
)
def test_real_files_come_out_as_they_went_in(family: str, name: str, algorithm: str) -> None:
    check_real("comfy", family, name, algorithm)
