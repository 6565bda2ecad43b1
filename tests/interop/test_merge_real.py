"""Whole files through `adaptkit merge` against the packages that wrote them: a small real U-Net, every algorithm they have.

LyCORIS' oracle is its forward pass: its own merge applies alpha/rank twice for LoHa and LoKr (reference, gotcha 16).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.interop.conftest import Sd1, unet_names

pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("lycoris")

import peft
from lycoris import LycorisNetwork, create_lycoris

pytestmark = pytest.mark.interop

TARGETS = ["Transformer2DModel", "ResnetBlock2D", "Downsample2D"]
ADDITIVE: dict[str, dict[str, Any]] = {
    "lora": {"algo": "lora"},
    "lora-rank-scaled": {"algo": "lora", "rs_lora": True},
    "lora-scalar": {"algo": "lora", "use_scalar": True},
    "locon-tucker": {"algo": "lora", "use_tucker": True},
    "loha": {"algo": "loha"},
    "loha-tucker": {"algo": "loha", "use_tucker": True},
    "lokr": {"algo": "lokr", "factor": 4},
    "lokr-full": {"algo": "lokr", "factor": 4, "full_matrix": True},
    "lokr-both": {"algo": "lokr", "factor": 4, "decompose_both": True},
    "lokr-tucker": {"algo": "lokr", "factor": 4, "use_tucker": True},
    "full": {"algo": "full"},
}
OTHERS: dict[str, dict[str, Any]] = {
    **{
        f"{name}-dora-{axis}": {**ADDITIVE[name], "weight_decompose": True, "wd_on_out": axis == "out"}
        for name in ("lora", "loha", "lokr")
        for axis in ("out", "in")
    },
    "oft": {"algo": "diag-oft"},
    "oft-bounded": {"algo": "diag-oft", "constraint": 0.01, "rescaled": True},
    "boft": {"algo": "boft"},
    "glora": {"algo": "glora"},
    "ia3": {"algo": "ia3"},
}


@contextmanager
def preset() -> Iterator[None]:
    """LyCORIS' networks take their targets and their prefix from a setting of the class."""
    LycorisNetwork.apply_preset({"target_module": TARGETS, "lora_prefix": "lora_unet"})
    try:
        yield
    finally:
        LycorisNetwork.apply_preset({"lora_prefix": "lycoris"})


def randomise(network: Any) -> None:
    """Weights that change the output by about a third: factors of products larger than vectors and rotations."""
    torch.manual_seed(5)
    for name, parameter in network.named_parameters():
        if name.endswith("scalar"):
            parameter.data.fill_(1.5)
        elif name.endswith("dora_scale"):
            parameter.data.mul_(1 + 0.2 * torch.rand_like(parameter))
        else:
            nn.init.normal_(parameter, std=0.3 if "hada" in name or "lokr" in name else 0.1)


def outputs(unet: nn.Module) -> torch.Tensor:
    draw = torch.Generator().manual_seed(9)
    sample = torch.randn(1, 4, 16, 16, generator=draw, dtype=torch.float64)
    text = torch.randn(1, 5, unet.config.cross_attention_dim, generator=draw, dtype=torch.float64)
    with torch.no_grad():
        return unet.double().eval()(sample, torch.tensor([500]), text).sample


@pytest.fixture(scope="module")
def plain(sd1: Sd1) -> torch.Tensor:
    """What the model answers without an adapter."""
    return outputs(sd1.unet())


def gap(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# at other strengths LyCORIS' rotations and magnitudes are not W + s·(W' - W)
@pytest.mark.parametrize(
    ("case", "strength"),
    [*((case, 1.0) for case in (*ADDITIVE, *OTHERS)), *((case, -0.6) for case in ("lora", "loha", "lokr", "full"))],
)
def test_a_merged_model_answers_as_lycoris_adapted_one_does(
    sd1: Sd1, plain: torch.Tensor, tmp_path: Path, case: str, strength: float
) -> None:
    options = dict({**ADDITIVE, **OTHERS}[case])
    unet = sd1.unet()
    with preset():
        network = create_lycoris(unet, strength, linear_dim=4, linear_alpha=2, conv_dim=4, conv_alpha=1, **options)
    network.apply_to()
    randomise(network)
    path = tmp_path / "lycoris.safetensors"
    network.save_weights(str(path), torch.float32, {})
    if case in ("full", "glora"):  # theirs mixes no dtypes, and the rotations have constants in float32
        network.double()
    expected = outputs(unet)
    merged = sd1.merge(path, tmp_path / "merged.safetensors", strength)
    found = outputs(sd1.unet(merged))
    assert gap(plain, expected) > 0.02, "the adapter changes nothing that could be missed"
    assert gap(found, expected) < 2e-5
    changed = sum(not torch.equal(merged[name], tensor) for name, tensor in sd1.base.items())
    assert changed >= len(network.loras) > 100


PEFTS: dict[str, Any] = {
    "lora": lambda names: peft.LoraConfig(r=4, lora_alpha=6, target_modules=names),
    "dora": lambda names: peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=names),
    "loha": lambda names: peft.LoHaConfig(r=3, alpha=5, target_modules=names),
    "lokr": lambda names: peft.LoKrConfig(r=3, alpha=5, decompose_factor=4, target_modules=names),
    "oft": lambda names: peft.OFTConfig(r=0, oft_block_size=2, target_modules=["to_q", "to_k"]),
    "ia3": lambda names: peft.IA3Config(target_modules=["to_q", "to_k"], feedforward_modules=["to_k"]),
}


@pytest.mark.parametrize("case", PEFTS)
def test_a_saved_adapter_is_merged_as_peft_merges_it(sd1: Sd1, tmp_path: Path, case: str) -> None:
    torch.manual_seed(4)
    model = peft.get_peft_model(sd1.unet(), PEFTS[case](["to_q", "to_k", "to_v", "proj_in"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if re.search(r"lora_[AB]|lokr_|hada_|oft_R|ia3_", name):
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(str(tmp_path / "adapter"))
    merged = unet_names(sd1.merge(tmp_path / "adapter", tmp_path / "merged.safetensors"))
    before, expected = unet_names(sd1.base), model.merge_and_unload().state_dict()
    assert expected.keys() == merged.keys()
    moved = [name for name, tensor in expected.items() if not torch.equal(before[name], tensor)]
    assert len(moved) > 30
    for name, tensor in expected.items():
        scale = tensor.abs().max()
        assert float((merged[name] - tensor).abs().max()) <= 3e-6 * float(scale), name
