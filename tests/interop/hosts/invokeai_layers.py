"""The layers of a LoRA file in InvokeAI, in our own words; see `invokeai`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache

from adaptkit.detect import families
from adaptkit.families.contract import Kind
from adaptkit.names import Target
from tests.interop.hosts.files import Part, is_denoiser
from tests.interop.hosts.invokeai_files import Shape
from tests.interop.hosts.loaded import Names, RefusedError
from tests.synth import expand, fill

Layers = Mapping[str, Mapping[str, Shape]]
# file's stem, component, module of the model, tensors
Converted = Iterator[tuple[str, str, str, Mapping[str, Shape]]]
NATIVE = ("flux", "anima")  # the model's own names in memory; else those of diffusers


@cache
def memory(family: str, component: str) -> Names:
    """The matrices of a component under the names of InvokeAI's model classes."""
    found = Names()
    part = families()[family].component(component)
    for row in part.rows:
        if row.kind is Kind.MATRIX:
            naming = "native" if family in NATIVE and is_denoiser(component) else "diffusers"
            for indices in expand(row):
                target = Target(component, fill(row.target, indices))
                for name in row.names.get(naming) or row.names["diffusers"]:
                    found.add(fill(name.module, indices), target, name.rows, name.swapped)
    return found


# ------------------------------------------------------------------ grouping and layers

LAYER_SUFFIXES = (
    ".lora_A.weight",
    ".lora_B.weight",
    ".lora_down.weight",
    ".lora_up.weight",
    ".dora_scale",
    ".alpha",
)


def grouped(
    keys: Mapping[str, Shape], *more: str, plain: bool = False
) -> dict[str, dict[str, Shape]]:
    """Tensors by layer: at a known suffix, else before the last two words; `plain`: always there."""
    found: dict[str, dict[str, Shape]] = {}
    for key, shape in keys.items():
        suffix = next((s for s in (*LAYER_SUFFIXES, *more) if key.endswith(s) and not plain), None)
        if suffix is None:
            words = key.rsplit(".", maxsplit=2)
            layer, name = words[0], ".".join(words[1:])
        else:
            layer, name = key[: -len(suffix)], suffix[1:]
        found.setdefault(layer, {})[name] = shape
    return found


def at_first_dot(keys: Mapping[str, Shape]) -> dict[str, dict[str, Shape]]:
    """Tensors by layer where names are joined by underscores."""
    found: dict[str, dict[str, Shape]] = {}
    for key, shape in keys.items():
        layer, _, name = key.partition(".")
        found.setdefault(layer, {})[name] = shape
    return found


def kind(tensors: Iterable[str]) -> str:
    """The class of a layer; refused if there is none, or if it lacks what the class needs."""
    names = set(tensors)
    for telling, found, needed in (
        ("dora_scale", "dora", {"lora_up.weight", "lora_down.weight"}),
        ("lora_up.weight", "lora", {"lora_down.weight"}),
        ("hada_w1_a", "loha", {"hada_w1_b", "hada_w2_a", "hada_w2_b"}),
        ("lokr_w1", "lokr", set[str]()),
        ("lokr_w1_a", "lokr", {"lokr_w1_b"}),
        ("diff", "full", set[str]()),
        ("on_input", "ia3", {"weight"}),
    ):
        if telling in names:
            if not needed <= names:
                raise RefusedError(f"a layer of {sorted(names)} lacks a tensor")
            return found
    raise RefusedError(f"no class for a layer of {sorted(names)}")


def renamed(tensors: Mapping[str, Shape], *keep: str) -> dict[str, Shape]:
    """PEFT's factors under LyCORIS' names, without the other tensors but these."""
    if "lora_A.weight" not in tensors:
        return dict(tensors)
    found = {
        "lora_down.weight": tensors["lora_A.weight"],
        "lora_up.weight": tensors["lora_B.weight"],
    }
    return found | {name: tensors[name] for name in keep if name in tensors}


def right(part: Part, layer: Mapping[str, Shape], meant: Mapping[str, Shape]) -> bool:
    """Whether a layer computes what the module's tensors mean."""
    form = kind(layer)
    window = len(part.shape) - 2
    if "alpha" in meant and "alpha" not in layer:
        return False
    magnitude = meant.get("dora_scale", meant.get("lora_magnitude_vector"))
    if magnitude is not None:
        # its norm is that of the input axis: one number per column
        return form == "dora" and len(magnitude) > 1 and magnitude[:2] == (1, part.shape[1])
    if {"lora_mid.weight", "hada_t1", "lokr_t2"} & set(meant) and window != 2:
        return False
    return len(meant.get("lokr_w2", ())) in (0, 2, 4)
