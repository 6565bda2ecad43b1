from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from adaptkit.adapter import Adapter
from adaptkit.detect import detect_adapter, detect_checkpoint, families
from adaptkit.errors import NoSuchName
from adaptkit.files.header import TensorInfo
from adaptkit.keymap import prefixes
from tests.synth import CORPUS, FIXTURES, Listing, corpus_listing, load_listing, write_header_only

KEY_LISTS = sorted((FIXTURES / "keys").glob("*.tsv"))

# what the corpus calls a family, without its version -> ours
FAMILIES = {
    "sd15": "sd1", "sd21": "sd2", "sdxl": "sdxl", "flux1": "flux", "chroma1": "chroma", "flux2": "flux2", "sd3": "sd3",
    "sd35": "sd3", "hunyuan_video": "hunyuan-video", "hunyuan_video_15": "hunyuan-video-15",
    "hunyuan_image_21": "hunyuan-image", "qwen_image": "qwen-image", "wan21": "wan", "wan22": "wan",
    "z_image": "z-image", "lumina2": "lumina2", "anima": "anima", "krea2": "krea2", "ideogram4": "ideogram4",
    "auraflow": "auraflow",
}  # fmt: skip
CORPUS_LISTS = sorted(path.stem for path in (CORPUS / "adapters").glob("*.json"))
# how many of the keys' families only metadata or --family can decide (reference §9.4): the likelier one is named
ALIKE = {
    "gen__kohya_chroma_lora": "flux",
    "invokeai__qwen_image_lora_diffusers_format": "flux",
}


def family_of(described: str) -> str:
    """`wan21_t2v_14b` -> wan: the longest known beginning."""
    return FAMILIES[max((name for name in FAMILIES if described.startswith(name)), key=len)]


def format_of(keys: Iterable[str]) -> str:
    """The format by its prefixes alone, as a person would say it."""
    first = next(iter(sorted(keys, key=lambda key: key.startswith(("lora_te", "text_encoder")))))
    if ".processor." in first:
        return "xlabs" if "blocks.0.processor" in first else "diffusers-old"
    starts = {
        "lora_transformer_": "onetrainer", "lora_unet_": "kohya", "lycoris_": "lycoris", "oft_unet_": "kohya-oft",
        "diffusion_model.": "comfy", "base_model.model.": "peft", "transformer.": "diffusers", "unet.": "diffusers",
    }  # fmt: skip
    return next((name for start, name in starts.items() if first.startswith(start)), "bare")


def infos(listing: Listing) -> dict[str, TensorInfo]:
    return {key: TensorInfo(key, dtype, shape, 0, 0) for key, (dtype, shape) in listing.items()}


# a list of another project's test, whose made-up magnitude fits none of its weights
MADE_UP = "invokeai__anima_lora_lokr_format"


def test_there_are_key_lists_to_look_at(corpus: Path) -> None:
    assert len(KEY_LISTS) >= 50
    assert len(list((corpus / "adapters").glob("*.json"))) == len(CORPUS_LISTS) >= 70
    assert MADE_UP in CORPUS_LISTS


# FramePack has every module of HunyuanVideo, by the same diffusers names and with the same shapes
ALIKE_OURS = {"hunyuan-video-diffusers": ("framepack",)}


@pytest.mark.parametrize("path", KEY_LISTS, ids=[path.stem for path in KEY_LISTS])
def test_n4_our_key_lists_have_one_winner_and_no_unclaimed_key(path: Path, tmp_path: Path) -> None:
    family = max((name for name in families() if path.stem.startswith(f"{name}-")), key=len)
    format = path.stem.removeprefix(f"{family}-").split("-")[0]
    with Adapter.open(write_header_only(tmp_path / "a.safetensors", load_listing(path))) as adapter:
        assert (adapter.family.name, adapter.format.name) == (family, format)
        assert adapter.detection.alternatives == ALIKE_OURS.get(path.stem, ())
        assert not adapter.unclaimed
        assert adapter.algorithms() == {"lora": len(adapter.entries)}
        assert {entry.facts.rank for entry in adapter.entries.values()} == {4}


@pytest.mark.parametrize("name", CORPUS_LISTS)
def test_n4_real_key_lists(name: str, corpus: Path, tmp_path: Path) -> None:
    """Each list is claimed completely by one (family, format), and every key is what its slot is spelled."""
    listing = corpus_listing(corpus / "adapters" / f"{name}.json")
    described = json.loads((corpus / "adapters" / f"{name}.json").read_text())
    family = family_of(described["family"])
    with Adapter.open(write_header_only(tmp_path / "a.safetensors", listing)) as adapter:
        assert bool(adapter.unclaimed) == bool(adapter.problems) == (name == MADE_UP)
        assert adapter.format.name == format_of(listing)
        found = (adapter.family.name, *adapter.detection.alternatives)
        assert found[0] == ALIKE.get(name, family)
        assert family in found
        assert adapter.detection.claimed == adapter.detection.total == len(listing)
        for key in listing:
            parsed = adapter.keys.parse(key)
            assert parsed is not None
            module = adapter.keys.module(
                parsed.slot._replace(target=parsed.slot.target._replace(param="weight")),
                parsed.naming,
            )
            stem = key.removesuffix(f".{parsed.spelled}")
            part = adapter.family.component(parsed.slot.component)
            assert stem in [prefix + module for prefix in prefixes(part, adapter.format)], key


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
    assert {key: shape for key, (_, shape) in listing.items()} == {
        key: shape for key, (_, shape) in theirs.items()
    }
    assert len(theirs) > 700


def test_look_alikes_are_named_and_told_apart_by_shape_and_metadata() -> None:
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    silent = infos(
        {f"{stem}.lora_up.weight": ("F16", (320, 4)), f"{stem}.lora_down.weight": ("F16", (4, 320))}
    )
    found = detect_adapter(silent, {})
    assert (found.family, found.alternatives) == ("sd1", ("sd2",))
    assert (
        detect_adapter(silent, {"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}).family
        == "sd2"
    )
    assert detect_adapter(silent, {"ss_base_model_version": "sd_v2"}).alternatives == ()
    assert detect_adapter(silent, {}, family="sd2").family == "sd2"
    cross = stem.replace("attn1_to_q", "attn2_to_k")
    for columns, family in ((768, "sd1"), (1024, "sd2")):
        shapes = {
            f"{cross}.lora_up.weight": ("F16", (320, 4)),
            f"{cross}.lora_down.weight": ("F16", (4, columns)),
        }
        assert (
            detect_adapter(infos(shapes), {}).family,
            detect_adapter(infos(shapes), {}).alternatives,
        ) == (
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
        shapes = {
            f"{stem}.lora_up.weight": ("F16", (640, 4)),
            f"{stem}.lora_down.weight": ("F16", (4, 640)),
        }
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


@pytest.mark.parametrize(
    "names",
    [
        # diffusers before 0.20 (`train_dreambooth_lora.py` of that time)
        [f"unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.{part}_lora.{role}.weight"
         for part in ("to_q", "to_k", "to_v", "to_out") for role in ("down", "up")],
        # XLabs-AI x-flux
        [f"double_blocks.0.processor.{part}_lora{n}.{role}.weight"
         for part in ("qkv", "proj") for n in (1, 2) for role in ("down", "up")],
    ],
)  # fmt: skip
def test_old_spellings_are_adapters_not_checkpoints(names: list[str]) -> None:
    from adaptkit.detect import is_adapter

    assert is_adapter(names)
    assert not is_adapter(
        [name.replace("_lora1", "").replace("_lora2", "").replace("_lora", "") for name in names]
    )
