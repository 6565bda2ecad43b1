"""SD.Next (vladmandic's): what its own loader makes of a file.

Of families that it has none for it leaves a file to diffusers, which was not tried there.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from adaptkit.hosts.contract import DORA, Cell, Host, Loss
from adaptkit.keymap import Dialect

if TYPE_CHECKING:
    from adaptkit.hosts.contract import Piece

UNETS, SD3 = ("sd1", "sd2", "sdxl"), ("sd3", "sd35-large")
LORA = ("lora", *DORA)
BLOCKS = r"^transformer\.(double_blocks|single_blocks|joint_blocks)\."
# of names behind a prefix with a dot, its first loader knows the suffixes of these alone
PLAIN = Loss(
    "have tensors of names that it does not read behind this prefix: lora_up and lora_down alone",
    suffix=r"(?!lora_(up|down)\.weight$)",
)
UNCONVERTED = Loss("are {kinds}, which its converter does not know", modules=BLOCKS, besides=LORA)
SWAPPED = Loss("change places: those of the image and those of the text", modules=r"attn\.qkv$")


def _rest(pieces: tuple[Piece, ...]) -> Loss | None:
    """Its converter takes plain LoRAs of the blocks; beside anything else it loses them."""
    taken = [
        piece
        for piece in pieces
        if re.search(BLOCKS, str(piece.slot.target))
        and piece.algorithm in LORA
        # it looks for the names of the original model
        and "native" in piece.namings
    ]
    if not taken:
        return None
    if not all(piece.told for piece in taken):
        return Loss("have no alpha, at which its converter stops", untold=True, whole=True)
    rest = len(taken) < len(pieces) or any(piece.algorithm in DORA for piece in taken)
    return Loss(BESIDE, modules=BLOCKS, algorithms=LORA) if rest else None


def _joint(modules: str, *more: str) -> tuple[Loss, ...]:
    """What it cannot split of layers that are one in a file and several in its model."""
    return (
        Loss(
            "are joint projections, of which it takes no {kinds}",
            modules=modules,
            named="native",
            algorithms=("full", *more),
        ),
        Loss(
            "are DoRA of joint projections on the input axis, which it leaves out",
            modules=modules,
            named="native",
            algorithms=DORA,
            axis="input",
        ),
    )


CHROMA = (*_joint(r"_attn\.qkv$"), *_joint(r"single_blocks\.\d+\.linear1$", "loha"))
SPLIT = ((("flux2", "z-image"), _joint(r"\.qkv$")), (("chroma",), CHROMA))
BESIDE = "are lost: it converts a file of such LoRAs only if there is nothing else in it"

HOST = Host(
    name="sdnext",
    also=("sd.next", "sd-next", "vladmandic"),
    title="SD.Next",
    cells=(
        Cell("diffusers", (*UNETS, *SD3, "flux"), (PLAIN,)),
        Cell("kohya", ("flux",), (UNCONVERTED,), check=_rest),
        Cell("kohya", SD3, (UNCONVERTED, SWAPPED), check=_rest),
        *(
            Cell(format, families, losses)
            for format in ("bare", "comfy", "kohya", "peft")
            for families, losses in (
                (("flux2", "z-image"), _joint(r"\.qkv$")),
                (("chroma",), CHROMA),
            )
        ),
    ),
    unread=Loss("are dropped with a line in the log"),
    # it has code for IA³, OFT and BOFT, which was not tried
    algorithms=("lora", "loha", "lokr", "full", "glora", *DORA),
    dialect=Dialect(),
    writes={**dict.fromkeys(UNETS, ("kohya",)), "": ("comfy", "diffusers", "kohya")},
    always=(
        Loss("are {kinds}, whose product fails", algorithms=("glora",)),
        Loss("have factors called lora.down and lora.up, which it does not read", suffix=r"lora\."),
        Loss("have their alpha in metadata, which it does not read", stated=True),
        Loss(
            "have PEFT's DoRA magnitudes of a window, which it takes for those of the inputs",
            algorithms=DORA,
            suffix="lora_magnitude_vector",
            kernel=2,
        ),
    ),
)
