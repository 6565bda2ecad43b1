"""Prefixes that wrapping a model puts before its names: PEFT's, torch.compile's, a pipeline's."""

from __future__ import annotations

import re
from functools import lru_cache

__all__ = ["unwrapped", "wrapper"]

_IN = r"(?:base_model\.model\.|_orig_mod\.|module\.)"
# in front; a pipeline's part after it, a component of diffusers before it
_FRONT = re.compile(
    rf"(?:unet\.(?={_IN})|{_IN}|pipe\.(?:dit\.|transformer\.)?|dit\.|net\."
    r"|model\.(?!diffusion_model\.))+"
)
_BEHIND = re.compile(
    rf"((?:model\.)?(?:transformer(?:_2)?|unet|diffusion_model|text_encoder(?:_[23])?)\.){_IN}+"
)


@lru_cache(maxsize=65536)
def unwrapped(stem: str) -> tuple[str, ...]:
    """What a stem may be without its wrappers, the likelier first; empty if it has none.

    >>> unwrapped("pipe.dit.blocks.0.attn.to_q"), unwrapped("blocks.0.attn.to_q_")
    (('blocks.0.attn.to_q',), ('blocks.0.attn.to_q',))
    >>> unwrapped("transformer.base_model.model.proj_out")
    ('transformer.proj_out',)
    >>> unwrapped("model.diffusion_model.proj_out")
    ()
    """
    plain = stem.removesuffix("_")
    found = []
    if (behind := _BEHIND.match(plain)) is not None:
        found.append(behind[1] + plain[behind.end() :])
    if (front := _FRONT.match(plain)) is not None:
        found.append(plain[front.end() :])
    return tuple(found) or ((plain,) if plain != stem else ())


def wrapper(stem: str, plain: str) -> str:
    """What was taken away from a stem: its wrapper, and `_` if only that.

    >>> wrapper("transformer.base_model.model.proj_out", "transformer.proj_out")
    'base_model.model.'
    """
    whole = stem.removesuffix("_")
    if whole == plain:
        return "_"
    common = next((n for n, (a, b) in enumerate(zip(whole, plain, strict=False)) if a != b), 0)
    # the end of what is left is the end of the stem
    while not whole.endswith(plain[common:]):
        common -= 1
    return whole[common : len(whole) - len(plain[common:])]
