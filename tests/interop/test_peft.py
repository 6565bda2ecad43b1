"""What PEFT saves, adaptkit opens and merges as PEFT does; what adaptkit writes for PEFT, PEFT loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from adaptkit.adapter import Adapter
from tests.interop.conftest import Sd1, close, deltas, noise, unet_names

pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.interop

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTIONS = [
    "conv1",
    "conv2",
    "proj_in",
    "time_emb_proj",
    "conv_shortcut",
    "downsamplers.0.conv",
]
MIDDLE = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"

CONFIGS: dict[str, dict[str, Any]] = {
    "alpha-is-not-the-rank": {
        "r": 4,
        "lora_alpha": 2,
        "target_modules": [*ATTENTION, *CONVOLUTIONS],
    },
    "patterns": {
        "r": 4,
        "lora_alpha": 2,
        "target_modules": ["to_q", "to_k", "conv1", "proj_in"],
        "rank_pattern": {MIDDLE: 2, "conv1": 3, "attn2.to_k": 1},
        "alpha_pattern": {MIDDLE: 9, "conv1": 7, "attn2.to_k": 5},
    },
    "anchored-patterns": {
        "r": 4,
        "lora_alpha": 2,
        "target_modules": ["to_q", "conv1"],
        "alpha_pattern": {"^mid_block.resnets.0.conv1": 7, r"^.*attn2\.to_q$": 5},
    },
    "rank-scaled": {
        "r": 4,
        "lora_alpha": 3,
        "target_modules": ["to_q", "conv1"],
        "use_rslora": True,
        "rank_pattern": {"conv1": 2},
    },
    "regular-expression": {
        "r": 4,
        "lora_alpha": 2,
        "target_modules": r".*attn1\.to_[qk]",
        "alpha_pattern": {r".*\.to_k": 8},
    },
}


def saved(sd1: Sd1, folder: Path, config: Any) -> Any:
    """A PEFT model with random adapters, saved as PEFT saves it."""
    torch.manual_seed(4)
    model = peft.get_peft_model(sd1.unet(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "lokr_" in name:
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(str(folder))
    return model


def in_layers(model: Any) -> dict[str, torch.Tensor]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        f"unet.{name.removeprefix('base_model.model.')}": module.get_delta_weight(
            "default"
        ).detach()
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }


@pytest.mark.parametrize("case", CONFIGS)
def test_a_saved_lora_is_merged_as_peft_merges_it(sd1: Sd1, tmp_path: Path, case: str) -> None:
    model = saved(sd1, tmp_path / "adapter", peft.LoraConfig(**CONFIGS[case]))
    theirs = in_layers(model)
    with Adapter.open(tmp_path / "adapter") as adapter:
        assert adapter.format.name == "peft"
        assert adapter.alpha_source == "metadata"
        assert {adapter.label(slot) for slot in adapter.entries} == theirs.keys()
    merged = unet_names(sd1.merge(tmp_path / "adapter", tmp_path / "merged.safetensors"))
    before, expected = unet_names(sd1.base), model.merge_and_unload().state_dict()
    assert expected.keys() == merged.keys()
    for name, tensor in expected.items():
        assert close(merged[name], tensor, 5e-7), name
    assert (
        sum(not torch.equal(before[name], tensor) for name, tensor in merged.items())
        == len(theirs)
        > 30
    )


def test_the_configuration_matters(sd1: Sd1, tmp_path: Path) -> None:
    """The comparison above can fail: another lora_alpha in the folder is another ΔW."""
    folder = tmp_path / "adapter"
    theirs = in_layers(saved(sd1, folder, peft.LoraConfig(**CONFIGS["patterns"])))
    assert all(close(theirs[name].reshape(d.shape), d, 1e-6) for name, d in deltas(folder).items())
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps(config | {"lora_alpha": 3, "alpha_pattern": {"conv1": 7}})
    )
    same = {
        name for name, d in deltas(folder).items() if close(theirs[name].reshape(d.shape), d, 1e-6)
    }
    assert same == {name for name in theirs if name.endswith("conv1")}


@pytest.mark.parametrize("rank", [{"rank": 6, "conv_rank": 2}])
def test_peft_loads_what_extract_writes(sd1: Sd1, tmp_path: Path, rank: dict[str, int]) -> None:
    """The folder that `extract --to peft` makes loads as it is, module by module."""
    folder = tmp_path / "adapter"
    report = sd1.extract(sd1.tuned("noise", noise), folder, to="peft", only=("unet",), **rank)
    model = peft.PeftModel.from_pretrained(sd1.unet(), str(folder))
    theirs, ours = in_layers(model), deltas(folder)
    assert theirs.keys() == ours.keys()
    assert len(ours) == report.modules == 282
    assert all(close(theirs[name].reshape(d.shape), d, 1e-6) for name, d in ours.items())
    # and into a model that PEFT has prepared already: nothing missing, nothing left over
    fresh = peft.get_peft_model(sd1.unet(), peft.PeftConfig.from_pretrained(str(folder)))
    loaded = peft.set_peft_model_state_dict(fresh, load_file(folder / "adapter_model.safetensors"))
    assert not loaded.unexpected_keys
    assert not [key for key in loaded.missing_keys if "lora_" in key]


LOKR: dict[str, dict[str, Any]] = {
    "both-full": {"r": 64, "alpha": 32, "target_modules": ["to_q", "conv1"]},
    "low-rank": {"r": 2, "alpha": 3, "target_modules": r".*mid_block.*(to_q|to_k|conv1)"},
    "both-low-rank": {
        "r": 1,
        "alpha": 3,
        "target_modules": ["to_q", "conv1"],
        "decompose_both": True,
    },
    "tucker": {
        "r": 2,
        "alpha": 3,
        "target_modules": r".*mid_block.*conv1",
        "use_effective_conv2d": True,
    },
}


@pytest.mark.parametrize(
    "case",
    [
        "both-full",
        "low-rank",
        "both-low-rank",
        "tucker",
    ],
)
def test_a_saved_lokr_means_what_peft_makes_of_it(sd1: Sd1, tmp_path: Path, case: str) -> None:
    theirs = in_layers(
        saved(sd1, tmp_path / "adapter", peft.LoKrConfig(**LOKR[case], decompose_factor=4))
    )
    ours = deltas(tmp_path / "adapter")
    assert theirs.keys() == ours.keys()
    assert all(close(theirs[name].reshape(d.shape), d, 1e-6) for name, d in ours.items())
