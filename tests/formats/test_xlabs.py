"""xlabs: processors of FLUX.1's double blocks, as XLabs' x-flux and USO name them."""

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

IMAGE = "model.diffusion_model.double_blocks.18.img_attn"
TEXT = "model.diffusion_model.double_blocks.18.txt_attn"
STEM = "double_blocks.18.processor"
KEYS = [
    Key(f"{STEM}.qkv_lora1.up.weight", "flux", f"{IMAGE}.qkv.weight"),
    Key(f"{STEM}.qkv_lora1.down.weight", "flux", f"{IMAGE}.qkv.weight", role="down"),
    Key(f"{STEM}.qkv_lora2.up.weight", "flux", f"{TEXT}.qkv.weight"),
    Key(f"{STEM}.proj_lora1.up.weight", "flux", f"{IMAGE}.proj.weight"),
    Key(f"{STEM}.proj_lora2.up.weight", "flux", f"{TEXT}.proj.weight"),
]


def test_the_first_processor_is_of_the_image_and_the_second_of_the_text() -> None:
    check_written("xlabs", KEYS)


def test_comfyuis_prefix_is_read() -> None:
    key = f"diffusion_model.{STEM}.qkv_lora1.up.weight"
    check_read("xlabs", [Key(key, "flux", f"{IMAGE}.qkv.weight")])


def test_no_other_format_reads_them() -> None:
    check_alone("xlabs", KEYS)


def test_names_of_other_formats_are_foreign() -> None:
    check_foreign(
        "xlabs",
        "flux",
        [
            "double_blocks.18.img_attn.qkv.lora_B.weight",
            f"transformer.{STEM}.qkv_lora1.up.weight",
            f"{STEM}.qkv_lora3.up.weight",
            f"{STEM.replace('18', '19')}.qkv_lora1.up.weight",
        ],
    )


def test_it_has_names_for_the_attention_of_double_blocks_alone() -> None:
    others = ["double_blocks.18.img_mlp.0", "single_blocks.0.linear1"]
    check_no_place("xlabs", "flux", [f"model.diffusion_model.{name}.weight" for name in others])


def test_a_real_file_comes_out_as_it_went_in() -> None:
    check_real("xlabs", "flux", "invokeai__flux_lora_xlabs_format", "lora")
