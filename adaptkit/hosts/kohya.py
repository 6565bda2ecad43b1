"""kohya's tools (sd-scripts, musubi-tuner): read their own keys, convert others on request."""

from __future__ import annotations

from adaptkit.hosts.contract import DORA, SD, Cell, Host, Loss

FAMILIES = (
    *SD, "sdxl", "sd3", "sd35-large", "flux", "chroma", "flux2", "hunyuan-video", "framepack",
    "hunyuan-video-15",
    "hunyuan-image", "qwen-image", "wan", "z-image", "lumina2", "anima", "krea2", "ideogram4",
)  # fmt: skip
FOREIGN = Loss(
    "its tools read kohya keys; musubi-tuner and sd-scripts convert others with scripts "
    "of their own",
    whole=True,
)
NOT_FOUND = "are not found under these names"
READ = ("lora", "loha", "lokr", "full", "oft", "boft", "glora", "ia3", "kohya-oft", *DORA)

HOST = Host(
    name="kohya",
    title="kohya (sd-scripts, musubi-tuner)",
    measured="read in the source, August 2026",
    cells=(
        Cell("kohya", SD, (Loss(NOT_FOUND, unnamed="diffusers"),)),
        Cell("kohya", ("sdxl",), (Loss(NOT_FOUND, unnamed="native"),)),
        Cell("kohya", FAMILIES),
        Cell("kohya-oft", ("sdxl", "flux")),
        *(
            Cell(format, FAMILIES, (FOREIGN,))
            for format in (
                "comfy",
                "diffusers",
                "diffusers-old",
                "peft",
                "lycoris",
                "bare",
                "onetrainer",
                "xlabs",
                "omi",
            )
        ),
    ),
    writes={"": ("kohya", "kohya-oft")},
    always=(
        Loss("are {kinds}, which its tools do not load", besides=READ),
        Loss("have their alpha in metadata, which its tools do not read", stated=True),
    ),
    unsupported=dict.fromkeys(
        ("auraflow", "ltx", "ltx2", "sdxl-refiner"),
        "neither sd-scripts nor musubi-tuner knows this family",
    ),
)
