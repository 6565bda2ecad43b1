"""The block and the kind of layer of each module, from its name."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from adaptkit.names import BIAS

if TYPE_CHECKING:
    from adaptkit.algorithms.contract import Facts

__all__ = ["KINDS", "NUMBERED", "STAGES", "block_of", "kind_of"]


# how the names of lists of equal blocks end
LIST = r"(?:blocks?|layers?|refiner|stages?)"
BLOCK = re.compile(rf"(?:.*?[._])?(?:(?:mid|middle)_block|\w*?{LIST}[._]\d+)(?=[._])")


# matches `unet.down_blocks.1`, but not `text_encoder_2`
NUMBERED = re.compile(rf"(.*{LIST})[._](\d+)")
STAGES = (
    ("down_blocks", "input_blocks"),
    ("mid_block", "middle_block"),
    ("up_blocks", "output_blocks"),
)


# searched in this order in a module's name below its block; shapes identify biases and norms
PATTERNS = {
    "mod": r"ada_?(ln|norm)|modulation|(^|[._])mod([._]|$)|norm\w*[._]linear|scale_shift",
    "emb": (
        r"emb|(^|[._])(img|txt|time|vector|guidance|vision|byt5)_in([._]|$)|patchify|caption_proj"
    ),
    "conv": r"conv|samplers|skip_connection|(in|out)_layers|[._]op$",
    # attention and ff in one matrix
    "fused": r"^linear[12]$|qkv_mlp",
    "qkv": r"qkv|att\w*[._]in_proj|(^|[._])(to_)?kv(_proj)?$|kv_mapper",
    "ff": r"(^|[._])ffn?([._]|$)|mlp|feed_?forward|fc\d|densereludense|channelwise",
    "q": r"(^|[._])(to_|add_|w)?q(uery)?(_proj|_img)?$",
    "k": r"(^|[._])(to_|add_|w)?k(ey)?(_proj|_img)?$",
    "v": r"(^|[._])(to_|add_|w)?v(alue)?(_proj|_img)?$",
    "out": (
        r"(to_(add_)?out|(^|[._])wo|att\w*[._](proj|out|o|out_proj|o_proj|output_proj|out_layer))"
        r"([._]\d+)?$"
    ),
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
    """Return the block of a module, or its component if it is in no block.

    The name of a block ends with the first number of a list of blocks.

    >>> block_of("unet.down_blocks.1.attentions.0.proj_in", "unet")
    'unet.down_blocks.1'
    """
    found = BLOCK.match(label)
    return found.group() if found else component


def kind_of(inside: str, param: str, facts: Facts) -> str:
    """Return the kind of layer, one of `KINDS`, from the name below the block (`.attn1.to_q`)."""
    if facts.vector:
        return "bias" if param == BIAS else "norm"
    name = inside.strip("._").lower()
    found = next((kind for kind, pattern in PATTERNS.items() if re.search(pattern, name)), "other")
    window = math.prod(facts.kernel or ())
    return "conv" if window > 1 and found in ("other", "proj") else found
