from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from adaptkit.adapter import Adapter
from adaptkit.checkpoint import Checkpoint
from adaptkit.detect import Nearest, detect_adapter, detect_checkpoint, families, search, sizes
from adaptkit.detect.evidence import CheckpointFile
from adaptkit.errors import NoSuchName, UnknownAdapter
from adaptkit.files.header import TensorInfo
from adaptkit.keymap import prefixes
from tests.cli.test_cli import adaptkit
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
# lists of that project with made-up sizes (the corpus' `shape_check`), which are no model's
NO_MODELS = {
    MADE_UP,
    "invokeai__anima_lora_kohya_with_te_format",
    "invokeai__flux_lokr_bfl_format",
    "invokeai__qwen_image_lora_kohya_format",
}


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
    path = write_header_only(tmp_path / "a.safetensors", listing)
    with Adapter.open(path, family=family if name in NO_MODELS else None) as adapter:
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


@pytest.mark.parametrize("name", CORPUS_LISTS)
def test_inspect_names_real_key_lists(name: str, corpus: Path, tmp_path: Path) -> None:
    """The command itself, on a file of these keys and shapes."""
    path = corpus / "adapters" / f"{name}.json"
    family = family_of(json.loads(path.read_text())["family"])
    file = write_header_only(tmp_path / "a.safetensors", corpus_listing(path))
    done = adaptkit("inspect", str(file), "--json")
    assert done.returncode == (name == MADE_UP), done.stderr  # 1: a broken file
    (record,) = json.loads(done.stdout)["files"]
    evidence = record["evidence"]
    assert record["kind"] == "adapter"
    if name in NO_MODELS:
        assert (record["family"], evidence["nearest"]["family"]) == (None, family)
        assert set(record["loads_in"].values()) == {None}
    else:
        assert record["family"] == ALIKE.get(name, family)
        assert family in (record["family"], *evidence["alternatives"])


LETTERS = ("to_q", "to_k", "to_v", "to_out.0")


def lora_infos(shapes: dict[str, tuple[int, int]], rank: int = 4) -> dict[str, TensorInfo]:
    """The header of a LoRA on modules of these sizes, by stem."""
    return infos(
        {
            f"{stem}.{name}.weight": ("F16", shape)
            for stem, (rows, columns) in shapes.items()
            for name, shape in (("lora_A", (rank, columns)), ("lora_B", (rows, rank)))
        }
    )


@pytest.mark.parametrize(
    ("rows", "columns", "family"),
    [(3072, 3072, "flux"), (1536, 1536, "sd3"), (2432, 2432, "sd35-large"), (1536, 6144, "krea2"),
     (3584, 3584, "hunyuan-image"), (2048, 2048, "hunyuan-video-15"), (1000, 1000, None)],
)  # fmt: skip
def test_one_module_is_decided_by_its_size(rows: int, columns: int, family: str | None) -> None:
    stem = "transformer.transformer_blocks.0.attn.to_k"
    found = detect_adapter(lora_infos({stem: (rows, columns)}), {})
    assert found.family == family
    assert (found.nearest is None) == (family is not None)
    if rows == 3072:
        assert {"chroma", "qwen-image", "framepack"} < set(found.alternatives)
        assert "krea2" not in found.alternatives


def test_a_toys_sizes_say_nothing_and_every_family_of_the_names_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stem = "transformer.transformer_blocks.0.attn.to_k"
    found = detect_adapter(lora_infos({stem: (48, 48)}), {})
    assert found.family == "flux"
    assert {"krea2", "sd3", "qwen-image", "hunyuan-image"} < set(found.alternatives)
    monkeypatch.setattr(search, "KEPT", 0)  # a header seen before is judged anew
    monkeypatch.setattr(sizes, "NARROW", 16)
    assert detect_adapter(lora_infos({stem: (48, 48)}), {}).family is None


