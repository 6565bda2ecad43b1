"""mflux (on Apple's MLX): reads plain LoRAs of the keys that its tables list for each model."""

from __future__ import annotations

from adaptkit.hosts.contract import DORA, NO_MODEL, Cell, Host, Loss

READ = ("lora", "lora+dora")
BEYOND = (
    "ace-step", "anima", "auraflow", "bria-fibo2", "chroma", "cogvideox", "cogview4",
    "cosmos", "cosmos-14b", "flux3", "framepack", "glm-image", "hidream", "hidream-o1",
    "hunyuan-dit", "hunyuan-image", "hunyuan-video", "hunyuan-video-15", "kandinsky5",
    "longcat-image", "ltx", "ltx-13b", "ltx2", "lumina2", "minimax-h3", "mochi",
    "ovis-image", "pixart", "prx", "qwen-image-21", "sana", "sd1", "sd2", "sd3",
    "sd35-large", "sdxl", "sdxl-refiner", "stable-cascade", "wan", "wan-animate2",
)  # fmt: skip
DOTTED = ("comfy", "diffusers")
ONLY_LISTED = ("ernie-image", "ideogram4", "krea2", "qwen-image", "z-image")
SPELLED = "have factors of names that it does not look for there"
OUTER = r"(final_layer|[xt]_embedder|cap_embedder)\b"


def _without(*beginnings: str, modules: str = "") -> Loss:
    """Factors whose names begin so are not looked for."""
    return Loss(SPELLED, modules=modules, suffix="|".join(beginnings))


def _cut(layer: str, parts: int) -> Loss:
    """Of a fused layer it cuts the down factor too if that divides, and then cannot multiply."""
    return Loss(
        f"are fused layers of a rank that {parts} divides, at which it stops while it generates",
        modules=layer,
        named="native",
        multiple=parts,
        whole=True,
    )


PEFT, KOHYA, OLD = "lora_[AB]", "lora_(up|down)", r"lora\."
QKV = _cut(r"_attn\.qkv$", 3)

HOST = Host(
    name="mflux",
    title="mflux",
    cells=(
        *(Cell("kohya", (name,), (_without(PEFT),)) for name in ONLY_LISTED),
        Cell("kohya", ("flux",), (_without(PEFT), QKV, _cut(r"single_blocks\.\d+\.linear1$", 4))),
        Cell("kohya", ("flux2",), (_without(PEFT), QKV)),
        Cell("bare", ("flux",), (_without(PEFT, modules=r"_mlp\."), _without(OLD))),
        Cell("diffusers", ("flux",), (_without(KOHYA, OLD),)),
        *(Cell(format, ("flux2",), (_without(OLD), QKV)) for format in (*DOTTED, "bare", "peft")),
        Cell("bare", ("qwen-image",), (_without(PEFT, OLD),)),
        Cell(
            "comfy",
            ("qwen-image",),
            (_without(KOHYA, OLD), Loss("have alpha tensors, which it ignores there", told=True)),
        ),
        Cell("diffusers", ("qwen-image",), (_without(PEFT, KOHYA),)),
        *(
            Cell(
                format,
                ("z-image",),
                (
                    _without(KOHYA, modules=OUTER),
                    _without(OLD),
                    Loss("have alpha tensors, which it ignores there", told=True, modules=OUTER),
                ),
            )
            for format in DOTTED
        ),
        Cell("bare", ("z-image",), (_without(OLD),)),
        *(
            Cell(format, ("ernie-image", "ideogram4"), (_without(KOHYA, OLD),))
            for format in (*DOTTED, "bare")
        ),
    ),
    unread=Loss("are dropped with a line in the output"),
    writes={"": ("diffusers", "comfy", "kohya")},
    algorithms=(*READ, "loha", "lokr", "full", "glora", "ia3", "oft", "kohya-oft"),
    always=(
        Loss("are {kinds}, which it does not read", besides=READ),
        Loss("have their alpha in metadata, which it does not read", stated=True),
        Loss("lose their DoRA magnitudes", algorithms=DORA),
    ),
    unsupported={
        **dict.fromkeys(BEYOND, NO_MODEL),
        "bria-fibo": "it runs FIBO, but applies no adapter to it",
    },
)
