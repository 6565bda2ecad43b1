"""omi: FLUX.1's own names in numbered parts, as OneTrainer's OMI format has them.

Known from the specification (Open Model Initiative); no published file is at hand.
"""

from __future__ import annotations

from adaptkit.detect import formats
from adaptkit.formats.contract import Alpha
from adaptkit.keymap import compile_keys
from tests.formats.spelling import (
    Key,
    check_alone,
    check_foreign,
    check_no_place,
    check_written,
    slot,
)

KEYS = [
    Key(
        "transformer.double_blocks.18.img_attn.qkv.1.lora_up.weight",
        "flux",
        "transformer.transformer_blocks.18.attn.to_k.weight",
    ),
    Key(
        "transformer.single_blocks.0.linear1.3.lora_down.weight",
        "flux",
        "transformer.single_transformer_blocks.0.proj_mlp.weight",
        role="down",
    ),
    Key(
        "transformer.single_blocks.37.linear1.0.alpha",
        "flux",
        "transformer.single_transformer_blocks.37.attn.to_q.weight",
        role="alpha",
    ),
]


def test_parts_of_fused_layers_are_numbered_in_their_order() -> None:
    check_written("omi", KEYS)


def test_all_parts_together_are_the_layer() -> None:
    keys = compile_keys("flux", "omi")
    whole = slot("flux", "model.diffusion_model.single_blocks.0.linear1.weight")
    cuts = [keys.slot(f"transformer.single_blocks.0.linear1.{n}") for n in range(4)]
    bounds = [cut.rows.bounds(7 * 3072) for cut in cuts if cut is not None and cut.rows is not None]
    # q, k and v of 3072 rows each, then 4 · 3072 of the MLP
    assert bounds == [(0, 3072), (3072, 6144), (6144, 9216), (9216, 21504)]
    assert {cut.target for cut in cuts if cut is not None} == {whole.target}
    assert keys.slot("transformer.single_blocks.0.linear1.4") is None


def test_no_other_format_reads_them() -> None:
    check_alone("omi", KEYS)


def test_names_of_other_formats_are_foreign() -> None:
    check_foreign(
        "omi",
        "flux",
        [
            "transformer.transformer_blocks.18.attn.to_k.lora_B.weight",
            "transformer.double_blocks.18.img_attn.qkv.lora_up.weight",
            "diffusion_model.double_blocks.18.img_attn.qkv.1.lora_up.weight",
        ],
    )


def test_other_models_have_no_names() -> None:
    check_no_place("omi", "sd1", ["unet.down_blocks.0.resnets.0.conv1.weight"])


def test_alpha_is_a_tensor_as_the_specification_has_it() -> None:
    """No file is at hand to show it."""
    assert formats()["omi"].alpha is Alpha.TENSOR
