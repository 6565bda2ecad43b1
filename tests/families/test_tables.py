"""The tables against the mappings in ../shared/corpus, and against the fixtures' headers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from adaptkit.detect import detect_checkpoint, families
from adaptkit.files.header import TensorInfo
from adaptkit.keymap import compile_checkpoint
from tests.synth import FIXTURES, load_listing

MAPS = {
    "sd1": {"unet": "sd15_unet", "text_encoder": "te_clip_l@sd15"},
    "sd2": {"unet": "sd21_unet", "text_encoder": "te_openclip_h@sd21"},
    "sdxl": {
        "unet": "sdxl_unet",
        "text_encoder": "te_clip_l@sdxl",
        "text_encoder_2": "te_openclip_bigg@sdxl",
    },
}


@pytest.mark.parametrize("family", MAPS)
def test_diffusers_and_native_names_mean_the_same_slot(family: str, corpus: Path) -> None:
    keys = compile_checkpoint(family)
    for component, name in MAPS[family].items():
        mapping = json.loads((corpus / "ckpt" / f"{name}.json").read_text())
        assert len(mapping) > 100
        for ours, theirs in mapping.items():
            place = keys.parse(f"{component}.{ours}")
            assert place is not None, ours
            if isinstance(theirs, str):
                assert keys.parse(theirs).slot == place.slot
            elif isinstance(theirs, dict):
                other = keys.parse(theirs["key"])
                assert other.slot == place.slot
                assert other.transposed
                assert not place.transposed
            else:
                ((key, start, stop),) = theirs
                whole = keys.parse(key).slot
                assert (whole.target, whole.rows) == (place.slot.target, None)
                assert place.slot.rows.bounds(3 * (stop - start)) == (start, stop)


@pytest.mark.parametrize("family", MAPS)
def test_every_parameter_of_the_model_is_in_the_table(family: str, corpus: Path) -> None:
    keys = compile_checkpoint(family)
    for component, name in MAPS[family].items():
        stem = name.partition("@")[0]
        modules = json.loads((corpus / "modules" / f"{stem}.json").read_text())
        assert len(modules) > 50
        for ours, shape in modules.items():
            assert shape
            assert keys.parse(f"{component}.{ours}.weight"), ours


@pytest.mark.parametrize("family", list(families()))
def test_the_fixture_header_is_recognised(family: str) -> None:
    listing = load_listing(FIXTURES / "checkpoints" / f"{family}.tsv")
    infos = {key: TensorInfo(key, dtype, shape, 0, 0) for key, (dtype, shape) in listing.items()}
    found = detect_checkpoint(infos, {})
    assert found.family == family
    assert found.alternatives == ()
    keys = compile_checkpoint(family)
    # only MAPS' fixtures are of files that hold an autoencoder too
    assert {keys.other(key) for key in listing if keys.parse(key) is None} == (
        {"vae"} if family in MAPS else set()
    )


@pytest.mark.parametrize(
    ("family", "unet"), [("sd1", "sd15_unet"), ("sd2", "sd21_unet"), ("sdxl", "sdxl_unet")]
)
def test_fixture_shapes_are_those_of_the_model(family: str, unet: str, corpus: Path) -> None:
    listing = load_listing(FIXTURES / "checkpoints" / f"{family}.tsv")
    native = json.loads((corpus / "ckpt" / f"{unet}.json").read_text())
    modules = json.loads((corpus / "modules" / f"{unet}.json").read_text())
    assert len(modules) > 200
    for module, (o, i, *kernel) in modules.items():
        _, shape = listing[native[f"{module}.weight"]]
        assert shape == (o, i, *kernel), module


# fixtures of the outer blocks, and the same checkpoint's parameters in the corpus
ORIGINALS = {
    "flux": "flux1_dev", "chroma": "chroma1", "flux2": "flux2_dev", "sd3": "sd35_medium", "sd35-large": "sd35_large",
    "hunyuan-video": "hunyuan_video", "framepack": "hunyuan_framepack", "hunyuan-video-15": "hunyuan_video_15",
    "hunyuan-image": "hunyuan_image_21", "qwen-image": "qwen_image", "wan": "wan21_i2v_14b", "lumina2": "lumina2",
    "anima": "anima", "krea2": "krea2", "ideogram4": "ideogram4",
}  # fmt: skip
BLOCK = re.compile(r".*?\.\d+\.")
CONSTANTS = "pos_embedder."  # of Anima, in some of its files


@pytest.mark.parametrize("family", ORIGINALS)
def test_short_fixtures_are_the_model_without_its_middle(family: str, corpus: Path) -> None:
    listing = load_listing(FIXTURES / "checkpoints" / f"{family}.tsv")
    ours = {
        re.sub(r"^(net|model\.diffusion_model)\.", "", key): list(shape)
        for key, (_, shape) in listing.items()
        if not key.startswith("text_encoders.")
    }
    theirs = json.loads((corpus / "orig" / f"{ORIGINALS[family]}.json").read_text())
    blocks = {found[0] for key in ours if (found := BLOCK.match(key))}
    outer = {
        key: shape
        for key, shape in theirs.items()
        if ((found := BLOCK.match(key)) is None or found[0] in blocks)
        and not key.startswith(CONSTANTS)
    }
    assert ours == outer


def test_the_table_claims_nothing_it_should_not() -> None:
    keys = compile_checkpoint("sd1")
    for foreign in (
        "model.diffusion_model.input_blocks.12.0.in_layers.2.weight",
        "first_stage_model.conv.weight",
        "x",
    ):
        assert keys.parse(foreign) is None
    assert keys.other("first_stage_model.decoder.conv_in.weight") == "vae"
    assert keys.other("model_ema.decay") == "ema"
