"""stable-diffusion.cpp: adds what it finds to the weights, and leaves out what it does not.

Measured where it applies adapters immediately, as it does to a model that is not quantised.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.hosts.contract import DORA, NO_MODEL, Cell, Host, Loss
from adaptkit.keymap import Dialect

if TYPE_CHECKING:
    from adaptkit.hosts.contract import Piece

READ = ("lora", "loha", "lokr", "full", "lora+dora")
# families in which it has one weight where others have a layer for each of q, k and v
FUSED = (
    "sd2", "sdxl", "sd3", "sd35-large", "flux", "flux2", "chroma", "z-image", "longcat-image",
    "ovis-image",
)  # fmt: skip
FIVE = "have factors of five dimensions, at which it ends"
# of the layers that its models have
FOUND = r"^transformer\.(patch_embedding|img_in\.proj)$"
ENDS = (
    Loss(FIVE, modules=FOUND, algorithms=("lora", "lora+dora"), kernel=3, whole=True),
    Loss(FIVE, modules=FOUND, suffix="hada_t|lokr_t2", kernel=3, whole=True),
)
WINDOW = "have a full `lokr_w2` with a window, which it takes for another product"
SPLIT = ("bare", "comfy", "diffusers", "kohya", "lycoris", "onetrainer")  # formats that name them
BEYOND = (
    "ace-step", "auraflow", "bria-fibo", "bria-fibo2", "cogvideox", "cogview4", "cosmos",
    "cosmos-14b", "flux3", "framepack", "glm-image", "hidream", "hunyuan-dit",
    "hunyuan-image", "hunyuan-video", "kandinsky5", "ltx", "ltx-13b", "lumina2", "mochi",
    "pixart", "prx", "qwen-image-21", "sana", "sdxl-refiner", "stable-cascade",
    "wan-animate2",
)  # fmt: skip
PARTLY = (
    "are left out: it puts the parts of a fused layer together in their order, and stops at the "
    "first that is missing"
)


def _in_order(pieces: tuple[Piece, ...]) -> Loss | None:
    """Of the parts of one weight it takes those before the first that is not in the file."""
    weights: dict[str, list[tuple[float, float, str]]] = {}
    for piece in pieces:
        rows = piece.slot.rows
        if rows is not None:
            part = (rows.start / rows.total, rows.stop / rows.total, piece.stem)
            weights.setdefault(str(piece.slot.target), []).append(part)
    late: set[str] = set()
    for parts in weights.values():
        reached = 0.0
        for start, stop, stem in sorted(parts):
            if start > reached:
                late.add(stem)
            else:
                reached = stop
    return Loss(PARTLY, stems=frozenset(late)) if late else None


HOST = Host(
    name="sdcpp",
    also=("sd.cpp", "stable-diffusion.cpp", "stable-diffusion-cpp"),
    title="stable-diffusion.cpp",
    cells=(
        *(Cell(format, FUSED, check=_in_order) for format in SPLIT),
        *(Cell(format, ("wan", "hunyuan-video-15"), ENDS) for format in ("comfy", "diffusers")),
    ),
    unread=Loss("are not applied"),
    dialect=Dialect(flat=("lokr_w2",)),
    writes={"": ("comfy", "kohya", "diffusers")},
    algorithms=(*READ, "glora", "ia3", "oft", "kohya-oft"),
    always=(
        Loss("are {kinds}, which it does not read", besides=READ),
        Loss("have their alpha in metadata, which it does not read", stated=True),
        Loss("lose their DoRA magnitudes", algorithms=DORA),
        # it takes the last dimension that is not one for the rank
        Loss("have rank 1, for which it divides alpha by the width", rank=1, told=True),
        Loss("have Tucker cores, at which it ends", suffix="lokr_t2", kernel=2, whole=True),
        Loss("have Tucker cores, of which it swaps inputs and outputs", suffix="lora_mid|hada_t"),
        Loss(WINDOW, suffix=r"lokr_w2$", kernel=2),
        Loss(WINDOW, suffix=r"lokr_w2$", kernel=3),
    ),
    unsupported={
        **dict.fromkeys(BEYOND, NO_MODEL),
        "hidream-o1": "it reads none of the names that adapters of this family have",
    },
)
