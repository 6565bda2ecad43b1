"""LyCORIS' own forward pass gives what adaptkit merges: the kinds that are no difference, linear and convolution.

Its `get_merged_weight` is no oracle (reference, gotcha 16), so layers are run.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from adaptkit.algorithms.contract import Stated
from adaptkit.keymap import algorithms

pytest.importorskip("lycoris")

from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.tlora import TLoraModule

IN, OUT = 8, 16
ROTATIONS: list[tuple[str, type, dict[str, Any]]] = [
    (name, kind, {"lora_dim": 4, "constraint": bound, "rescaled": rescaled})
    for name, kind in (("oft", DiagOFTModule), ("boft", ButterflyOFTModule))
    for bound in (0, 0.01)
    for rescaled in (False, True)
]
DORAS: list[tuple[str, type, dict[str, Any]]] = [
    (f"{name}+dora", kind, {"lora_dim": 2, "alpha": 1, "weight_decompose": True, "wd_on_out": out})
    for name, kind in (("lora", LoConModule), ("loha", LohaModule), ("lokr", LokrModule))
    for out in (True, False)
]
OTHERS: list[tuple[str, type, dict[str, Any]]] = [
    ("glora", GLoRAModule, {"lora_dim": 3, "alpha": 2}),
    *(("ia3", IA3Module, {"train_on_input": on_input}) for on_input in (False, True)),
]


@pytest.mark.share(3)
@pytest.mark.parametrize("rank", [1, 3, IN])
@pytest.mark.parametrize("alpha", [2, 0])
@torch.no_grad()
def test_the_difference_of_a_t_lora_is_that_of_the_factors_it_started_with(
    rank: int, alpha: float
) -> None:
    """As LyCORIS rebuilds it from a file: the start is not in it, but comes from the weight."""
    torch.manual_seed(1)
    adapted = layer(conv=False)
    base = adapted.weight.clone()
    made = TLoraModule("x", adapted, 1.0, lora_dim=rank, alpha=alpha)
    for parameter in made.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.2)
    state = {name: tensor.clone() for name, tensor in made.custom_state_dict().items()}
    theirs = TLoraModule.make_module_from_state_dict("x", adapted, *state.values())
    theirs.apply_to()
    x, plain = torch.randn(3, IN), layer(conv=False)
    expected = adapted(x)
    plain.weight.copy_(merged("tlora", state, base))
    torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-5)
    plain.weight.copy_(base)
    assert not torch.allclose(plain(x), expected, atol=1e-2)


def layer(conv: bool) -> torch.nn.Module:
    return (
        torch.nn.Conv2d(IN, OUT, 3, padding=1, bias=False)
        if conv
        else torch.nn.Linear(IN, OUT, bias=False)
    )


@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv"])
@pytest.mark.parametrize(("algorithm", "module", "options"), [*ROTATIONS, *DORAS, *OTHERS], ids=str)
@torch.no_grad()
def test_the_forward_pass_is_the_merged_weights(
    algorithm: str, module: type, options: dict[str, Any], conv: bool
) -> None:
    torch.manual_seed(1)
    x = torch.randn(2, IN, 5, 5) if conv else torch.randn(3, IN)
    adapted = layer(conv)
    base = adapted.weight.clone()
    theirs = module("x", adapted, 1.0, **options)
    for parameter in theirs.parameters():
        if parameter.ndim and parameter.is_floating_point():
            parameter.normal_(std=0.3)
    if hasattr(theirs, "dora_scale"):
        theirs.dora_scale.copy_(theirs.dora_scale.abs() + 0.5)
    theirs.apply_to()
    theirs.eval()
    expected = adapted(x)
    plain = layer(conv)
    plain.weight.copy_(merged(algorithm, theirs.state_dict(), base))
    torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-5)


def merged(algorithm: str, state: dict[str, torch.Tensor], base: torch.Tensor) -> torch.Tensor:
    kind = algorithms()[algorithm]
    roles = {role.spelling: name for name, role in kind.roles.items()}
    alpha = Stated(float(state["alpha"])) if "alpha" in state else None
    tensors = {roles[key]: tensor for key, tensor in state.items() if key != "alpha"}
    facts = kind.facts({role: tuple(tensor.shape) for role, tensor in tensors.items()}, alpha)
    if facts.kernel is None:
        facts = replace(facts, kernel=tuple(base.shape[2:]))
    weight = base.reshape(OUT, -1).double()
    return kind.decode(tensors, facts).apply(weight, 1.0).float().reshape(base.shape)
