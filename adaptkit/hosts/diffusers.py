"""diffusers: its own names load everywhere; of other spellings it converts what its converters know."""

from __future__ import annotations

from adaptkit.hosts._host import SD, UNETS, Cell, Host

SILENT = "nothing loads, and no error is shown"
RAISES = "its converter raises on such a file"
OUTSIDE = r"^transformer\.(img_in|txt_in|time_in|vector_in|guidance_in|final_layer)"
BLOCKS_ONLY = "are dropped without a message"
NO_PIPELINE = "its pipeline for this family has no LoRA loader"

HOST = Host(
    name="diffusers",
    title="diffusers",
    measured="0.42.1",
    cells=(
        Cell("kohya", SD, "native", note=RAISES),
        Cell("kohya", SD),
        Cell("kohya", ("sdxl",), "diffusers", (r"add_embedding",), "are given one name, so one is lost"),
        Cell("kohya", ("sdxl",)),
        Cell("kohya", ("flux", "chroma"), lost=(OUTSIDE, "distilled_guidance"), note=BLOCKS_ONLY),
        Cell("kohya", ("flux2",), lost=(r"stream_modulation", r"final_layer\.adaLN"), note=BLOCKS_ONLY),
        Cell("kohya", ("qwen-image",)),
        Cell("kohya", ("z-image",), "diffusers", note="its converter wants the fused names: " + SILENT),
        Cell("kohya", ("sd3", "sd35-large", "krea2", "ideogram4", "anima", "lumina2"), note=SILENT),
        Cell("kohya", ("hunyuan-video", "framepack"), note=RAISES),
        Cell("lycoris", (*UNETS, "flux"), note=RAISES),
        Cell("comfy", ("flux", *UNETS, "sd3", "sd35-large"), note=SILENT),
        Cell("comfy", ("chroma",), lost=(OUTSIDE, "distilled_guidance"), note="are dropped, or stop the converter"),
        Cell(
            "comfy",
            ("flux2",),
            lost=(r"final_layer\.adaLN",),
            note="come out with scale and shift exchanged",
            alpha=False,
        ),
        Cell("comfy", ("qwen-image",)),
        Cell("comfy", ("wan",), lost=(r"patch_embedding",), note="stop the converter"),
        Cell("comfy", ("z-image",), "diffusers"),
        Cell("comfy", ("z-image",), lost=(r"attention\.", r"final_layer", r"x_embedder"), note=BLOCKS_ONLY),
        Cell("comfy", ("hunyuan-video",), lost=(r"final_layer\.adaLN",), note="come out wrong", alpha=False),
        Cell("comfy", ("krea2", "anima", "ltx2"), alpha=False),
        Cell("comfy", ("ltx",), lost=(r"adaln_single", r"patchify_proj", r"^transformer\.proj_out"), note=BLOCKS_ONLY),
        Cell("diffusers", ("flux", "chroma", *UNETS)),
        Cell(
            "diffusers", ("sd3", "sd35-large", "flux2", "qwen-image", "wan", "z-image", "lumina2", "krea2"), alpha=False
        ),
        Cell("diffusers", ("hunyuan-video", "framepack", "ideogram4", "anima", "auraflow", "ltx", "ltx2"), alpha=False),
        Cell("xlabs", ("flux",)),
        Cell("bare", ("flux",)),
        Cell("onetrainer", ("flux",), note="its converter gives different modules one name, so the last one wins"),
        Cell("peft", ("flux",), note="it takes such a file for fal's and wants exactly the modules of those"),
    ),
    algorithms={"lora": (), "lora+dora": (), "lokr": ("flux2", "z-image"), "set": ("flux",), "full": ("flux",)},
    writes={"": "diffusers"},
    unsupported={
        "hunyuan-video-15": NO_PIPELINE,
        "hunyuan-image": NO_PIPELINE,
        "sdxl-refiner": "its refiner pipeline has no place for adapters",
    },
    metadata=True,
    tucker=False,
    equal_scales=("kohya",),
)
