"""ComfyUI's LoRA loader in our own words: which keys it looks for, and what it computes.

Read in Comfy-Org/ComfyUI on 2026-11-29, at the newest commits stored: `comfy/lora.py` ec93dca,
`comfy/lora_convert.py` 2bffe2f, `comfy/utils.py` 09708ea, `comfy/weight_adapter/lora.py` 6f98b15, `lokr.py` 2bffe2f; the
other weight adapters at a125cd8 (October 2025); which models there are at `supported_models.py` 01f03bb; the names of
layers in `ldm/` of a125cd8, those of newer models in `ldm/minimax/model.py` 01a56b7, `qwen_image21/model.py` 08f68f0,
`wan/model_animate2.py` 1e41693, `ernie/model.py` 7b30bf3, `kandinsky5/model.py` 0c84b76, `cogvideo/model.py` 3e4d15a,
`ace/ace_step15.py` 1d5eae0.

The loader walks over the names of the model's weights. Each has several names under which a file may hold it; for
every name it looks for the keys of each algorithm. A key that no name leads to is dropped with a line in the log.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache

from adaptkit.detect import families
from adaptkit.families.contract import Component, Kind, Row
from adaptkit.names import Rows, Target
from tests.interop.hosts.files import File, Part, is_denoiser
from tests.interop.hosts.loaded import Loaded, Names, Place, RefusedError, same
from tests.synth import expand, fill

VERSION = "lora.py ec93dca, lora_convert.py 2bffe2f, utils.py 09708ea"
DATE = "2026-11"

MODEL = "diffusion_model."
UNETS = ("sd1", "sd2", "sdxl", "sdxl-refiner")

# ------------------------------------------------------------------ names in memory

# Tencent's names are renamed while the checkpoint is loaded
TENCENT = (
    (r"^txt_in\.t_embedder\.mlp\.0$", "txt_in.t_embedder.in_layer"),
    (r"^txt_in\.t_embedder\.mlp\.2$", "txt_in.t_embedder.out_layer"),
    (r"^txt_in\.c_embedder\.linear_1$", "txt_in.c_embedder.in_layer"),
    (r"^txt_in\.c_embedder\.linear_2$", "txt_in.c_embedder.out_layer"),
    (r"_mod\.linear$", "_mod.lin"),
    (r"_attn_(qkv|q|k|v)$", "_attn.qkv"),  # 1.5 ships with q, k and v fused
    (r"_attn_proj$", "_attn.proj"),
    (r"mlp\.fc1$", "mlp.0"),
    (r"mlp\.fc2$", "mlp.2"),
    (r"\.modulation\.linear$", ".modulation.lin"),
    (r"_in\.mlp\.0$", "_in.in_layer"),
    (r"_in\.mlp\.2$", "_in.out_layer"),
)
# layers that its models have not, or under names that no table of ours has
ABSENT = {
    # of Wan's kin: SkyReels V2, AnyFlow, Helios, ReCamMaster
    "wan": r"^(fps_|condition_embedder\.delta|far_patch|patch_(short|mid|long)|norm_out)|\.(cam_encoder|projector)$",
    "sdxl": r"^encoder_hid_proj$",  # Kolors
    **dict.fromkeys(("cosmos", "cosmos-14b"), r"^(crossattn_proj|img_context_proj)"),
    # its own names of all other layers: `blocks.0.q`, `blocks.0.ff_proj`, `time_embedding_linear_1`
    "cogvideox": r"^(?!(patch_embed\.(proj|text_proj)|norm_out\.linear|proj_out)$)",
    # Tencent's names, of which diffusers kept one
    "hunyuan-dit": r"^(?!.*\.skip_linear$)",
    "pixart": "",
}
# names in memory that are neither diffusers' nor the original's
RENAMED = {"ace-step": (r"^", "decoder."), "wan-animate2": (r"\.block\.", ".")}
QWEN = ("qwen-image", "qwen-image-21")
TENCENTS = ("hunyuan-video", "hunyuan-video-15", "hunyuan-image")
# the text encoders of each family, in the order of our components, as ComfyUI names them
TEXT = {
    "sd1": ("clip_l.transformer.",),
    "sd2": ("clip_h.transformer.",),
    "sdxl": ("clip_l.transformer.", "clip_g.transformer."),
    "sdxl-refiner": ("clip_g.transformer.",),
    "sd3": ("clip_l.transformer.", "clip_g.transformer.", "t5xxl.transformer."),
    "sd35-large": ("clip_l.transformer.", "clip_g.transformer.", "t5xxl.transformer."),
    "flux": ("clip_l.transformer.", "t5xxl.transformer."),
    "chroma": ("t5xxl.transformer.",),
    "hunyuan-video": ("llama.transformer.model.", "clip_l.transformer."),
    "hunyuan-video-15": ("qwen25_7b.transformer.model.",),
    "hunyuan-image": ("qwen25_7b.transformer.model.",),
    "qwen-image": ("qwen25_7b.transformer.model.",),
    "z-image": ("qwen3_4b.transformer.model.",),
    "lumina2": ("gemma2_2b.transformer.model.",),
    "anima": ("qwen3_06b.transformer.model.",),
    "stable-cascade": ("clip_g.transformer.",),
}
# these load a second, small text encoder beside the LLM, so that no LLM is alone
ACCOMPANIED = ("hunyuan-video", "hunyuan-video-15", "hunyuan-image")


def _rows(part: Component) -> Iterator[tuple[Row, dict[str, int]]]:
    for row in part.rows:
        if row.kind is Kind.MATRIX:
            for indices in expand(row):
                yield row, indices


@cache
def memory(family: str) -> tuple[Names, Names]:
    """The weights of the denoiser and of the text encoders as they are called in memory."""
    denoiser, text = Names(), Names()
    encoders = iter(TEXT.get(family, ()))
    for part in families()[family].components:
        if part.name in ("transformer_2", "transformer_ref"):
            continue  # another model: its adapter is another file
        # Anima's text conditioner is a part of its transformer
        main = is_denoiser(part.name) or part.name == "text_conditioner"
        prefix = "" if is_denoiser(part.name) else "llm_adapter." if main else next(encoders, None)
        if prefix is None:
            continue
        for row, indices in _rows(part):
            if re.search(ABSENT.get(family, "^$"), row.target):
                continue
            own = "comfy" if family == "stable-cascade" else "native"
            names = row.names.get(own) or row.names["diffusers"]
            for name in row.names["diffusers"] if not main else names:
                module = re.sub(*RENAMED.get(family, ("", "")), fill(name.module, indices), count=1)
                if main and family in TENCENTS:
                    for pattern, new in TENCENT:
                        module = re.sub(pattern, new, module)
                target = Target(part.name, fill(row.target, indices))
                (denoiser if main else text).add(prefix + module, target, name.rows, name.swapped)
    return denoiser, text


# ------------------------------------------------------------------ names in files


@cache
def key_map(family: str) -> Mapping[str, Place]:
    """Every stem that the loader looks for, and where it leads."""
    denoiser, text = memory(family)
    found: dict[str, Place] = {}
    for name, place in denoiser.places.items():
        found[f"lora_unet_{name.replace('.', '_')}"] = place
        found[MODEL + name] = place
        for other in _relative(family, name):
            found[other] = place
    for stem, place in _diffusers(family):
        found[stem] = place
    if family == "qwen-image-21":
        for stem, place in _halves():
            found[stem] = place
    if family == "flux" or family == "chroma":
        for name, place in denoiser.places.items():
            if name.endswith(".linear1"):  # USO and XLabs adapt q, k and v of a single block
                found[f"{MODEL}{name}_qkv"] = Place(place.target, Rows(0, 3, 7))
    found.update(_text(family, text))
    return found


def _relative(family: str, name: str) -> Iterator[str]:
    """Other stems of a weight with the same module name."""
    # 2.1 fuses two layers while it is loaded: these names are those of the two
    if family in QWEN and not name.endswith(".gate_up"):
        yield from (name, f"transformer.{name}", f"lycoris_{name.replace('.', '_')}")
    if family in ("ltx", "ltx2", "mochi", "minimax-h3", "kandinsky5"):
        yield name
    if family in ("hidream", "kandinsky5", "ernie-image"):
        yield f"transformer.{name}"
    if family == "stable-cascade":
        yield f"lora_prior_unet_{name.replace('.', '_')}"
    if family == "hidream":
        yield f"lycoris_{name.replace('.', '_')}"
    if family == "hunyuan-dit":
        yield f"base_model.model.{name}"
    if family == "ace-step":
        name = name.removeprefix("decoder.")
        yield from (f"base_model.model.{name}", f"lycoris_{name.replace('.', '_')}")
    if family in ("hunyuan-video", "hunyuan-video-15"):  # diffusion-pipe, and older files
        theirs = name
        for new, old in (
            (r"_mod\.lin$", "_mod.linear"),
            (r"_attn\.qkv$", "_attn_qkv"),
            (r"_attn\.proj$", "_attn_proj"),
            (r"mlp\.0$", "mlp.fc1"),
            (r"mlp\.2$", "mlp.fc2"),
            (r"\.modulation\.lin$", ".modulation.linear"),
        ):
            theirs = re.sub(new, old, theirs)
        yield from (f"transformer.{theirs}", MODEL + theirs)


# prefix or joiner of diffusers' names, by the class of the model
DOTTED = {
    **dict.fromkeys(("sd3", "sd35-large"), ("transformer.", "base_model.model.")),
    "auraflow": ("transformer.",),
    "pixart": ("transformer.", "base_model.model."),
    **dict.fromkeys(("flux", "chroma", "flux2", "longcat-image"), ("transformer.", "")),
    **dict.fromkeys(("krea2", "z-image", "lumina2"), (MODEL, "transformer.", "")),
}
JOINED = {
    **dict.fromkeys(("sd3", "sd35-large"), ("lora_transformer_", "lycoris_")),
    **dict.fromkeys(
        ("flux", "chroma", "flux2", "longcat-image"), ("lora_transformer_", "lycoris_")
    ),
    **dict.fromkeys(("krea2", "z-image", "lumina2"), ("lycoris_",)),
}
# modules in diffusers' names that its tables do not have
UNMAPPED = {
    "chroma": r"^(distilled_guidance_layer|img_in_patch|nerf_)",
    "longcat-image": r"^time_embed\.",
    "sdxl": r"^encoder_hid_proj$",  # Kolors
    "z-image": r"^siglip_",  # Omni
    "flux2": r"_stream_modulation|^time_guidance_embed",
}


def _diffusers(family: str) -> Iterator[tuple[str, Place]]:
    part = families()[family].components[0]
    if family == "lumina2":
        yield from _as_z_image()
        return
    for row, indices in _rows(part):
        target = Target(part.name, fill(row.target, indices))
        for name in row.names["diffusers"]:
            module = fill(name.module, indices)
            # the table swaps for the native model what is swapped in diffusers
            place = Place(target, name.rows, name.swapped)
            if re.search(UNMAPPED.get(family, "^$"), module):
                continue
            joined = module.replace(".", "_")
            if family in UNETS:
                yield f"lora_unet_{joined}", place
                yield f"lycoris_{joined}", place
                old = module.replace(".to_", ".processor.to_").removesuffix(".0") if module.endswith(".to_out.0") else module.replace(".to_", ".processor.to_")  # fmt: skip
                yield old, place
                yield f"unet.{old}", place
            for prefix in DOTTED.get(family, ()):
                yield prefix + module, place
            for prefix in JOINED.get(family, ()):
                yield prefix + joined, place
            if family == "krea2" and module.endswith(".to_out.0"):
                short = module.removesuffix(".0")
                for prefix in DOTTED[family]:
                    yield prefix + short, place
                yield f"lycoris_{short.replace('.', '_')}", place


def _halves() -> Iterator[tuple[str, Place]]:
    """The two layers that Qwen-Image 2.1 fuses while it is loaded."""
    for row, indices in _rows(families()["qwen-image-21"].components[0]):
        for name in row.names["diffusers"] if "native" in row.names else ():
            module = fill(name.module, indices)
            place = Place(Target("transformer", fill(row.target, indices)), name.rows)
            for stem in (module, f"transformer.{module}", f"lycoris_{module.replace('.', '_')}"):
                yield stem, place


def _as_z_image() -> Iterator[tuple[str, Place]]:
    """Lumina 2 is of Z-Image's class, so its own names are found where they are also those of Z-Image in diffusers."""
    for row, indices in _rows(families()["lumina2"].components[0]):
        module = fill(row.target, indices)
        if re.search(r"feed_forward\.w\d$|^cap_embedder\.1$|^t_embedder\.", module):
            place = Place(Target("transformer", module))
            for prefix in DOTTED["lumina2"]:
                yield prefix + module, place
            yield f"lycoris_{module.replace('.', '_')}", place


