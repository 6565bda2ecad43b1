"""FLUX.1 and 2, Chroma, the Hunyuan family, FramePack, Stable Diffusion 3 and the SDXL refiner against the corpus."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adaptkit.adapter import Adapter
from adaptkit.detect import detect_adapter, detect_checkpoint, families
from adaptkit.files.header import TensorInfo
from adaptkit.keymap import compile_checkpoint, compile_keys
from adaptkit.names import Rows, Slot, Target
from tests.families.mapping import check_known, check_pairs, place, read
from tests.synth import corpus_listing, write_header_only

DENOISERS = [
    ("flux", "flux1_dev"),
    ("flux", "flux1_schnell"),
    ("chroma", "chroma1"),
    ("flux2", "flux2_dev"),
    ("flux2", "flux2_klein_4b"),
    ("flux2", "flux2_klein_9b"),
    ("sd3", "sd3_medium"),
    ("sd3", "sd35_medium"),
    ("sd35-large", "sd35_large"),
    ("hunyuan-video", "hunyuan_video"),
    ("framepack", "hunyuan_framepack"),
    ("hunyuan-video-15", "hunyuan_video_15"),
    ("hunyuan-image", "hunyuan_image_21"),
]
COMFY = ["hunyuan_video", "hunyuan_video_15", "hunyuan_image_21"]
FAMILY_OF = {name: family for family, name in DENOISERS}
# (family, component, name in modules/)
ENCODERS = [
    ("flux", "text_encoder", "te_clip_l"),
    ("flux", "text_encoder_2", "te_t5_xxl"),
    ("chroma", "text_encoder", "te_t5_xxl"),
    *(
        (family, component, name)
        for family in ("sd3", "sd35-large")
        for component, name in (
            ("text_encoder", "te_clip_l_proj"),
            ("text_encoder_2", "te_openclip_bigg"),
            ("text_encoder_3", "te_t5_xxl"),
        )
    ),
    *((family, "text_encoder", "te_llama3_8b") for family in ("hunyuan-video", "framepack")),
    *((family, "text_encoder_2", "te_clip_l") for family in ("hunyuan-video", "framepack")),
    *(
        (family, "text_encoder", "te_qwen25_vl_7b_text")
        for family in ("hunyuan-video-15", "hunyuan-image")
    ),
    ("sdxl-refiner", "text_encoder_2", "te_openclip_bigg"),
]

# adapter lists of the corpus: what they are called there, the family, the format, and the look-alikes named
LISTS = [
    ("gen__comfynative_flux1_dev_allmodules", "flux", "comfy", ()),
    ("gen__diffusers_peft_flux1_dev_allmodules", "flux", "diffusers", ()),
    ("gen__kohya_flux1_lora", "flux", "kohya", ()),
    ("gen__simpletuner_lycoris_flux1_lokr", "flux", "lycoris", ()),
    ("gen__musubi_flux_kontext_lora", "flux", "kohya", ("chroma", "hunyuan-video")),
    ("invokeai__flux_lora_aitoolkit_format", "flux", "comfy", ("chroma", "hunyuan-video")),
    (
        "invokeai__flux_lora_diffusers_base_model_format",
        "flux",
        "peft",
        ("bria-fibo", "chroma", "framepack", "hunyuan-video"),
    ),
    ("invokeai__flux_lora_diffusers_format", "flux", "diffusers", ("framepack", "hunyuan-video")),
    ("invokeai__flux_lora_kohya_format", "flux", "kohya", ("hunyuan-video",)),
    ("invokeai__flux_lora_xlabs_format", "flux", "xlabs", ()),
    ("gen__comfynative_chroma1_allmodules", "chroma", "comfy", ()),
    ("gen__kohya_chroma_lora", "flux", "kohya", ("chroma", "hunyuan-video")),
    ("gen__comfynative_flux2_klein_4b_allmodules", "flux2", "comfy", ()),
    ("gen__diffusers_peft_flux2_dev_allmodules", "flux2", "diffusers", ()),
    ("gen__diffusers_peft_flux2_klein_4b_allmodules", "flux2", "diffusers", ()),
    ("gen__musubi_flux2_dev_lora", "flux2", "kohya", ()),
    ("gen__musubi_flux2_klein_4b_lokr", "flux2", "kohya", ()),
    ("gen__musubi_flux2_klein_4b_lora", "flux2", "kohya", ()),
    ("gen__comfynative_hunyuan_video_allmodules", "hunyuan-video", "comfy", ()),
    ("gen__diffusers_peft_hunyuan_video_allmodules", "hunyuan-video", "diffusers", ("framepack",)),
    ("gen__musubi_hunyuan_video_lora", "hunyuan-video", "kohya", ()),
    ("gen__diffusers_peft_hunyuan_video_15_allmodules", "hunyuan-video-15", "diffusers", ()),
    ("gen__musubi_hv15_lora", "hunyuan-video-15", "kohya", ()),
    ("gen__kohya_hunyuan_image_lora", "hunyuan-image", "kohya", ()),
    ("gen__comfynative_sd3_medium_allmodules", "sd3", "comfy", ()),
    ("gen__diffusers_peft_sd35_medium_allmodules", "sd3", "diffusers", ()),
    ("gen__diffusers_peft_sd3_medium_allmodules", "sd3", "diffusers", ()),
    ("gen__kohya_sd3_lora", "sd3", "kohya", ()),
    ("gen__diffusers_attnproc_sd15", "sd1", "diffusers-old", ()),
]


def header(shapes: dict[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    return {key: TensorInfo(key, "BF16", shape, 0, 0) for key, shape in shapes.items()}


def params(corpus: Path, name: str) -> list[str]:
    """Every parameter of a model of the corpus, by diffusers' names."""
    modules, extra = read(corpus, "modules", name), read(corpus, "modules_extra", name)
    weights = [f"{module}.weight" for module in modules]
    return [
        *weights,
        *(f"{m}.bias" for m in extra["modules_with_bias"]),
        *extra["norm_params"],
        *extra["other_params"],
    ]


