"""InvokeAI: knows a format by its keys, family by family; misreads look-alikes of FLUX."""

from __future__ import annotations

from adaptkit.hosts._host import SD, Cell, Host

UNKNOWN = "it does not recognise such a file"
MISREAD = "it takes files of this family for FLUX.1"
NONE = "InvokeAI does not run this family"
PASSED_OVER = "are dropped without a message"
OUTSIDE = r"^transformer\.(text_embedding|time_embedding|time_projection|patch_embedding|head)"

HOST = Host(
    name="invokeai",
    title="InvokeAI",
    measured="August 2026",
    cells=(
        Cell("kohya", SD, "native", note=UNKNOWN),
        Cell("kohya", (*SD, "sdxl", "sdxl-refiner", "qwen-image", "krea2")),
        Cell(
            "kohya",
            ("flux",),
            lost=(r"final_layer", r"^text_encoder_2\."),
            note="are skipped, or make the file unrecognised",
        ),
        Cell("kohya", ("flux2",), lost=(r"qkv$", r"linear1$"), note=PASSED_OVER, algorithms=("lokr", "loha")),
        Cell("kohya", ("wan",), lost=(r"_img$", OUTSIDE), note=PASSED_OVER),
        Cell("kohya", ("z-image",), note="it wants `lora_unet__` with two underscores: nothing loads"),
        Cell("kohya", ("anima",), lost=(r"llm_adapter|text_conditioner",), note=PASSED_OVER),
        Cell("lycoris", ("sdxl",), note=UNKNOWN),
        Cell("comfy", ("flux",)),
        Cell("comfy", ("flux2",), lost=(r"final_layer\.adaLN",), note=PASSED_OVER),
        Cell("comfy", ("qwen-image",), note="`diffusion_model.` is not stripped: nothing loads"),
        Cell("comfy", ("wan",), lost=(r"_img$", OUTSIDE), note=PASSED_OVER),
        Cell("comfy", ("z-image",), "diffusers"),
        Cell("comfy", ("z-image",), lost=(r"attention\.", r"final_layer", r"x_embedder"), note=PASSED_OVER),
        Cell("comfy", ("krea2", "anima")),
        Cell("comfy", ("sdxl", *SD), note=UNKNOWN),
        Cell("diffusers", ("flux",), lost=(r"final_layer\.adaLN",), note="make it refuse the whole file"),
        Cell("diffusers", ("flux2", "qwen-image", "z-image", "krea2")),
        Cell("diffusers", ("wan",), lost=(r"_img$", OUTSIDE), note=PASSED_OVER),
        Cell("diffusers", ("sdxl", *SD), note=UNKNOWN),
        Cell("diffusers", ("anima",), note="nothing loads"),
        *(Cell(format, ("flux",)) for format in ("xlabs", "onetrainer", "bare", "peft")),
        Cell("kohya-oft", ("sdxl", "flux"), note=UNKNOWN),
    ),
    algorithms={"lora": (), "loha": (), "lokr": (), "full": (), "lora+dora": (), "set": ("flux",)},
    writes={
        **dict.fromkeys((*SD, "sdxl", "sdxl-refiner", "flux", "wan"), "kohya"),
        **dict.fromkeys(("flux2", "qwen-image", "z-image", "krea2"), "diffusers"),
        "anima": "comfy",
    },
    unsupported={
        **dict.fromkeys(("chroma", "hunyuan-video", "hunyuan-image", "hunyuan-video-15", "framepack"), MISREAD),
        **dict.fromkeys(("sd3", "sd35-large", "lumina2", "ideogram4", "auraflow", "ltx", "ltx2"), NONE),
    },
    axes=("input",),
)
