"""PEFT's adapter_config.json for an adapter, and the same fields as diffusers keeps them in a file's metadata."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from adaptkit.errors import NotRepresentable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = ["PeftModule", "diffusers_metadata", "factor_rows", "peft_config"]

TEXT_MODEL = "text_model."

KINDS = {"lora": "LORA", "lora+dora": "LORA", "loha": "LOHA", "lokr": "LOKR"}


@dataclass(frozen=True, slots=True)
class PeftModule:
    """One module as PEFT knows it: its name in the model, its algorithm, rank and alpha; `roles` are those it stores."""

    name: str
    algorithm: str
    rank: int
    alpha: float
    roles: frozenset[str]
    factors: tuple[int, int] | None = None  # LoKr: rows of its two factors


def factor_rows(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int] | None:
    """The rows of the two factors of a LoKr, from its stored shapes; None for anything else."""
    one = shapes.get("w1", shapes.get("w1_a"))
    if one is None or not shapes.keys() <= {"w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"}:
        return None
    return one[0], shapes["w2"][0] if "w2" in shapes else shapes["w2_a"][1 if "t2" in shapes else 0]


def peft_config(modules: Sequence[PeftModule]) -> dict[str, Any]:
    """The configuration with which PEFT rebuilds these modules; NotRepresentable where one file cannot hold them all."""
    algorithms = {module.algorithm for module in modules}
    if not algorithms <= KINDS.keys() or len(algorithms) > 1:
        raise NotRepresentable(
            f"PEFT cannot hold {' and '.join(sorted(algorithms))} in one adapter",
            hint="convert with --algo lora, or use --only and --skip",
        )
    (algorithm,) = algorithms
    alpha_name = "lora_alpha" if KINDS[algorithm] == "LORA" else "alpha"
    ranks, alphas = (
        _patterns((m.name, m.rank) for m in modules),
        _patterns((m.name, m.alpha) for m in modules),
    )
    config: dict[str, Any] = {
        "peft_type": KINDS[algorithm],
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": ranks[0],
        alpha_name: alphas[0],
        "rank_pattern": ranks[1],
        "alpha_pattern": alphas[1],
        "target_modules": _targets([module.name for module in modules]),
    }
    return config | _special(algorithm, modules)


def _special(algorithm: str, modules: Sequence[PeftModule]) -> dict[str, Any]:
    if algorithm in ("lora", "lora+dora"):
        return {
            "use_dora": algorithm == "lora+dora",
            "use_rslora": False,
            "bias": "none",
            "fan_in_fan_out": False,
        }
    tucker = {
        bool(module.roles & {"t1", "t2"})
        for module in modules
        if module.roles & {"t1", "t2", "w2_b", "w1_b"}
    }
    fields: dict[str, Any] = {"use_effective_conv2d": True in tucker}
    if algorithm == "loha":
        return fields
    both = {"w1_a" in module.roles for module in modules}
    sizes = {min(module.factors) for module in modules if module.factors is not None}
    if len(both) > 1 or len(sizes) > 1:
        raise NotRepresentable(
            "these LoKr modules differ in how they are factored, which PEFT's configuration cannot say",
            hint="convert with --algo lora",
        )
    return fields | {"decompose_both": both == {True}, "decompose_factor": next(iter(sizes), -1)}


def _patterns(values: Iterable[tuple[str, float]]) -> tuple[float, dict[str, float]]:
    """The most frequent value, and those that differ from it by module.

    `^` keeps `proj_out` from meaning `blocks.0.proj_out` as well (huggingface/peft#2419).
    """
    listed = list(values)
    usual = Counter(value for _, value in listed).most_common(1)[0][0]
    return _plain(usual), {
        _exactly(name): _plain(value) for name, value in listed if value != usual
    }


def _exactly(name: str) -> str:
    return (
        name if name.startswith("encoder.layers.") else f"^{name}"
    )  # of a text encoder, perhaps below `text_model.`


def _anywhere(module: PeftModule) -> PeftModule:
    """transformers 5 took `text_model.` out of its CLIP: diffusers takes it off the weights' names, but not off these.

    Without it PEFT finds the module either way, as the ending of its name.
    """
    return replace(module, name=module.name.removeprefix(TEXT_MODEL))


def _plain(value: float) -> float:
    return int(value) if float(value).is_integer() else float(value)


def _targets(names: Sequence[str]) -> list[str] | str:
    """PEFT takes a list as endings of names: where one is the ending of another, a pattern says it exactly."""
    tails = {name[n + 1 :] for name in names for n, letter in enumerate(name) if letter == "."}
    if not tails & set(names):
        return list(names)
    return "|".join(name.replace(".", r"\.") for name in names)


def diffusers_metadata(parts: Mapping[str, Sequence[PeftModule]]) -> str:
    """What diffusers keeps under `lora_adapter_metadata`: the LoraConfig fields of each component behind its name."""
    fields = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_dora")
    found: dict[str, Any] = {}
    for component, modules in parts.items():
        config = peft_config([_anywhere(module) for module in modules])
        found |= {f"{component}.{name}": config[name] for name in fields}
    return json.dumps(found, indent=2, sort_keys=True, ensure_ascii=False)
