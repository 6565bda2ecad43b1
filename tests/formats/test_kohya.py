"""kohya: as sd-scripts (`networks/lora.py`) and musubi-tuner name them."""

from __future__ import annotations

import pytest

from adaptkit.keymap import compile_keys
from tests.formats.spelling import (
    Key,
    check_alone,
    check_foreign,
    check_read,
    check_real,
    check_written,
)

QUERY = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"
SDXL = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
FUSED = "model.diffusion_model.double_blocks.18.img_attn.qkv.weight"
KEYS = [
    Key(
        "lora_unet_double_blocks_0_img_attn_norm_key_norm.set_weight",
        "flux",
        "model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale",
        "set",
        "value",
    ),
    Key(
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_up.weight",
        "sd1",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.weight",
    ),
    Key(
        "lora_te_text_model_encoder_layers_11_mlp_fc1.lora_down.weight",
        "sd1",
        "text_encoder.text_model.encoder.layers.11.mlp.fc1.weight",
        role="down",
    ),
    Key(f"{SDXL}.lora_up.weight", "sdxl", QUERY),
    Key(f"{SDXL}.alpha", "sdxl", QUERY, role="alpha"),
    Key(
        "lora_te1_text_model_encoder_layers_0_self_attn_k_proj.lora_up.weight",
        "sdxl",
        "text_encoder.text_model.encoder.layers.0.self_attn.k_proj.weight",
    ),
    Key(
        "lora_te2_text_model_encoder_layers_31_mlp_fc2.lora_up.weight",
        "sdxl",
        "text_encoder_2.text_model.encoder.layers.31.mlp.fc2.weight",
    ),
    Key("lora_unet_double_blocks_18_img_attn_qkv.lora_up.weight", "flux", FUSED),
    Key(
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_up.weight",
        "flux",
        "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.weight",
    ),
    Key(
        "lora_unet_blocks_39_self_attn_q.lora_up.weight",
        "wan",
        "transformer.blocks.39.attn1.to_q.weight",
    ),
]
SUFFIXES = [
    ("lora", "mid", "lora_mid.weight"),
    ("lora+dora", "magnitude", "dora_scale"),
    ("loha", "w1_a", "hada_w1_a"),
    ("loha", "t2", "hada_t2"),
    ("lokr", "w1", "lokr_w1"),
    ("lokr", "w2_b", "lokr_w2_b"),
    ("lokr", "t2", "lokr_t2"),
    ("full", "diff", "diff"),
    ("oft", "blocks", "oft_blocks"),
    ("oft", "rescale", "rescale"),
]


def test_parameters_are_written_as_sd_scripts_names_them() -> None:
    check_written("kohya", KEYS)
    check_written("kohya", [Key(f"{SDXL}.{s}", "sdxl", QUERY, a, r) for a, r, s in SUFFIXES])


def test_a_bias_is_a_parameter_of_its_own() -> None:
    bias = QUERY.replace("attn1.to_q.weight", "attn1.to_out.0.bias")
    key = f"{SDXL.replace('attn1_to_q', 'attn1_to_out_0')}.diff_b"
    check_written("kohya", [Key(key, "sdxl", bias, "full", "diff_b")])


def test_every_naming_of_a_module_is_read() -> None:
    """A doubled underscore as in Wan-Fun files, diffusers' block names of SDXL, PEFT's factors."""
    blocks = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    wan = "transformer.blocks.39.attn1.to_q.weight"
    check_read(
        "kohya",
        [
            Key("lora_unet__blocks_39_self_attn_q.lora_up.weight", "wan", wan),
            Key(f"{blocks}.lora_up.weight", "sdxl", QUERY),
            Key(f"{SDXL}.lora_B.weight", "sdxl", QUERY),
            Key(f"{SDXL}.lora_A.weight", "sdxl", QUERY, role="down"),
        ],
    )


def test_other_formats_leave_its_keys_alone() -> None:
    """But OneTrainer, whose text encoders have the same names."""
    check_alone("kohya", [key for key in KEYS if not key.key.startswith("lora_te")])
    check_alone("kohya", KEYS[-2:-1], shared=["onetrainer"])


def test_names_of_other_formats_are_foreign() -> None:
    check_foreign(
        "kohya",
        "sdxl",
        [
            f"{SDXL.replace('lora_', 'oft_')}.oft_blocks",
            f"{SDXL.replace('lora_unet', 'lycoris')}.lora_up.weight",
            f"{SDXL.replace('_', '.')}.lora_up.weight",
            f"{SDXL}.lora_sideways.weight",
            "lora_te3_text_model_encoder_layers_0_self_attn_k_proj.lora_up.weight",
            SDXL,
        ],
    )


def test_its_own_oft_belongs_to_another_format() -> None:
    assert not compile_keys("sdxl", "kohya").holds("kohya-oft")
    assert all(compile_keys("sdxl", "kohya").holds(name) for name in ("lora", "oft", "ia3"))


@pytest.mark.parametrize(
    ("family", "name", "algorithm"),
    [
        ("sd1", "gen__kohya_sd15_locon_conv3x3", "lora"),
        ("sd2", "gen__kohya_sd21_lora", "lora"),
        ("sdxl", "gen__kohya_sdxl_lora", "lora"),
        ("flux", "invokeai__flux_lora_kohya_format", "lora"),
        ("flux2", "gen__musubi_flux2_klein_4b_lokr", "lokr"),
        ("wan", "gen__musubi_wan21_t2v_1.3b_loha", "loha"),
        ("qwen-image", "gen__musubi_qwen_image_lokr_full", "lokr"),
    ],
)
def test_real_files_come_out_as_they_went_in(family: str, name: str, algorithm: str) -> None:
    check_real("kohya", family, name, algorithm)
