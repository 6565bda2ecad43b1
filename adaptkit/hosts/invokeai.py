"""InvokeAI: recognises a format by its keys per family; takes look-alikes of FLUX.1 for it."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from adaptkit.hosts.contract import DORA, NO_MODEL, SD, Cell, Host, Loss
from adaptkit.keymap import Dialect

if TYPE_CHECKING:
    from collections.abc import Callable

    from adaptkit.hosts.contract import Piece

PASSED_OVER = "are dropped without a message"
UNKNOWN = Loss("it does not recognise such a file", whole=True)
MISREAD = "it takes files of this family for FLUX.1"
NONE = "InvokeAI has no LoRA loader for this family"
READ = ("lora", "loha", "lokr", "full", "ia3", "lora+dora")
REFUSES = "are {kinds}, which stop its loader"
BIAS = Loss(PASSED_OVER, modules=r"\.bias$", algorithms=("full",))
ANY = (Loss(REFUSES, besides=(*READ, "kohya-oft", "set"), whole=True), BIAS)
# its grouping of keys by layer splits suffixes other than LoRA's in the wrong place
LORA = Loss(REFUSES, besides=("lora",), whole=True)
LORA_OR_DORA = Loss(REFUSES, besides=("lora", "lora+dora"), whole=True)
LOKR_OR_LORA = Loss(REFUSES, besides=("lora", "lokr", "lora+dora"), whole=True)
PEFT_DORA = Loss(
    "have PEFT's DoRA magnitudes, which stop its loader", suffix="lora_magnitude_vector", whole=True
)
UNSCALED = Loss("have alpha tensors beside lora_A, which it ignores", told=True, suffix="lora_A")
NO_DORA = Loss("lose their DoRA magnitudes", algorithms=DORA, suffix="lora_A")
ALPHA = Loss("have alpha tensors, which stop its loader", told=True, suffix="lora_", whole=True)
TEXT = Loss("make it not recognise the file", modules=r"^text_encoder", whole=True)
NORM_OUT = Loss("make it refuse the whole file", modules=r"final_layer\.adaLN", whole=True)


def _only(suffix: str) -> Loss:
    """A tensor of another name makes it not recognise the file, or stop at it."""
    what = "have tensors of names at which it stops"
    return Loss(what, suffix=rf"(?!{suffix})", whole=True)


LYCORIS = (
    "hada|lokr|diff|alpha|dora_scale|weight$|on_input|oft|a1|a2|b1|b2|set_weight|w_norm|b_norm"
)
KOHYA = _only(rf"lora_(?:up|down|mid)\.|{LYCORIS}")
OLD = Loss("are called lora.down and lora.up, at which it stops", suffix=r"lora\.", whole=True)
FACTORS = _only(rf"lora_[AB]\.|{LYCORIS}")

SHORT_CUTS = ("lora_down.weight", "hada_w1_b", "lokr_w1", "diff")


def _unet(family: str) -> Callable[[tuple[Piece, ...]], Loss | None]:
    """It tells Stable Diffusion 1, 2 and XL apart by the first module whose width says so."""

    def check(pieces: tuple[Piece, ...]) -> Loss | None:
        encoders: set[str] = set()
        for piece in pieces:
            # of factored LoKr it looks for keys without a dot
            telling = any(
                suffix in SHORT_CUTS and (suffix != "lokr_w1" or "lokr_w2" in piece.suffixes)
                for suffix in piece.suffixes
            )
            if re.search(r"^lora_unet_.*_attn2_to_[kv]$", piece.stem) and telling:
                return None
            time = re.search(r"^lora_unet_.*time_emb_proj$", piece.stem)
            if time and "lora_down.weight" in piece.suffixes:
                return None if family == "sdxl" else UNKNOWN  # 1,280 in all three
            text = re.search(r"^lora_te\d?_.*_self_attn_", piece.stem)
            if text and (telling or "on_input" in piece.suffixes):
                encoders.add(piece.slot.component)
                if family != "sdxl" or len(encoders) > 1:
                    return None
        deep = r"^lora_unet_(?:down|up|mid|middle|input|output)_block.*_transformer_blocks_(\d+)_"
        found = (re.search(deep, piece.stem) for piece in pieces)
        if family == "sdxl" and any(hit and int(hit[1]) > 1 for hit in found):
            return None
        return UNKNOWN

    return check


KOHYA_FLUX = re.compile(
    r"lora_unet_\w+_blocks_\d+_(?:img|txt)_(?:attn|mlp|mod)"
    r"|lora_unet_\w+_blocks_\d+_(?:linear1|linear2|modulation)|lora_unet_final_layer_linear"
    r"|lora_te1_text_model_encoder_layers_\d+_(?:mlp|self_attn)|lora_te2_encoder_block_"
)


def _flux_kohya(pieces: tuple[Piece, ...]) -> Loss | None:
    return None if all(KOHYA_FLUX.match(piece.stem) for piece in pieces) else UNKNOWN


def _flux2(pieces: tuple[Piece, ...]) -> Loss | None:
    """It takes a file for FLUX.1 unless a width is another: told by LoRA, and LoKr in one form."""
    width = 0
    for piece in pieces:
        known = piece.algorithm in ("lora", "lora+dora") or (
            piece.algorithm == "lokr"
            and ("lokr_w1" in piece.suffixes) == ("lokr_w2" in piece.suffixes)
        )
        if known and re.search(r"txt_in$|context_embedder$", piece.stem):
            return None
        if known and re.search(r"img_attn[._]proj$", piece.stem):
            width = piece.columns
    if not width or (
        width == 3072 and not any(re.search(r"img_mlp[._]0$", piece.stem) for piece in pieces)
    ):
        return UNKNOWN
    return None


def _flux2_kohya(pieces: tuple[Piece, ...]) -> Loss | None:
    return _flux_kohya(pieces) or _flux2(pieces)


def _flux_diffusers(pieces: tuple[Piece, ...]) -> Loss | None:
    """It knows such a file by two layers of the first blocks."""
    stems = {re.sub(r"^(?:transformer|base_model\.model)\.", "", piece.stem) for piece in pieces}
    first = {
        "single_transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.attn.add_q_proj",
    }
    if not first <= stems:
        return UNKNOWN
    for side in ("to_{}", "add_{}_proj"):
        for stem in stems:
            block = re.fullmatch(r"(transformer_blocks\.\d+\.attn\.)" + side.format("[qkv]"), stem)
            if block and not all(block[1] + side.format(c) in stems for c in "qkv"):
                return Loss("its converter stops, because q, k or v is missing", whole=True)
    return None


def _flux2_diffusers(pieces: tuple[Piece, ...]) -> Loss | None:
    """It knows such a file by layers that FLUX.1 does not have."""
    stems = [piece.stem for piece in pieces]
    own = any(re.search(r"to_qkv_mlp_proj$|ff(_context)?\.linear_in$", stem) for stem in stems)
    telling = r"(^|\.)context_embedder$|single_transformer_blocks\.0\.attn\.to_qkv_mlp_proj$"
    first = r"(^|[^_])transformer_blocks\.0\.ff\.linear_in$"
    if own and any(re.search(f"{telling}|{first}", stem) for stem in stems):
        return None
    return UNKNOWN


def _some(pattern: str) -> Callable[[tuple[Piece, ...]], Loss | None]:
    """It recognises a file that has a module of such a name."""

    def check(pieces: tuple[Piece, ...]) -> Loss | None:
        return None if any(re.search(pattern, piece.stem) for piece in pieces) else UNKNOWN

    return check


def _black_forest(pieces: tuple[Piece, ...]) -> bool:
    return any(re.search(r"\.(?:double|single)_blocks\.", piece.stem) for piece in pieces)


def _flux_peft(pieces: tuple[Piece, ...]) -> Loss | None:
    return None if _black_forest(pieces) else _flux_diffusers(pieces)


def _flux2_peft(pieces: tuple[Piece, ...]) -> Loss | None:
    return _flux2(pieces) if _black_forest(pieces) else _flux2_diffusers(pieces)


def _diffusers_only(*losses: Loss) -> tuple[Loss, ...]:
    """Losses under diffusers' names."""
    return tuple(replace(loss, named="diffusers") for loss in losses)


