"""Files of every family in the real PEFT and the real LyCORIS: how many of their modules end up in layers."""

from __future__ import annotations

import warnings

import pytest
import torch

from adaptkit.detect import families

pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

from tests.interop.hosts.diffusers import _in_layers, skeleton  # noqa: E402
from tests.interop.hosts.files import make  # noqa: E402

pytestmark = pytest.mark.interop

SOME = ("sd1", "flux", "wan", "ltx2")
FAMILIES = [f if f in SOME else pytest.param(f, marks=pytest.mark.slow) for f in families()]
PREFIX = "base_model.model."


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_every_module(family: str) -> None:
    """`lora_A`, `lora_B` under `base_model.model.` and diffusers' names, in layers of the family's widths."""
    file = make(family, "peft", "diffusers", "lora_B", "layers", 2)
    assert file is not None
    names = [part.stem.removeprefix(PREFIX) for part in file.parts]
    model = skeleton(family, file.parts[0].slot.component, 2, whole=True)
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.inject_adapter_in_model(config, model)
        found = peft.set_peft_model_state_dict(model, file.tensors())
    assert not found.unexpected_keys
    assert {name for name, added, _ in _in_layers(model) if added.any()} == set(names)


@pytest.mark.parametrize("form", ["lora_up, alpha", "loha", "lokr", "lokr, factored", "full"])
@pytest.mark.parametrize("family", ["sd1", "flux", "wan"])
def test_lycoris_loads_every_module(family: str, form: str) -> None:
    """`lycoris_` and diffusers' joined names, as its own wrapper saves them."""
    lycoris = pytest.importorskip("lycoris")
    file = make(family, "lycoris", "diffusers", form, "attention", 1)
    assert file is not None
    model = skeleton(family, file.parts[0].slot.component, 1, whole=True)
    with torch.no_grad():
        network, _ = lycoris.create_lycoris_from_weights(1.0, "", model, file.tensors())
    made = {lora.lora_name for lora in network.loras}
    assert made == {part.stem for part in file.parts}
