"""diffusers' published converters of adapters (`lora_conversion_utils`), each in both directions.

A file in the format that a converter reads becomes by `convert` what the converter makes of it, and a file of diffusers
becomes by `convert` what the converter turns into that file again. The loader that calls the converter is run, not the
converter alone. What they do differently is named in `tests/interop/published`, and must stay true.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit.adapter import Adapter
from adaptkit.hosts import judge
from adaptkit.ops import convert
from tests.interop.published import CASES, HELPERS, Case, Numbers, State

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from diffusers.loaders import lora_conversion_utils, lora_pipeline
from diffusers.utils import state_dict_utils

FACTOR = re.compile(r"(.+)\.(lora_[AB]|lokr_w[12](?:_[ab])?)(?:\.weight)?")
EVERY = [(name, number) for name, cases in CASES.items() for number in range(len(cases))]
NAMES = [f"{name.strip('_').removeprefix('convert_')}-{number}" for name, number in EVERY]


def functions() -> set[str]:
    """The functions of the installed diffusers' module."""
    return {
        name
        for name, item in vars(lora_conversion_utils).items()
        if inspect.isfunction(item) and item.__module__ == lora_conversion_utils.__name__
    }


def test_every_function_has_a_case() -> None:
    found = functions()
    assert found - set(CASES) - set(HELPERS) == set(), "a newer diffusers converts more"
    assert not set(CASES) & set(HELPERS)
    if {"_convert_non_diffusers_minimax_h3_lora_to_diffusers"} <= found:
        assert len(set(CASES) & found) >= 26


# ------------------------------------------------------------------ what a file adds


def loaded(case: Case, function: str, state: State, monkeypatch: Any) -> tuple[State, State]:
    """What diffusers' loader makes of a file, in PEFT's names, and the alphas; it must call the function."""
    calls = []
    inner = getattr(lora_conversion_utils, function)

    def spied(*args: Any, **kwargs: Any) -> Any:
        calls.append(function)
        return inner(*args, **kwargs)

    given = {key: tensor.clone() for key, tensor in state.items()}
    if any("dora_scale" in key for key in state):  # the loader drops them before it converts
        found = inner(given)
    else:
        monkeypatch.setattr(lora_pipeline, function, spied)
        mixin = getattr(lora_pipeline, f"{case.loader}LoraLoaderMixin")
        found = mixin.lora_state_dict(given, **case.options)
        assert calls
    found, alphas = found if isinstance(found, tuple) else (found, None)
    return renamed(found), alphas or {}


def renamed(state: State) -> State:
    """In PEFT's names, by the functions with which diffusers' models rename them."""
    text = {key: t for key, t in state.items() if key.startswith("text_encoder")}
    rest = {key: t for key, t in state.items() if key not in text}
    if any(".processor." in key or ".lora.down" in key for key in rest):
        rest = state_dict_utils.convert_unet_state_dict_to_peft(rest)
    if text:
        text = state_dict_utils.convert_state_dict_to_peft(
            state_dict_utils.convert_state_dict_to_diffusers(text)
        )
    return rest | text


def scales(alphas: State) -> dict[str, float]:
    """Alpha of every module: those of attention are under the name of the factor, where the loader misses them."""
    stems = {key.removesuffix(".alpha"): float(value) for key, value in alphas.items()}
    named = {key: torch.tensor(value) for key, value in stems.items() if key.endswith(".weight")}
    plain = {key: value for key, value in stems.items() if key not in named}
    return plain | {
        found[1]: float(value)
        for key, value in renamed(named).items()
        if (found := FACTOR.fullmatch(key))
    }


def probe(columns: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(columns)
    return torch.randint(-99, 100, (columns, 2), generator=draw).double()


def modules(state: State) -> dict[str, State]:
    found: dict[str, State] = {}
    for key, tensor in state.items():
        if match := FACTOR.fullmatch(key):
            found.setdefault(match[1], {})[match[2]] = tensor.double()
    return found


def adds(state: State, alphas: dict[str, float] | None = None) -> State:
    """ΔW of every module on two vectors: exact, because all numbers are integers or quarters."""
    return dict(_adds(modules(state), alphas or {}))


def _adds(found: dict[str, State], alphas: dict[str, float]) -> Iterator[tuple[str, torch.Tensor]]:
    for module, parts in found.items():
        if "lora_A" in parts:
            down, up = parts["lora_A"].flatten(1), parts["lora_B"].flatten(1)
            scale = alphas.get(module, len(down)) / len(down)
            yield module, scale * (up @ (down @ probe(down.shape[1])))
            continue
        w1, w2 = (
            parts[f"lokr_{w}"]
            if f"lokr_{w}" in parts
            else parts[f"lokr_{w}_a"] @ parts[f"lokr_{w}_b"]
            for w in ("w1", "w2")
        )
        x = probe(w1.shape[1] * w2.shape[1]).view(w1.shape[1], w2.shape[1], 2)
        added = torch.einsum("ab,bdp,cd->acp", w1, x, w2).flatten(0, 1)
        yield from split(module, added)


# diffusers joins its projections before it loads a LoKr of joint ones
JOINT = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}


