"""kohya's tools: sd-scripts and musubi-tuner, which read their own keys and convert others on request."""

from __future__ import annotations

from adaptkit.hosts._host import SD, Cell, Host

FOREIGN = "its tools read kohya keys; musubi-tuner and sd-scripts convert others with scripts of their own"
FAMILIES = (
    *SD, "sdxl", "sd3", "sd35-large", "flux", "chroma", "flux2", "hunyuan-video", "framepack", "hunyuan-video-15",
    "hunyuan-image", "qwen-image", "wan", "z-image", "lumina2", "anima", "krea2", "ideogram4",
)  # fmt: skip
ANY = ("lora", "loha", "lokr", "full", "oft", "boft", "glora", "ia3", "kohya-oft")
UNTRAINED = "neither sd-scripts nor musubi-tuner knows this family"

HOST = Host(
    name="kohya",
    title="kohya (sd-scripts, musubi-tuner)",
    measured="read in the source, August 2026",
    cells=(
        Cell("kohya", SD, "native", note="it wants diffusers' block names for this family"),
        Cell("kohya", ("sdxl",), "diffusers", lost=(r"^unet\.",), note="are not found under diffusers' names"),
        Cell("kohya", FAMILIES),
        Cell("kohya-oft", ("sdxl", "flux")),
        *(
            Cell(format, FAMILIES, note=FOREIGN)
            for format in ("comfy", "diffusers", "peft", "lycoris", "bare", "onetrainer", "xlabs")
        ),
    ),
    algorithms=dict.fromkeys((*ANY, *(f"{name}+dora" for name in ("lora", "loha", "lokr"))), ()),
    writes={**dict.fromkeys(FAMILIES, "kohya")},
    unsupported=dict.fromkeys(("auraflow", "ltx", "ltx2", "sdxl-refiner"), UNTRAINED),
)