CLIP_LAYERS = r"^text_model\.encoder\.layers\.\d+\.(mlp\.fc[12]|self_attn\.(k|q|v|out)_proj)$"


def _text(family: str, text: Names) -> Iterator[tuple[str, Place]]:
    encoders = {name.partition(".")[0] for name in text.places}
    both = {"clip_l", "clip_g"} <= encoders
    for name, place in text.places.items():
        encoder, _, module = name.partition(".transformer.")
        joined = module.replace(".", "_")
        yield f"text_encoders.{name}", place
        if not encoder.startswith("clip_"):
            yield f"text_encoders.transformer.{module}", place
        if re.search(CLIP_LAYERS, module):
            if encoder == "clip_g" and both:
                yield f"lora_te2_{joined}", place
                yield f"text_encoder_2.{module}", place
            else:
                yield f"lora_te_{joined}", place
                if encoder == "clip_g":
                    yield f"lora_prior_te_{joined}", place
                else:
                    yield f"lora_te1_{joined}", place
                yield f"text_encoder.{module}", place
        if encoder == "t5xxl":
            index = 1 + len(encoders & {"clip_l", "clip_g"})
            if index == 2 and "clip_l" in encoders:
                yield f"lora_te2_{joined}", place
                index = 3
            yield f"lora_te{index}_{joined}", place
        if len(encoders) == 1 and family not in ACCOMPANIED and module.startswith("model."):
            yield f"lora_te_{module.removeprefix('model.').replace('.', '_')}", place
        if name == "clip_g.transformer.text_projection":
            yield "lora_prior_te_text_projection", place
        if module == "text_projection" and encoder in ("clip_l", "clip_g"):
            yield f"lora_te{1 if encoder == 'clip_l' else 2}_text_projection", place


