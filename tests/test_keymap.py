"""Laws N1 to N3, for every family and format, over every name the tables can produce."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from adaptkit.detect import families, formats
from adaptkit.errors import NotRepresentable
from adaptkit.families.contract import Component, Row
from adaptkit.keymap import algorithms, compile_keys, label, param_of, prefixes, split_suffix
from adaptkit.names import Slot, Target
from tests.synth import expand, fill

PAIRS = [(family, format) for family in families() for format in formats()]


def all_targets(component: Component) -> Iterator[tuple[Target, Row]]:
    for row in component.rows:
        for indices in expand(row):
            yield Target(component.name, fill(row.target, indices)), row


def written(family: str, format: str) -> Iterator[Slot]:
    """Every slot that a format has a name for."""
    keys = compile_keys(family, format)
    for part in families()[family].components:
        for target, _ in all_targets(part):
            yield from keys.slots(target)


@pytest.mark.parametrize(("family", "format"), PAIRS)
def test_n1_to_n3_stems(family: str, format: str) -> None:
    keys = compile_keys(family, format)
    spelled: dict[str, Slot] = {}
    for slot in written(family, format):
        stem = keys.stem(slot)
        assert keys.slot(stem) == slot, stem  # parse ∘ spell = id
        assert spelled.setdefault(stem, slot) == slot  # no two slots share a key
    if not spelled:
        parts = families()[family].components
        names = {name for part in parts for row in part.rows for name in row.names}
        private = keys.format.private and keys.format.style not in names
        assert private or not any(prefixes(part, keys.format) for part in parts)


@pytest.mark.parametrize("format", list(formats()))
def test_n1_to_n3_roles(format: str) -> None:
    """Suffixes do not depend on the module: every role of every algorithm, on a plain module and on a part of one."""
    for family in ("sd1", "flux"):
        keys = compile_keys(family, format)
        for slot in [slot for slot in written(family, format) if "0" in slot.target.module][:9]:
            _check_roles(family, format, slot)
    assert keys


def _check_roles(family: str, format: str, slot: Slot) -> None:
    keys = compile_keys(family, format)
    spelled: dict[str, set[str]] = {}
    for algorithm, kind in algorithms().items():
        if not keys.holds(algorithm):
            with pytest.raises(NotRepresentable, match="no names for"):
                keys.spell(slot, algorithm, next(iter(kind.roles)))
            continue
        mine: set[str] = set()
        for role in kind.roles:
            here = Slot(
                Target(slot.component, slot.target.module, param_of((algorithm, role))), slot.rows
            )
            key = keys.spell(here, algorithm, role)
            parsed = keys.parse(key)
            assert parsed is not None, key
            assert parsed.slot == here, key
            assert (algorithm, role) in parsed.roles
            assert key not in mine, f"{algorithm} spells two roles {key}"
            mine.add(key)
            spelled.setdefault(key, set()).add(role)
    assert spelled
    assert all(len(roles) == 1 or "." in key for key, roles in spelled.items())


@pytest.mark.parametrize(("family", "format"), PAIRS)
def test_every_naming_is_read(family: str, format: str) -> None:
    """Files in the other naming (SDXL with diffusers' block names, SD 1 with ldm's) are read too."""
    keys = compile_keys(family, format)
    own = {f.style for f in formats().values() if f.private}
    for part in families()[family].components:
        known = prefixes(part, keys.format)
        if not known:
            continue
        for row in part.rows:
            indices = next(expand(row))
            target = Target(part.name, fill(row.target, indices))
            for naming, names in row.names.items():
                if (naming not in own) if not keys.format.private else naming == keys.format.style:
                    for name in (name for name in names if not name.transposed):
                        stem = known[0] + fill(name.module, indices).replace(
                            ".", keys.format.joiner
                        )
                        found = keys.slot(stem)
                        assert found is not None, stem
                        assert (found.target.module, found.rows) == (target.module, name.rows), stem


def test_underscored_names_are_never_guessed() -> None:
    keys = compile_keys("sd1", "kohya")
    assert keys.parse(
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_up.weight"
    )
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
    stem, suffix, roles = split_suffix("unet.conv_in.lora_A.weight") or ("", "", ())
    assert (stem, suffix) == ("unet.conv_in", "lora_A.weight")
    assert set(roles) == {("lora", "down"), ("lora+dora", "down")}
    assert split_suffix("unet.conv_in.lora_A.style.weight") == (stem, suffix, roles)
    stem, suffix, roles = split_suffix("a.b.alpha") or ("", "", ())
    assert (stem, suffix) == ("a.b", "alpha")
    assert {role for _, role in roles} == {"alpha"}
    assert split_suffix("unet.conv_in.something") is None


def test_a_fused_projection_is_shown_by_its_parts() -> None:
    keys = compile_keys("sdxl", "kohya")
    target = Target("text_encoder_2", "text_model.encoder.layers.7.self_attn.in_proj")
    q, _, v = keys.slots(target)
    assert (
        label(families()["sdxl"], q)
        == "text_encoder_2.text_model.encoder.layers.7.self_attn.q_proj"
    )
    assert (
        keys.spell(v, "lora", "up")
        == "lora_te2_text_model_encoder_layers_7_self_attn_v_proj.lora_up.weight"
    )
    with pytest.raises(NotRepresentable, match="no name for"):
        keys.spell(Slot(target), "lora", "up")


def test_a_format_without_a_place_says_so() -> None:
    with pytest.raises(NotRepresentable, match="lycoris format has no place for the OpenCLIP-G"):
        compile_keys("sdxl", "lycoris").stem(
            Slot(Target("text_encoder_2", "text_model.final_layer_norm"))
        )
