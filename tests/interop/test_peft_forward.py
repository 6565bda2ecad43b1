"""PEFT's own forward pass gives what adaptkit merges: DoRA, OFT, BOFT and IA³, from the tensors that PEFT saves."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from adaptkit.algorithms.contract import Stated
from adaptkit.keymap import algorithms, split_suffix

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.interop

IN, OUT = 8, 12


@pytest.fixture(autouse=True)
def _without_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT would compile BOFT's CUDA extension."""
    from peft.tuners.boft import layer

    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: None)


class Tiny(nn.Module):
    def __init__(self, *, conv: bool, bias: bool) -> None:
        super().__init__()
        self.layer = (
            nn.Conv2d(IN, OUT, 3, padding=1, bias=bias) if conv else nn.Linear(IN, OUT, bias=bias)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


LINEAR: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "dora": ("lora+dora", "LoraConfig", {"r": 3, "lora_alpha": 6, "use_dora": True}),
    "loha": ("loha", "LoHaConfig", {"r": 2, "alpha": 1}),
    "oft": ("peft-oft", "OFTConfig", {"oft_block_size": 4}),
    "oft-shared": ("peft-oft", "OFTConfig", {"oft_block_size": 4, "block_share": True}),
    "boft": ("peft-boft", "BOFTConfig", {"boft_block_size": 4}),
    "ia3-output": ("ia3", "IA3Config", {"feedforward_modules": []}),
    "ia3-input": ("ia3", "IA3Config", {"feedforward_modules": ["layer"]}),
}
CONV = ("dora", "boft")


def trained(config: Any, *, conv: bool = False, bias: bool = True) -> Any:
    """A PEFT model whose adapter is random, and a reference to the layer it wraps."""
    torch.manual_seed(3)
    model = peft.get_peft_model(Tiny(conv=conv, bias=bias), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if re.search(r"lora_[AB]|hada_|oft_R", name):
                parameter.normal_(std=0.6 if "hada_" in name else 0.2)
            elif re.search(r"magnitude|ia3_l|boft_s", name):
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    return model


def merged(algorithm: str, model: Any, alpha: float | None) -> torch.Tensor:
    """What adaptkit makes of the base weight with the tensors that `save_pretrained` would store."""
    kind = algorithms()[algorithm]
    found = {}
    for key, tensor in peft.get_peft_model_state_dict(model).items():
        split = split_suffix(key)
        assert split is not None, key
        roles = dict(split[2])
        assert algorithm in roles, key
        found[roles[algorithm]] = tensor
    assert frozenset(found) in kind.forms
    facts = kind.facts(
        {role: tuple(t.shape) for role, t in found.items()},
        None if alpha is None else Stated(alpha),
    )
    base = model.base_model.model.layer.base_layer.weight
    if facts.kernel is None:
        facts = replace(facts, kernel=tuple(base.shape[2:]))
    flat = base.detach().double().reshape(OUT, -1)
    assert facts.rows in (0, OUT)
    assert facts.columns in (0, flat.shape[1])
    return kind.decode(found, facts).apply(flat, 1.0).float().reshape(base.shape)


def equal_outputs(model: Any, weight: torch.Tensor, x: torch.Tensor) -> None:
    base = model.base_model.model.layer.base_layer
    plain = Tiny(conv=base.weight.ndim > 2, bias=base.bias is not None)
    plain.load_state_dict({f"layer.{name}": value for name, value in base.state_dict().items()})
    with torch.no_grad():
        before = plain(x)
        plain.layer.weight.copy_(weight)
        expected = model(x)
        torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-5)
    assert (before - expected).abs().max() > 0.05


@pytest.mark.parametrize(
    ("case", "conv"), [*((case, False) for case in LINEAR), *((case, True) for case in CONV)]
)
def test_the_forward_pass_is_the_merged_weights(case: str, conv: bool) -> None:
    algorithm, name, options = LINEAR[case]
    config = getattr(peft, name)(target_modules=["layer"], **options)
    # PEFT multiplies the bias too by an IA³ on the output, which a weight cannot do
    model = trained(config, conv=conv, bias=case != "ia3-output")
    alpha = options.get("lora_alpha", options.get("alpha"))
    equal_outputs(
        model,
        merged(algorithm, model, alpha),
        torch.randn(2, IN, 5, 5) if conv else torch.randn(3, IN),
    )


def test_oft_of_a_convolution_is_merged_as_peft_merges_it() -> None:
    """Not as its forward pass computes, which adds up overlapping windows."""
    model = trained(peft.OFTConfig(target_modules=["layer"], oft_block_size=4), conv=True)
    ours = merged("peft-oft", model, None)
    theirs = model.merge_and_unload().layer.weight
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("factors", [2, 3])
def test_butterfly_stages(monkeypatch: pytest.MonkeyPatch, factors: int, conv: bool) -> None:
    """More than one stage needs PEFT's CUDA extension, of which only `FastBlockDiag` is used: done here in torch."""
    from peft.tuners.boft import layer

    class BlockDiagonal:
        @staticmethod
        def apply(blocks: torch.Tensor) -> torch.Tensor:
            return torch.stack([torch.block_diag(*stage) for stage in blocks])

    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(layer, "FastBlockDiag", BlockDiagonal)
    config = peft.BOFTConfig(
        target_modules=["layer"], boft_block_size=2, boft_n_butterfly_factor=factors
    )
    model = trained(config, conv=conv)
    assert model.base_model.model.layer.boft_R["default"].shape[0] == factors
    equal_outputs(
        model,
        merged("peft-boft", model, None),
        torch.randn(2, IN, 5, 5) if conv else torch.randn(3, IN),
    )


def test_the_bias_of_a_lora_is_a_difference_of_its_own() -> None:
    model = trained(peft.LoraConfig(target_modules=["layer"], r=2, lora_alpha=2, lora_bias=True))
    stored = peft.get_peft_model_state_dict(model)
    key = next(key for key in stored if key.endswith("lora_B.bias"))
    split = split_suffix(key)
    assert split is not None
    assert dict(split[2])["full"] == "diff_b"
    layer = model.base_model.model.layer
    x, up, down = (
        torch.randn(3, IN),
        stored[key.replace("bias", "weight")],
        layer.lora_A["default"].weight,
    )
    plain = nn.functional.linear(
        x, layer.base_layer.weight + up @ down, layer.base_layer.bias + stored[key]
    )
    torch.testing.assert_close(plain, model(x), rtol=1e-4, atol=1e-5)
