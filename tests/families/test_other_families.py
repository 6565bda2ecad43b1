"""Qwen-Image, Wan, Z-Image, Lumina 2, Anima, Krea 2, Ideogram 4, AuraFlow, LTX-Video and LTX-2 against the corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adaptkit.adapter import Adapter
from adaptkit.detect import detect_adapter, detect_checkpoint
from adaptkit.errors import NotRepresentable
from adaptkit.files.header import TensorInfo
from adaptkit.keymap import compile_checkpoint, compile_keys
from adaptkit.names import Rows, Slot, Target
from tests.families.mapping import check_known, check_pairs, place, read
from tests.synth import Listing, corpus_listing, write_header_only
from tests.test_detect import NO_MODELS

# (family, component, name in the corpus); the prefixes its original keys may carry
DENOISERS = [
    ("qwen-image", "transformer", "qwen_image"),
    ("wan", "transformer", "wan21_t2v_1.3b"),
    ("wan", "transformer", "wan21_t2v_14b"),
    ("wan", "transformer", "wan21_i2v_14b"),
    ("wan", "transformer", "wan22_t2v_a14b"),
    ("wan", "transformer", "wan22_i2v_a14b"),
    ("wan", "transformer", "wan22_ti2v_5b"),
    ("z-image", "transformer", "z_image"),
    ("lumina2", "transformer", "lumina2"),
    ("anima", "transformer", "anima"),
    ("anima", "text_conditioner", "anima_text_conditioner"),
    ("krea2", "transformer", "krea2"),
    ("ideogram4", "transformer", "ideogram4"),
    ("auraflow", "transformer", "auraflow"),
    ("ltx", "transformer", "ltx_video"),
    ("ltx2", "transformer", "ltx2_video"),
]
ENCODERS = [("lumina2", "te_gemma2_2b"), ("anima", "te_qwen3_0.6b"), ("z-image", "te_qwen3_4b")]
ORIGINALS = [
    (family, name)
    for family, _, name in DENOISERS
    if not name.startswith(("anima_", "auraflow", "ltx"))
]
ALIKE = {"anima": ("cosmos",)}  # Anima has the transformer of Cosmos-Predict 2 2B
FAMILIES = tuple(dict.fromkeys(family for family, _, _ in DENOISERS))

# adapter lists of the corpus: what they are called there, and the format
LISTS = [
    ("gen__aitoolkit_z_image_allmodules", "z-image", "comfy"),
    ("gen__comfynative_anima_allmodules", "anima", "comfy"),
    ("gen__comfynative_krea2_allmodules", "krea2", "comfy"),
    ("gen__comfynative_lumina2_allmodules", "lumina2", "comfy"),
    ("gen__comfynative_wan21_t2v_14b_allmodules", "wan", "comfy"),
    ("gen__comfynative_z_image_allmodules", "z-image", "comfy"),
    ("gen__diffusers_peft_anima_allmodules", "anima", "diffusers"),
    ("gen__diffusers_peft_auraflow_allmodules", "auraflow", "diffusers"),
    ("gen__diffusers_peft_ideogram4_allmodules", "ideogram4", "diffusers"),
    ("gen__diffusers_peft_krea2_allmodules", "krea2", "diffusers"),
    ("gen__diffusers_peft_lumina2_allmodules", "lumina2", "diffusers"),
    ("gen__diffusers_peft_qwen_image_allmodules", "qwen-image", "diffusers"),
    ("gen__diffusers_peft_wan21_t2v_14b_allmodules", "wan", "diffusers"),
    ("gen__diffusers_peft_z_image_allmodules", "z-image", "diffusers"),
    ("gen__kohya_anima_lora", "anima", "kohya"),
    ("gen__kohya_lumina2_lora", "lumina2", "kohya"),
    ("gen__musubi_ideogram4_lora", "ideogram4", "kohya"),
    ("gen__musubi_krea2_lora", "krea2", "kohya"),
    ("gen__musubi_qwen_image_lokr_full", "qwen-image", "kohya"),
    ("gen__musubi_qwen_image_lora", "qwen-image", "kohya"),
    ("gen__musubi_wan21_i2v_14b_lora", "wan", "kohya"),
    ("gen__musubi_wan21_t2v_1.3b_loha", "wan", "kohya"),
    ("gen__musubi_wan21_t2v_14b_lora", "wan", "kohya"),
    ("gen__musubi_wan22_a14b_lora", "wan", "kohya"),
    ("gen__musubi_z_image_loha", "z-image", "kohya"),
    ("gen__musubi_z_image_lora", "z-image", "kohya"),
    ("invokeai__anima_lora_kohya_format", "anima", "kohya"),
    ("invokeai__anima_lora_kohya_with_te_format", "anima", "kohya"),
    ("invokeai__anima_lora_lokr_format", "anima", "comfy"),
    ("invokeai__anima_lora_peft_format", "anima", "comfy"),
    ("invokeai__qwen_image_lora_kohya_format", "qwen-image", "kohya"),
]


def listing(path: Path) -> dict[str, TensorInfo]:
    return {
        key: TensorInfo(key, dtype, shape, 0, 0)
        for key, (dtype, shape) in corpus_listing(path).items()
    }


@pytest.mark.parametrize(("family", "component", "name"), DENOISERS)
def test_both_namings_mean_the_same_slot(
    family: str, component: str, name: str, corpus: Path
) -> None:
    assert check_pairs(family, component, read(corpus, "ckpt", name)) > 50


@pytest.mark.parametrize(("family", "component", "name"), DENOISERS)
def test_every_parameter_is_in_the_table(
    family: str, component: str, name: str, corpus: Path
) -> None:
    modules, extra = read(corpus, "modules", name), read(corpus, "modules_extra", name)
    keys = [f"{module}.weight" for module in modules] + [
        f"{module}.bias" for module in extra["modules_with_bias"]
    ]
    keys += [*extra["norm_params"], *extra["other_params"]]
    assert check_known(family, [f"{component}.{key}" for key in keys]) > 50


@pytest.mark.parametrize(("family", "name"), ORIGINALS)
def test_the_original_checkpoint_is_known(family: str, name: str, corpus: Path) -> None:
    keys = read(corpus, "orig", "z_image_musubi" if name == "z_image" else name)
    assert check_known(family, [f"model.diffusion_model.{key}" for key in keys]) >= 400


@pytest.mark.parametrize(("family", "name"), ENCODERS)
def test_text_encoders(family: str, name: str, corpus: Path) -> None:
    extra = read(corpus, "modules_extra", name)
    params = [f"{module}.weight" for module in read(corpus, "modules", name)]
    params += [*extra["norm_params"], *extra["other_params"]]
    stem = compile_checkpoint(family).family.component("text_encoder").tags["comfy"][1]
    assert len(params) > 200
    for param in params:
        slot = place(family, f"text_encoder.{param}").slot
        assert slot.component == "text_encoder"
        for prefix in ("text_encoder.model.", f"{stem}.", f"{stem}.model."):
            assert place(family, prefix + param).slot == slot


@pytest.mark.parametrize(("name", "family", "format"), LISTS)
def test_adapters_are_recognised(
    name: str, family: str, format: str, corpus: Path, tmp_path: Path
) -> None:
    path = write_header_only(
        tmp_path / "adapter.safetensors", corpus_listing(corpus / "adapters" / f"{name}.json")
    )
    with Adapter.open(path, family=family if name in NO_MODELS else None) as adapter:
        assert (adapter.family.name, adapter.format.name) == (family, format)
        assert set(adapter.detection.alternatives) <= set(ALIKE.get(family, ()))
        assert adapter.detection.claimed == adapter.detection.total
        if name != "invokeai__anima_lora_lokr_format":  # whose made-up shapes fit nothing
            assert not adapter.unclaimed
            assert len(adapter.entries) > 2


@pytest.mark.parametrize(
    ("family", "name"),
    [(family, name) for family, component, name in DENOISERS if component == "transformer"],
)
def test_checkpoints_are_recognised_by_their_shapes(family: str, name: str, corpus: Path) -> None:
    """Each model in both namings, weights only: the family wins alone, and no other comes near it."""
    shapes = {
        f"{module}.weight": tuple(shape) for module, shape in read(corpus, "modules", name).items()
    }
    for keys in (shapes, _original(read(corpus, "ckpt", name), shapes)):
        found = detect_checkpoint(
            {key: TensorInfo(key, "BF16", shape, 0, 0) for key, shape in keys.items()}, {}
        )
        alike = ALIKE.get(family, ())
        assert (found.family, found.claimed, found.alternatives) == (family, len(keys), alike)


def _original(
    mapping: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Shapes of the original checkpoint: slices of one key add up."""
    found: dict[str, tuple[int, ...]] = {}
    for ours, shape in shapes.items():
        theirs = mapping[ours]
        if isinstance(theirs, str):
            found[theirs] = shape
        else:
            for key, _, stop in theirs:
                found[key] = (max(stop, found.get(key, (0,))[0]), *shape[1:])
    return found


