"""AUTOMATIC1111's WebUI: reads kohya's names, and stops at a module of no kind that it knows."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from adaptkit.hosts.contract import BEYOND_WEBUI, DORA, NO_MODEL, Cell, Host, Loss

if TYPE_CHECKING:
    from collections.abc import Callable

    from adaptkit.hosts.contract import Piece

READ = ("lora", "loha", "lokr", "full", *DORA)
UNKNOWN = Loss("are {kinds}, at which it stops", besides=READ, whole=True)
FACTORS = Loss("have factors of names at which it stops", suffix=r"lora\.|lora_linear", whole=True)
PROJECTIONS = re.compile(
    r"(.*\.self_attn\.)(?:in|out)_proj$"
)  # queries, keys and values are in one


def _joint(component: str) -> Callable[[tuple[Piece, ...]], Loss | None]:
    """Of OpenCLIP's attention it applies nothing unless the file has all four projections."""

    def check(pieces: tuple[Piece, ...]) -> Loss | None:
        found: dict[str, int] = {}
        for piece in pieces:
            target = piece.slot.target
            hit = PROJECTIONS.match(target.module) if target.component == component else None
            if hit:
                found[hit[1]] = found.get(hit[1], 0) + 1
        short = [re.escape(f"{component}.{block}") for block, count in found.items() if count < 4]
        return Loss(PARTLY, modules="|".join(f"^{block}" for block in short)) if short else None

    return check


PARTLY = "are left out, because the file has not all four projections of that attention"

HOST = Host(
    name="a1111",
    also=("automatic1111", "sd-webui", "webui", "stable-diffusion-webui"),
    title="A1111",
    cells=(
        Cell("kohya", ("sd2",), check=_joint("text_encoder")),
        Cell("kohya", ("sdxl",), check=_joint("text_encoder_2")),
    ),
    unread=Loss("are dropped without a message"),
    # an error is shown where the first word is the name of a layer
    nothing=Loss("none of these names is read: nothing loads", whole=True),
    writes={"": ("kohya",)},
    # it has code for IA³, GLoRA and OFT, which was not tried
    algorithms=(*READ, "set", "peft-oft", "peft-boft"),
    always=(
        UNKNOWN,
        FACTORS,
        Loss(
            "have alpha tensors beside lora_A, which it ignores",
            told=True,
            suffix=r"lora_A",
        ),
        Loss("lose their DoRA magnitudes", algorithms=DORA, suffix=r"lora_A"),
        Loss("have their alpha in metadata, which it does not read", stated=True),
        Loss(
            "are DoRA on the output axis, which it takes for the input axis",
            algorithms=DORA,
            axis="output",
        ),
    ),
    unsupported=dict.fromkeys((*BEYOND_WEBUI, "flux", "chroma", "sd35-large"), NO_MODEL),
)
