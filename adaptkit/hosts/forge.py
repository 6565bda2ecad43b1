"""Forge (lllyasviel's): reads kohya's names; loads nothing of a file with 13 strange keys.

Forge Neo has more models and another limit; it was not measured.
"""

from __future__ import annotations

from adaptkit.hosts.contract import BEYOND_WEBUI, DORA, NO_MODEL, UNETS, Cell, Host, Loss
from adaptkit.keymap import Dialect

READ = ("lora", "loha", "lokr", "full", "glora", "set", *DORA)
SPARE = 12  # keys without a place, with which it still loads the others

HOST = Host(
    name="forge",
    also=("sd-webui-forge", "webui-forge"),
    title="Forge",
    cells=(
        # black-forest-labs' control LoRAs get the prefix of its own names
        Cell("bare", ("flux",), having=r"single_blocks\.0\.norm\.key_norm", like="comfy"),
    ),
    unread=Loss("are dropped with a line in the log"),
    spare=SPARE,
    refuses=Loss(
        f"it loads nothing of a file in which more than {SPARE} keys have no place", whole=True
    ),
    dialect=Dialect(flat=("lokr_w2",)),
    writes={**dict.fromkeys(UNETS, ("kohya", "comfy")), "": ("kohya", "comfy")},
    always=(
        Loss("are {kinds}, which it does not read", besides=READ, left="."),
        Loss("have their alpha in metadata, which it does not read", stated=True),
        Loss(
            "lose their DoRA magnitudes under PEFT's name",
            algorithms=DORA,
            suffix="lora_magnitude_vector",
            left="lora_magnitude_vector",
        ),
        Loss(
            "are DoRA on the output axis, for which it divides by another norm",
            algorithms=DORA,
            axis="output",
        ),
        Loss("have Tucker cores, for which its product fails", suffix=r"lokr_t2", whole=True),
    ),
    unsupported=dict.fromkeys(BEYOND_WEBUI, NO_MODEL),
)
