from __future__ import annotations

from pathlib import Path

import pytest

from adaptkit.adapter import Adapter
from adaptkit.detect import detect_adapter, detect_checkpoint, is_adapter
from adaptkit.errors import NoSuchName, UnknownAdapter
from adaptkit.files.header import TensorInfo
from tests.synth import CORPUS, FIXTURES, Listing, corpus_listing, load_listing, write_header_only

KEY_LISTS = sorted((FIXTURES / "keys").glob("*.tsv"))

# the lists of the corpus whose family, algorithm and spelling stand: (family, format, modules, TE modules)
CORPUS_LISTS = {
    "gen__kohya_sd15_lora": ("sd1", "kohya", 264),
    "gen__kohya_sd15_dylora": ("sd1", "kohya", 264),
    "gen__kohya_sd15_locon_conv3x3": ("sd1", "kohya", 350),
    "gen__kohya_sd21_lora": ("sd2", "kohya", 330),
    "gen__kohya_sdxl_lora": ("sdxl", "kohya", 986),
    "gen__kohya_sdxl_lora_fa": ("sdxl", "kohya", 986),
    "gen__lycoris_wrapper_sdxl_locon": ("sdxl", "lycoris", 794),
    "gen__comfynative_sdxl_unet_allmodules": ("sdxl", "comfy", 794),
    "gen__diffusers_peft_sdxl_transformers5_te": ("sdxl", "diffusers", 1059),
}


def infos(listing: Listing) -> dict[str, TensorInfo]:
    return {key: TensorInfo(key, dtype, shape, 0, 0) for key, (dtype, shape) in listing.items()}


@pytest.mark.parametrize("path", KEY_LISTS, ids=[path.stem for path in KEY_LISTS])
def test_n4_our_key_lists_have_one_winner_and_no_unclaimed_key(path: Path, tmp_path: Path) -> None:
    family, format = path.stem.split("-")[:2]
    with Adapter.open(write_header_only(tmp_path / "a.safetensors", load_listing(path))) as adapter:
        assert (adapter.family.name, adapter.format.name) == (family, format)
        assert adapter.detection.alternatives == ()
        assert not adapter.unclaimed
        assert adapter.algorithms() == {"lora": len(adapter.entries)}
        assert {entry.facts.rank for entry in adapter.entries.values()} == {4}


@pytest.mark.parametrize("name", CORPUS_LISTS)
def test_n4_real_key_lists(name: str, corpus: Path, tmp_path: Path) -> None:
    family, format, modules = CORPUS_LISTS[name]
    listing = corpus_listing(corpus / "adapters" / f"{name}.json")
    with Adapter.open(write_header_only(tmp_path / "a.safetensors", listing)) as adapter:
        assert (adapter.family.name, adapter.format.name) == (family, format)
        assert adapter.algorithms() == {"lora": modules}
        assert {entry.facts.rank for entry in adapter.entries.values()} == {4}
        assert not adapter.unclaimed
        assert not adapter.problems


SAME = {
    "sd1-kohya": "gen__kohya_sd15_lora",
    "sd1-kohya-locon": "gen__kohya_sd15_locon_conv3x3",
    "sd2-kohya": "gen__kohya_sd21_lora",
    "sdxl-kohya": "gen__kohya_sdxl_lora",
    "sdxl-lycoris": "gen__lycoris_wrapper_sdxl_locon",
    "sdxl-comfy": "gen__comfynative_sdxl_unet_allmodules",
}


@pytest.mark.parametrize("ours", SAME)
def test_our_key_lists_equal_the_trainers(ours: str, corpus: Path) -> None:
    theirs = corpus_listing(corpus / "adapters" / f"{SAME[ours]}.json")
    listing = load_listing(FIXTURES / "keys" / f"{ours}.tsv")
    assert {key: shape for key, (_, shape) in listing.items()} == {key: shape for key, (_, shape) in theirs.items()}
    assert len(theirs) > 700


@pytest.mark.skipif(not CORPUS.is_dir(), reason="no corpus")
def test_no_list_of_another_family_is_taken_for_one_of_ours(tmp_path: Path) -> None:
    """FLUX and SD3 files share lora_te1_ names with SDXL; most of their keys do not fit, so they are not SDXL."""
    known = ("sd15", "sd21", "sdxl")
    foreign = [path for path in sorted((CORPUS / "adapters").glob("*.json")) if not any(k in path.name for k in known)]
    assert len(foreign) > 40
    for path in foreign:
        listing = corpus_listing(path)
        assert is_adapter(listing), path.name
        with pytest.raises(UnknownAdapter, match="no family and key format"):
            Adapter.open(write_header_only(tmp_path / "a.safetensors", listing))


def test_look_alikes_are_named_and_told_apart_by_shape_and_metadata() -> None:
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    silent = infos({f"{stem}.lora_up.weight": ("F16", (320, 4)), f"{stem}.lora_down.weight": ("F16", (4, 320))})
    found = detect_adapter(silent, {})
    assert (found.family, found.alternatives) == ("sd1", ("sd2",))
    assert detect_adapter(silent, {"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}).family == "sd2"
    assert detect_adapter(silent, {"ss_base_model_version": "sd_v2"}).alternatives == ()
    assert detect_adapter(silent, {}, family="sd2").family == "sd2"
    cross = stem.replace("attn1_to_q", "attn2_to_k")
    for columns, family in ((768, "sd1"), (1024, "sd2")):
        shapes = {f"{cross}.lora_up.weight": ("F16", (320, 4)), f"{cross}.lora_down.weight": ("F16", (4, columns))}
        assert (detect_adapter(infos(shapes), {}).family, detect_adapter(infos(shapes), {}).alternatives) == (
            family,
            (),
        )
    # a LoKr hides its sizes in products; they are worked out
    lokr = {f"{cross}.lokr_w1": ("F16", (8, 8)), f"{cross}.lokr_w2": ("F16", (40, 128))}
    assert detect_adapter(infos(lokr), {}).family == "sd2"


def test_sdxl_in_either_naming() -> None:
    stems = [
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_1_attn1_to_q",
        "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_k",
    ]
    for stem in stems:
        shapes = {f"{stem}.lora_up.weight": ("F16", (640, 4)), f"{stem}.lora_down.weight": ("F16", (4, 640))}
        assert detect_adapter(infos(shapes), {}).family == "sdxl"


def test_names_are_checked() -> None:
    with pytest.raises(NoSuchName, match="unknown family 'sdlx'") as caught:
        detect_adapter({}, {}, family="sdlx")
    assert "sdxl" in caught.value.hint
    with pytest.raises(NoSuchName, match="unknown format"):
        detect_adapter({}, {}, format="koya")


def test_an_unknown_checkpoint_has_no_family() -> None:
    found = detect_checkpoint(infos({"transformer.h.0.attn.weight": ("F16", (4, 4))}), {})
    assert found.family is None