@pytest.mark.parametrize(
    ("family", "module", "rows", "columns"),
    [
        ("z-image", "layers.0.attention.qkv", 11520, 3840),
        ("lumina2", "layers.0.attention.qkv", 3840, 2304),
        ("ideogram4", "layers.0.attention.qkv", 13824, 4608),
        ("lumina2", "layers.0.feed_forward.w1", 9216, 2304),
        ("ltx", "transformer_blocks.0.attn2.to_k", 2048, 2048),
        ("anima", "transformer_blocks.0.attn2.to_k", 2048, 1024),
        ("ltx2", "transformer_blocks.0.audio_attn2.to_k", 2048, 2048),
    ],
)
def test_sizes_tell_look_alikes_apart(family: str, module: str, rows: int, columns: int) -> None:
    """One module whose name several families know."""
    found = detect_adapter(module_of(f"diffusion_model.{module}", rows, columns), {})
    assert (found.family, found.alternatives) == (family, ALIKE.get(family, ()))


def module_of(stem: str, rows: int, columns: int) -> dict[str, TensorInfo]:
    shapes = {f"{stem}.lora_A.weight": (4, columns), f"{stem}.lora_B.weight": (rows, 4)}
    return {key: TensorInfo(key, "F16", shape, 0, 0) for key, shape in shapes.items()}


