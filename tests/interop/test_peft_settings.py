"""PEFT's settings beside rank and alpha: what `merge_and_unload` makes of them, or a refusal by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit.errors import AdaptkitError
from adaptkit.ops import merge

peft = pytest.importorskip("peft")

SIZE = 24


class Model(torch.nn.Module):
    """Three linear layers under the names of FLUX."""

    def __init__(self) -> None:
        super().__init__()
        block, attn = torch.nn.Module(), torch.nn.Module()
        attn.to_q, attn.to_k = torch.nn.Linear(SIZE, SIZE + 8), torch.nn.Linear(SIZE, SIZE)
        block.attn = attn
        self.transformer_blocks = torch.nn.ModuleList([block])
        self.proj_out = torch.nn.Linear(SIZE, SIZE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.transformer_blocks[0].attn.to_q(x)


def lora(**settings: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "target_modules": ["to_q"], **settings})


def oft(**settings: Any) -> Any:
    return peft.OFTConfig(
        r=0, oft_block_size=8, target_modules=["to_q"], use_cayley_neumann=True, **settings
    )


def saved(folder: Path, settings: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    """The base checkpoint, and the weights as PEFT merges the adapter it saved."""
    torch.manual_seed(0)
    model = Model()
    base = folder / "base.safetensors"
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, base)
    tuned = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    tuned.save_pretrained(folder / "a")
    return base, tuned.merge_and_unload().state_dict()


def merged(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    out = base.with_name("out.safetensors")
    merge.run(merge.plan(base, [(adapter, 1.0)], merge.Options(output=out, family="flux")))
    return load_file(out)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(lambda: lora(layers_to_transform=[0], layers_pattern="transformer_blocks"), id="layers"),
        pytest.param(lambda: lora(target_modules="all-linear", exclude_modules=["proj_out"]), id="excluded"),
        pytest.param(lambda: lora(target_modules=[], target_parameters=["proj_out.weight"]), id="parameters"),
        pytest.param(lambda: lora(fan_in_fan_out=True), id="fan-in"),
        pytest.param(
            lambda: lora(
                target_modules=["to_q", "to_k"], use_dora=True, use_rslora=True,
                rank_pattern={"to_k": 2}, alpha_pattern={"to_q": 3},
            ),
            id="dora-patterns",
        ),
        pytest.param(oft, id="oft"),
        pytest.param(lambda: oft(block_share=True), id="oft-shared"),
    ],
)  # fmt: skip
def test_what_is_merged_is_what_peft_merges(tmp_path: Path, settings: Callable[[], Any]) -> None:
    base, theirs = saved(tmp_path, settings())
    ours, before = merged(base, tmp_path / "a"), load_file(base)
    changed = [name for name, tensor in theirs.items() if not torch.equal(tensor, before[name])]
    assert changed
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=2e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(lambda: lora(modules_to_save=["proj_out"]), id="modules-to-save"),
        pytest.param(lambda: lora(bias="all"), id="biases"),
        pytest.param(lambda: lora(bias="lora_only"), id="lora-biases"),
    ],
)
def test_weights_that_are_trained_beside_an_adapter_are_refused_by_name(
    tmp_path: Path, settings: Callable[[], Any]
) -> None:
    """They replace those of the base: leaving them out without a word would be another model."""
    base, _ = saved(tmp_path, settings())
    with pytest.raises(AdaptkitError, match=r"base_model\.model\.\S*(bias|weight)|no known family"):
        merged(base, tmp_path / "a")
    assert not (tmp_path / "out.safetensors").exists()
