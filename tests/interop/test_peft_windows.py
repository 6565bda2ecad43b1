"""LoKr and LoHa that PEFT saved for convolutions of one dimension: merged as PEFT merges them, or refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit.errors import AdaptkitError, NotRepresentable
from adaptkit.ops import convert, extract, merge

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.interop


class Net(torch.nn.Module):
    """Convolutions of one dimension, under names of no family."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.front = torch.nn.ModuleList(torch.nn.Conv1d(24, 32, window) for _ in range(6))


def config(kind: str, **settings: Any) -> Any:
    return {"lokr": peft.LoKrConfig, "loha": peft.LoHaConfig}[kind](
        r=4, alpha=3, target_modules=r"front\.\d", init_weights=False, **settings
    )


def saved(folder: Path, window: int, kind: str, **settings: Any) -> dict[str, torch.Tensor]:
    """A base and the adapter that PEFT saves for it; what PEFT itself merges."""
    torch.manual_seed(0)
    net = Net(window)
    save_file(net.state_dict(), folder / "base.safetensors")
    model = peft.get_peft_model(copy.deepcopy(net), config(kind, **settings))
    model.save_pretrained(folder / "adapter")
    return model.merge_and_unload().state_dict()


def merged(folder: Path) -> dict[str, torch.Tensor]:
    output = folder / "merged.safetensors"
    merge.run(
        merge.plan(
            folder / "base.safetensors", [(folder / "adapter", 1.0)], merge.Options(output=output)
        )
    )
    return load_file(output)


FACTORED = {"decompose_factor": 2}  # a second factor of 16 × 12, larger than twice the rank
SAME = {
    "lokr, factored": ("lokr", FACTORED),
    "lokr, factored twice": ("lokr", {**FACTORED, "decompose_both": True}),
    "lokr, tucker": ("lokr", {**FACTORED, "use_effective_conv2d": True}),
    "loha": ("loha", {}),
    "loha, tucker": ("loha", {"use_effective_conv2d": True}),
}


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("case", SAME)
def test_a_merge_is_that_of_peft(tmp_path: Path, case: str, window: int) -> None:
    kind, settings = SAME[case]
    expected = saved(tmp_path, window, kind, **settings)
    found = merged(tmp_path)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [1, 3])
def test_a_full_second_factor_is_refused(tmp_path: Path, window: int) -> None:
    """PEFT mixes up its entries: 1.4 times the difference away from what LyCORIS makes of it."""
    expected = saved(tmp_path, window, "lokr", decompose_factor=8)
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    stem = "base_model.model.front.0"
    assert state[f"{stem}.lokr_w2"].shape == (4, 3, window)
    base = load_file(tmp_path / "base.safetensors")["front.0.weight"]
    delta = expected["front.0.weight"] - base
    # peft scales by alpha / r
    kron = 0.75 * torch.kron(state[f"{stem}.lokr_w1"], state[f"{stem}.lokr_w2"].flatten(1))
    assert (kron.view_as(delta) - delta).norm() > delta.norm()
    with pytest.raises(AdaptkitError, match="otherwise than all other readers"):
        merged(tmp_path)


def test_no_such_adapter_is_written(tmp_path: Path) -> None:
    """A LyCORIS of the same tensors: kohya holds it, PEFT only as a LoRA."""
    saved(tmp_path, 3, "lokr", decompose_factor=8)
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    made = tmp_path / "lycoris.safetensors"
    save_file({k.replace("base_model.model.", ""): t for k, t in state.items()}, made)
    output = tmp_path / "out"
    with pytest.raises(NotRepresentable, match="otherwise than all other readers") as caught:
        convert.plan(made, convert.Options(to="peft", output=output))
    assert "--algo lora" in (caught.value.hint or "")
    convert.run(convert.plan(made, convert.Options(to="peft", algo="lora", output=output)))


def test_nor_is_one_extracted(tmp_path: Path) -> None:
    expected = saved(tmp_path, 3, "lokr", decompose_factor=8)
    save_file({k: t.contiguous() for k, t in expected.items()}, tmp_path / "tuned.safetensors")
    options = extract.Options(algo="lokr", factor=8, to="peft", output=tmp_path / "out")
    with pytest.raises(NotRepresentable, match="otherwise than all other readers"):
        extract.plan(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", options)