def split(module: str, added: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    stem, _, name = module.rpartition(".")
    if name not in JOINT:
        yield module, added
    else:
        for part, rows in zip(JOINT[name], added.chunk(3), strict=True):
            yield f"{stem}.{part}", rows


def others(state: State) -> State:
    """Biases, magnitudes and whole tensors."""
    return {
        key.removesuffix(".weight") if "magnitude" in key else key: tensor.flatten()
        for key, tensor in state.items()
        if not FACTOR.fullmatch(key)
    }


# ------------------------------------------------------------------ comparison


def converted(path: Path, output: Path, to: str, **options: Any) -> State:
    plan = convert.plan(path, convert.Options(to=to, output=output, **options))
    try:
        convert.run(plan)
    finally:
        plan.close()
    return load_file(output / "adapter_model.safetensors" if output.is_dir() else output)


def compare(ours: State, theirs: State, case: Case, alphas: dict[str, float] | None) -> None:
    """The same modules with the same ΔW, but for the differences that the case names.

    `alphas` is None if the file has none.
    """
    made = adds(theirs, alphas)
    strays = {name for name in (*made, *others(theirs)) if match(case.stray, name)}
    assert bool(strays) == bool(case.stray)
    added = {
        f"transformer.{name}" if match(case.nameless, name) else name: tensor
        for name, tensor in made.items()
        if name not in strays
    }
    mine = {name: tensor for name, tensor in adds(ours).items() if not match(case.lost, name)}
    assert added.keys() == mine.keys()
    wrong = {name for name, tensor in mine.items() if not torch.equal(added[name], tensor)}
    expected = case.wrong if alphas is None else case.wrong | case.unscaled
    assert wrong == {name for name in mine if match(expected, name)}
    left = {key: t for key, t in others(ours).items() if not match(case.lost, key)}
    right = {key: t for key, t in others(theirs).items() if not match(case.stray, key)}
    assert left.keys() == right.keys()
    assert [key for key in left if not torch.equal(left[key], right[key])] == []


def match(patterns: dict[str, str], name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.getLogger("diffusers").setLevel(logging.ERROR)


@pytest.mark.share(4)
@pytest.mark.parametrize(("function", "number"), EVERY, ids=NAMES)
def test_both_directions(
    function: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if function not in functions():
        pytest.skip(f"this diffusers has no {function}")
    case = CASES[function][number]
    state = case.made()
    source, there = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(state, source)
    theirs, alphas = loaded(case, function, state, monkeypatch)
    ours = converted(source, there, "diffusers")
    compare(ours, theirs, case, scales(alphas))
    promised(case, source, there)
    again(case, ours)
    if not case.unwritten:
        # what LoKr of one projection makes of joint ones is no LoKr
        joint = any(".lokr_" in key for key in theirs)
        back(case, function, theirs if joint else ours, tmp_path, monkeypatch)


def promised(case: Case, source: Path, ours: Path) -> None:
    """`inspect` says that diffusers loads our file, and of the other what was seen here."""
    differs = (case.lost, case.wrong, case.unscaled, case.nameless, case.stray, case.later)
    for path, loads in ((source, not any(differs)), (ours, True)):
        with Adapter.open(path) as adapter:
            verdict = judge(adapter)["diffusers"]
        # in a layout of its own a file is not judged
        assert verdict.loads in (loads, None if adapter.source.layout else loads), verdict


def again(case: Case, ours: State) -> None:
    """The loader takes our file for one of its own, and changes nothing."""
    mixin = getattr(lora_pipeline, f"{case.loader}LoraLoaderMixin")
    found = mixin.lora_state_dict(dict(ours), **case.options)
    found = found[0] if isinstance(found, tuple) else found
    assert found.keys() == ours.keys()
    assert all(found[key] is tensor for key, tensor in ours.items())


def back(case: Case, function: str, ours: State, tmp_path: Path, monkeypatch: Any) -> None:
    """Other numbers under diffusers' names, in the converter's format, and by the converter here again."""
    numbers = Numbers(7)
    first = {key: numbers(*tensor.shape) for key, tensor in ours.items()}
    path, output = tmp_path / "c.safetensors", tmp_path / ("d" if case.to == "peft" else "d.safetensors")  # fmt: skip
    save_file(first, path)
    written = converted(path, output, case.to, family=case.family, format="diffusers")
    ours_, theirs_ = case.prefix
    written = {
        key.replace(ours_, theirs_, 1) if ours_ else key: tensor for key, tensor in written.items()
    }
    theirs, alphas = loaded(case, function, written, monkeypatch)
    compare(first, theirs, case, scales(alphas) if alphas else None)
