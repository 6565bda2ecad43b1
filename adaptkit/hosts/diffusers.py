"""diffusers: loads its own names for every family; converts some other spellings."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from adaptkit.hosts.contract import DORA, NO_MODEL, SD, TE, UNETS, Cell, Host, Loss

if TYPE_CHECKING:
    from adaptkit.hosts.contract import Piece

DROPPED = "are dropped without a message"
RAISES = "its converter stops at such a file"
NO_PIPELINE = "its pipeline for this family has no LoRA loader"
FAMILIES = (
    "sd3", "sd35-large", "flux", "chroma", "flux2", "hunyuan-video", "framepack", "qwen-image",
    "wan", "z-image",
    "lumina2", "anima", "krea2", "ideogram4", "auraflow", "ltx", "ltx2", "ltx-13b", "minimax-h3",
    "qwen-image-21", "ernie-image", "hidream", "ace-step", "kandinsky5", "cogvideox", "cogview4",
    "mochi", "sana", "flux3", "bria-fibo", "bria-fibo2", "cosmos", "cosmos-14b", "wan-animate2",
)  # fmt: skip

STOPS = Loss(RAISES, whole=True)
ALPHA = Loss(
    "have alpha tensors, which it refuses or ignores under these names", told=True, whole=True
)
# for any other algorithm a converter raises, or passes keys through that are never read
ONLY_LORA = Loss(
    "are {kinds}, which it does not load in this format", besides=("lora", *DORA), whole=True
)
NO_DORA = Loss(
    "are DoRA, which it loads as plain LoRA", algorithms=DORA, suffix="dora_scale|magnitude"
)
OF_LORA = (ONLY_LORA, NO_DORA)
# all attention gets one alpha: the keys of its pattern never match (0.42.1, `_get_alpha_name`)
ODD = Loss(
    "get the alpha that most modules have, not their own", modules=rf"\.attn\d\.|{TE}", odd=True
)  # fmt: skip
DOWN = Loss(
    "are called lora_down and lora_up, which it does not read here", suffix="lora_down", whole=True
)
LORA_OR_LOKR = Loss(
    "are {kinds}, which it does not load in this format",
    besides=("lora", "lokr", *DORA),
    whole=True,
)
FACTORS = Loss(
    "are not called lora_down and lora_up, which alone it converts here",
    suffix=r"lora_[ABm]|lora\.",
    whole=True,
)
OLD = Loss("are called lora.down and lora.up, at which it stops", suffix=r"lora\.", whole=True)
NO_SCALE = replace(NO_DORA, suffix="dora_scale")
MAGNITUDE = Loss(
    "have PEFT's DoRA magnitudes, at which its converter stops",
    suffix="lora_magnitude_vector",
    whole=True,
)
NO_ALPHA = Loss(
    "have no alpha tensors, without which these names are not converted", untold=True, whole=True
)
SINGLE = Loss(
    "lose their DoRA magnitudes", algorithms=DORA, modules=r"single_blocks\.\d+\.linear2$"
)
# of Wan Animate
FUSER = replace(SINGLE, modules=r"fuser_blocks\.\d+\.linear2$", suffix="lora_magnitude_vector")
# a layer of this name that is a layer itself
OUT = replace(SINGLE, modules=r"\.to_out$", suffix="lora_magnitude_vector")
TWO_SPELLINGS = Loss(
    "are called lora.down and lora.up beside others called lora_A and lora_B: they are dropped "
    "without a message",
    suffix=r"lora\.",
)

# names that a converter neither takes nor leaves out
STRANGE = Loss("have names at which its converter stops", whole=True)
OPEN_CLIP = replace(STRANGE, modules=TE, named="native")
# of a U-Net's native names it converts those of attention alone, but all those of SDXL
SGM = replace(STRANGE, modules=r"^unet\.(?!.*attentions)", unnamed="diffusers")
EMBEDDING = Loss(
    "get one name for two, so one is lost", modules="add_embedding|label_emb", unnamed="native"
)
NO_PROJECTION = Loss(
    "no name has q_proj or k_proj, by which it knows such files: nothing loads", whole=True
)
# PEFT finds nothing to adapt in the model
NO_TARGET = Loss(
    "the denoiser's modules all have names that it does not know, at which it stops",
    modules=r"^(transformer|unet)\.",
    whole=True,
)
OUTSIDE = r"^transformer\.(?!double_blocks|single_blocks)"
FLUX2 = (
    replace(STRANGE, modules=OUTSIDE, unnamed="native"),
    replace(ALPHA, suffix="lora"),
    DOWN,
    OLD,
    NO_SCALE,
    replace(MAGNITUDE, unnamed="diffusers"),
    SINGLE,
    LORA_OR_LOKR,
    replace(STRANGE, algorithms=("lokr",), unnamed="native"),
    Loss("come out with scale and shift swapped", modules=r"final_layer\.adaLN_modulation\.1$"),
)
# it renames `attention.out` before lora_down, lora_up and alpha only
Z_OUT = (
    Loss(
        "have alpha tensors, which stop its converter",
        modules=r"attention\.out$",
        told=True,
        suffix="lora_A",
        unnamed="diffusers",
        whole=True,
    ),
    Loss(
        "are dropped without a message unless their factors are lora_down and lora_up",
        modules=r"attention\.out$",
        suffix="lora_A|lokr_",
        unnamed="diffusers",
    ),
    Loss(
        "are dropped without a message unless their factors are lora.down and lora.up",
        modules=r"attention\.qkv$",
        suffix="lora_|lokr_",
        unnamed="diffusers",
    ),
)

WAN_BLOCK = (
    r"self_attn\.q$",
    r"self_attn\.k$",
    r"self_attn\.v$",
    r"self_attn\.o$",
    r"cross_attn\.q$",
    r"cross_attn\.k$",
    r"cross_attn\.v$",
    r"cross_attn\.o$",
    r"ffn\.0$",
    r"ffn\.2$",
)


def _spellings(pieces: tuple[Piece, ...]) -> Loss | None:
    """It converts a file's spelling of the factors or not, as its first key says."""
    denoiser = [piece for piece in pieces if not piece.slot.component.startswith("text")]
    new = any(suffix.startswith("lora_A") for piece in denoiser[:1] for suffix in piece.suffixes)
    return TWO_SPELLINGS if new else None


