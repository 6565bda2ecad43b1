"""diffusers: PEFT's factors under the names of a pipeline's parts, as `save_lora_weights` writes."""

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

QUERY = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
PART = "transformer.transformer_blocks.18.attn.to_k"
KEYS = [
    Key(f"{QUERY}.lora_B.weight", "sdxl", f"{QUERY}.weight"),
    Key(f"{QUERY}.lora_A.weight", "sdxl", f"{QUERY}.weight", role="down"),
    Key(f"{QUERY}.lora_B.weight", "sdxl", f"{QUERY}.weight", "lora+dora"),
    Key(f"{PART}.lora_B.weight", "flux", f"{PART}.weight"),
    Key(
        "text_encoder_2.text_model.encoder.layers.0.self_attn.v_proj.lora_B.weight",
        "sdxl",
        "text_encoder_2.text_model.encoder.layers.0.self_attn.v_proj.weight",
    ),
]


def test_parameters_are_written_as_diffusers_names_them() -> None:
    check_written("diffusers", KEYS)


def test_adapter_names_and_older_spellings_are_read() -> None:
    """PEFT writes `.default`; Mochi's trainer no `.weight`; pipelines `lora.up` and `lora_up`."""
    parameter = f"{QUERY}.weight"
    spellings = ("lora_B.default.weight", "lora_B", "lora.up.weight", "lora_up.weight")
    check_read("diffusers", [Key(f"{QUERY}.{s}", "sdxl", parameter) for s in spellings])
    check_read(
        "diffusers",
        [
            Key(f"{QUERY}.{s}", "sdxl", parameter, "lora+dora", role)
            for s, role in (
                ("lora_magnitude_vector.weight", "vector"),
                ("lora_magnitude_vector", "vector"),
                ("lora_magnitude_vector.default.weight", "vector"),
            )
        ],
    )


def test_no_other_format_reads_them() -> None:
    check_alone("diffusers", KEYS)


def test_names_of_other_formats_are_foreign() -> None:
    check_foreign(
        "diffusers",
        "flux",
        [
            "transformer.double_blocks.18.img_attn.qkv.1.lora_up.weight",
            f"base_model.model.{PART.removeprefix('transformer.')}.lora_B.weight",
            PART.replace(".", "_") + ".lora_B.weight",
        ],
    )


def test_a_fused_layer_has_no_key() -> None:
    fused = "model.diffusion_model.double_blocks.18.img_attn.qkv.weight"
    check_no_place("diffusers", "flux", [fused])


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("flux", "invokeai__flux_lora_diffusers_format"),
        ("sd3", "gen__diffusers_peft_sd3_medium_allmodules"),
        ("flux2", "gen__diffusers_peft_flux2_klein_4b_allmodules"),
        ("hunyuan-video", "gen__diffusers_peft_hunyuan_video_allmodules"),
    ],
)
def test_real_files_come_out_as_they_went_in(family: str, name: str) -> None:
    check_real("diffusers", family, name, "lora")
