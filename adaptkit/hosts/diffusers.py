"""diffusers: loads its own names for every family; converts some other spellings."""

from __future__ import annotations

from adaptkit.hosts.contract import DORA, NOTHING, SD, TE, UNETS, Cell, Host, Loss

DROPPED = "are dropped without a message"
RAISES = "its converter stops at such a file"
OUTSIDE = r"^transformer\.(img_in|txt_in|time_in|vector_in|guidance_in|final_layer)"
SWAPPED = "come out with scale and shift swapped"
NO_PIPELINE = "its pipeline for this family has no LoRA loader"
FAMILIES = (
    "sd3", "sd35-large", "flux", "chroma", "flux2", "hunyuan-video", "framepack", "qwen-image",
    "wan", "z-image",
    "lumina2", "anima", "krea2", "ideogram4", "auraflow", "ltx", "ltx2",
)  # fmt: skip

STOPS = Loss(RAISES, whole=True)
SILENT = NOTHING
TEXT = Loss(DROPPED, modules=TE)
ALPHA = Loss(
    "have alpha tensors, which it refuses or ignores under these names", told=True, whole=True
)
# for any other algorithm a converter raises, or passes keys through that are never read
ONLY_LORA = Loss(
    "are {kinds}, which it does not load in this format", besides=("lora", *DORA), whole=True
)
NO_DORA = Loss("are DoRA, which it loads as plain LoRA", algorithms=DORA)
OF_LORA = (ONLY_LORA, NO_DORA)
# all attention gets one alpha: the keys of its pattern never match (0.42.1, `_get_alpha_name`)
ODD = Loss(
    "get the alpha that most modules have, not their own", modules=rf"\.attn\d\.|{TE}", odd=True
)  # fmt: skip
DOWN = Loss(
    "are called lora_down and lora_up, which it does not read here", suffix="lora_down", whole=True
)
SHARED = Loss(DROPPED, modules=r"^transformer.*(stream_modulation|final_layer\.adaLN)")

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

