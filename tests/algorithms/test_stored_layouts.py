"""What LyCORIS and PEFT modules of every algorithm really save (corpus/suffixes) is decoded, or refused knowingly."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from adaptkit.algorithms.contract import ALPHA, Facts, Stated, Weights
from adaptkit.entries import _whole
from adaptkit.errors import AdaptkitError
from adaptkit.keymap import param_of, split_suffix

OUT, IN = 128, 64
KERNELS = {
    "lin": (),
    "conv1": (1, 1),
    "conv3": (3, 3),
    "conv1d": (3,),
    "conv3d": (3, 3, 3),
    "ln": (),
    "gn": (),
}
# what each holds
LYCORIS = {
    "lora": "lora",
    "locon": "lora",
    "loha": "loha",
    "lokr": "lokr",
    "full": "full",
    "diag-oft": "oft",
    "boft": "boft",
    "glora": "glora",
    "ia3": "ia3",
    "dylora": "lora",
    "locon dora": "lora+dora",
    "loha dora": "loha+dora",
    "lokr dora": "lokr+dora",
}
PEFT = {
    "lora": "lora",
    "lora+dora": "lora+dora",
    "loha": "loha",
    "lokr": "lokr",
    "oft": "peft-oft",
    "boft": "peft-boft",
    "ia3": "ia3",
}
# known by their tensors, and decoded with their configuration (tests/interop/test_peft_read.py)
CONFIGURED = {
    "vera": "vera", "AdaLoraConfig": "adalora", "HRAConfig": "hra", "FourierFTConfig": "fourierft",
    "MissConfig": "miss", "DeloraConfig": "delora", "GraloraConfig": "gralora",
    "RandLoraConfig": "randlora", "WaveFTConfig": "waveft", "ShiraConfig": "shira",
    "RoadConfig": "road", "PsoftConfig": "psoft", "LNTuningConfig": "ln-tuning",
}  # fmt: skip
Shapes = Mapping[str, tuple[int, ...]]


def expected(table: Mapping[str, str], name: str) -> str:
    """Of the longest name that this one begins with."""
    return table[max((known for known in table if name.startswith(known)), key=len)]


@dataclass(frozen=True)
class Read:
    """One weight of a module: its kind, its tensors' shapes by role, and what they say."""

    kind: type[Weights]
    shapes: Shapes
    facts: Facts


def read(shapes: Shapes, alpha: float | None) -> tuple[list[Read], set[str]]:
    """The weights of a module as the reader of files groups them, and the keys that are left."""
    groups: dict[str, dict[str, tuple[tuple[str, str], ...]]] = {}
    left, found = set(), []
    for key in shapes:
        split = split_suffix(f"module.{key}")
        # sd-scripts' OFT has the same tensors as LyCORIS', in a format of its own
        roles = (
            tuple(role for role in split[2] if role[0] != "kohya-oft")
            if split and split[0] == "module"
            else ()
        )
        if roles:
            groups.setdefault(param_of(roles[0]), {})[key] = roles
        else:
            left.add(key)
    for group in groups.values():
        names = tuple(group)
        for kind, places in _whole(tuple(group.values())):
            own = {role: shapes[names[n]] for role, n in places.items() if role != ALPHA}
            try:
                found.append(
                    Read(kind, own, kind.facts(own, None if alpha is None else Stated(alpha)))
                )
            except AdaptkitError:
                continue
            break
        else:
            left |= group.keys()
    return found, left


def check(one: Read, kernel: tuple[int, ...], label: str) -> None:
    """Decoded, encoded and applied: the tensors come back, and what is known of the size is right."""
    facts = one.facts if one.facts.kernel is not None else replace(one.facts, kernel=kernel)
    rows, columns = (facts.rows, 1) if facts.vector else (OUT, IN * math.prod(kernel))
    assert facts.rows in (0, rows), label
    assert facts.columns in (0, columns), label
    assert facts.vector or facts.kernel == kernel, label
    stored = {role: torch.rand(shape, dtype=torch.float64) for role, shape in one.shapes.items()}
    stored |= {"on_input": torch.tensor(0)} if "on_input" in stored else {}
    weights = one.kind.decode(stored, facts)
    encoded = weights.encode()
    for role, tensor in stored.items():
        back = encoded["magnitude" if role == "vector" else role]
        assert torch.equal(back.reshape(-1), tensor.reshape(-1)), (label, role)
        if role not in ("vector", "up"):  # DyLoRA stores a flat `up` for convolutions
            assert back.shape == tensor.shape, (label, role)
    applied = weights.apply(torch.rand(rows, columns, dtype=torch.float64), 0.5)
    assert applied.shape == (rows, columns), label
    assert bool(applied.isfinite().all()), label


def test_every_module_of_lycoris(corpus: Path) -> None:
    matrix = json.loads((corpus / "suffixes" / "gen__lycoris_suffix_matrix.json").read_text())
    assert len(matrix) == 26
    for name, modules in matrix.items():
        for module, stored in modules.items():
            shapes = {key: tuple(shape) for key, (shape, _, _) in stored.items()}
            found, left = read(shapes, stored["alpha"][2] if "alpha" in stored else None)
            part = module.removeprefix("lycoris_")
            wanted = {"full"} if part in ("ln", "gn") else {expected(LYCORIS, name)}
            assert {one.kind.name for one in found} == wanted, (name, module)
            assert not left
            for one in found:
                check(one, KERNELS[part], f"{name} {module}")


def test_every_tuner_of_peft(corpus: Path) -> None:
    matrix = json.loads((corpus / "suffixes" / "gen__peft_suffix_matrix.json").read_text())
    assert matrix.keys() >= CONFIGURED.keys()
    for name, saved in matrix.items():
        modules: dict[str, dict[str, tuple[int, ...]]] = {}
        for key, shape in saved["keys"].items():
            module, _, suffix = key.removeprefix("base_model.model.").partition(".")
            modules.setdefault(module, {})[suffix] = tuple(shape)
        for module, shapes in modules.items():
            found, left = read(shapes, None)
            if name in CONFIGURED:  # what all modules share stands beside them
                shared = shapes.keys() & {"vera_A", "randlora_A"} and module == "base_model"
                assert {one.kind.name for one in found} == {CONFIGURED[name]} or shared, name
                continue
            assert {one.kind.name for one in found} - {"full"} == {expected(PEFT, name)}, (
                name,
                module,
            )
            assert not left
            for one in found:
                check(one, KERNELS[module], f"{name} {module}")
