"""lycoris: as the LyCORIS wrapper (`create_lycoris`) and SimpleTuner name them."""

from __future__ import annotations

from tests.formats.spelling import (
    Key,
    check_alone,
    check_foreign,
    check_no_place,
    check_real,
    check_written,
)

QUERY = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"
STEM = "lycoris_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
PART = "transformer.single_transformer_blocks.0.proj_mlp.weight"
KEYS = [
    Key(f"{STEM}.lora_up.weight", "sdxl", QUERY),
    Key(f"{STEM}.alpha", "sdxl", QUERY, role="alpha"),
    Key(f"{STEM}.hada_w2_b", "sdxl", QUERY, "loha", "w2_b"),
    Key(f"{STEM}.dora_scale", "sdxl", QUERY, "lokr+dora", "magnitude"),
    Key("lycoris_single_transformer_blocks_0_proj_mlp.lokr_w1", "flux", PART, "lokr", "w1"),
]


def test_parameters_are_written_as_the_wrapper_names_them() -> None:
    check_written("lycoris", KEYS)


def test_no_other_format_reads_them() -> None:
    check_alone("lycoris", KEYS)


def test_names_of_other_formats_are_foreign() -> None:
    kohya = STEM.replace("lycoris_", "lora_unet_")
    keys = [f"{kohya}.lora_up.weight", f"{STEM.replace('_', '.')}.lora_up.weight"]
    check_foreign("lycoris", "sdxl", [*keys, f"{STEM.replace('s_', 's_unet_', 1)}.lora_up.weight"])


def test_text_encoders_have_no_names() -> None:
    text = "text_encoder.text_model.encoder.layers.0.mlp.fc1.weight"
    check_no_place("lycoris", "sdxl", [text])


def test_real_files_come_out_as_they_went_in() -> None:
    check_real("lycoris", "sdxl", "gen__lycoris_wrapper_sdxl_locon", "lora")
    check_real("lycoris", "flux", "gen__simpletuner_lycoris_flux1_lokr", "lokr")
