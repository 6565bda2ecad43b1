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
# UniLoRA's numbers without their places (save_indices = False)
BANK, BANK_NAME = "UniLoRA without its places", "unilora_theta_d"
# the beginning of a tensor's name within its module → the kind
TENSORS: Mapping[str, str] = MappingProxyType(
    {
        "tinylora_": "TinyLoRA",
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
# why the tensors of a kind and the base do not tell what it changes, though PEFT can merge it
WHY: Mapping[str, str] = MappingProxyType(
    {
        "TinyLoRA": "its factors are singular vectors of the base, whose signs no file tells",
        BANK: "which number goes where follows the order of the layers in the model",
        "AdaMSS": "its parts are found by clustering the base weight anew",
        "FRoD": "its bases are decomposed from all layers of the model together",
        "PEANuT": "it adds what a neural network makes of the weight",
        "trainable tokens": "it replaces some rows of an embedding, and no layer",
    }
)
# kinds that no weight can hold
UNWEIGHTED: Mapping[str, str] = MappingProxyType(
    {
        "Lily": "a router mixes its factors for every input",
        "X-LoRA": "a classifier mixes its LoRAs for every input",
        "Poly": "a router mixes its factors for every task",
        "Shadow": "a network beside the model changes the states between its blocks",
        "Cartridge": "it stores keys and values of the attention",
        "CPT": "it is a prompt, put before the input",
        "prompt tuning": "it is a prompt, put before the input",
        "p-tuning": "it is a prompt, put before the input",
        "prefix tuning": "it stores keys and values of the attention",
        "adaption prompts": "it is a prompt, put before the input of some layers",
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
        "SHADOW": "Shadow",
        "CARTRIDGE": "Cartridge",
        "CPT": "CPT",
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
    if names and all(BANK_NAME in name for name in names):
        return BANK
    if any(name.endswith((".lora_down", ".lora_up")) for name in names):
        return PACKED
    found = Counter(filter(None, map(_kind, names)))
    if CONTROL in found:  # one tensor marks the file
        return CONTROL
    return found.most_common(1)[0][0] if found else None


def hint_for(kind: str) -> str:
    """What works for an adapter of a kind that is not read."""
    if kind in UNWEIGHTED:
        return f"{UNWEIGHTED[kind]}: no weight can hold that, and PEFT alone runs it"
    why = f"{WHY[kind]}; " if kind in WHY else ""
    return HINTS.get(kind, why + MERGED)


def _kind(name: str) -> str | None:
    for part in name.split(".")[-3:]:  # PEFT's own name of an adapter may follow
        if part.startswith(_STARTS):
            return next(kind for start, kind in TENSORS.items() if part.startswith(start))
    return None
