"""Wan2GP (deepbeepmeep's): loads a file whole, or stops with an error.

Of Wan, the model from an image was tried, which has the layers of that from text; no other kinds.
"""

from __future__ import annotations

from adaptkit.hosts.contract import DORA, NO_MODEL, Cell, Host, Loss

# of these it has neither a folder of code nor a definition of a model
BEYOND = (
    "anima", "auraflow", "bria-fibo", "bria-fibo2", "cogvideox", "cogview4", "cosmos", "cosmos-14b",
    "ernie-image", "flux3", "glm-image", "hunyuan-dit", "hunyuan-image", "lumina2", "mochi",
    "ovis-image", "pixart", "prx", "sana", "sd1", "sd2", "sd3", "sd35-large", "sdxl",
    "sdxl-refiner", "stable-cascade",
)  # fmt: skip
REFUSED = Loss("it refuses a file with names that it does not know", whole=True)
FORMATS = ("bare", "diffusers")
HALVES = Loss(
    "come out with scale and shift swapped, unless called lora_B",
    modules=r"final_layer\.adaLN_modulation\.1$",
    named="diffusers",
    suffix=r"(?!lora_[AB])",
)
LINEAR1 = Loss(
    "are differences of joint projections, at which it refuses the file",
    modules=r"single_blocks\.\d+\.linear1$",
    suffix=r"diff$",
    whole=True,
)

HOST = Host(
    name="wan2gp",
    also=("wangp", "mmgp"),
    title="Wan2GP",
    # it swaps the halves of the last modulation in tensors called lora_B alone
    cells=tuple(
        Cell(format, families, losses)
        for format in FORMATS
        for families, losses in ((("chroma", "flux"), (HALVES,)), (("flux2",), (HALVES, LINEAR1)))
    ),
    unread=REFUSED,
    nothing=REFUSED,
    # DoRA loads or not as alpha is, which no description here tells
    algorithms=("full", "glora", "ia3", "loha", "lokr", "lora"),
    writes={"": ("diffusers", "comfy", "kohya", "bare"), "wan": ("comfy", "kohya", "bare")},
    untried={
        "chroma": r"\.(img_in_patch|nerf_)",
        "wan": r"\.(vace_|pose_|face_|casual_|audio_|cond|frame_|ref_conv|control_|fps_|far_)"
        r"|\.(patch_|audio_cross_attn_wrapper|cam_encoder|projector)|^transformer_",
        "z-image": r"\.siglip_",
    },
    always=(
        Loss(
            "are {kinds}, at which it refuses the file",
            besides=("lora", "lokr", "full", *DORA),
            whole=True,
        ),
        Loss(
            "have factors of factors or Tucker cores, at which it refuses the file",
            suffix=r"lora_mid|lokr_w\d_[ab]|lokr_t2",
            whole=True,
        ),
        Loss(
            "are differences of joint projections, at which it refuses the file",
            modules=r"(double|single)_blocks\.\d+\.(\w+\.qkv|linear1)$",
            named="native",
            suffix=r"diff$",
            whole=True,
        ),
        Loss("have their alpha in metadata, which it does not read", stated=True),
    ),
    unsupported=dict.fromkeys(BEYOND, NO_MODEL),
)