@pytest.mark.parametrize("module", ["attn1.to_q", "attn2.to_k"])
def test_the_video_part_of_ltx2_could_be_ltx_video_13b(module: str) -> None:
    """The blocks of both are equal in names and sizes; LTX-2 has others for the sound beside them."""
    stem = f"diffusion_model.transformer_blocks.0.{module}"
    found = detect_adapter(module_of(stem, 4096, 4096), {})
    assert found.family == "ltx2"
    kin = {"ltx-13b", "cogview4", "glm-image", "cosmos-14b"}
    assert {"ltx-13b"} <= set(found.alternatives) <= kin
    assert detect_adapter(module_of(stem, 4096, 4096), {"ss_base_model_version": "ltx2"}).family == "ltx2"  # fmt: skip
    said = {"modelspec.architecture": "ltx-video-13b/lora"}
    assert detect_adapter(module_of(stem, 4096, 4096), said).family == "ltx-13b"
    found = detect_adapter(module_of(stem, 2048, 2048), {})
    assert found.family == "ltx"


def test_self_attention_of_ltx_could_be_anima() -> None:
    """28 blocks, 2048 wide, in diffusers' names, which are LTX-Video's own too."""
    stem = "transformer.transformer_blocks.0.attn1.to_q"
    shapes = {f"{stem}.lora_A.weight": (4, 2048), f"{stem}.lora_B.weight": (2048, 4)}
    found = detect_adapter(
        {key: TensorInfo(key, "F16", shape, 0, 0) for key, shape in shapes.items()}, {}
    )
    assert (found.family, found.alternatives) == ("ltx", ("anima", "cosmos"))


def test_an_excerpt_of_qwen_image_could_be_flux(corpus: Path) -> None:
    """Attention of the first blocks has the names and the width of FLUX.1's: only the metadata tells."""
    infos = listing(corpus / "adapters" / "invokeai__qwen_image_lora_diffusers_format.json")
    found = detect_adapter(infos, {})
    assert (found.family, found.claimed) == ("flux", len(infos))
    assert "qwen-image" in found.alternatives
    assert (
        detect_adapter(infos, {"modelspec.architecture": "Qwen-Image/lora"}).family == "qwen-image"
    )
    assert detect_adapter(infos, {"ss_base_model_version": "qwen_image_edit"}).alternatives == ()


def test_text_encoders_alone_are_told_by_their_width() -> None:
    for family, columns in (("lumina2", 2304), ("anima", 1024)):
        stem = "lora_te_layers_0_self_attn_q_proj"
        shapes = {f"{stem}.lora_down.weight": (4, columns), f"{stem}.lora_up.weight": (2048, 4)}
        found = detect_adapter(
            {key: TensorInfo(key, "F16", shape, 0, 0) for key, shape in shapes.items()}, {}
        )
        assert (found.family, found.format, found.alternatives) == (family, "kohya", ())


def test_z_image_is_fused_for_comfy_and_split_for_kohya() -> None:
    qkv = Target("transformer", "layers.3.attention.qkv")
    split = [
        compile_keys("z-image", "kohya").stem(slot)
        for slot in compile_keys("z-image", "kohya").slots(qkv)
    ]
    assert split == [f"lora_unet_layers_3_attention_to_{letter}" for letter in "qkv"]
    assert (
        compile_keys("z-image", "comfy").stem(Slot(qkv)) == "diffusion_model.layers.3.attention.qkv"
    )
    fused = compile_keys("z-image", "kohya").slot("lora_unet__layers_3_attention_qkv")
    assert fused == Slot(qkv)


