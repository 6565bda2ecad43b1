"""peft: one module's own names behind `base_model.model.`, as `save_pretrained` writes them."""

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

MODULE = "transformer_blocks.18.attn.to_k"
STEM = f"base_model.model.{MODULE}"
PARAMETER = f"transformer.{MODULE}.weight"
KEYS = [
    Key(f"{STEM}.lora_B.weight", "flux", PARAMETER),
    Key(f"{STEM}.lora_A.weight", "flux", PARAMETER, role="down"),
    Key(f"{STEM}.lora_B.weight", "flux", PARAMETER, "lora+dora"),
    Key(f"{STEM}.lokr_w1", "flux", PARAMETER, "lokr", "w1"),
]


def test_parameters_are_written_as_peft_names_them() -> None:
    check_written("peft", KEYS)


def test_adapter_names_are_read() -> None:
    """A state dict of the model itself has the adapter's name in its keys."""
    check_read(
        "peft",
        [
            Key(f"{STEM}.lora_B.default.weight", "flux", PARAMETER),
            Key(f"{STEM}.lora_A.my_style.weight", "flux", PARAMETER, role="down"),
            Key(f"{STEM}.lokr_w1.default", "flux", PARAMETER, "lokr", "w1"),
            Key(f"{STEM}.hada_w1_a.default", "flux", PARAMETER, "loha", "w1_a"),
        ],
    )


@pytest.mark.parametrize(
    "suffix",
    ["lora_B.a.b.weight", "lora_B.weight.extra", "lora_C.weight", "other_B.default.weight"],
)
def test_other_suffixes_are_foreign(suffix: str) -> None:
    check_foreign("peft", "flux", [f"{STEM}.{suffix}"])


def test_no_other_format_reads_them() -> None:
    check_alone("peft", KEYS)


def test_names_of_other_formats_are_foreign() -> None:
    keys = [f"{MODULE}.lora_B.weight", f"base_model.{MODULE}.lora_B.weight"]
    check_foreign("peft", "flux", [*keys, f"base_model.model.transformer.{MODULE}.lora_B.weight"])


def test_a_file_holds_one_model() -> None:
    text = "text_encoder.text_model.encoder.layers.0.mlp.fc1.weight"
    check_no_place("peft", "flux", [text])


def test_a_real_file_comes_out_as_it_went_in() -> None:
    check_real("peft", "flux", "invokeai__flux_lora_diffusers_base_model_format", "lora")
