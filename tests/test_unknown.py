"""Families without a table: their modules are those that the file names, and no name is guessed."""

from __future__ import annotations

import pytest

from adaptkit.detect import formats
from adaptkit.families.contract import Kind
from adaptkit.keymap import CheckpointMap, KeyMap
from adaptkit.names import Slot, Target
from adaptkit.unknown import NAME, fallback, family_of_weights

DOTTED = ("blocks.0.mixer.to_in", "blocks.1.mixer.to_in", "head.out_0")


def lora(*stems: str, factors: tuple[str, str] = ("lora_A", "lora_B")) -> list[str]:
    return [f"{stem}.{factor}.weight" for stem in stems for factor in factors]


def test_modules_are_named_as_the_file_names_them() -> None:
    stems = [f"transformer.{module}" for module in DOTTED]
    found = fallback([*lora(*stems), "transformer.strange.thing"])
    assert found is not None
    family, format, claimed = found
    assert (family.name, format.name, claimed) == (NAME, "diffusers", 6)
    keys = KeyMap(family, format)
    for module, stem in zip(DOTTED, stems, strict=True):
        slot = keys.slot(stem)
        assert slot == Slot(Target("transformer", module))
        assert keys.stem(slot) == stem
    assert keys.slot("transformer.blocks.2.mixer.to_in") is None, "only what is in the file"


@pytest.mark.parametrize(
    ("prefix", "format", "component"),
    [
        ("lora_unet_", "kohya", "transformer"),
        ("lora_te1_", "kohya", "text_encoder"),
        ("diffusion_model.", "comfy", "transformer"),
        ("unet.", "diffusers", "unet"),
        ("base_model.model.", "peft", "transformer"),
        ("", "bare", "transformer"),
    ],
)
def test_the_prefix_tells_the_format_and_the_component(
    prefix: str, format: str, component: str
) -> None:
    joiner = formats()[format].joiner
    stems = [prefix + module.replace(".", joiner) for module in DOTTED]
    found = fallback(lora(*stems, factors=("lora_down", "lora_up")))
    assert found is not None
    family, spelled, claimed = found
    assert (spelled.name, claimed) == (format, 6)
    assert [part.name for part in family.components] == [component]
    assert len(family.components[0].rows) == len(DOTTED)


def test_names_are_carried_where_modules_are_named_alike_and_never_out_of_underscores() -> None:
    dotted = fallback(lora(*(f"diffusion_model.{module}" for module in DOTTED)))
    under = fallback(lora("lora_unet_blocks_0_mixer_to_in", factors=("lora_down", "lora_up")))
    assert dotted is not None
    assert under is not None
    slot = Slot(Target("transformer", DOTTED[0]))
    assert KeyMap(dotted[0], formats()["kohya"]).stem(slot) == "lora_unet_blocks_0_mixer_to_in"
    assert KeyMap(dotted[0], formats()["diffusers"]).slots(slot.target) == ()
    (target,) = (Target("transformer", row.target) for row in under[0].components[0].rows)
    assert KeyMap(under[0], formats()["comfy"]).slots(target) == ()
    assert KeyMap(under[0], formats()["kohya"]).slots(target) == (Slot(target),)


def test_a_format_that_is_asked_for_is_the_only_one_tried() -> None:
    names = lora("transformer.blocks.0.mixer.to_in")
    assert fallback(names, "kohya") is None
    found = fallback(names, "bare")
    assert found is not None
    assert found[1].name == "bare"
    assert fallback(["blocks.0.mixer.to_in.weight_norm", "x"]) is None, "no adapter's names"


SHAPES: dict[str, tuple[int, ...]] = {
    "model.diffusion_model.blocks.0.attn.weight": (8, 8),
    "model.diffusion_model.blocks.0.attn.bias": (8,),
    "model.diffusion_model.blocks.0.norm.weight": (8,),
    "model.diffusion_model.conv.weight": (8, 4, 3, 3),
    "model.diffusion_model.embed_tokens.weight": (100, 8),
    "model.diffusion_model.only_bias.bias": (8,),
    "model.diffusion_model.table": (4, 8),
    "first_stage_model.decoder.conv.weight": (8, 8, 3, 3),
}


def test_a_checkpoints_own_modules_are_its_family() -> None:
    family = family_of_weights(SHAPES)
    (part,) = family.components
    kinds = {row.target: (row.kind, row.kernel) for row in part.rows}
    assert kinds == {
        "blocks.0.attn": (Kind.MATRIX, ()),
        "blocks.0.norm": (Kind.NORM, ()),
        "conv": (Kind.MATRIX, (3, 3)),
        "embed_tokens": (Kind.EMBEDDING, ()),
        "only_bias": (Kind.MATRIX, ()),
    }
    assert part.name == "transformer"
    place = CheckpointMap(family).parse("model.diffusion_model.blocks.0.attn.bias")
    assert place is not None
    assert place.slot == Slot(Target("transformer", "blocks.0.attn", "bias"))
    assert CheckpointMap(family).parse("blocks.0.attn.bias") is None, "the prefix is the file's"


def test_every_format_spells_a_checkpoints_names_behind_its_own_prefix() -> None:
    family = family_of_weights(SHAPES)
    slot = Slot(Target("transformer", "blocks.0.attn"))
    spelled = {
        name: KeyMap(family, formats()[name]).stem(slot) for name in ("kohya", "comfy", "peft")
    }
    assert spelled == {
        "kohya": "lora_unet_blocks_0_attn",
        "comfy": "diffusion_model.blocks.0.attn",
        "peft": "base_model.model.blocks.0.attn",
    }


def test_modules_that_underscores_make_alike_are_left_out() -> None:
    shapes = {"a.b_c.weight": (4, 4), "a_b.c.weight": (4, 4), "a.d.weight": (4, 4)}
    (part,) = family_of_weights(shapes).components
    assert [row.target for row in part.rows] == ["a.d"]


def test_folders_of_a_pipeline_are_its_components() -> None:
    shapes = {"unet.conv.weight": (8, 4, 3, 3), "text_encoder.fc.weight": (8, 8)}
    family = family_of_weights(shapes)
    assert {part.name: [row.target for row in part.rows] for part in family.components} == {
        "unet": ["conv"],
        "text_encoder": ["fc"],
    }
    keys = KeyMap(family, formats()["kohya"])
    assert keys.stem(Slot(Target("text_encoder", "fc"))) == "lora_te1_fc"


def test_the_weight_tells_the_shape_in_whatever_order_and_file_it_comes() -> None:
    weight, bias = {"conv.weight": (8, 4, 3, 3)}, {"conv.bias": (8,)}
    for files in ((weight, bias), (bias, weight)):
        (part,) = family_of_weights(*files).components
        assert [(row.kind, row.kernel) for row in part.rows] == [(Kind.MATRIX, (3, 3))]
