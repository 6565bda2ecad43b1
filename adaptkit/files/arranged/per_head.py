"""DiffSynth-Studio's fused projections: q, k and v of each head together.

It runs MiniMax-H3 in the rows of the original checkpoint, `head 0: q k v, head 1: q k v, …`, and
all other tools in those of the original program, all q, then all k, then all v. Its trainer writes
PEFT's name of the adapter, `lora_A.default.weight`, and that tells such a file (as diffusers does,
`_convert_non_diffusers_minimax_h3_lora_to_diffusers`).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from adaptkit.errors import ShapeMismatch
from adaptkit.files.arranged.contract import Arranged

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from adaptkit.files.header import TensorInfo

__all__ = ["LAYOUT", "find"]

LAYOUT = "diffsynth"
MARK = ".lora_A.default.weight"
# what has the rows of the layer
BY_ROWS = (".lora_B.default.weight", ".lora_magnitude_vector.default.weight")
PARTS = 3  # q, k and v


def find(infos: Mapping[str, TensorInfo], ends: Sequence[tuple[str, int]]) -> dict[str, Arranged]:
    """The tensors whose rows are by heads; `ends` are ends of modules and the rows of a head."""
    found: dict[str, Arranged] = {}
    for end, head in ends:
        for key in infos:
            if not key.endswith(end + MARK):
                continue
            for info in filter(None, (infos.get(key.removesuffix(MARK) + s) for s in BY_ROWS)):
                rows = info.shape[0] if info.shape else 0
                if not rows or rows % (PARTS * head):
                    raise ShapeMismatch(
                        f"{rows} rows are not q, k and v of heads of {head}, which DiffSynth-Studio"
                        " stores together",
                        hint="load it in diffusers and save it with save_lora_weights",
                        tensor=info.name,
                    )
                read = partial(_in_order, key=info.name, head=head)
                found[info.name] = Arranged(info.dtype, info.shape, {info.name: info.name}, read)
    return found


def _in_order(stored: Mapping[str, Tensor], key: str, head: int) -> Tensor:
    """Rows (heads, 3, head) as (3, heads, head)."""
    rows = stored[key]
    grouped = rows.reshape(-1, PARTS, head, *rows.shape[1:])
    return grouped.transpose(0, 1).reshape(rows.shape)