# ------------------------------------------------------------------ algorithms

READS = (
    ("lora_up.weight", "lora_down.weight", "lora_mid.weight"),
    ("lora_B.weight", "lora_A.weight"),
    ("lora.up.weight", "lora.down.weight"),
    ("lora_B", "lora_A"),
    ("lora_linear_layer.up.weight", "lora_linear_layer.down.weight"),
    ("lora_B.default.weight", "lora_A.default.weight"),
    tuple(f"hada_{role}" for role in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    tuple(f"lokr_{role}" for role in ("w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b", "t2")),
    ("a1.weight", "a2.weight", "b1.weight", "b2.weight"),
    ("diff",),
    ("diff_b",),
    ("set_weight",),
)
ALWAYS = ("alpha", "dora_scale", "reshape_weight")


def read(suffixes: set[str]) -> bool:
    """Whether every tensor of a module is looked for."""
    rest = suffixes - set(ALWAYS)
    return any(rest and rest <= set(names) for names in READS)


def right(part: Part, tensors: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether what is computed of these tensors is what was meant."""
    window = len(part.shape) - 2
    cores = {"lora_mid.weight", "hada_t1", "hada_t2"} & tensors.keys()
    if cores and window != 2:
        return False  # written for kernels of two dimensions: raises for others
    if "lokr_t2" in tensors:
        return False  # the product is not contiguous: `view` raises (torch 2.13), nothing is added
    if len(tensors.get("lokr_w2", ())) not in (0, 2, 4):
        return False  # w1 gets no dimensions for a kernel but of two: another product
    scale = tensors.get("dora_scale")
    # on the output axis it divides by the norm of the weight without the difference
    return scale is None or scale[0] != part.shape[0]


def _control(stem: str) -> str:
    """The stem after the conversion of black-forest-labs' control LoRAs."""
    return MODEL + stem


def _uso(stem: str) -> str:
    """The stem after the conversion of XLabs files, which it knows by their last blocks."""
    for old, new in (
        ("qkv_lora2", "txt_attn.qkv"),
        ("qkv_lora1", "img_attn.qkv"),
        ("proj_lora1", "img_attn.proj"),
        ("proj_lora2", "txt_attn.proj"),
        ("qkv_lora", "linear1_qkv"),
        ("proj_lora", "linear2"),
    ):
        stem = stem.replace(f".processor.{old}", f".{new}")
    return MODEL + stem


LAST = (
    "single_blocks.37.processor.qkv_lora.up.weight",
    "double_blocks.18.processor.qkv_lora2.up.weight",
)


def load(file: File) -> Loaded:
    """What ComfyUI loads of a file, by the key map of the family's model and text encoders."""
    listing = file.listing
    by_stem: dict[str, dict[str, tuple[int, ...]]] = {}
    stems = {part.stem: part for part in file.parts}
    for key, (_, shape) in listing.items():
        stem = next(s for s in _stems(key) if s in stems)
        by_stem.setdefault(stem, {})[key.removeprefix(f"{stem}.")] = shape
    if file.metadata.get("lora_adapter_metadata"):
        raise RefusedError("alpha in metadata is not read")
    keys, rename, also = key_map(file.family), str, set[str]()
    if "img_in.lora_A.weight" in listing and "single_blocks.0.norm.key_norm.scale" in listing:
        rename = _control
    elif all(key in listing for key in LAST):
        rename, also = _uso, {"up.weight", "down.weight"}
    found = set()
    for stem, tensors in by_stem.items():
        part, place, suffixes = stems[stem], keys.get(rename(stem)), set(tensors)
        if stem.endswith("_lora") and suffixes == {"up.weight", "down.weight"}:
            place, suffixes = keys.get(stem.removesuffix("_lora")), set()
        looked_for = read(suffixes) or suffixes <= also
        if place is not None and same(part, place) and looked_for and right(part, tensors):
            found.add(stem)
    return Loaded(frozenset(found))


def _stems(key: str) -> Iterator[str]:
    while "." in key:
        key = key.rpartition(".")[0]
        yield key
