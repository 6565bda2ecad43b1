"""ComfyUI: reads most formats; drops unmapped keys with a line in the log."""

from __future__ import annotations

from adaptkit.hosts.contract import DORA, NO_MODEL, UNETS, Cell, Host, Loss
from adaptkit.keymap import Dialect

READ = ("lora", "loha", "lokr", "full", "glora", "set", *DORA)
MISREAD = "are stored with a full `lokr_w2` of {n} dimensions, which it takes for another product"
FAILS = "have Tucker cores, for which its product fails: they are left out with an error in the log"

HOST = Host(
    name="comfyui",
    also=("comfy", "comfy-ui"),
    title="ComfyUI",
    cells=(
        # black-forest-labs' control LoRAs get the prefix of its own names
        Cell("bare", ("flux",), having=r"single_blocks\.0\.norm\.key_norm", like="comfy"),
        Cell(
            "xlabs",
            ("flux",),
            needs=(r"single_blocks\.37\.linear1", r"double_blocks\.18\.txt_attn\.qkv"),
            partial=Loss(
                "it reads XLabs files only with all 19 double and 38 single blocks", whole=True
            ),
        ),
    ),
    unread=Loss("are dropped with a line in the log"),
    dialect=Dialect(flat=("lokr_w2",)),
    writes={
        **dict.fromkeys(UNETS, ("kohya", "comfy")),
        "ace-step": ("peft", "lycoris"),
        "pixart": ("diffusers", "peft"),
        "": ("comfy", "kohya"),
    },
    # it has code for OFT and BOFT, which was not tried
    algorithms=(*READ, "kohya-oft", "ia3", "peft-oft", "peft-boft"),
    always=(
        Loss("are {kinds}, which it does not read", besides=READ),
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
        # its one row makes it take the magnitudes of the input axis for those of the output axis
        Loss(
            "are DoRA on a layer of one row, for which it divides by another norm",
            algorithms=DORA,
            modules=r"txtfusion\.projector$",
            axis="input",
        ),
        Loss("are differences named `diff_m`, which it does not read", suffix=r"diff_m$"),
        Loss(MISREAD.replace("{n}", "three"), suffix=r"lokr_w2$", kernel=1),
        Loss(MISREAD.replace("{n}", "five"), suffix=r"lokr_w2$", kernel=3),
        Loss(FAILS, suffix=r"lora_mid|hada_t", kernel=1),
        Loss(FAILS, suffix=r"lora_mid|hada_t", kernel=3),
        Loss(FAILS, suffix=r"lokr_t2"),
    ),
    unsupported={
        "framepack": "ComfyUI itself does not run FramePack; its wrapper nodes load kohya files",
        **dict.fromkeys(
            ("bria-fibo", "bria-fibo2", "cogview4", "flux3", "glm-image", "prx", "sana"),
            NO_MODEL,
        ),
    },
)
