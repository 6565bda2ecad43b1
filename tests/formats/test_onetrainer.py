"""onetrainer: `lora_transformer_…` over diffusers' names, as OneTrainer wrote before August 2026."""

from __future__ import annotations

from tests.formats.spelling import (
    Key,
    check_alone,
    check_foreign,
    check_no_place,
    check_real,
    check_written,
)

OUT = "transformer.transformer_blocks.0.attn.to_out.0.weight"
STEM = "lora_transformer_transformer_blocks_0_attn_to_out_0"
KEYS = [
    Key(f"{STEM}.lora_up.weight", "flux", OUT),
    Key(f"{STEM}.alpha", "flux", OUT, role="alpha"),
    Key(f"{STEM}.dora_scale", "flux", OUT, "lora+dora", "magnitude"),
    Key(
        "lora_transformer_blocks_0_attn1_to_q.lora_up.weight",
        "wan",
        "transformer.blocks.0.attn1.to_q.weight",
    ),
]
TEXT = [
    Key(
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight",
        "flux",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.weight",
    ),
    # the second encoder of FLUX.1, which sd-scripts calls the third
    Key(
        "lora_te2_encoder_block_0_layer_0_SelfAttention_k.alpha",
        "flux",
        "text_encoder_2.encoder.block.0.layer.0.SelfAttention.k.weight",
        role="alpha",
    ),
]


def test_parameters_are_written_as_onetrainer_names_them() -> None:
    check_written("onetrainer", KEYS)
    check_written("onetrainer", TEXT)


def test_only_its_text_encoders_are_named_as_in_other_formats() -> None:
    check_alone("onetrainer", KEYS)
    check_alone("onetrainer", TEXT, shared=["kohya"])


def test_names_of_other_formats_are_foreign() -> None:
    kohya = "lora_unet_double_blocks_0_img_attn_proj.lora_up.weight"
    check_foreign("onetrainer", "flux", [kohya, f"{STEM.replace('_', '.')}.lora_up.weight"])


def test_its_unets_are_kohya_files() -> None:
    check_no_place("onetrainer", "sdxl", ["unet.down_blocks.0.resnets.0.conv1.weight"])


def test_a_real_file_comes_out_as_it_went_in() -> None:
    check_real("onetrainer", "flux", "invokeai__flux_dora_onetrainer_format", "lora+dora")
