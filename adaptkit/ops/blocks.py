"""Names for parts of a model: the block a module belongs to, and what kind of layer it is."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from adaptkit.names import BIAS

if TYPE_CHECKING:
    from adaptkit.algorithms.contract import Facts

__all__ = ["KINDS", "NUMBERED", "STAGES", "block_of", "kind_of"]


LIST = r"(?:blocks?|layers?|refiner|stages?)"  # how the names of lists of equal blocks end


BLOCK = re.compile(rf"(?:.*?[._])?(?:(?:mid|middle)_block|\w*?{LIST}[._]\d+)(?=[._])")


NUMBERED = re.compile(rf"(.*{LIST})[._](\d+)")  # `unet.down_blocks.1`, but not `text_encoder_2`


STAGES = (
    ("down_blocks", "input_blocks"),
    ("mid_block", "middle_block"),
    ("up_blocks", "output_blocks"),
)


# the first that is found in a module's name below its block; biases and norms are told by their shape
PATTERNS = {
    "mod": r"ada_?(ln|norm)|modulation|(^|[._])mod([._]|$)|norm\w*[._]linear|scale_shift",
    "emb": r"emb|(^|[._])(img|txt|time|vector|guidance|vision|byt5)_in([._]|$)|patchify|caption_proj",
    "conv": r"conv|samplers|skip_connection|(in|out)_layers|[._]op$",
    "fused": r"^linear[12]$|qkv_mlp",  # attention and ff in one matrix
    "qkv": r"qkv|att\w*[._]in_proj|(^|[._])(to_)?kv(_proj)?$",
    "ff": r"(^|[._])ffn?([._]|$)|mlp|feed_?forward|fc\d|densereludense",
    "q": r"(^|[._])(to_|add_|w)?q(uery)?(_proj|_img)?$",
    "k": r"(^|[._])(to_|add_|w)?k(ey)?(_proj|_img)?$",
    "v": r"(^|[._])(to_|add_|w)?v(alue)?(_proj|_img)?$",
    "out": r"(to_(add_)?out|(^|[._])wo|att\w*[._](proj|out|o|out_proj|o_proj|output_proj))([._]\d+)?$",
    "proj": r"proj",
}


KINDS = (
    "q",
    "k",
    "v",
    "qkv",
    "out",
    "fused",
    "ff",
    "mod",
    "conv",
    "proj",
    "emb",
    "norm",
    "bias",
    "other",
)


def block_of(label: str, component: str) -> str:
    """The block a module stands in: its name up to the first number of a list of blocks, or its component where there is none.

    >>> block_of("unet.down_blocks.1.attentions.0.proj_in", "unet")
    'unet.down_blocks.1'
    """
    found = BLOCK.match(label)
    return found.group() if found else component


def kind_of(inside: str, param: str, facts: Facts) -> str:
    """What sort of layer a module is, by its name below its block (`.attn1.to_q`): one of `KINDS`."""
    if facts.vector:
        return "bias" if param == BIAS else "norm"
    name = inside.strip("._").lower()
    found = next((kind for kind, pattern in PATTERNS.items() if re.search(pattern, name)), "other")
    window = math.prod(facts.kernel or ())
    return "conv" if window > 1 and found in ("other", "proj") else found
