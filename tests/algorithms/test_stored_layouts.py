"""What LyCORIS and PEFT modules of every algorithm really save (corpus/suffixes) is decoded, or refused knowingly."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adaptkit.algorithms._weights import ALPHA, Facts, Stated, Weights
from adaptkit.errors import AdaptkitError
from adaptkit.keymap import algorithms, split_suffix

OUT, IN = 128, 64
KERNELS = {"lin": (), "conv1": (1, 1), "conv3": (3, 3), "conv1d": (3,), "conv3d": (3, 3, 3), "ln": (), "gn": ()}
# what each holds; of PEFT's other tuners adaptkit knows nothing
LYCORIS = {
    "lora": {"lora"},
    "locon": {"lora"},
    "loha": {"loha"},
    "lokr": {"lokr"},
    "full": {"full"},
    "diag-oft": {"oft", "kohya-oft"},  # told apart by the format of the file
    "boft": {"boft"},
    "glora": {"glora"},
    "ia3": {"ia3"},
    "dylora": {"lora"},
    "locon dora": {"lora+dora"},
    "loha dora": {"loha+dora"},
    "lokr dora": {"lokr+dora"},
    "locon train_norm": {"lora", "full"},
}
PEFT = {
    "lora": {"lora"},
    "lora+dora": {"lora+dora"},
    "lora lora_bias": {"lora", "full"},
    "loha": {"loha"},
    "lokr": {"lokr"},
    "oft": {"peft-oft"},
    "boft": {"peft-boft"},
    "ia3": {"ia3"},
}
UNKNOWN = {
    *("vera", "AdaLoraConfig", "GraloraConfig", "HRAConfig", "FourierFTConfig", "RandLoraConfig", "WaveFTConfig"),
    *("ShiraConfig", "RoadConfig", "MissConfig", "DeloraConfig", "PsoftConfig", "LNTuningConfig"),
}
Shapes = Mapping[str, tuple[int, ...]]


def expected(table: Mapping[str, set[str]], name: str) -> set[str]:
    """Of the longest name that this one begins with."""
    return table[max((known for known in table if name.startswith(known)), key=len)]


def grouped(
    tensors: Shapes, alphas: Mapping[str, float]
) -> Iterator[tuple[str, Weights, dict[str, torch.Tensor], Facts]]:
    """Every weight of a module that an algorithm makes a whole of, with what was decoded."""
    roles: dict[str, dict[str, str]] = {}
    for key in tensors:
        split = split_suffix(f"module.{key}")
        for algorithm, role in split[2] if split else ():
            param = algorithms()[algorithm].roles[role].param
            roles.setdefault(f"{algorithm} {param}", {})[role] = key
    for group, keys in roles.items():
        kind = algorithms()[group.split()[0]]
        shapes = {role: tensors[key] for role, key in keys.items() if role != ALPHA}
        for form in {frozenset(shapes)} | ({frozenset({role}) for role in shapes} if kind.name == "full" else set()):
            if form not in kind.forms:
                continue
            chosen = {role: shapes[role] for role in form}
            stated = Stated(alphas["alpha"]) if "alpha" in alphas else None
            try:
                facts = kind.facts(chosen, stated)
            except AdaptkitError:
                continue
            made = {
                role: torch.tensor(0) if role == "on_input" else torch.rand(shape, dtype=torch.float64)
                for role, shape in chosen.items()
            }
            yield kind.name, kind, made, facts  # type: ignore[misc]


def check(name: str, module: str, tensors: Shapes, alphas: Mapping[str, float], wanted: set[str]) -> None:
    kernel = KERNELS[module]
    found = list(grouped(tensors, alphas))
    names = {algorithm for algorithm, *_ in found}
    # a part of the tensors may be a whole of something smaller: a DoRA is a LoRA too
    claimed = {frozenset(made) for algorithm, _, made, _ in found if algorithm in wanted}
    best = {algorithm for algorithm, _, made, _ in found if not any(frozenset(made) < other for other in claimed)}
    assert best <= wanted, (name, module, names)
    assert claimed, (name, module, names)
    total = {key for key in tensors if key != "alpha"}
    assert sum(len(made) for made in claimed) >= len(total), (name, module, claimed)
    for algorithm, kind, made, facts in found:
        if algorithm not in best:
            continue
        if facts.kernel is None:
            facts = replace(facts, kernel=kernel)
        if not facts.vector:
            assert facts.kernel == kernel, (name, module)
        width = IN * torch.Size(kernel).numel()
        if facts.vector:
            assert facts.columns == 1
        else:
            assert facts.rows in (0, OUT), (name, module)
            assert facts.columns in (0, width), (name, module)
        weights = kind.decode(made, facts)
        stored = weights.encode()
        for role, tensor in made.items():
            back = stored.get(role, stored.get("magnitude"))
            assert back is not None
            assert torch.equal(back.reshape(-1), tensor.reshape(-1)), (name, module, role)
            if not (name == "dylora" and role == "up") and role != "vector":
                assert back.shape == tensor.shape, (name, module, role)
        rows, columns = (facts.rows or OUT), (facts.columns or width)
        applied = weights.apply(torch.rand(rows, columns, dtype=torch.float64), 0.5)
        assert applied.shape == (rows, columns)
        assert bool(applied.isfinite().all())


def test_every_module_of_lycoris(corpus: Path) -> None:
    matrix = json.loads((corpus / "suffixes" / "gen__lycoris_suffix_matrix.json").read_text())
    assert len(matrix) == 26
    for name, modules in matrix.items():
        for module, stored in modules.items():
            shapes = {key: tuple(shape) for key, (shape, _, _) in stored.items()}
            alphas = {key: value for key, (_, _, value) in stored.items() if key == "alpha"}
            kind = module.removeprefix("lycoris_")
            wanted = {"full"} if kind in ("ln", "gn") else expected(LYCORIS, name)
            check(name, kind, shapes, alphas, wanted)


def test_every_tuner_of_peft(corpus: Path) -> None:
    matrix = json.loads((corpus / "suffixes" / "gen__peft_suffix_matrix.json").read_text())
    assert {name for name in matrix if name in UNKNOWN} == UNKNOWN
    for name, saved in matrix.items():
        modules: dict[str, dict[str, tuple[int, ...]]] = {}
        for key, shape in saved["keys"].items():
            module, _, suffix = key.removeprefix("base_model.model.").partition(".")
            modules.setdefault(module, {})[suffix] = tuple(shape)
        for module, shapes in modules.items():
            if name not in UNKNOWN:
                check(name, module, shapes, {}, expected(PEFT, name))
                continue
            whole = [(algorithm, made) for algorithm, _, made, _ in grouped(shapes, {})]
            assert not [algorithm for algorithm, made in whole if len(made) == len(shapes)], name