def original(
    mapping: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Shapes of the original checkpoint: slices of one key add up."""
    found: dict[str, tuple[int, ...]] = {}
    for ours, shape in shapes.items():
        theirs = mapping[ours]
        for key, _, stop in [(theirs, 0, shape[0])] if isinstance(theirs, str) else theirs:
            found[key] = (max(stop, found.get(key, (0,))[0]), *shape[1:])
    return found


@pytest.mark.parametrize(("family", "name"), DENOISERS)
def test_both_namings_mean_the_same_slot(family: str, name: str, corpus: Path) -> None:
    assert (
        check_pairs(family, "transformer", read(corpus, "ckpt", name), "model.diffusion_model.")
        > 160
    )


@pytest.mark.parametrize("name", COMFY)
def test_comfyui_s_names_mean_the_same_slot(name: str, corpus: Path) -> None:
    assert check_pairs(FAMILY_OF[name], "transformer", read(corpus, "ckpt", f"{name}@comfy")) > 1200


@pytest.mark.parametrize(("family", "name"), DENOISERS)
def test_every_parameter_is_in_the_table(family: str, name: str, corpus: Path) -> None:
    assert check_known(family, [f"transformer.{key}" for key in params(corpus, name)]) > 160


@pytest.mark.parametrize(("family", "name"), DENOISERS)
def test_the_original_checkpoint_is_known(family: str, name: str, corpus: Path) -> None:
    keys = list(read(corpus, "orig", name))
    assert check_known(family, keys) > 140
    assert check_known(family, [f"model.diffusion_model.{key}" for key in keys])


@pytest.mark.parametrize(("family", "name"), DENOISERS)
def test_kernels_are_those_of_the_model(family: str, name: str, corpus: Path) -> None:
    """The table's kernels, which complete adapters stored flat, are the model's, and it has no others."""
    keys, modules = compile_keys(family, "diffusers"), read(corpus, "modules", name)
    assert len(modules) > 50
    for module, (_, _, *kernel) in modules.items():
        row = keys.row(place(family, f"transformer.{module}.weight").slot.target)
        assert row is not None
        assert row.kernel == tuple(kernel), module


@pytest.mark.parametrize(("family", "component", "name"), ENCODERS)
def test_text_encoders(family: str, component: str, name: str, corpus: Path) -> None:
    (stem,) = compile_checkpoint(family).family.component(component).tags["comfy"][-1:]
    listed = list(params(corpus, name))
    assert len(listed) > 100
    for param in listed:
        slot = place(family, f"{component}.{param}").slot
        assert slot.component == component
        assert place(family, f"{stem}.{param}").slot == slot


@pytest.mark.parametrize("family", ["sd3", "sd35-large"])
def test_single_files_of_sd3_hold_their_text_encoders(family: str, corpus: Path) -> None:
    assert check_pairs(family, "text_encoder", read(corpus, "ckpt", "te_clip_l@sd3")) == 197
    assert (
        check_pairs(family, "text_encoder_2", read(corpus, "ckpt", "te_openclip_bigg@sd3")) == 517
    )
    known = compile_checkpoint(family)
    assert known.parse(
        "text_encoders.t5xxl.transformer.encoder.block.3.layer.0.SelfAttention.q.weight"
    )


def test_the_refiner_of_sdxl(corpus: Path) -> None:
    mapping = read(corpus, "ckpt", "sdxl_refiner_unet")
    assert check_pairs("sdxl-refiner", "unet", mapping) == 1220
    assert (
        check_known("sdxl-refiner", [f"unet.{key}" for key in params(corpus, "sdxl_refiner_unet")])
        == 1220
    )
    encoder = {
        ours: _moved(theirs)
        for ours, theirs in read(corpus, "ckpt", "te_openclip_bigg@sdxl").items()
    }  # the base model's second encoder is the refiner's only one
    assert check_pairs("sdxl-refiner", "text_encoder_2", encoder) == 517
    shapes = {
        f"{m}.weight": tuple(s) for m, s in read(corpus, "modules", "sdxl_refiner_unet").items()
    }
    for keys in (shapes, original(mapping, shapes)):
        found = detect_checkpoint(header(keys), {})
        assert (found.family, found.claimed, found.alternatives) == ("sdxl-refiner", len(keys), ())


def _moved(theirs: Any) -> Any:
    return json.loads(
        json.dumps(theirs).replace("conditioner.embedders.1.", "conditioner.embedders.0.")
    )


@pytest.mark.parametrize(("name", "family", "format", "alike"), LISTS)
def test_adapters_are_recognised(
    name: str, family: str, format: str, alike: tuple[str, ...], corpus: Path, tmp_path: Path
) -> None:
    path = write_header_only(
        tmp_path / "adapter.safetensors", corpus_listing(corpus / "adapters" / f"{name}.json")
    )
    with Adapter.open(path) as adapter:
        assert (adapter.family.name, adapter.format.name) == (family, format)
        assert set(adapter.detection.alternatives) <= set(alike)
        assert not adapter.unclaimed
        assert not adapter.problems
        assert len(adapter.entries) > 5


@pytest.mark.parametrize(("family", "name"), DENOISERS)
def test_checkpoints_are_recognised(family: str, name: str, corpus: Path) -> None:
    """Each model in every naming, weights only: the family wins."""
    shapes = {
        f"{module}.weight": tuple(shape) for module, shape in read(corpus, "modules", name).items()
    }
    maps = [name, f"{name}@comfy"] if name in COMFY else [name]
    for keys in (shapes, *(original(read(corpus, "ckpt", one), shapes) for one in maps)):
        found = detect_checkpoint(header(keys), {})
        # FramePack has all of HunyuanVideo's modules in diffusers' names
        alike = ("framepack",) if family == "hunyuan-video" and keys is shapes else ()
        assert (found.family, found.claimed, found.alternatives) == (family, len(keys), alike)


# what trainers and hosts call one module: format -> stems
WRITTEN = [
    ("flux2", "single_blocks.2.linear1", "kohya", ["lora_unet_single_blocks_2_linear1"]),
    ("flux2", "single_blocks.2.linear1", "diffusers", ["transformer.single_transformer_blocks.2.attn.to_qkv_mlp_proj"]),
    ("hunyuan-video", "double_blocks.2.img_attn_proj", "kohya", ["lora_unet_double_blocks_2_img_attn_proj"]),
    ("hunyuan-video", "double_blocks.2.img_mlp.fc1", "kohya", ["lora_unet_double_blocks_2_img_mlp_fc1"]),
    ("hunyuan-video", "double_blocks.2.img_mlp.fc1", "comfy", ["diffusion_model.double_blocks.2.img_mlp.0"]),
    ("hunyuan-video", "double_blocks.2.txt_mod.linear", "comfy", ["diffusion_model.double_blocks.2.txt_mod.lin"]),
    ("hunyuan-video", "vector_in.in_layer", "comfy", ["diffusion_model.vector_in.in_layer"]),
    ("hunyuan-image", "guidance_in.mlp.2", "comfy", ["diffusion_model.guidance_in.out_layer"]),
    ("hunyuan-video-15", "double_blocks.2.img_attn.qkv", "comfy", ["diffusion_model.double_blocks.2.img_attn.qkv"]),
    (
        "hunyuan-video-15",
        "double_blocks.2.img_attn.qkv",
        "kohya",
        [f"lora_unet_double_blocks_2_img_attn_{letter}" for letter in "qkv"],
    ),
    (
        "framepack",
        "double_blocks.2.img_attn_qkv",
        "kohya",
        [f"lora_unet_transformer_blocks_2_attn_to_{letter}" for letter in "qkv"],
    ),
    ("framepack", "clean_x_embedder.proj_2x", "kohya", ["lora_unet_clean_x_embedder_proj_2x"]),
    ("sd3", "joint_blocks.2.x_block.attn2.qkv", "kohya", ["lora_unet_joint_blocks_2_x_block_attn2_qkv"]),
    ("chroma", "distilled_guidance_layer.layers.2.in_layer", "kohya", ["lora_unet_distilled_guidance_layer_layers_2_in_layer"]),
]  # fmt: skip


@pytest.mark.parametrize(("family", "target", "format", "stems"), WRITTEN)
def test_what_each_format_writes(family: str, target: str, format: str, stems: list[str]) -> None:
    keys = compile_keys(family, format)
    assert [keys.stem(slot) for slot in keys.slots(Target("transformer", target))] == stems


@pytest.mark.parametrize(
    ("family", "stem", "component"),
    [
        ("sd3", "lora_te1_text_model_encoder_layers_0_mlp_fc1", "text_encoder"),
        ("sd3", "lora_te2_text_model_encoder_layers_0_mlp_fc1", "text_encoder_2"),
        ("sd3", "lora_te3_encoder_block_0_layer_0_SelfAttention_q", "text_encoder_3"),
        ("flux", "lora_te3_encoder_block_0_layer_0_SelfAttention_q", "text_encoder_2"),
        ("flux", "lora_te2_encoder_block_0_layer_0_SelfAttention_q", "text_encoder_2"),
        ("chroma", "lora_te3_encoder_block_0_layer_0_SelfAttention_q", "text_encoder"),
        ("chroma", "lora_te_encoder_block_0_layer_0_SelfAttention_q", "text_encoder"),
    ],
)
def test_numbers_of_text_encoders(family: str, stem: str, component: str) -> None:
    slot = compile_keys(family, "kohya").slot(stem)
    assert slot is not None
    assert slot.component == component


def test_only_the_last_layer_s_text_modulation_is_swapped() -> None:
    """Layer 23 is the last of SD3 medium, and one of many in SD3.5 large."""
    for family, last in (("sd3", 23), ("sd35-large", 37)):
        assert [
            n for n in range(last + 1) if place(family, f"transformer.transformer_blocks.{n}.norm1_context.linear.weight").swapped
        ] == [last]  # fmt: skip


def test_all_blocks_of_a_kin_tell_it_apart_and_some_do_not() -> None:
    """LongCat-Image and Ovis-Image have fewer blocks than FLUX.1, of the same names and sizes."""

    def found(double: range, single: range, stem: str) -> tuple[str | None, set[str]]:
        shapes = {f"transformer.transformer_blocks.{n}.{stem}" for n in double}
        shapes |= {f"transformer.single_transformer_blocks.{n}.{stem}" for n in single}
        pairs = {k: v for name in shapes for k, v in ((f"{name}.lora_A.weight", (4, 3072)), (f"{name}.lora_B.weight", (3072, 4)))}  # fmt: skip
        said = detect_adapter(header(pairs), {})
        return said.family, set(said.alternatives)

    assert found(range(19), range(38), "attn.to_q")[0] == "flux"
    assert found(range(10), range(20), "attn.to_q") == ("longcat-image", set())
    assert found(range(6), range(27), "attn.to_q") == ("ovis-image", set())
    # the last blocks of the kin without the first: a choice of FLUX.1's layers
    for double, single in ((range(9, 10), range(19, 20)), (range(5, 6), range(26, 27))):
        assert found(double, single, "attn.to_q")[0] == "flux"


def pair_of(stem: str, rows: int, columns: int) -> dict[str, TensorInfo]:
    return header({f"{stem}.lora_A.weight": (4, columns), f"{stem}.lora_B.weight": (rows, 4)})


@pytest.mark.parametrize(
    ("module", "rows", "columns", "family", "alike"),
    [
        (
            "double_blocks.0.img_mlp.0",
            12288,
            3072,
            "flux",
            ("chroma", "hunyuan-video", "longcat-image"),
        ),
        ("double_blocks.0.img_mlp.0", 18432, 3072, "flux2", ()),  # klein 4B
        ("double_blocks.0.img_mlp.0", 24576, 4096, "flux2", ()),
        ("double_blocks.0.img_mlp.0", 14336, 3584, "hunyuan-image", ()),
        ("double_blocks.0.img_mlp.0", 8192, 2048, "hunyuan-video-15", ()),
        (
            "single_blocks.0.linear1",
            21504,
            3072,
            "flux",
            ("chroma", "hunyuan-video", "longcat-image"),
        ),
        ("single_blocks.0.linear1", 27648, 3072, "flux2", ()),
        ("single_blocks.0.linear1", 55296, 6144, "flux2", ()),
        ("single_blocks.0.linear1", 25088, 3584, "hunyuan-image", ()),
        # nothing but attention: FLUX.1 and klein 4B are equally wide
        (
            "double_blocks.0.img_attn.qkv",
            9216,
            3072,
            "flux",
            ("chroma", "flux2", "hunyuan-video", "longcat-image", "ovis-image"),
        ),
        ("double_blocks.0.img_attn.qkv", 6144, 2048, "hunyuan-video-15", ()),
        ("joint_blocks.0.x_block.attn.qkv", 4608, 1536, "sd3", ()),
        ("joint_blocks.0.context_block.mlp.fc1", 9728, 2432, "sd35-large", ()),
        # beyond FLUX.1's blocks
        ("double_blocks.19.img_attn.qkv", 9216, 3072, "hunyuan-video", ()),
        ("single_blocks.40.linear2", 6144, 24576, "flux2", ()),
    ],
)
def test_shapes_tell_look_alikes_apart(
    module: str, rows: int, columns: int, family: str, alike: tuple[str]
) -> None:
    found = detect_adapter(pair_of(f"diffusion_model.{module}", rows, columns), {})
    assert (found.family, tuple(sorted(found.alternatives))) == (family, alike)


@pytest.mark.parametrize(
    ("said", "family"),
    [
        ("chroma/lora", "chroma"),
        ("flux-1-dev/lora", "flux"),
        ("Flux.1-dev", "flux"),
        ("flux_kontext", "flux"),
        ("Flux.2-klein-4b", "flux2"),
        ("flux_2_klein_4b", "flux2"),
        ("hunyuan-video", "hunyuan-video"),
    ],
)
def test_metadata_decides_between_look_alikes(said: str, family: str) -> None:
    infos = pair_of("lora_unet_double_blocks_0_img_attn_qkv", 9216, 3072)
    for field in ("modelspec.architecture", "ss_base_model_version"):
        found = detect_adapter(infos, {field: said})
        assert (found.family, found.alternatives) == (family, ())


def test_metadata_says_framepack() -> None:
    infos = pair_of("lora_unet_transformer_blocks_0_attn_to_q", 3072, 3072)
    assert detect_adapter(infos, {"ss_base_model_version": "framepack"}).family == "framepack"


def ours() -> Iterator[str]:
    return iter(dict.fromkeys((*FAMILY_OF.values(), "sdxl-refiner")))


@pytest.mark.parametrize("family", list(ours()))
def test_what_a_family_writes_of_itself_it_recognises(family: str) -> None:
    mine = families()[family]
    said = mine.modelspec.lower()
    assert said.startswith(mine.architectures)
    others = {
        name for name, other in families().items() if said.startswith(other.architectures)
    } - {family}
    assert others <= {
        "hunyuan-video",
        "sdxl",
    }  # whose names are the beginnings of their successors'


def test_private_namings_are_flux_1_s_alone() -> None:
    qkv, linear = (
        Target("transformer", name)
        for name in ("double_blocks.3.txt_attn.qkv", "single_blocks.3.linear1")
    )
    omi, xlabs = compile_keys("flux", "omi"), compile_keys("flux", "xlabs")
    assert omi.stem(Slot(qkv, Rows(1, 2, 3))) == "transformer.double_blocks.3.txt_attn.qkv.1"
    assert omi.slot("transformer.single_blocks.3.linear1.1") == Slot(linear, Rows(1, 2, 7))
    assert omi.slot("transformer.single_blocks.3.linear1.3") == Slot(linear, Rows(3, 7, 7))
    assert xlabs.slot("double_blocks.3.processor.qkv_lora2") == Slot(
        qkv
    )  # 1 is the image, 2 the text
    assert (
        xlabs.stem(Slot(Target("transformer", "double_blocks.3.img_attn.proj")))
        == "double_blocks.3.processor.proj_lora1"
    )
    for family in ("chroma", "flux2"):
        assert not any(
            {"omi", "xlabs"} & set(row.names) for row in families()[family].components[0].rows
        )


@pytest.mark.parametrize(
    ("module", "rows", "columns", "family"),
    [
        ("input_blocks.4.1.transformer_blocks.1.attn1.to_q", 768, 768, "sdxl-refiner"),
        ("input_blocks.4.1.transformer_blocks.1.attn1.to_q", 640, 640, "sdxl"),
        ("input_blocks.4.1.transformer_blocks.0.attn2.to_k", 768, 1280, "sdxl-refiner"),
        ("input_blocks.4.1.transformer_blocks.0.attn2.to_k", 640, 2048, "sdxl"),
    ],
)
def test_the_refiner_is_told_from_the_base_model(
    module: str, rows: int, columns: int, family: str
) -> None:
    found = detect_adapter(pair_of(f"diffusion_model.{module}", rows, columns), {})
    assert (found.family, found.alternatives) == (family, ())


def test_the_base_model_is_likelier_than_the_refiner() -> None:
    stem = "diffusion_model.input_blocks.7.1.transformer_blocks.2.attn1.to_out.0"
    found = detect_adapter(pair_of(stem, 64, 64), {})
    assert found.family == "sdxl"
    assert "sdxl-refiner" in found.alternatives, "a toy's sizes say nothing"
    found = detect_adapter(pair_of(stem, 640, 640), {})
    assert (found.family, found.alternatives) == ("sdxl", ())
    found = detect_adapter(pair_of("lora_te2_text_model_encoder_layers_0_mlp_fc1", 5120, 1280), {})
    assert found.family == "sdxl"


def test_clip_l_and_clip_g_of_sd3_are_not_mixed_up() -> None:
    """Names without a component could be either's, so formats that have only such names hold neither."""
    for family in ("sd3", "sd35-large"):
        assert (
            compile_keys(family, "peft").slot(
                "base_model.model.text_model.encoder.layers.0.mlp.fc1"
            )
            is None
        )
        assert (
            compile_keys(family, "peft").slot("base_model.model.joint_blocks.0.x_block.mlp.fc1")
            is not None
        )
