"""diffusers-old: attention processors, as diffusers' training scripts saved them before 0.20."""

from __future__ import annotations

from tests.formats.spelling import (
    Key,
    check_alone,
    check_foreign,
    check_no_place,
    check_read,
    check_real,
    check_written,
)

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
OUT = f"unet.{BLOCK}.attn1.to_out.0.weight"
KEYS = [
    Key(f"unet.{BLOCK}.attn1.processor.to_out_lora.up.weight", "sd1", OUT),
    Key(f"unet.{BLOCK}.attn1.processor.to_out_lora.down.weight", "sd1", OUT, role="down"),
    Key(
        f"unet.{BLOCK}.attn2.processor.to_k_lora.up.weight",
        "sd1",
        f"unet.{BLOCK}.attn2.to_k.weight",
    ),
    Key(
        "text_encoder.text_model.encoder.layers.0.self_attn.to_v_lora.up.weight",
        "sd1",
        "text_encoder.text_model.encoder.layers.0.self_attn.v_proj.weight",
    ),
]


def test_parameters_are_written_as_processors_are_named() -> None:
    check_written("diffusers-old", KEYS)


def test_files_of_the_unet_alone_carry_no_prefix() -> None:
    check_read("diffusers-old", [Key(f"{BLOCK}.attn1.processor.to_out_lora.up.weight", "sd1", OUT)])


def test_no_other_format_reads_them() -> None:
    check_alone("diffusers-old", KEYS)


def test_names_of_other_formats_are_foreign() -> None:
    check_foreign(
        "diffusers-old",
        "sd1",
        [
            f"unet.{BLOCK}.attn1.to_out.0.lora_B.weight",
            f"unet.{BLOCK}.attn1.processor.to_out.up.weight",
            f"unet.{BLOCK}.attn1.processor.to_out_lora.sideways.weight",
        ],
    )


def test_it_has_names_for_attention_alone() -> None:
    others = ["resnets.0.conv1", "attentions.0.transformer_blocks.0.ff.net.2"]
    check_no_place("diffusers-old", "sd1", [f"unet.down_blocks.0.{name}.weight" for name in others])


def test_a_real_file_comes_out_as_it_went_in() -> None:
    check_real("diffusers-old", "sd1", "gen__diffusers_attnproc_sd15", "lora")
