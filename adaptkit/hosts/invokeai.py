"""InvokeAI: recognises a format by its keys per family; takes look-alikes of FLUX.1 for it."""

from __future__ import annotations

from adaptkit.hosts.contract import DORA, NOTHING, SD, TE, Cell, Host, Loss

PASSED_OVER = "are dropped without a message"
UNKNOWN = Loss("it does not recognise such a file", whole=True)
UNNAMED = "are such that it does not recognise the file"
MISREAD = "it takes files of this family for FLUX.1"
NONE = "InvokeAI does not run this family"
OUTSIDE = r"^transformer\.(text_embedding|time_embedding|time_projection|patch_embedding|head)"
FAMILIES = ("flux", "flux2", "qwen-image", "z-image", "wan", "krea2", "anima")
READ = ("lora", "loha", "lokr", "full", "ia3", "lora+dora")

EMBEDDERS = "img_in|txt_in|time_in|guidance_in"
REFUSES = "are {kinds}, which stop its loader"
ANY = (
    Loss(REFUSES, besides=(*READ, "kohya-oft", "set"), whole=True),
    Loss(PASSED_OVER, modules=r"\.bias$", algorithms=("full",)),
)
# its grouping of keys by layer splits suffixes other than LoRA's in the wrong place
LORA = Loss(REFUSES, besides=("lora",), whole=True)
LORA_OR_DORA = Loss(REFUSES, besides=("lora", "lora+dora"), whole=True)
PEFT_DORA = Loss(
    "have PEFT's DoRA magnitudes, which stop its loader", suffix="lora_magnitude_vector", whole=True
)
UNSCALED = Loss("have alpha tensors beside lora_A, which it ignores", told=True, suffix="lora_A")
NO_DORA = Loss("lose their DoRA magnitudes", algorithms=DORA)
ALPHA = Loss("have alpha tensors, which stop its loader", told=True, suffix="lora_", whole=True)
NORM_OUT = Loss("make it refuse the whole file", modules=r"final_layer\.adaLN", whole=True)
WAN = Loss(PASSED_OVER, modules=rf"_img$|{OUTSIDE}")
TEXT = Loss(PASSED_OVER, modules=TE)
DOWN = Loss(
    "are called lora_down and lora_up: it does not recognise the file",
    suffix="lora_down",
    whole=True,
)

