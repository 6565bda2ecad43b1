"""ComfyUI: reads most formats; drops unmapped keys with a line in the log."""

from __future__ import annotations

from adaptkit.hosts.contract import DORA, NOTHING, SD, TE, UNETS, Cell, Host, Loss

DROPPED = "are dropped with a line in the log"
HUNYUAN = ("hunyuan-video", "hunyuan-video-15", "hunyuan-image")
GENERIC = (
    "sd3", "sd35-large", "flux", "chroma", "flux2", "qwen-image", "wan", "z-image", "lumina2",
    "anima", "krea2",
    "ideogram4", "auraflow", "ltx", "ltx2",
)  # fmt: skip
UNMAPPED = ("wan", *HUNYUAN, "lumina2", "krea2", "ideogram4", "anima", "ltx", "ltx2")
READ = ("lora", "loha", "lokr", "full", "glora", "set", *DORA)

# "comfy" is the naming of the layers in memory, after ComfyUI's conversion of the checkpoint
IN_MEMORY = Loss(DROPPED, unnamed="comfy")
FUSED = Loss(DROPPED, unnamed="native")
TEXT = Loss(DROPPED, modules=TE)
PROJECTION = Loss(DROPPED, modules=rf"{TE}\w*\.text_projection")
FLAT = Loss(DROPPED, named="flat", modules=TE)  # transformers 5 omits `text_model.`
GUIDANCE = Loss(DROPPED, modules="distilled_guidance_layer")
SHARED = Loss(DROPPED, modules="^transformer.*(stream_modulation|time_in|guidance_in)")

HOST = Host(
    name="comfyui",
    title="ComfyUI",
    measured="January 2026",
    cells=(
        Cell("kohya", ("sdxl-refiner", "lumina2", "anima", "chroma"), (TEXT,)),
        Cell("kohya", HUNYUAN, (IN_MEMORY,)),
        Cell("kohya", ("z-image",), (FUSED,)),
        Cell("kohya", (*UNETS, *GENERIC)),
        Cell(
            "comfy",
            ("hunyuan-video", "hunyuan-image"),
            (Loss(DROPPED, modules=r"guidance_in|time_in|\.[ct]_embedder", unnamed="comfy"),),
        ),
        Cell("comfy", ("hunyuan-video-15",), (IN_MEMORY,)),
        Cell("comfy", (*UNETS, *GENERIC)),
        Cell("diffusers", UNETS, (Loss(DROPPED, modules=r"^unet\..*attn\d\."), FLAT, PROJECTION)),
        Cell("diffusers", ("chroma",), (GUIDANCE, TEXT)),
        Cell("diffusers", ("flux2",), (SHARED,)),
        Cell("diffusers", ("z-image", "auraflow"), (TEXT,)),
        Cell("diffusers", ("flux",), (FLAT, Loss(DROPPED, modules=r"^text_encoder_2\."))),
        Cell(
            "diffusers",
            ("sd3", "sd35-large"),
            (FLAT, PROJECTION, Loss(DROPPED, modules=r"^text_encoder_3\.")),
        ),
        Cell("diffusers", ("qwen-image",)),
        Cell("diffusers", UNMAPPED, (NOTHING,)),
        Cell("diffusers-old", UNETS, (TEXT,)),
        Cell("lycoris", (*UNETS, "flux", "sd3", "sd35-large", "qwen-image", "z-image"), (TEXT,)),
        Cell("lycoris", ("chroma",), (GUIDANCE, TEXT)),
        Cell("lycoris", ("flux2",), (SHARED,)),
        Cell("lycoris", ("auraflow", *UNMAPPED), (NOTHING,)),
        Cell("onetrainer", ("flux", "sd3", "sd35-large")),
        Cell("onetrainer", ("chroma",), (GUIDANCE, TEXT)),
        Cell("onetrainer", ("flux2",), (SHARED,)),
        Cell("onetrainer", ("qwen-image", "z-image", "auraflow", *UNMAPPED), (NOTHING,)),
        # black-forest-labs' control LoRAs
        Cell("bare", ("flux",), having=r"single_blocks\.0\.norm\.key_norm"),
        Cell("bare", ("qwen-image",)),
        Cell("bare", ("z-image",), (Loss(DROPPED, unnamed="diffusers"),)),
        Cell("bare", ("flux", "chroma", "flux2", "auraflow", *UNMAPPED), (NOTHING,)),
        Cell(
            "peft",
            (*UNETS, "flux", "chroma", "flux2", "qwen-image", "z-image", "auraflow", *UNMAPPED),
            (NOTHING,),
        ),
        Cell(
            "xlabs",
            ("flux",),
            (
                Loss(
                    "it reads XLabs files only with all 19 double and 38 single blocks", whole=True
                ),
            ),
        ),
        Cell("kohya-oft", ("sdxl", *SD, *GENERIC), (NOTHING,)),
        Cell("omi", ("flux",), (NOTHING,)),
    ),
    writes={**dict.fromkeys(UNETS, ("kohya", "comfy")), "": ("comfy", "kohya")},
    always=(
        Loss("are {kinds}, which it does not read", besides=(*READ, "kohya-oft")),
        Loss("have their alpha in metadata, which it does not read", stated=True),
        Loss(
            "lose their DoRA magnitudes under PEFT's name",
            algorithms=DORA,
            suffix="lora_magnitude_vector",
        ),
        Loss(
            "are DoRA on the output axis, for which it divides by another norm",
            algorithms=DORA,
            axis="output",
        ),
    ),
    unsupported={
        "framepack": "ComfyUI itself does not run FramePack; its wrapper nodes load kohya files"
    },
)
