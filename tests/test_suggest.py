"""Nearest known names: a slip is found, numbers stay, and nothing is invented."""

from __future__ import annotations

import pytest

from adaptkit.keymap import compile_keys
from adaptkit.suggest import nearest

BLOCK = "lora_unet_input_blocks_4_1_transformer_blocks_1_"


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        (f"{BLOCK}attn1_to_qq.lora_up.weight", f"{BLOCK}attn1_to_q.lora_up.weight"),
        (  # SDXL has two text encoders, which count from 1
            "lora_te_text_model_encoder_layers_3_self_attn_q_proj.lora_up.weight",
            "lora_te1_text_model_encoder_layers_3_self_attn_q_proj.lora_up.weight",
        ),
        (f"{BLOCK}atn2_to_k.alpha", f"{BLOCK}attn2_to_k.alpha"),
        (
            "lora_te1_text_model_encoder_layer_11_mlp_fc1.lora_down.weight",
            "lora_te1_text_model_encoder_layers_11_mlp_fc1.lora_down.weight",
        ),
    ],
)
def test_a_slip_in_a_name_is_found_and_its_numbers_stay(wrong: str, right: str) -> None:
    keys = compile_keys("sdxl", "kohya")
    assert keys.parse(wrong) is None
    assert nearest(keys, wrong) == right
    assert keys.parse(right) is not None


def test_a_suffix_nobody_knows_stays_as_it_is() -> None:
    keys = compile_keys("sdxl", "kohya")
    assert nearest(keys, f"{BLOCK}attn1_to_qq.lora_sideways") == f"{BLOCK}attn1_to_q.lora_sideways"


def test_missing_numbers_are_zeros() -> None:
    keys = compile_keys("flux", "comfy")
    found = nearest(keys, "diffusion_model.double_blocks.img_attn.qkv.lora_A.weight")
    assert found == "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight"


def test_dots_stay_dots() -> None:
    keys = compile_keys("flux", "comfy")
    found = nearest(keys, "diffusion_model.single_blocks.7.liner1.lora_A.weight")
    assert found == "diffusion_model.single_blocks.7.linear1.lora_A.weight"


@pytest.mark.parametrize(
    "key",
    [
        f"{BLOCK}attn1_to_q.lora_sideways.weight",  # the name is known, only its suffix is not
        "lora_unet_input_blocks_99_1_transformer_blocks_1_attn1_to_q.alpha",  # or its number
        "something.else.entirely.weight",
        "x",
        "",
    ],
)
def test_nothing_is_offered_for_a_known_name_or_a_strange_one(key: str) -> None:
    assert nearest(compile_keys("sdxl", "kohya"), key) is None
