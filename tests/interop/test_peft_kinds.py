"""Every kind of adapter that PEFT has is read, or refused by its name with the reason, in every verb."""

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
from adaptkit.detect.foreign import MERGED, READ, UNWEIGHTED, WHY, hint_for
from adaptkit.errors import AdaptkitError
from adaptkit.keymap import algorithms
from tests.interop.test_peft_read import CASES

peft = pytest.importorskip("peft")
SIDE = 32

# PEFT's type → the kind and what it is refused for; all other types are read
REFUSED = {
    "ADAMSS": "AdaMSS",
    "FROD": "FRoD",
    "PEANUT": "PEANuT",
    "TINYLORA": "TinyLoRA",
    "TRAINABLE_TOKENS": "trainable tokens",
    "LILY": "Lily",
    "XLORA": "X-LoRA",
    "POLY": "Poly",
    "SHADOW": "Shadow",
    "CARTRIDGE": "Cartridge",
    "CPT": "CPT",
    "PROMPT_TUNING": "prompt tuning",
    "MULTITASK_PROMPT_TUNING": "prompt tuning",
    "P_TUNING": "p-tuning",
    "PREFIX_TUNING": "prefix tuning",
    "ADAPTION_PROMPT": "adaption prompts",
}
# read, and compared with PEFT in other modules of tests
ELSEWHERE = {"LOHA", "LOKR", "LN_TUNING", "BEFT"}


def test_every_kind_of_peft_is_read_or_refused_for_a_reason() -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
    from peft.utils import PeftType

    types = {kind.value for kind in PeftType}
    assert {getattr(k, "value", k) for k in PEFT_TYPE_TO_PREFIX_MAPPING} <= types
    assert types == (READ - {"BONE"}) | REFUSED.keys()  # Bone is what MiSS was called
    assert not READ & REFUSED.keys()
    written = {kind.peft_type for kind in algorithms().values()} - {""}
    assert written == READ - {"BONE"}
    configs = {getattr(k, "value", k): v.__name__ for k, v in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    compared = {name for name, _ in CASES.values()}
    assert {configs[name] for name in READ - {"BONE"} - ELSEWHERE} == compared
    for name in types:
        told = foreign([], {"peft_type": name})
        assert told == REFUSED.get(name), name
        if told is not None:
            assert (told in UNWEIGHTED) != (told in WHY)
            assert (MERGED in hint_for(told)) == (told in WHY)


def configs() -> dict[str, Callable[[], Any]]:
    linear = dict(target_modules=["to_q"])
    return {
        "TinyLoRA": lambda: peft.TinyLoraConfig(r=2, **linear),
        "PEANuT": lambda: peft.PeanutConfig(r=2, **linear),
        "Lily": lambda: peft.LilyConfig(r=2, num_B=2, stride_A=1, **linear),
        "UniLoRA without its places": lambda: peft.UniLoraConfig(r=2, theta_d_length=9, **linear),
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
    assert report.record["hint"] == hint_for(name)
    for verb in (
        lambda: Adapter.open(path),
        lambda: ops.convert.plan(path, ops.convert.Options(to="kohya", output=output)),
        lambda: ops.merge.plan(base, [(path, 1.0)], ops.merge.Options(output=output, family="wan")),
        lambda: ops.combine.plan([(path, 1.0)] * 2, ops.combine.Options(output=output)),
    ):
        with pytest.raises(AdaptkitError, match=name) as refused:
            verb()
        assert refused.value.hint == hint_for(name)
    assert not output.exists()


class Normed(torch.nn.Module):
    """A layer and norms, one with a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks = torch.nn.ModuleList([torch.nn.Module()])
        self.blocks[0].norm = torch.nn.LayerNorm(SIDE)
        self.blocks[0].norm_q = torch.nn.RMSNorm(SIDE)
        self.blocks[0].to_q = torch.nn.Linear(SIDE, SIDE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        block: Any = self.blocks[0]
        found: torch.Tensor = block.norm_q(block.to_q(block.norm(x)))
        return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(
            lambda: peft.LNTuningConfig(target_modules=["norm", "norm_q"]), id="ln-tuning"
        ),
        pytest.param(lambda: peft.BeftConfig(target_modules=["to_q"]), id="beft"),
    ],
)
def test_vectors_are_merged_and_written_as_peft_does(make: Any, tmp_path: Path) -> None:
    """Replaced norms and added biases: the same forward pass, merged and loaded again."""
    plain, x = Normed(), torch.randn(5, SIDE)
    before = plain(x)
    base, out = tmp_path / "base.safetensors", tmp_path / "merged.safetensors"
    save_file({name: value.clone() for name, value in plain.state_dict().items()}, base)
    tuned = peft.get_peft_model(plain, make())
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    tuned.save_pretrained(tmp_path / "a")
    with torch.no_grad():
        expected = tuned.eval()(x)
    size = float((expected - before).norm())
    assert size > 0.05 * float(before.norm())
    options = ops.merge.Options(output=out, verify=True)
    ops.merge.run(ops.merge.plan(base, [(tmp_path / "a", 1.0)], options))
    merged = Normed()
    from safetensors.torch import load_file

    merged.load_state_dict(load_file(out))
    assert float((merged(x) - expected).norm()) < 1e-5 * size
    again = tmp_path / "b"
    ops.convert.run(ops.convert.plan(tmp_path / "a", ops.convert.Options(to="peft", output=again)))
    loaded = peft.PeftModel.from_pretrained(Normed(), again).eval()
    with torch.no_grad():
        assert float((loaded(x) - expected).norm()) < 1e-5 * size