def test_lumina2_shares_its_rows_unequally() -> None:
    slots = compile_keys("lumina2", "diffusers").slots(
        Target("transformer", "layers.0.attention.qkv")
    )
    assert [slot.rows.bounds(3840) for slot in slots if slot.rows] == [
        (0, 2304),
        (2304, 3072),
        (3072, 3840),
    ]


def test_anima_s_adapter_of_the_language_model() -> None:
    target = Target("text_conditioner", "blocks.5.self_attn.o_proj")
    spelled = {
        "kohya": "lora_unet_llm_adapter_blocks_5_self_attn_o_proj",
        "comfy": "diffusion_model.llm_adapter.blocks.5.self_attn.o_proj",
        "diffusers": "text_conditioner.blocks.5.self_attn.o_proj",
    }
    for format, stem in spelled.items():
        assert compile_keys("anima", format).stem(Slot(target)) == stem
    assert place("anima", "net.llm_adapter.blocks.5.self_attn.o_proj.weight").slot == Slot(target)
    assert place("anima", "net.blocks.5.self_attn.q_proj.weight").slot.component == "transformer"


def test_wan_s_second_expert_is_diffusers_alone() -> None:
    target = Target("transformer_2", "blocks.39.self_attn.q")
    keys = compile_keys("wan", "diffusers")
    assert keys.stem(Slot(target)) == "transformer_2.blocks.39.attn1.to_q"
    assert keys.slot("transformer_2.blocks.39.attn1.to_q") == Slot(target)
    assert (
        place("wan", "transformer_2.blocks.0.norm2.weight").slot.target.module == "blocks.0.norm3"
    )
    for format in ("kohya", "comfy", "lycoris", "bare"):
        with pytest.raises(NotRepresentable, match="has no place for the Wan transformer"):
            compile_keys("wan", format).stem(Slot(target))


def test_wan_s_other_models() -> None:
    """VACE and FLF2V, which are not in the corpus: names as in diffusers' convert_wan_to_diffusers."""
    for native, diffusers in (
        ("vace_blocks.14.self_attn.o.weight", "vace_blocks.14.attn1.to_out.0.weight"),
        ("vace_blocks.0.before_proj.bias", "vace_blocks.0.proj_in.bias"),
        ("vace_blocks.7.after_proj.weight", "vace_blocks.7.proj_out.weight"),
        ("vace_blocks.7.modulation", "vace_blocks.7.scale_shift_table"),
        ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
    ):
        assert place("wan", native).slot == place("wan", f"transformer.{diffusers}").slot
    assert compile_checkpoint("wan").parse("vace_blocks.1.before_proj.weight") is None


def test_bounds_hold() -> None:
    """No table claims blocks its model does not have."""
    for family, key in (
        ("qwen-image", "transformer_blocks.60.attn.to_q.weight"),
        ("wan", "blocks.40.self_attn.q.weight"),
        ("z-image", "layers.30.attention.qkv.weight"),
        ("lumina2", "layers.26.attention.qkv.weight"),
        ("anima", "net.blocks.28.self_attn.q_proj.weight"),
        ("krea2", "blocks.28.attn.wq.weight"),
        ("ideogram4", "layers.34.attention.qkv.weight"),
        ("auraflow", "single_layers.32.attn.w1q.weight"),
        ("ltx", "transformer_blocks.48.attn1.to_q.weight"),
        ("ltx2", "transformer_blocks.48.attn1.to_q.weight"),
    ):
        assert compile_checkpoint(family).parse(key) is None, key


def test_row_order_matters_where_the_halves_are_swapped() -> None:
    assert place("auraflow", "transformer.norm_out.linear.weight").swapped
    assert not place("auraflow", "modF.1.weight").swapped
    assert place("z-image", "transformer.layers.0.attention.to_v.weight").slot.rows == Rows(2, 3, 3)


@pytest.mark.parametrize(("infix", "layout"), [("", ""), (".default", "diffsynth")])
def test_the_default_alone_tells_rows_that_diffsynth_stores_head_by_head(
    infix: str, layout: str, tmp_path: Path
) -> None:
    """Names and sizes are those of other tools' MiniMax-H3 files."""
    shapes = {"attn.qkv_proj": (21504, 5376), "attn.out_proj": (5376, 7168), "mlp.fc2": (5376, 14336)}  # fmt: skip
    listing: Listing = {}
    for name, (rows, columns) in shapes.items():
        listing[f"blocks.0.{name}.lora_A{infix}.weight"] = ("F16", (4, columns))
        listing[f"blocks.0.{name}.lora_B{infix}.weight"] = ("F16", (rows, 4))
    with Adapter.open(write_header_only(tmp_path / "a.safetensors", listing)) as adapter:
        assert (adapter.family.name, adapter.source.layout) == ("minimax-h3", layout)
