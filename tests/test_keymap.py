"""Laws N1 to N3, for every family and format, over every name the tables can produce."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from adaptkit.detect import families, formats
from adaptkit.errors import NotRepresentable
from adaptkit.families import contract as table
from adaptkit.families.contract import Component, Kind, ModelFamily, Name, Row, pair, split
from adaptkit.keymap import (
    CheckpointMap,
    KeyMap,
    Place,
    algorithms,
    compile_keys,
    label,
    param_of,
    prefixes,
    split_suffix,
)
from adaptkit.names import Rows, Slot, Target
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
        if not kind.forms:
            continue  # told by a configuration
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


# a family of a few rows, one of each kind; what is expected is written out by hand

ROWS = (
    pair("blocks.{i:3}.qkv", split("layers.{i:3}.to_", "q", "k", "v")),
    pair("blocks.{i:3}.mod", table.swapped("layers.{i:3}.norm.linear")),
    pair("blocks.{i:3}.norm", table.scaled("layers.{i:3}.norm_out"), kind=Kind.NORM),
    pair("conv", "conv_in", kernel=(3, 3)),
    pair(Name("proj", "proj.weight", "proj.bias", kernel=(1, 1)), "proj_in"),
    pair("single.{j:1}.out", "alone.{j:1}.out"),
)
TEXT = (
    table.row(
        "layers.{i:2}.fc", original=table.named("h.{i:2}.fc", weight="h.{i:2}.w", transposed=True)
    ),
    table.row("emb", kind=Kind.EMBEDDING),
)
AUTOENCODER = (table.row("decoder.conv", kernel=(3, 3)),)
TOY = ModelFamily(
    name="toy",
    title="Toy",
    components=(
        Component(
            name="unet",
            title="U-Net",
            rows=ROWS,
            checkpoints={"native": ("model.", ""), "diffusers": ("unet.",)},
            tags={"kohya": ("unet",), "comfy": ("model",), "root": ("",), "diffusers": ("unet",)},
            namings={"kohya": "native", "comfy": "native"},
        ),
        Component(
            name="text",
            title="encoder",
            rows=TEXT,
            checkpoints={"original": ("te.",), "diffusers": ("text.", "")},
            tags={"kohya": ("te",), "root": ("",), "diffusers": ("text",)},
        ),
    ),
    beside=(
        Component(
            name="vae", title="VAE", rows=AUTOENCODER, checkpoints={"diffusers": ("vae.", "")}
        ),
    ),
)


def keys_of(format: str) -> KeyMap:
    return KeyMap(TOY, formats()[format])


def at(module: str, rows: Rows | None = None, param: str = "weight", part: str = "unet") -> Slot:
    return Slot(Target(part, module, param), rows)


@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("model.blocks.2.qkv.weight", Place(at("blocks.2.qkv"), Kind.MATRIX, "native")),
        ("blocks.2.qkv.bias", Place(at("blocks.2.qkv", param="bias"), Kind.MATRIX, "native")),
        (
            "unet.layers.2.to_k.weight",
            Place(at("blocks.2.qkv", Rows(1, 2, 3)), Kind.MATRIX, "diffusers"),
        ),
        (
            "unet.layers.0.norm.linear.weight",
            Place(at("blocks.0.mod"), Kind.MATRIX, "diffusers", swapped=True),
        ),
        ("blocks.0.mod.weight", Place(at("blocks.0.mod"), Kind.MATRIX, "native")),
        ("unet.layers.1.norm_out.scale", Place(at("blocks.1.norm"), Kind.NORM, "diffusers")),
        (
            "te.h.1.w",
            Place(at("layers.1.fc", part="text"), Kind.MATRIX, "original", transposed=True),
        ),
        (
            "te.h.1.fc.bias",
            Place(at("layers.1.fc", param="bias", part="text"), Kind.MATRIX, "original"),
        ),
        ("text.emb.weight", Place(at("emb", part="text"), Kind.EMBEDDING, "diffusers")),
        ("emb.weight", Place(at("emb", part="text"), Kind.EMBEDDING, "diffusers")),
    ],
)
def test_a_checkpoint_key_says_where_it_belongs_and_how_it_is_stored(
    key: str, place: Place
) -> None:
    assert CheckpointMap(TOY).parse(key) == place
    assert CheckpointMap(TOY).claims(key)


@pytest.mark.parametrize(
    "key",
    [
        "model.blocks.3.qkv.weight",
        "model.layers.2.to_k.weight",
        "unet.blocks.2.qkv.weight",
        "unet.layers.1.norm_out.weight",
        "te.h.1.fc.weight",
        "te.layers.1.fc.weight",
        "vae.decoder.conv.weight",
        "model.blocks.0.qkv",
        "",
    ],
)
def test_a_checkpoint_key_in_another_naming_is_foreign(key: str) -> None:
    assert CheckpointMap(TOY).parse(key) is None
    assert not CheckpointMap(TOY).claims(key)


def test_parts_that_no_adapter_holds_are_read_where_they_are_asked_for() -> None:
    for key in ("vae.decoder.conv.weight", "decoder.conv.weight"):
        place = CheckpointMap(TOY, beside=True).parse(key)
        assert place == Place(at("decoder.conv", part="vae"), Kind.MATRIX, "diffusers"), key
    assert CheckpointMap(TOY, beside=True).claims("emb.weight")
    assert CheckpointMap(TOY).other("vae.decoder.conv.weight") == "vae"
    assert CheckpointMap(TOY).other("model.blocks.0.qkv.weight") is None


@pytest.mark.parametrize(
    ("slot", "naming", "tensors"),
    [
        (at("blocks.1.qkv"), "native", [("blocks.1.qkv.weight", None, False, False, ())]),
        (
            at("blocks.1.qkv"),
            "diffusers",
            [
                ("layers.1.to_q.weight", Rows(0, 1, 3), False, False, ()),
                ("layers.1.to_k.weight", Rows(1, 2, 3), False, False, ()),
                ("layers.1.to_v.weight", Rows(2, 3, 3), False, False, ()),
            ],
        ),
        (
            at("blocks.1.mod", param="bias"),
            "diffusers",
            [("layers.1.norm.linear.bias", None, False, True, None)],
        ),
        (at("conv"), "native", [("conv.weight", None, False, False, (3, 3))]),
        (at("conv", param="bias"), "native", [("conv.bias", None, False, False, None)]),
        (at("proj"), "native", [("proj.weight", None, False, False, (1, 1))]),
        (at("proj"), "diffusers", [("proj_in.weight", None, False, False, ())]),
        (at("layers.0.fc", part="text"), "original", [("h.0.w", None, True, False, ())]),
        (
            at("layers.0.fc", param="bias", part="text"),
            "original",
            [("h.0.fc.bias", None, False, False, None)],
        ),
        # a naming without names for it has diffusers'
        (
            at("layers.0.fc", part="text"),
            "native",
            [("layers.0.fc.weight", None, False, False, ())],
        ),
        (at("nowhere"), "native", []),
    ],
)
def test_a_layout_tells_the_tensors_that_hold_a_target(
    slot: Slot,
    naming: str,
    tensors: list[tuple[str, Rows | None, bool, bool, tuple[int, ...] | None]],
) -> None:
    found = CheckpointMap(TOY).spelled(slot.target, naming)
    assert [
        (one.key, one.place.slot.rows, one.place.transposed, one.place.swapped, one.kernel)
        for one in found
    ] == tensors
    assert all(one.place.slot.target == slot.target for one in found)


def test_halves_are_exchanged_where_a_formats_own_naming_has_them_so() -> None:
    mod = at("blocks.1.mod")
    assert {name: keys_of(name).swapped(mod) for name in ("kohya", "comfy", "diffusers")} == {
        "kohya": False,
        "comfy": False,
        "diffusers": True,
    }
    assert not keys_of("diffusers").swapped(at("blocks.1.qkv", Rows(0, 1, 3)))
    assert not keys_of("diffusers").swapped(at("blocks.1.mod", Rows(0, 1, 2))), "no such name"
    assert not keys_of("diffusers").swapped(at("nowhere"))
    parsed = keys_of("diffusers").parse("unet.layers.1.norm.linear.lora_A.weight")
    assert parsed is not None
    assert (parsed.swapped, parsed.naming, parsed.module) == (
        True,
        "diffusers",
        "layers.1.norm.linear",
    )


def test_only_the_last_block_ends_a_run() -> None:
    keys = keys_of("kohya")
    assert list(keys.edges(at("blocks.2.qkv").target)) == [("blocks.{i:3}", True)]
    assert list(keys.edges(at("blocks.0.qkv").target)) == [("blocks.{i:3}", False)]
    assert list(keys.edges(at("blocks.1.qkv").target)) == []
    assert list(keys.edges(at("layers.1.fc", part="text").target)) == [("layers.{i:2}", True)]
    assert list(keys.edges(at("single.0.out").target)) == [], "one block is no run"
    assert list(keys.edges(at("conv").target)) == []
    assert list(keys.edges(at("nowhere").target)) == []


def test_a_target_is_cut_as_the_formats_naming_cuts_it() -> None:
    target = at("blocks.1.qkv").target
    assert keys_of("kohya").slots(target) == (Slot(target),)
    assert keys_of("diffusers").slots(target) == tuple(
        Slot(target, Rows(n, n + 1, 3)) for n in range(3)
    )
    assert keys_of("diffusers").slots(at("nowhere").target) == ()
    text = at("layers.1.fc", part="text").target
    assert keys_of("comfy").slots(text) == (), "no tag, no place"
    assert keys_of("peft").slots(text) == (), "the first component has the prefix already"


def test_a_bias_is_spelled_behind_the_name_of_its_module() -> None:
    keys, bias = keys_of("kohya"), at("blocks.1.mod", param="bias")
    assert keys.stem(bias) == keys.stem(at("blocks.1.mod")) == "lora_unet_blocks_1_mod"
    assert keys.spell(bias, "full", "diff_b") == "lora_unet_blocks_1_mod.diff_b"
    parsed = keys.parse("lora_unet_blocks_1_mod.diff_b")
    assert parsed is not None
    assert parsed.slot == bias
    assert keys.slot("lora_unet_blocks_1_mod", "bias") == bias
    assert keys.slot("lora_unet_blocks_1_mod") == at("blocks.1.mod")


def test_a_module_is_named_in_any_naming_or_refused() -> None:
    keys = keys_of("kohya")
    query = at("blocks.1.qkv", Rows(0, 1, 3))
    assert keys.module(query, "diffusers") == "layers_1_to_q"
    assert keys.module(at("blocks.1.qkv")) == "blocks_1_qkv"
    for slot, naming in ((query, None), (at("blocks.1.qkv"), "diffusers"), (query, "other")):
        with pytest.raises(NotRepresentable, match="has no name for unet.layers.1.to_q|qkv"):
            keys.module(slot, naming)
    with pytest.raises(NotRepresentable, match="is not a module of Toy"):
        keys.module(at("nowhere"))


def test_labels_are_names_that_people_know() -> None:
    assert label(TOY, at("blocks.1.qkv", Rows(1, 2, 3))) == "unet.layers.1.to_k"
    assert label(TOY, at("blocks.1.qkv", param="bias"), "native") == "unet.blocks.1.qkv.bias"
    assert label(TOY, at("blocks.1.qkv")) == "unet.blocks.1.qkv", "diffusers has only its parts"
    assert label(TOY, at("blocks.1.qkv", Rows(0, 1, 2))) == "unet.blocks.1.qkv[0:1/2]"
    assert label(TOY, at("nowhere")) == "unet.nowhere"