def test_headers_of_one_layout_are_judged_once_and_by_their_own_metadata() -> None:
    stems = {"transformer.transformer_blocks.0.attn.to_k": (48, 48)}
    alike, other = lora_infos(stems), lora_infos(dict.fromkeys(stems, (64, 48)))
    moved = {name: info._replace(start=8, stop=16) for name, info in alike.items()}
    search.scored.cache_clear()
    first, second = (detect_adapter(infos, {}) for infos in (alike, moved))
    assert first == second
    assert search.scored.cache_info()[:2] == (1, 1)
    told = detect_adapter(moved, {"ss_base_model_version": "krea2"})
    assert (told.family, search.scored.cache_info().hits) == ("krea2", 2)
    detect_adapter(other, {})  # other sizes
    detect_adapter(dict(reversed(alike.items())), {})  # another order, which samples are taken by
    detect_adapter(alike, {}, family="flux")
    assert search.scored.cache_info().misses == 4


def test_a_width_that_a_family_has_not_is_unknown_unless_the_family_is_given() -> None:
    stems = {
        f"diffusion_model.double_blocks.{n}.img_attn.proj": (2816, 2816) for n in range(19)
    } | {f"diffusion_model.single_blocks.{n}.linear1": (7 * 2816, 2816) for n in range(38)}
    found = detect_adapter(lora_infos(stems), {})
    assert (found.family, found.nearest) == (None, Nearest("flux", 1.0, 0.0))
    assert str(found.nearest).endswith("fits 100 % of the names and 0 % of the sizes")
    assert detect_adapter(lora_infos(stems), {}, family="flux").family == "flux"
    # a few layers of other sizes do not make another model
    few = {"diffusion_model.img_in": (3072, 384)}
    same = {stem: (rows // 2816 * 3072, 3072) for stem, (rows, _) in stems.items()}
    assert detect_adapter(lora_infos(same | few), {}).family == "flux"


def test_a_refused_checkpoint_says_the_nearest_family(tmp_path: Path) -> None:
    listing: Listing = {
        f"double_blocks.{n}.img_attn.proj.weight": ("F16", (2816, 2816)) for n in range(19)
    }
    path = write_header_only(tmp_path / "a.safetensors", listing)
    with pytest.raises(UnknownAdapter) as caught:
        Checkpoint.open(path)
    assert "the nearest is flux, which fits 100 % of the names and 0 %" in caught.value.hint
    with Checkpoint.open(path, family="flux") as checkpoint:
        assert (checkpoint.family.name, len(checkpoint.places)) == ("flux", 19)
    shown = adaptkit("inspect", str(path)).stdout
    assert "unknown  (the nearest is flux, which fits 100 % of the names and 0 % of" in shown


def test_modules_of_every_block_that_a_table_lacks_are_another_models() -> None:
    blocks = {
        f"transformer.transformer_blocks.{n}.attn.{letter}": (3072, 3072)
        for n in range(19)
        for letter in LETTERS
    }
    stray = {"transformer.no_such_module": (3072, 3072)}
    gates = {f"transformer.transformer_blocks.{n}.attn.to_gate": (3072, 3072) for n in range(19)}
    assert detect_adapter(lora_infos(blocks | stray), {}).family == "flux"
    found = detect_adapter(lora_infos(blocks | gates), {})
    assert found.family is None
    assert found.nearest is not None
    assert 0.79 < found.nearest.names < 0.81


def test_a_text_encoder_that_the_table_lacks_does_not_count_against_the_transformer() -> None:
    blocks = {
        f"lora_unet_layers_{n}_attention_{letter}": (3840, 3840)
        for n in range(30)
        for letter in ("to_q", "to_k", "to_v", "to_out_0")
    }
    encoder = {f"lora_te9_layers_{n}_self_attn_q_proj": (4096, 2560) for n in range(36)}
    found = detect_adapter(lora_infos(blocks | encoder), {})
    assert (found.family, found.claimed, found.total) == ("z-image", 240, 312)


def test_marks_count_without_a_tie(monkeypatch: pytest.MonkeyPatch) -> None:
    """1280 is a width of SD 1's layers, but not of the text that its cross-attention reads."""
    stems = {
        f"lora_unet_down_blocks_0_attentions_{n}_transformer_blocks_0_attn2_to_{letter}": (
            320,
            1280,
        )
        for n in range(2)
        for letter in "kv"
    }
    assert detect_adapter(lora_infos(stems), {}).family is None
    monkeypatch.setattr(search, "KEPT", 0)  # a header seen before is judged anew
    monkeypatch.setattr(sizes, "MARKS", 0.0)
    assert detect_adapter(lora_infos(stems), {}).family == "sd1"


def test_one_stray_module_in_a_small_file_changes_no_family() -> None:
    stems = dict.fromkeys(
        (f"diffusion_model.double_blocks.0.img_attn.{name}" for name in ("proj", "prj")),
        (3072, 3072),
    )
    third = {"diffusion_model.double_blocks.1.img_attn.proj": (3072, 3072)}
    assert detect_adapter(lora_infos(stems | third), {}).family == "flux"


def test_a_family_that_fits_wins_over_two_that_only_claim_more() -> None:
    blocks = {
        f"transformer.transformer_blocks.{n}.attn.{letter}": (2048, 2048)
        for n in range(19)
        for letter in LETTERS
    }
    single = {"transformer.single_transformer_blocks.0.attn.to_q": (2048, 2048)}
    found = detect_adapter(lora_infos(blocks | single), {})
    assert (found.family, found.claimed, found.total) == ("hunyuan-video-15", 152, 154)


def test_blocks_without_the_second_attention_are_not_ltx() -> None:
    one = {
        f"transformer.transformer_blocks.{n}.attn1.{letter}": (4096, 4096)
        for n in range(28)
        for letter in LETTERS
    }
    two = {stem.replace("attn1", "attn2"): size for stem, size in one.items()}
    assert detect_adapter(lora_infos(one), {}).family == "cogview4"
    found = detect_adapter(lora_infos(one | two), {})
    assert (found.family, found.alternatives) == ("ltx2", ("ltx-13b",))
    few = {stem: size for stem, size in one.items() if "blocks.0." in stem}
    assert detect_adapter(lora_infos(few), {}).family == "ltx2", "a few modules show no habit"


def test_musubis_framepack_names_are_framepack() -> None:
    """musubi-tuner spells FramePack's modules as diffusers does, HunyuanVideo's as Tencent does."""
    stems = {
        f"lora_unet_single_transformer_blocks_{n}_attn_to_{letter}": (3072, 3072)
        for n in range(40)
        for letter in "qkv"
    }
    found = detect_adapter(lora_infos(stems), {})
    assert (found.family, found.alternatives) == ("framepack", ("hunyuan-video",))
    assert detect_adapter(lora_infos({next(iter(stems)): (3072, 3072)}), {}).family == "framepack"


def test_the_sizes_of_every_table_are_those_of_its_checkpoint() -> None:
    """Every matrix of every listed model, and no family without sizes."""
    for path in sorted((FIXTURES / "checkpoints").glob("*.tsv")):
        listing = infos(load_listing(path))
        own = [name for name in listing if not name.startswith("first_stage_model.")]
        fit = CheckpointFile(listing, own).fit(path.stem, None)
        assert (fit.names, fit.sizes, fit.marks or 1.0) == (1.0, 1.0, 1.0), path.stem
    # a projection from all layers of the language model at once tells nothing
    parts = [part for family in families().values() for part in family.components]
    assert {part.name for part in parts if not part.sizes} == {"text_projection"}


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


def test_what_adaptkit_wrote_down_tells_look_alikes_apart() -> None:
    """Parts of FLUX.1 in diffusers' names are those of its kin, until a record names the family."""
    listing: Listing = {}
    for block in (0, 1):
        stem = f"transformer.transformer_blocks.{block}.attn.to_q.lora_"
        listing |= {f"{stem}A.weight": ("F16", (4, 3072)), f"{stem}B.weight": ("F16", (3072, 4))}

    def told(*records: object) -> tuple[str | None, tuple[str, ...]]:
        metadata = {"adaptkit": json.dumps(records)} if records else {}
        found = detect_adapter(infos(listing), metadata)
        return found.family, found.alternatives

    first, others = guess = told()
    assert {"flux", "framepack"} <= {first, *others}
    for family in (first, *others):
        assert told({"family": family}) == (family, ())
    assert told({"family": "wan"}, {"family": "framepack"}, {"command": "x"}) == ("framepack", ())
    # only where the names fit
    for record in (
        {"family": "sdxl"},
        {"family": "wan"},
        {"family": "none"},
        {"family": 1},
        "text",
    ):
        assert told(record) == guess