HOST = Host(
    name="invokeai",
    title="InvokeAI",
    measured="August 2026",
    cells=(
        Cell("kohya", SD, (Loss(PASSED_OVER, unnamed="diffusers"), *ANY)),
        Cell("kohya", ("sdxl",), ANY),
        Cell(
            "kohya",
            ("flux",),
            (
                Loss(
                    UNNAMED,
                    modules=rf"^transformer\.({EMBEDDERS}|vector_in|final_layer\.adaLN)",
                    whole=True,
                ),
                Loss(
                    "are called lora_te3: it does not recognise the file",
                    modules=r"^text_encoder_2\.",
                    whole=True,
                ),
                Loss(PASSED_OVER, modules=r"final_layer\.linear"),
                *ANY,
            ),
        ),
        Cell(
            "kohya",
            ("flux2",),
            (
                Loss(
                    UNNAMED,
                    modules=rf"^transformer\.({EMBEDDERS}|final_layer\.adaLN|.*stream_mod)",
                    whole=True,
                ),
                Loss(PASSED_OVER, modules=r"_attn\.qkv$", algorithms=("loha", "lokr")),
                Loss(PASSED_OVER, modules=r"final_layer\.linear"),
                *ANY,
            ),
        ),
        Cell(
            "kohya",
            ("qwen-image",),
            (Loss(PASSED_OVER, modules=r"^transformer\.(?!transformer_blocks)"), *ANY),
        ),
        Cell("kohya", ("wan",), (WAN, *ANY)),
        Cell(
            "kohya",
            ("krea2",),
            (
                Loss(
                    "are {kinds}, which it does not load under these names",
                    besides=("lora", "lora+dora"),
                ),
            ),
        ),
        Cell("kohya", ("anima",), (Loss(PASSED_OVER, modules=r"^text_conditioner.*mlp"), *ANY)),
        Cell(
            "kohya",
            ("z-image",),
            (Loss("it wants `lora_unet__` with two underscores: nothing loads", whole=True),),
        ),
        Cell(
            "comfy",
            ("flux",),
            (
                ALPHA,
                TEXT,
                Loss(REFUSES, besides=("lora", "loha", "lokr"), whole=True),
            ),
        ),
        Cell(
            "comfy",
            ("flux2",),
            (
                Loss(PASSED_OVER, modules=r"final_layer\.adaLN"),
                ALPHA,
                TEXT,
                Loss(PASSED_OVER, modules=r"_attn\.qkv$", algorithms=("loha",)),
                Loss(REFUSES, besides=("lora", "loha", "lokr"), whole=True),
            ),
        ),
        Cell(
            "comfy",
            ("qwen-image",),
            (Loss("`diffusion_model.` is not stripped: nothing loads", whole=True),),
        ),
        Cell("comfy", ("wan",), (WAN, LORA_OR_DORA)),
        Cell(
            "comfy",
            ("z-image",),
            (
                Loss(
                    PASSED_OVER, modules=r"attention\.|final_layer|x_embedder", unnamed="diffusers"
                ),
                UNSCALED,
                NO_DORA,
                TEXT,
                LORA_OR_DORA,
            ),
        ),
        Cell("comfy", ("krea2",), (LORA_OR_DORA,)),
        Cell(
            "comfy",
            ("anima",),
            (
                UNSCALED,
                NO_DORA,
                TEXT,
                Loss(REFUSES, besides=("lora", "lokr", "lora+dora"), whole=True),
            ),
        ),
        Cell("comfy", ("sdxl", *SD), (UNKNOWN,)),
        Cell("diffusers", ("flux",), (NORM_OUT, DOWN, ALPHA, TEXT, LORA)),
        Cell("diffusers", ("flux2",), (DOWN, ALPHA, LORA)),
        Cell("diffusers", ("qwen-image", "z-image"), (UNSCALED, PEFT_DORA, NO_DORA, LORA_OR_DORA)),
        Cell("diffusers", ("krea2",), (PEFT_DORA, LORA_OR_DORA)),
        Cell("diffusers", ("wan",), (WAN, PEFT_DORA, LORA_OR_DORA)),
        Cell("diffusers", ("anima",), (NOTHING,)),
        Cell("diffusers", ("sdxl", *SD), (UNKNOWN,)),
        Cell("diffusers-old", ("sdxl", *SD), (UNKNOWN,)),
        Cell("lycoris", ("sdxl", "flux", "flux2"), (UNKNOWN,)),
        Cell("lycoris", (*SD, "qwen-image", "z-image", "wan", "krea2", "anima"), (NOTHING,)),
        Cell(
            "onetrainer",
            ("flux",),
            (
                Loss("stop its converter", modules=r"(_mod|modulation)\.lin$", whole=True),
                Loss(
                    UNNAMED,
                    modules=rf"^transformer\.({EMBEDDERS}|vector_in|final_layer)",
                    whole=True,
                ),
                Loss(REFUSES, besides=("lora", "lora+dora"), whole=True),
            ),
        ),
        Cell("onetrainer", ("flux2",), (UNKNOWN,)),
        Cell("onetrainer", FAMILIES, (NOTHING,)),
        Cell("xlabs", ("flux",)),
        Cell("bare", ("flux",), having=r"single_blocks\.0\.norm\.key_norm"),
        Cell("bare", ("flux", "sdxl", *SD), (UNKNOWN,)),
        Cell("bare", ("flux2",), (Loss(PASSED_OVER, unnamed="diffusers"), DOWN, ALPHA, LORA)),
        Cell(
            "bare",
            ("qwen-image", "z-image"),
            (Loss(PASSED_OVER, unnamed="diffusers"), UNSCALED, NO_DORA, LORA_OR_DORA),
        ),
        Cell("bare", ("krea2",), (LORA_OR_DORA,)),
        Cell("bare", ("wan",), (WAN, LORA_OR_DORA)),
        Cell(
            "bare",
            ("anima",),
            (Loss(PASSED_OVER, unnamed="native"), UNSCALED, NO_DORA, LORA_OR_DORA),
        ),
        Cell("peft", ("flux",), (NORM_OUT, ALPHA, LORA)),
        Cell("peft", ("flux2",), (ALPHA, LORA)),
        Cell("peft", ("sdxl", *SD), (UNKNOWN,)),
        Cell("peft", ("qwen-image", "z-image", "wan", "krea2", "anima"), (NOTHING,)),
        Cell("kohya-oft", ("sdxl", *SD, *FAMILIES), (UNKNOWN,)),
    ),
    writes={
        **dict.fromkeys((*SD, "sdxl"), ("kohya",)),
        "flux": ("kohya", "comfy", "diffusers", "onetrainer"),
        "": ("diffusers", "comfy", "kohya"),
        "wan": ("kohya", "comfy"),
    },
    always=(
        Loss("have their alpha in metadata, which it does not read", stated=True),
        Loss(
            "are DoRA on the output axis, which it takes for the input axis",
            algorithms=DORA,
            axis="output",
        ),
    ),
    unsupported={
        **dict.fromkeys(
            ("chroma", "hunyuan-video", "hunyuan-image", "hunyuan-video-15", "framepack"), MISREAD
        ),
        **dict.fromkeys(
            ("sd3", "sd35-large", "lumina2", "ideogram4", "auraflow", "ltx", "ltx2"), NONE
        ),
        "sdxl-refiner": "it takes the block names of the refiner for those of SDXL",
    },
)
