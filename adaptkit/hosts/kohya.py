"""kohya's tools (sd-scripts, musubi-tuner): read their own keys, convert others on request."""

from __future__ import annotations

from dataclasses import replace

from adaptkit.hosts.contract import NO_MODEL, Cell, Host, Loss

# sd-scripts trains these; musubi-tuner the others, and FLUX.1 Kontext
SCRIPTS = ("sd1", "sd2", "sdxl", "sd3", "sd35-large", "chroma", "lumina2", "anima", "hunyuan-image")
FOREIGN = Loss(
    "its tools read kohya keys; musubi-tuner and sd-scripts convert others with scripts "
    "of their own",
    whole=True,
)
PLAIN = Loss("are {kinds}, which sd-scripts does not load", besides=("lora", "kohya-oft"))
NO_ALPHA = Loss("have no alpha, without which its tool stops", untold=True, whole=True)
ONLY_LORA = Loss("are convolutions, of which it merges plain LoRAs only", besides=("lora",))
CORES = Loss("have Tucker cores, which its tools do not load", suffix="lora_mid|hada_t|lokr_t2")
FACTORS = Loss(
    "have factors of other names than lora_down and lora_up, which its tools do not read",
    suffix=r"lora_A|lora\.|lora_linear",
)

# of Wan's kin, of one and two dimensions
CONVOLUTIONS = (
    r"(face_encoder|casual_audio_encoder\.encoder)\.conv|control_adapter\.(conv|res)|ref_conv"
)

HOST = Host(
    name="kohya",
    also=("reforge", "sd-scripts", "musubi-tuner"),
    title="kohya (sd-scripts, musubi-tuner)",
    cells=(
        Cell("kohya", SCRIPTS, (PLAIN,)),
        Cell("onetrainer", SCRIPTS, (PLAIN,)),
        # musubi-tuner merges it by its network, which is that of LoRA alone
        Cell(
            "kohya",
            ("kandinsky5",),
            (replace(PLAIN, what=PLAIN.what.replace("sd-scripts", "musubi-tuner")), NO_ALPHA),
        ),
        Cell(
            "kohya",
            (
                "flux2",
                "hunyuan-video",
                "framepack",
                "hunyuan-video-15",
                "qwen-image",
                "wan",
                "z-image",
                "krea2",
                "ideogram4",
            ),
            (
                Loss("are convolutions of three dimensions, which it cannot merge", kernel=3),
                replace(ONLY_LORA, kernel=3),
                # flat factors do not show that they are convolutions
                replace(ONLY_LORA, modules=CONVOLUTIONS),
            ),
        ),
    ),
    unread=Loss("are not among the layers that its tools adapt"),
    nothing=FOREIGN,
    writes={"": ("kohya", "kohya-oft")},
    always=(
        Loss(
            "are {kinds}, which its tools do not load",
            besides=("lora", "loha", "lokr", "kohya-oft"),
        ),
        CORES,
        FACTORS,
        Loss("have their alpha in metadata, which its tools do not read", stated=True),
    ),
    unsupported=dict.fromkeys(
        (
            "auraflow",
            "ltx",
            "ltx2",
            "ltx-13b",
            "sdxl-refiner",
            "ace-step",
            "bria-fibo",
            "bria-fibo2",
            "cogvideox",
            "cogview4",
            "cosmos",
            "cosmos-14b",
            "flux3",
            "glm-image",
            "hidream",
            "hunyuan-dit",
            "mochi",
            "pixart",
            "prx",
            "sana",
            "wan-animate2",
            "longcat-image",
            "ovis-image",
            "stable-cascade",
        ),
        NO_MODEL,
    ),
)