def _of_ace_step(pieces: tuple[Piece, ...]) -> Loss | None:
    """It knows the original's files by the names of their projections."""
    known = any(re.search(r"[qk]_proj", piece.stem) for piece in pieces)
    return None if known else NO_PROJECTION


HOST = Host(
    name="diffusers",
    title="diffusers",
    cells=(
        Cell(
            "kohya",
            SD,
            (SGM, ODD, *OF_LORA),
        ),
        Cell(
            "kohya",
            ("sdxl",),
            (EMBEDDING, OPEN_CLIP, ODD, *OF_LORA),
        ),
        # the same converter, but four levels of blocks as in Stable Diffusion 1
        Cell("kohya", ("sdxl-refiner",), (SGM, EMBEDDING, OPEN_CLIP, ODD, *OF_LORA)),
        Cell("kohya", ("flux",), (replace(STRANGE, unnamed="native"), *OF_LORA)),
        Cell(
            "kohya",
            ("chroma",),
            (
                replace(STRANGE, modules="distilled_guidance"),
                replace(STRANGE, unnamed="native"),
                *OF_LORA,
            ),
        ),
        Cell(
            "kohya",
            ("qwen-image-21",),
            (replace(STRANGE, modules=r"^transformer\.(txt_in|modulation)"), *OF_LORA),
        ),
        Cell("kohya", ("flux2", "qwen-image", "z-image"), OF_LORA),
        Cell(
            "kohya",
            ("wan",),
            (
                Loss(
                    "stop its converter",
                    modules=r"^transformer\.(text_|time_|patch_|head)",
                    whole=True,
                ),
                NO_ALPHA,
                *OF_LORA,
            ),
            needs=WAN_BLOCK,
            unread=STRANGE,
        ),
        Cell("kohya", ("hunyuan-video",), (STOPS,)),
        Cell("comfy", ("qwen-image", "qwen-image-21"), (MAGNITUDE, *OF_LORA)),
        Cell("comfy", ("flux2",), FLUX2),
        Cell(
            "comfy",
            ("wan",),
            (Loss("stop its converter", modules="patch_embedding", whole=True), *OF_LORA),
            unread=STRANGE,
        ),
        Cell(
            "comfy",
            ("z-image",),
            (*Z_OUT, NO_DORA, MAGNITUDE, LORA_OR_LOKR),
        ),
        Cell(
            "comfy",
            ("krea2",),
            (ALPHA, DOWN, MAGNITUDE, *OF_LORA),
        ),
        Cell(
            "comfy",
            ("anima", "ltx", "ltx2", "ltx-13b", "ernie-image", "hidream", "flux3"),
            (ALPHA, DOWN, ONLY_LORA, NO_SCALE, OUT),
        ),
        Cell("comfy", ("ideogram4",), (MAGNITUDE, *OF_LORA), unread=STRANGE),
        *(
            Cell(format, ("minimax-h3",), (MAGNITUDE, *OF_LORA))
            for format in ("kohya", "comfy", "bare")
        ),
        *(
            Cell(format, ("ace-step",), (ALPHA, DOWN, ONLY_LORA, NO_SCALE), check=_of_ace_step)
            for format in ("peft", "bare")
        ),
        Cell("peft", ("ernie-image",), (ALPHA, DOWN, ONLY_LORA, NO_SCALE)),
        Cell(
            "diffusers",
            ("ltx2",),
            (replace(STRANGE, modules="^connectors", unnamed="diffusers"), ALPHA, DOWN, ONLY_LORA),
            none=NO_TARGET,
        ),
        # by this name it knows the file
        Cell(
            "bare",
            ("ideogram4",),
            (MAGNITUDE, *OF_LORA),
            needs=(r"attention\.qkv$",),
            unread=STRANGE,
        ),
        Cell("comfy", ("lumina2",), (ALPHA, DOWN, *OF_LORA)),
        Cell(
            "comfy",
            ("hunyuan-video",),
            (
                Loss(
                    "stop its converter (those of the refiner and the embedders)",
                    whole=True,
                    modules=r"^transformer\.(txt_in|time_in|guidance_in|vector_in|img_in)",
                ),
                ALPHA,
                *OF_LORA,
            ),
        ),
        Cell("comfy", ("flux",), (FACTORS, replace(STRANGE, unnamed="native"), *OF_LORA)),
        Cell(
            "comfy",
            ("chroma",),
            (
                FACTORS,
                replace(STRANGE, modules="distilled_guidance"),
                replace(STRANGE, unnamed="native"),
                *OF_LORA,
            ),
        ),
        # alpha beside lora_A is read here, under the other names of the factors it is not
        Cell(
            "diffusers",
            ("flux", "bria-fibo"),
            (replace(ALPHA, suffix="lora_down|lora_up"), ONLY_LORA),
            none=NO_TARGET,
        ),
        Cell(
            "diffusers",
            ("chroma",),
            (
                Loss("stop it (its pipeline looks for CLIP there)", modules=TE, whole=True),
                replace(ALPHA, suffix="lora_down|lora_up"),
                ONLY_LORA,
            ),
        ),
        Cell(
            "diffusers",
            (*UNETS, "sd3", "sd35-large"),
            (OPEN_CLIP, ALPHA, DOWN, ONLY_LORA),
            none=NO_TARGET,
            check=_spellings,
        ),
        Cell("diffusers", ("flux2",), (ALPHA, DOWN, SINGLE, LORA_OR_LOKR)),
        Cell("diffusers", ("z-image",), (ALPHA, DOWN, LORA_OR_LOKR)),
        Cell(
            "diffusers",
            ("ideogram4",),
            (
                replace(STRANGE, modules=r"attention\.qkv$", unnamed="diffusers"),
                ALPHA,
                DOWN,
                ONLY_LORA,
            ),
        ),
        Cell(
            "diffusers",
            ("ace-step",),
            (
                replace(STRANGE, modules=r"_attn\.[qk]_proj", unnamed="diffusers"),
                ALPHA,
                DOWN,
                ONLY_LORA,
            ),
            none=NO_TARGET,
        ),
        Cell(
            "diffusers",
            ("mochi", "hidream", "cogvideox", "sana"),
            (ALPHA, DOWN, ONLY_LORA, NO_SCALE, OUT),
            none=NO_TARGET,
        ),
        Cell("diffusers", ("wan",), (ALPHA, DOWN, ONLY_LORA, FUSER), none=NO_TARGET),
        Cell("diffusers", FAMILIES, (ALPHA, DOWN, ONLY_LORA), none=NO_TARGET),
        Cell("diffusers-old", (*SD, "sdxl"), OF_LORA),
        Cell(
            "lycoris",
            ("flux2",),
            (
                Loss(
                    "are {kinds}: of these names it reads only LoKr", besides=("lokr",), whole=True
                ),
                replace(STRANGE, modules=OUTSIDE),
            ),
            like="diffusers",
        ),
        Cell(
            "bare",
            ("flux2",),
            (
                Loss(
                    "are {kinds}: of these names it reads only LoKr", besides=("lokr",), whole=True
                ),
            ),
            like="diffusers",
        ),
        Cell(
            "onetrainer",
            ("flux", "chroma", "bria-fibo"),
            (
                Loss(
                    "get one name for different modules, so the last one wins, or it stops",
                    modules=r"mlp|mod|linear|_in(\.|$)|final|distilled|^text",
                    whole=True,
                ),
                NO_ALPHA,
                *OF_LORA,
            ),
        ),
        # black-forest-labs' control LoRAs
        Cell(
            "bare",
            ("flux",),
            (
                Loss(
                    "come out with scale and shift swapped",
                    modules=r"final_layer\.adaLN_modulation\.1$",
                ),
            ),
            having=r"single_blocks\.0\.norm\.key_norm",
            like="comfy",
        ),
        Cell("bare", ("qwen-image", "qwen-image-21"), (NO_ALPHA, *OF_LORA)),
        Cell("bare", ("z-image",), (NO_ALPHA, *Z_OUT, NO_DORA, LORA_OR_LOKR)),
        Cell(
            "peft",
            ("flux", "chroma"),
            (
                Loss(
                    "it mistakes such a file for one of fal's, and expects exactly their modules",
                    whole=True,
                ),
            ),
        ),
        Cell("peft", ("krea2",), (ALPHA, DOWN, MAGNITUDE, *OF_LORA)),
        Cell("peft", ("flux2",), FLUX2),
    ),
    unread=Loss(DROPPED),
    writes={"": ("diffusers", "comfy")},
    always=(
        Loss("have their alpha in metadata that it does not read", loose=True),
        Loss("have Tucker cores, which it does not load", suffix="lora_mid", whole=True),
        Loss("have DoRA magnitudes on the input axis, which it has no form of", axis="input"),
    ),
    unsupported=dict.fromkeys(
        (
            "hunyuan-video-15",
            "hunyuan-image",
            "pixart",
            "hunyuan-dit",
            "glm-image",
            "longcat-image",
            "ovis-image",
            "stable-cascade",
        ),
        NO_PIPELINE,
    )
    | {"hidream-o1": NO_MODEL, "prx": "the LoRA loader of its pipeline is for U-Nets"},
)
