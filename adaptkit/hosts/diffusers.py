"""diffusers: loads its own names for every family; converts some other spellings."""

from __future__ import annotations

from dataclasses import replace

from adaptkit.hosts._whole import (
    of_ace_step,
    of_fal,
    of_lumina2,
    of_onetrainer,
    spellings,
    unmarked,
)
from adaptkit.hosts.contract import DORA, NO_MODEL, SD, TE, UNETS, Cell, Host, Loss

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
# a LoRA's bias is read where it is called `lora_B.bias`; those of norms nowhere
WEIGHT, BIAS = r"(?<!\.bias)$", r"^(?!text_encoder).*\.bias$"


def _besides(loss: Loss, *read: str) -> tuple[Loss, ...]:
    """What a loss says, but not of biases, nor of these algorithms."""
    biases = replace(loss, modules=BIAS, suffix="diff_b|b_norm")
    weights = replace(loss, modules=WEIGHT, besides=(*loss.besides, *read))
    return weights, biases, replace(loss, modules=rf"{TE}.*\.bias$")


BESIDE = _besides(ONLY_LORA)
BESIDE_LOKR = _besides(LORA_OR_LOKR)
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

# names that a converter neither takes nor leaves out
STRANGE = Loss("have names at which its converter stops", whole=True)
OPEN_CLIP = replace(STRANGE, modules=TE, named="native")
# of a U-Net's native names it converts those of attention alone, but all those of SDXL
SGM = replace(STRANGE, modules=r"^unet\.(?!.*attentions)", unnamed="diffusers")
EMBEDDING = Loss(
    "get one name for two, so one is lost", modules="add_embedding|label_emb", unnamed="native"
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


# of HunyuanVideo's own names
TENCENT = (
    Loss("stop its converter", modules=r"txt_in\..*self_attn_?\.?qkv$", whole=True),
    Loss("come out wrong", modules=r"final_layer\.adaLN_modulation\.1$"),
)

# a LoKr of joint projections is loaded after it has joined those of the model, by their joint names
GONE = Loss(DROPPED, unnamed="diffusers")
JOINT = (
    replace(GONE, besides=("lokr",)),
    replace(GONE, algorithms=("lokr",), modules=r"^(?!.*attn\.qkv$)"),
    replace(GONE, algorithms=("lokr",), named="native"),
)

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
            (
                Loss("stop its converter", modules="patch_embedding", whole=True),
                Loss(
                    "are differences of norms, which it leaves out",
                    algorithms=("full",),
                    modules=r"norm\d?",
                ),
                replace(ONLY_LORA, modules=r"^(?!.*norm\d?(\.bias)?$).*(?<!\.bias)$"),
                replace(STRANGE, modules=BIAS, suffix="lora_B"),
                NO_DORA,
            ),
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
            Cell(format, ("ace-step",), (ALPHA, DOWN, ONLY_LORA, NO_SCALE), check=of_ace_step)
            for format in ("peft", "bare")
        ),
        Cell("peft", ("ernie-image",), (ALPHA, DOWN, ONLY_LORA, NO_SCALE)),
        Cell(
            "diffusers",
            ("ltx2",),
            (replace(STRANGE, modules="^connectors", unnamed="diffusers"), ALPHA, DOWN, *BESIDE),
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
        Cell("comfy", ("lumina2",), (ALPHA, DOWN, *OF_LORA), unread=STRANGE, check=of_lumina2),
        Cell(
            "comfy",
            ("hunyuan-video",),
            (
                *TENCENT,
                ALPHA,
                *OF_LORA,
            ),
        ),
        # its names behind `transformer.`, too
        Cell(
            "diffusers",
            ("hunyuan-video",),
            (*(replace(loss, unnamed="diffusers") for loss in TENCENT), ALPHA, DOWN, *BESIDE),
            none=NO_TARGET,
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
            (replace(ALPHA, suffix="lora_down|lora_up"), *_besides(ONLY_LORA, "set")),
            none=NO_TARGET,
        ),
        Cell(
            "diffusers",
            ("chroma",),
            (
                Loss("stop it (its pipeline looks for CLIP there)", modules=TE, whole=True),
                replace(ALPHA, suffix="lora_down|lora_up"),
                *BESIDE,
            ),
        ),
        Cell(
            "diffusers",
            (*UNETS, "sd3", "sd35-large"),
            (OPEN_CLIP, ALPHA, DOWN, *BESIDE),
            none=NO_TARGET,
            check=spellings,
        ),
        Cell("diffusers", ("flux2",), (ALPHA, DOWN, SINGLE, *BESIDE_LOKR, *JOINT), every=True),
        Cell("diffusers", ("z-image",), (ALPHA, DOWN, *BESIDE_LOKR)),
        Cell(
            "diffusers",
            ("ideogram4",),
            (
                replace(STRANGE, modules=r"attention\.qkv$", unnamed="diffusers"),
                ALPHA,
                DOWN,
                *BESIDE,
            ),
        ),
        Cell(
            "diffusers",
            ("ace-step",),
            (
                replace(STRANGE, modules=r"_attn\.[qk]_proj", unnamed="diffusers"),
                ALPHA,
                DOWN,
                *BESIDE,
            ),
            none=NO_TARGET,
        ),
        Cell(
            "diffusers",
            ("mochi", "hidream", "cogvideox", "sana"),
            (ALPHA, DOWN, *BESIDE, NO_SCALE, OUT),
            none=NO_TARGET,
        ),
        Cell("diffusers", ("wan",), (ALPHA, DOWN, *BESIDE, FUSER), none=NO_TARGET),
        Cell("diffusers", FAMILIES, (ALPHA, DOWN, *BESIDE), none=NO_TARGET),
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
                *JOINT,
            ),
            like="diffusers",
            every=True,
        ),
        Cell(
            "onetrainer",
            ("flux", "chroma", "bria-fibo"),
            (
                replace(
                    STRANGE, modules=r"distilled|^text_encoder_2|^text_encoder\..*(norm|tion)$"
                ),
                NO_ALPHA,
                *OF_LORA,
            ),
            check=of_onetrainer,
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
            every=True,
        ),
        Cell("bare", ("qwen-image", "qwen-image-21"), OF_LORA, check=unmarked),
        Cell("bare", ("z-image",), (*Z_OUT, NO_DORA, LORA_OR_LOKR), check=unmarked),
        Cell("peft", ("flux", "chroma"), like="comfy", every=True, check=of_fal),
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
