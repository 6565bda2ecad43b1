"""kohya-oft: as sd-scripts' `networks/oft.py` and `networks/oft_flux.py` name them."""

from __future__ import annotations

import pytest

from adaptkit.detect import formats
from adaptkit.errors import NotRepresentable
from adaptkit.keymap import algorithms, compile_keys
from tests.formats.spelling import (
    Key,
    check_alone,
    check_foreign,
    check_real,
    check_written,
    real_list,
    slot,
)

QUERY = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"
STEM = "oft_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
KEYS = [
    Key(f"{STEM}.oft_blocks", "sdxl", QUERY, "kohya-oft", "blocks"),
    Key(f"{STEM}.alpha", "sdxl", QUERY, "kohya-oft", "alpha"),
    Key(
        "oft_unet_double_blocks_18_img_attn_qkv.oft_blocks.2",
        "flux",
        "model.diffusion_model.double_blocks.18.img_attn.qkv.weight",
        "kohya-oft",
        "part2",
    ),
]


def test_parameters_are_written_as_sd_scripts_names_them() -> None:
    check_written("kohya-oft", KEYS)


def test_no_other_format_reads_them() -> None:
    check_alone("kohya-oft", KEYS)


def test_it_holds_no_other_algorithm() -> None:
    held = [name for name in algorithms() if compile_keys("sdxl", "kohya-oft").holds(name)]
    assert held == ["kohya-oft"]
    with pytest.raises(NotRepresentable, match="has no names for lora"):
        compile_keys("sdxl", "kohya-oft").spell(slot("sdxl", QUERY), "lora", "up")
    for name in formats().keys() - {"kohya-oft"}:
        assert not compile_keys("sdxl", name).holds("kohya-oft")


def test_names_of_other_formats_are_foreign() -> None:
    lora = STEM.replace("oft_", "lora_")
    suffixes = [f"{STEM}.lora_up.weight", f"{lora}.oft_blocks", f"{STEM}.rescale"]
    check_foreign("kohya-oft", "sdxl", [*suffixes, f"{STEM}_.oft_blocks"])


def test_real_files_come_out_as_they_went_in() -> None:
    check_real("kohya-oft", "sdxl", "gen__kohya_sdxl_oft", "kohya-oft")
    check_real("kohya-oft", "flux", "gen__kohya_flux_oft", "kohya-oft")


def test_flux_cuts_its_fused_layers_into_parts_with_blocks_of_their_own() -> None:
    ends = {key.rpartition(".")[2] for key in real_list("gen__kohya_flux_oft")}
    assert {"alpha", "0", "1", "2"} <= ends
