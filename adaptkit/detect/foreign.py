"""Kinds of adapters that adaptkit does not read, told by name.

Names of tensors and of `peft_type` are those of PEFT 0.21 (`peft.mapping`).
"""

from __future__ import annotations

from collections import Counter
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["foreign", "hint_for"]

# a network beside the model, stored as differences from it (Stability AI's control-lora)
CONTROL = "Control LoRA"
# factors in the order of a kernel's tiles, named without `.weight` (nunchaku before 0.2); those of
# FLUX.1 are read, see adaptkit.files.arranged.nunchaku
PACKED = "LoRA packed for nunchaku"
# the beginning of a tensor's name within its module → the kind
TENSORS: Mapping[str, str] = MappingProxyType(
    {
        "tinylora_": "TinyLoRA",
        "unilora_": "UniLoRA",
        "adamss_": "AdaMSS",
        "frod_": "FRoD",
        "lily_": "Lily",
        "peanut_": "PEANuT",
        "trainable_tokens_": "trainable tokens",
        "lora_controlnet": CONTROL,
        "xlora_": "X-LoRA",
        "poly_": "Poly",
        "prompt_embeddings": "prompt tuning",
        "adaption_prompt": "adaption prompts",
        "adaption_gate": "adaption prompts",
    }
)
# what works for a kind; of all others, what trained it can merge it
HINTS: Mapping[str, str] = MappingProxyType(
    {
        CONTROL: "it is a ControlNet, made of the model and of these factors, and changes no "
        "weight of the model: ComfyUI loads it with Load ControlNet Model; no LoRA can stand for "
        "it",
        PACKED: "use the file that it was made from: nunchaku 0.2 and newer packs any LoRA itself",
    }
)
MERGED = (
    "what trained it can merge it into its base model (PEFT: merge_and_unload); then "
    "`adaptkit extract BASE MERGED` makes a LoRA or LoKr of the difference"
)
# the `peft_type` of kinds that adaptkit reads
READ = frozenset(
    {
        "LORA", "LOHA", "LOKR", "OFT", "BOFT", "IA3", "ADALORA", "DELORA", "HIRA", "HRA", "MISS",
        "BONE", "FOURIERFT", "VERA", "GLORA", "SHIRA", "GRALORA",
        "RANDLORA", "ROAD", "WAVEFT", "PSOFT", "LN_TUNING", "C3A", "OSF",
        "PVERA", "BEFT", "DEFT", "SUPERTUNING", "VBLORA", "UNILORA",
    }
)  # fmt: skip
NAMES = MappingProxyType(
    {
        "PROMPT_TUNING": "prompt tuning",
        "MULTITASK_PROMPT_TUNING": "prompt tuning",
        "P_TUNING": "p-tuning",
        "PREFIX_TUNING": "prefix tuning",
        "ADAPTION_PROMPT": "adaption prompts",
    }
)
_STARTS = tuple(TENSORS)


def foreign(names: Iterable[str], config: Mapping[str, object] | None = None) -> str | None:
    """The kind of an adapter that adaptkit does not read (`RandLoRA`), or None.

    `config` is PEFT's adapter_config.json, whose `peft_type` counts before the names of tensors.
    """
    stated = config.get("peft_type") if config else None
    if isinstance(stated, str) and stated.upper() not in READ:
        kind = stated.upper()
        return TENSORS.get(f"{kind.lower()}_") or NAMES.get(kind, stated)
    names = list(names)
    if any(name.endswith((".lora_down", ".lora_up")) for name in names):
        return PACKED
    found = Counter(filter(None, map(_kind, names)))
    if CONTROL in found:  # one tensor marks the file
        return CONTROL
    return found.most_common(1)[0][0] if found else None


def hint_for(kind: str) -> str:
    """What works for an adapter of a kind that is not read."""
    return HINTS.get(kind, MERGED)


def _kind(name: str) -> str | None:
    for part in name.split(".")[-3:]:  # PEFT's own name of an adapter may follow
        if part.startswith(_STARTS):
            return next(kind for start, kind in TENSORS.items() if part.startswith(start))
    return None
