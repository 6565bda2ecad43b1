"""PEFT's adapter_config.json, and the same fields in the metadata of diffusers files."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from adaptkit.algorithms._restated import Restated, kept, patterns
from adaptkit.errors import NotRepresentable
from adaptkit.keymap.kinds import vector_kind
from adaptkit.meaning import otherwise

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from adaptkit.algorithms.contract import Facts, Weights

__all__ = [
    "BIASED",
    "PeftModule",
    "check_window",
    "diffusers_metadata",
    "only_kind",
    "peft_config",
]

TEXT_MODEL = "text_model."
# PEFT merges a LoRA that has biases only into layers that have one
BIASED = (
    "the biases are stored as lora_B.bias: PEFT and diffusers add them, but fuse_lora and "
    "merge_and_unload stop at a layer without a bias; `adaptkit merge` does not."
)


@dataclass(frozen=True, slots=True)
class PeftModule:
    """One module as PEFT knows it: its name in the model and what is stored of it.

    `facts` are those of its source, and `config` is the PEFT configuration of that; of kinds that
    are written with it.
    """

    name: str
    kind: type[Weights]
    rank: int
    alpha: float
    shapes: Mapping[str, tuple[int, ...]]
    facts: Facts | None = None
    config: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))


def peft_config(modules: Sequence[PeftModule]) -> dict[str, Any]:
    """The configuration with which PEFT rebuilds these modules.

    NotRepresentable if one file cannot hold them all.
    """
    biases = [module for module in modules if _is_bias(module)]
    modules = [module for module in modules if not _is_bias(module)]
    kind = only_kind({module.kind for module in modules}, biased=bool(biases))
    if kind.peft_kept:
        return _again(kind, modules)
    rank, ranks = _patterns((m.name, m.rank) for m in modules)
    alpha, alphas = _patterns((m.name, m.alpha) for m in modules)
    config: dict[str, Any] = {
        "peft_type": kind.peft_type,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        kind.peft_alpha: alpha,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": _targets(
            list(dict.fromkeys(module.name for module in (*modules, *biases)))
        ),
    }
    if biases:
        config["lora_bias"] = True
    return config | kind.peft_fields([module.shapes for module in modules])


def _again(kind: type[Weights], modules: Sequence[PeftModule]) -> dict[str, Any]:
    """The configuration of the source, with what the modules themselves tell."""
    told = [Restated(m.name, m.shapes, m.facts, m.config) for m in modules if m.facts is not None]
    return {
        "base_model_name_or_path": None,
        **kept(told),
        "peft_type": kind.peft_type,
        "inference_mode": True,
        "target_modules": _targets(list(dict.fromkeys(module.name for module in modules))),
        **kind.restated(told),
    }


def only_kind(kinds: Collection[type[Weights]], *, biased: bool) -> type[Weights]:
    """The one kind of all modules, beside which there may be biases.

    NotRepresentable if PEFT has no adapter of these.
    """
    names = " and ".join(sorted(kind.name for kind in kinds)) or "biases alone"
    if biased and not all(kind.low_rank and not kind.wrapper for kind in kinds):
        raise NotRepresentable(
            f"PEFT holds a bias only beside a LoRA, not beside {names}",
            hint="--algo lora may hold the weights; --skip '*.bias' leaves the biases out",
        )
    if not all(kind.peft_type for kind in kinds) or len(kinds) != 1:
        raise NotRepresentable(
            f"PEFT cannot hold {names} in one adapter",
            hint="--algo lora may hold them all",
        )
    return next(iter(kinds))


def check_window(kind: type[Weights], kernel: Sequence[int] | None, roles: Iterable[str]) -> None:
    """NotRepresentable if PEFT has no layer for a kind over such a kernel, or no right one.

    `roles` are those that are stored.
    """
    window = len(kernel or ())
    role = kind.peft_lacks.get(window)
    if role == "":
        raise NotRepresentable(
            f"PEFT has no {kind.title} of {window}-dimensional convolutions",
            hint="--algo lora can hold it",
        )
    if role is not None and role in roles:
        raise NotRepresentable(otherwise(kind, role, window), hint="--algo lora can hold it")


def _is_bias(module: PeftModule) -> bool:
    return module.shapes.keys() == {vector_kind().vector_role(bias=True, norm=False)}


def _patterns(values: Iterable[tuple[str, float]]) -> tuple[float, dict[str, float]]:
    """The most frequent value, and the other values by module."""
    usual, others = patterns(values)
    return _plain(usual), {name: _plain(value) for name, value in others.items()}


def _anywhere(module: PeftModule) -> PeftModule:
    """The module without `text_model.`, which transformers 5 removed from its CLIP.

    diffusers removes it from the keys but not from this configuration. PEFT matches endings of
    names, so the shorter name is found in both versions.
    """
    return replace(module, name=module.name.removeprefix(TEXT_MODEL))


def _plain(value: float) -> float:
    return int(value) if float(value).is_integer() else float(value)


def _targets(names: Sequence[str]) -> list[str] | str:
    """The names as a list, or as a pattern if one name is the ending of another.

    PEFT matches the entries of a list as endings of names.
    """
    tails = {name[n + 1 :] for name in names for n, letter in enumerate(name) if letter == "."}
    if not tails & set(names):
        return list(names)
    return "|".join(name.replace(".", r"\.") for name in names)


def diffusers_metadata(parts: Mapping[str, Sequence[PeftModule]]) -> str:
    """The `lora_adapter_metadata` of diffusers: LoraConfig fields behind component names."""
    fields = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_dora")
    also = ("lora_bias",)
    found: dict[str, Any] = {}
    for component, modules in parts.items():
        config = peft_config([_anywhere(module) for module in modules])
        found |= {f"{component}.{name}": config[name] for name in fields}
        found |= {f"{component}.{name}": config[name] for name in also if name in config}
    return json.dumps(found, indent=2, sort_keys=True, ensure_ascii=False)