HOST = Host(
    name="diffusers",
    title="diffusers",
    measured="0.42.1",
    cells=(
        Cell(
            "kohya",
            SD,
            (Loss("stop its converter", unnamed="diffusers", whole=True), ODD, *OF_LORA),
        ),
        Cell(
            "kohya",
            ("sdxl",),
            (
                Loss(
                    "get one name for two, so one is lost",
                    modules="add_embedding|label_emb",
                    unnamed="native",
                ),
                ODD,
                *OF_LORA,
            ),
        ),
        Cell("kohya", ("sdxl-refiner",), (STOPS,)),
        Cell(
            "kohya",
            ("flux",),
            (
                Loss(DROPPED, modules=OUTSIDE),
                Loss(DROPPED, modules=r"^text_encoder_2\."),
                *OF_LORA,
            ),
        ),
        Cell(
            "kohya",
            ("chroma",),
            (
                Loss("stop its converter", modules="distilled_guidance", whole=True),
                Loss(DROPPED, modules=OUTSIDE),
                TEXT,
                *OF_LORA,
            ),
        ),
        Cell("kohya", ("flux2",), (SHARED, *OF_LORA)),
        Cell("kohya", ("qwen-image",), (TEXT, *OF_LORA)),
        Cell(
            "kohya",
            ("z-image",),
            (
                Loss(DROPPED, modules="final_layer|x_embedder", unnamed="diffusers"),
                TEXT,
                *OF_LORA,
            ),
        ),
        Cell(
            "kohya",
            ("wan",),
            (
                Loss(
                    "stop its converter",
                    modules=r"^transformer\.(text_|time_|patch_|head)",
                    whole=True,
                ),
                *OF_LORA,
            ),
            needs=WAN_BLOCK,
        ),
        Cell("kohya", ("hunyuan-video",), (STOPS,)),
        Cell("kohya", FAMILIES, (SILENT,)),
        Cell("comfy", ("qwen-image",), (TEXT, *OF_LORA)),
        Cell(
            "comfy",
            ("flux2",),
            (
                Loss(SWAPPED, modules=r"final_layer\.adaLN"),
                ALPHA,
                DOWN,
                NO_DORA,
                Loss(
                    "are {kinds}, which it does not load in this format",
                    besides=("lora", "lokr", *DORA),
                    whole=True,
                ),
            ),
        ),
        Cell(
            "comfy",
            ("wan",),
            (
                Loss("stop its converter", modules="patch_embedding", whole=True),
                *OF_LORA,
            ),
        ),
        Cell(
            "comfy",
            ("z-image",),
            (
                Loss(DROPPED, modules=r"attention\.|final_layer|x_embedder", unnamed="diffusers"),
                Loss(
                    "have alpha tensors, which stop its converter",
                    told=True,
                    suffix="lora_A",
                    whole=True,
                ),
                TEXT,
                NO_DORA,
                Loss(
                    "are {kinds}, which it does not load in this format",
                    besides=("lora", "lokr", *DORA),
                    whole=True,
                ),
            ),
        ),
        Cell("comfy", ("krea2", "anima", "ltx2"), (ALPHA, DOWN, TEXT, *OF_LORA)),
        Cell(
            "comfy",
            ("ltx",),
            (ALPHA, DOWN, Loss(DROPPED, modules="adaln_single|patchify_proj"), *OF_LORA),
        ),
        Cell("comfy", ("lumina2", "ideogram4"), (STOPS,)),
        Cell(
            "comfy",
            ("hunyuan-video",),
            (
                Loss(
                    "stop its converter (those of the refiner and the embedders)",
                    whole=True,
                    modules=r"^transformer\.(txt_in|time_in|guidance_in|vector_in|img_in)",
                ),
                Loss(DROPPED, named="comfy", unnamed="native"),
                Loss(SWAPPED, modules=r"final_layer\.adaLN"),
                ALPHA,
                *OF_LORA,
            ),
        ),
        Cell(
            "comfy",
            (*UNETS, "flux", "chroma", "sd3", "sd35-large", "framepack", "auraflow"),
            (SILENT,),
        ),
        Cell(
            "diffusers", ("flux",), (ALPHA, ONLY_LORA, Loss(DROPPED, modules=r"^text_encoder_2\."))
        ),
        Cell(
            "diffusers",
            (*UNETS, "sd3", "sd35-large"),
            (ALPHA, ONLY_LORA, Loss(DROPPED, modules=r"^text_encoder_3\.")),
        ),
        Cell(
            "diffusers",
            ("flux2", "z-image"),
            (
                ALPHA,
                TEXT,
                Loss(
                    "are {kinds}, which it does not load",
                    besides=("lora", "lokr", *DORA),
                    whole=True,
                ),
            ),
        ),
        Cell("diffusers", FAMILIES, (ALPHA, DOWN, ONLY_LORA, TEXT)),
        Cell("diffusers-old", (*SD, "sdxl"), (*OF_LORA,)),
        Cell(
            "lycoris",
            ("flux2",),
            (
                Loss(
                    "are {kinds}: of these names it reads only LoKr", besides=("lokr",), whole=True
                ),
            ),
        ),
        Cell("lycoris", (*UNETS, *FAMILIES), (SILENT,)),
        Cell("xlabs", ("flux",)),
        Cell(
            "bare",
            ("flux",),
            (Loss(SWAPPED, modules=r"final_layer\.adaLN_modulation\.1$"),),
            having=r"single_blocks\.0\.norm\.key_norm",
        ),
        Cell("bare", (*UNETS, *FAMILIES), (SILENT,)),
        Cell(
            "onetrainer",
            ("flux",),
            (
                Loss(
                    "its converter gives different modules one name, so the last one wins",
                    whole=True,
                ),
            ),
        ),
        Cell("onetrainer", FAMILIES, (SILENT,)),
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
        Cell("peft", ("krea2", "flux2"), (STOPS,)),
        Cell("peft", (*UNETS, *FAMILIES), (SILENT,)),
        Cell("kohya-oft", ("sdxl", *SD, *FAMILIES), (SILENT,)),
        Cell("omi", ("flux",), (SILENT,)),
    ),
    writes={"": ("diffusers", "comfy")},
    always=(
        Loss("have Tucker cores, which it does not load", suffix="lora_mid", whole=True),
        Loss("have DoRA magnitudes on the input axis, which it has no form of", axis="input"),
    ),
    unsupported={"hunyuan-video-15": NO_PIPELINE, "hunyuan-image": NO_PIPELINE},
)