ANIMA = (
    r"(?:lora_unet_(?:llm_adapter_)?|(?:diffusion_model|transformer)\.)blocks[._]\d+[._]"
    r"(?:mlp[._]layer|adaln_mod|(?:cross|self)_attn[._](?:[qkv]_proj|output_proj))"
)
KREA = r"text_fusion|txtfusion|time_mod_proj"


def _krea2(pieces: tuple[Piece, ...]) -> Loss | None:
    stems = [piece.stem for piece in pieces]
    if any(re.search(KREA, stem) for stem in stems) or (
        any(stem.endswith(".attn.wq") for stem in stems)
        and any(stem.endswith(".attn.gate") for stem in stems)
    ):
        return None
    return UNKNOWN


OUTER = r"^transformer\.(img_in|txt_in|time_in|guidance_in|vector_in|final_layer)"
HOST = Host(
    name="invokeai",
    also=("invoke", "invoke-ai"),
    title="InvokeAI",
    cells=(
        *(Cell("kohya", (family,), (KOHYA, *ANY), check=_unet(family)) for family in (*SD, "sdxl")),
        Cell("kohya", ("flux",), (KOHYA, *ANY), check=_flux_kohya),
        Cell(
            "kohya",
            ("flux2",),
            (KOHYA, Loss(PASSED_OVER, modules=r"_attn\.qkv$", besides=("lora",)), *ANY),
            check=_flux2_kohya,
        ),
        Cell("kohya", ("qwen-image",), (KOHYA, LOKR_OR_LORA)),
        Cell("kohya", ("wan",), (OLD, LOKR_OR_LORA)),
        Cell(
            "kohya",
            ("krea2",),
            (
                Loss(
                    "are {kinds}, which it does not load under these names",
                    besides=("lora", "lora+dora"),
                ),
            ),
            check=_some(KREA),
        ),
        Cell("kohya", ("anima",), (KOHYA, LOKR_OR_LORA), check=_some(ANIMA)),
        Cell(
            "comfy",
            ("flux",),
            (FACTORS, ALPHA, TEXT, Loss(REFUSES, besides=("lora", "loha", "lokr"), whole=True)),
        ),
        Cell(
            "comfy",
            ("flux2",),
            (
                FACTORS,
                ALPHA,
                TEXT,
                Loss(PASSED_OVER, modules=r"_attn\.qkv$", algorithms=("loha",)),
                Loss(REFUSES, besides=("lora", "loha", "lokr"), whole=True),
            ),
            check=_flux2,
        ),
        Cell("comfy", ("wan",), (OLD, LORA_OR_DORA)),
        Cell("comfy", ("z-image",), (OLD, UNSCALED, NO_DORA, LORA_OR_DORA)),
        Cell("comfy", ("krea2",), (LORA_OR_DORA,), check=_krea2),
        Cell("comfy", ("anima",), (OLD, UNSCALED, NO_DORA, LOKR_OR_LORA), check=_some(ANIMA)),
        Cell(
            "diffusers",
            ("anima",),
            (OLD, UNSCALED, PEFT_DORA, NO_DORA, LOKR_OR_LORA),
            check=_some(ANIMA),
        ),
        Cell("diffusers", ("flux",), (FACTORS, NORM_OUT, ALPHA, TEXT, LORA), check=_flux_diffusers),
        Cell("diffusers", ("flux2",), (FACTORS, ALPHA, LORA), check=_flux2_diffusers),
        Cell(
            "diffusers",
            ("qwen-image", "z-image"),
            (OLD, UNSCALED, PEFT_DORA, NO_DORA, LORA_OR_DORA),
        ),
        Cell("diffusers", ("krea2",), (OLD, PEFT_DORA, LORA_OR_DORA), check=_krea2),
        Cell("diffusers", ("wan",), (OLD, PEFT_DORA, LORA_OR_DORA)),
        Cell(
            "onetrainer",
            ("flux",),
            (
                OLD,
                Loss("stop its converter", modules=r"\.txt_(?:mod|mlp)", whole=True),
                Loss("make it not recognise the file", modules=OUTER, whole=True),
                LORA_OR_DORA,
            ),
        ),
        # black-forest-labs' control LoRAs
        Cell("bare", ("flux",), having=r"single_blocks\.0\.norm\.key_norm", like="comfy"),
        Cell("bare", ("flux2",), (FACTORS, ALPHA, LORA), check=_flux2_diffusers),
        Cell("bare", ("qwen-image",), (OLD, UNSCALED, NO_DORA, LORA_OR_DORA)),
        Cell("bare", ("krea2",), (LORA_OR_DORA,), check=_krea2),
        Cell(
            "bare",
            ("wan",),
            (
                OLD,
                LORA_OR_DORA,
            ),
        ),
        Cell(
            "peft",
            ("flux",),
            (
                FACTORS,
                *_diffusers_only(NORM_OUT, ALPHA, LORA),
                Loss(REFUSES, besides=("lora", "loha", "lokr", "full", "lora+dora"), whole=True),
            ),
            check=_flux_peft,
        ),
        Cell(
            "peft",
            ("flux2",),
            (
                FACTORS,
                *_diffusers_only(ALPHA, LORA),
                Loss(PASSED_OVER, modules=r"_attn\.qkv$", besides=("lora", "lokr")),
                Loss(REFUSES, besides=("lora", "loha", "lokr", "full", "lora+dora"), whole=True),
            ),
            check=_flux2_peft,
        ),
        Cell("omi", ("flux",), (_only(r"lora_(?:up|down)\.|alpha"),)),
    ),
    unread=Loss(PASSED_OVER),
    nothing=Loss("it does not recognise such a file, or finds none of its modules", whole=True),
    # sd-scripts calls T5 lora_te3_
    dialect=Dialect(prefixes=("lora_te2_",), flat=("lokr_w2",)),
    writes={
        **dict.fromkeys((*SD, "sdxl"), ("kohya",)),
        "flux": ("kohya", "comfy", "diffusers", "onetrainer"),
        "": ("diffusers", "comfy", "kohya"),
    },
    always=(
        Loss("have their alpha in metadata, which it does not read", stated=True),
        Loss(
            "are DoRA on the output axis, which it takes for the input axis",
            algorithms=DORA,
            axis="output",
        ),
        Loss(
            "have a full `lokr_w2` of five dimensions, which it misreads",
            suffix=r"lokr_w2$",
            kernel=3,
        ),
        Loss("have Tucker cores of three dimensions", suffix=r"lora_mid|hada_t|lokr_t2", kernel=3),
    ),
    unsupported={
        **dict.fromkeys(
            ("chroma", "hunyuan-video", "hunyuan-image", "hunyuan-video-15", "framepack"), MISREAD
        ),
        **dict.fromkeys(
            (
                "sd3",
                "sd35-large",
                "lumina2",
                "ideogram4",
                "auraflow",
                "ltx",
                "ltx2",
                "ltx-13b",
                "cogview4",
                "ernie-image",
            ),
            NONE,
        ),
        **dict.fromkeys(
            (
                "ace-step",
                "bria-fibo",
                "bria-fibo2",
                "cogvideox",
                "cosmos",
                "cosmos-14b",
                "flux3",
                "glm-image",
                "hidream",
                "hunyuan-dit",
                "kandinsky5",
                "minimax-h3",
                "mochi",
                "pixart",
                "prx",
                "qwen-image-21",
                "sana",
                "wan-animate2",
                "longcat-image",
                "ovis-image",
                "stable-cascade",
                "hidream-o1",
            ),
            NO_MODEL,
        ),
        "sdxl-refiner": "it takes the block names of the refiner for those of SDXL",
    },
)
