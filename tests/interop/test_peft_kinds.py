"""Kinds of PEFT adapters that adaptkit does not read are refused by their name, in every verb."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from adaptkit import ops
from adaptkit.adapter import Adapter
from adaptkit.detect import foreign
from adaptkit.detect.foreign import READ
from adaptkit.errors import AdaptkitError

peft = pytest.importorskip("peft")
SIDE = 32


def test_every_kind_of_peft_is_read_or_has_a_name() -> None:
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    for kind, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items():
        name = getattr(kind, "value", kind)
        told = foreign([], {"peft_type": name})
        assert (told is None) == (name in READ), name
        # tensors alone: prompts are no weights of layers
        if name not in READ and "PROMPT" not in name and name not in UNTOLD:
            assert foreign([f"base_model.model.layer.{prefix}x.weight"]) is not None, name


# stored under names that say nothing, or only with a configuration
UNTOLD = {"CARTRIDGE", "CPT", "P_TUNING", "PREFIX_TUNING", "SHADOW"}


def configs() -> dict[str, Callable[[], Any]]:
    linear = dict(target_modules=["to_q"])
    return {
        "GraLoRA": lambda: peft.GraloraConfig(r=4, gralora_k=2, **linear),
        "WaveFT": lambda: peft.WaveFTConfig(n_frequency=20, **linear),
        "C3A": lambda: peft.C3AConfig(block_size=8, **linear),
        "RandLoRA": lambda: peft.RandLoraConfig(r=4, **linear),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", configs())
@pytest.mark.parametrize("folder", [True, False], ids=["folder", "tensors-alone"])
def test_a_saved_adapter_is_refused_by_name(name: str, folder: bool, tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({"to_q": torch.nn.Linear(SIDE, SIDE)})
    peft.get_peft_model(model, configs()[name]()).save_pretrained(str(tmp_path / "a"))
    path = tmp_path / "a"
    if not folder:
        path = tmp_path / "renamed.safetensors"
        path.write_bytes((tmp_path / "a" / "adapter_model.safetensors").read_bytes())
    base = tmp_path / "base.safetensors"
    save_file({"blocks.0.self_attn.q.weight": torch.zeros(SIDE, SIDE)}, base)
    output = tmp_path / "out.safetensors"
    report = ops.inspect.run(path)
    assert name in report.record["error"]
    assert "extract" in report.record["hint"]
    for verb in (
        lambda: Adapter.open(path),
        lambda: ops.convert.plan(path, ops.convert.Options(to="kohya", output=output)),
        lambda: ops.merge.plan(base, [(path, 1.0)], ops.merge.Options(output=output, family="wan")),
        lambda: ops.combine.plan([(path, 1.0)] * 2, ops.combine.Options(output=output)),
    ):
        with pytest.raises(AdaptkitError, match=name) as refused:
            verb()
        assert "extract" in (refused.value.hint or "")
    assert not output.exists()
