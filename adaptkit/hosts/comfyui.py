"""ComfyUI: reads most formats; drops in silence what its key maps do not name."""

from __future__ import annotations

from adaptkit.hosts._host import SD, UNETS, Cell, Host

DROPPED = "are dropped with a line in the log"
FLUX = ("flux", "chroma")
HUNYUAN = ("hunyuan-video", "hunyuan-video-15", "hunyuan-image")
TE = (r"^text_encoder",)

HOST = Host(
    name="comfyui",
    title="ComfyUI",
    measured="January 2026",
    cells=(
        Cell(
            "kohya", (*UNETS, "sd3", "sd35-large", "flux", "chroma", "flux2", "qwen-image", "wan", "krea2", "ideogram4")
        ),
        Cell("kohya", ("anima", "lumina2"), lost=TE, note=DROPPED),
        Cell("kohya", ("z-image",), "diffusers", (r"attention\.",), DROPPED),
        Cell("kohya", ("z-image",)),
        Cell("kohya", ("hunyuan-video",), lost=(r"_mlp",), note=DROPPED),
        Cell("kohya", ("hunyuan-image",), lost=(r"_mlp", r"_mod", r"modulation"), note=DROPPED),
        Cell("kohya", ("hunyuan-video-15",), lost=(r"^(?!.*_attn[._]proj$)",), note=DROPPED),
        Cell("lycoris", ("sdxl", *SD)),
        Cell("comfy", HUNYUAN, "comfy"),
        Cell("comfy", ("hunyuan-video",), lost=(r"guidance_in", r"time_in", r"\.[ct]_embedder"), note=DROPPED),
        Cell(
            "comfy", (*UNETS, "sd3", "sd35-large", *FLUX, "flux2", "qwen-image", "wan", "z-image", "lumina2", "krea2")
        ),
        Cell("comfy", ("ideogram4", "anima", "auraflow", "ltx", "ltx2")),
        Cell("diffusers", UNETS, lost=(r"^unet\..*attn\d\.",), note=DROPPED),
        Cell("diffusers", ("sd3", "sd35-large", "flux", "qwen-image", "z-image")),
        Cell("diffusers", ("flux2",), lost=(r"stream_modulation", r"time_in", r"guidance_in"), note=DROPPED),
        Cell(
            "diffusers",
            ("wan", *HUNYUAN, "framepack", "lumina2", "krea2", "ideogram4", "anima"),
            note="its key map has no diffusers names for this family: nothing loads, and no error is shown",
        ),
        Cell("onetrainer", ("flux",)),
        Cell("bare", ("flux",)),
        Cell("peft", ("flux",), note="`base_model.model.` is not read: nothing loads, and no error is shown"),
        Cell("kohya-oft", ("sdxl", "flux"), note="`oft_unet_` is not read: nothing loads, and no error is shown"),
    ),
    algorithms=dict.fromkeys(
        ("lora", "loha", "lokr", "full", "lora+dora", "loha+dora", "lokr+dora", "glora", "set"), ()
    ),
    writes={**dict.fromkeys(UNETS, "kohya"), "": "comfy"},
    unsupported={"framepack": "ComfyUI itself does not run FramePack; its wrapper nodes load kohya files"},
    axes=("input",),
)
