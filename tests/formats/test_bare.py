"""bare: a model's own module names without a prefix, as FLUX.1's control LoRAs have them."""

from __future__ import annotations

from adaptkit.keymap import compile_keys
from tests.formats.spelling import (
    Key,
    check_alone,
    check_foreign,
    check_no_place,
    check_read,
    check_written,
    real_list,
)

MODULE = "transformer_blocks.18.attn.to_k"
PARAMETER = f"transformer.{MODULE}.weight"
KEYS = [
    Key(f"{MODULE}.lora_B.weight", "flux", PARAMETER),
    Key(f"{MODULE}.lora_A.weight", "flux", PARAMETER, role="down"),
    Key(f"{MODULE}.alpha", "flux", PARAMETER, role="alpha"),
    Key(f"{MODULE}.dora_scale", "flux", PARAMETER, "lora+dora", "magnitude"),
    # a norm that is replaced, as the model itself calls its weight
    Key(
        "transformer_blocks.0.attn.norm_k.scale",
        "flux",
        "model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale",
        "set",
        "value",
    ),
]


def test_parameters_are_written_by_diffusers_names() -> None:
    check_written("bare", KEYS)


def test_black_forest_labs_own_names_are_read() -> None:
    fused = "model.diffusion_model.double_blocks.18.img_attn.qkv.weight"
    control = [
        Key("double_blocks.18.img_attn.qkv.lora_B.weight", "flux", fused),
        Key("double_blocks.18.img_attn.qkv.lora_B.bias", "flux", BIAS, "full", "diff_b"),
    ]
    check_read("bare", control)


BIAS = "model.diffusion_model.double_blocks.18.img_attn.qkv.bias"


def test_no_other_format_reads_them() -> None:
    check_alone("bare", KEYS)


def test_names_of_other_formats_are_foreign() -> None:
    keys = [f"transformer.{MODULE}.lora_B.weight", f"diffusion_model.{MODULE}.lora_B.weight"]
    check_foreign("bare", "flux", [*keys, MODULE.replace(".", "_") + ".lora_B.weight"])


def test_names_carry_no_component_so_only_the_denoiser_has_a_place() -> None:
    text = "text_encoder.text_model.encoder.layers.0.mlp.fc1.weight"
    check_no_place("bare", "flux", [text])


def test_every_key_of_a_real_control_lora_is_known() -> None:
    """Factors, biases, and norms that are replaced: `scale` is a value, not a difference."""
    keys, table = real_list("invokeai__flux_control_lora_format"), compile_keys("flux", "bare")
    parsed = {key: table.parse(key) for key in keys}
    assert [key for key, found in parsed.items() if found is None] == []
    roles = {key: found.roles for key, found in parsed.items() if found is not None}
    kinds = {"lora_A.weight": ("lora", "down"), "lora_B.weight": ("lora", "up")}
    kinds |= {"lora_B.bias": ("full", "diff_b"), "scale": ("set", "value")}
    counted = dict.fromkeys(kinds, 0)
    for key, found in roles.items():
        suffix = next(suffix for suffix in kinds if key.endswith(f".{suffix}"))
        assert kinds[suffix] in found, key
        counted[suffix] += 1
    assert sum(counted.values()) == len(keys)
    assert min(counted.values()) > 70, counted
