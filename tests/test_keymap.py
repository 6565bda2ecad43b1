"""Laws N1 to N3, for every family and format, over every name the tables can produce."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from adaptkit.detect import families, formats
from adaptkit.errors import NotRepresentable
from adaptkit.families._family import Component, Row
from adaptkit.keymap import algorithms, compile_keys, label, param_of, split_suffix
from adaptkit.names import Slot, Target
from tests.synth import expand, fill

PAIRS = [(family, format) for family in families() for format in formats()]


def all_targets(component: Component) -> Iterator[tuple[Target, Row]]:
    for row in component.rows:
        for indices in expand(row):
            yield Target(component.name, fill(row.target, indices)), row


@pytest.mark.parametrize(("family", "format"), PAIRS)
def test_n1_to_n3(family: str, format: str) -> None:
    keys = compile_keys(family, format)
    spelled: dict[str, tuple[Slot, str, str]] = {}
    for part in families()[family].components:
        for target, _ in all_targets(part):
            for slot in keys.slots(target):
                for algorithm, kind in algorithms().items():
                    for role in kind.roles:
                        here = Slot(Target(target.component, target.module, param_of((algorithm, role))), slot.rows)
                        key = keys.spell(here, algorithm, role)
                        parsed = keys.parse(key)
                        assert parsed is not None, key
                        assert parsed.slot == here, key  # parse ∘ spell = id
                        assert (algorithm, role) in parsed.roles
                        if role != "alpha":  # alpha is shared by the algorithms; whose it is, the others say
                            assert spelled.setdefault(key, (here, algorithm, role)) == (here, algorithm, role)
    assert spelled


@pytest.mark.parametrize(("family", "format"), PAIRS)
def test_every_naming_is_read(family: str, format: str) -> None:
    """Files in the other naming (SDXL with diffusers' block names, SD 1 with ldm's) are read too."""
    keys = compile_keys(family, format)
    for part in families()[family].components:
        prefix = next((p for p, _ in keys._stems if keys.slots(next(all_targets(part))[0])), None)
        if prefix is None:
            continue
        for target, row in all_targets(part):
            for names in row.names.values():
                for name in names:
                    if name.transposed or not keys.slots(target):
                        continue
                    found = {
                        slot
                        for p, stems in keys._stems
                        if (m := stems.match(_stem(name.module, target, row, keys.format.joiner)))
                        and (slot := m[0].slot(m[1], "weight")).component == part.name
                    }
                    assert Slot(target, name.rows) in found


def _stem(module: str, target: Target, row: Row, joiner: str) -> str:
    indices = next(i for i in expand(row) if fill(row.target, i) == target.module)
    return fill(module, indices).replace(".", joiner)


def test_underscored_names_are_never_guessed() -> None:
    keys = compile_keys("sd1", "kohya")
    assert keys.parse("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_up.weight")
    for wrong in (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out.lora_up.weight",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn3_to_q.lora_up.weight",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_1_attn1_to_q.lora_up.weight",
        "lora_unet_down_blocks_3_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight",
        "lora_te_text_model_encoder_layers_12_mlp_fc1.lora_up.weight",
        "lora_unet_.lora_up.weight",
        "lora_up.weight",
        "",
    ):
        assert keys.parse(wrong) is None, wrong


def test_suffixes_are_found_after_dotted_names() -> None:
    assert split_suffix("unet.conv_in.lora_A.weight") == ("unet.conv_in", "lora_A.weight", (("lora", "down"),))
    stem, suffix, roles = split_suffix("a.b.alpha") or ("", "", ())
    assert (stem, suffix) == ("a.b", "alpha")
    assert {role for _, role in roles} == {"alpha"}
    assert split_suffix("unet.conv_in.weight") is None


def test_a_fused_projection_is_shown_by_its_parts() -> None:
    keys = compile_keys("sdxl", "kohya")
    target = Target("text_encoder_2", "text_model.encoder.layers.7.self_attn.in_proj")
    q, _, v = keys.slots(target)
    assert label("sdxl", q) == "text_encoder_2.text_model.encoder.layers.7.self_attn.q_proj"
    assert keys.spell(v, "lora", "up") == "lora_te2_text_model_encoder_layers_7_self_attn_v_proj.lora_up.weight"
    with pytest.raises(NotRepresentable, match="no name for"):
        keys.spell(Slot(target), "lora", "up")


def test_a_format_without_a_place_says_so() -> None:
    with pytest.raises(NotRepresentable, match="lycoris format has no place for the OpenCLIP-G"):
        compile_keys("sdxl", "lycoris").stem(Slot(Target("text_encoder_2", "text_model.final_layer_norm")))
