"""The oracle against PEFT itself: what a folder does to a model's weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.matrix import build, judge, spelling
from tests.matrix.build import Adapter
from tests.matrix.layers import LAYERS

pytestmark = pytest.mark.interop
FORMS = ("loha", "loha-tucker", "lokr-peft", "peft-oft")  # BOFT needs PEFT's CUDA extension
CASES = [
    *((family, form, "config") for family in ("sd1", "flux") for form in FORMS),
    *(
        (family, form, alpha)
        for family in ("sd1", "flux")
        for form in ("lora", "lora+dora")
        for alpha in ("config", "pattern", "rslora")
    ),
    ("flux", "peft-ia3", "config"),
]


def _model(family: str, weights: dict[str, np.ndarray]) -> nn.Module:
    """Modules under diffusers names, with the base weights in float64."""
    root = nn.Module()
    for layer in LAYERS[family]:
        for part in () if layer.component else layer.parts:
            value = torch.tensor(build.seen(weights[layer.name], part))
            out, ins, *kernel = value.shape
            made = {
                0: lambda o, i, _: nn.Linear(i, o),
                2: lambda o, i, k: nn.Conv2d(i, o, tuple(k)),
            }[len(kernel)](out, ins, kernel).double()
            made.weight.data = value
            *path, name = part.name.split(".")
            here = root
            for step in path:
                if not hasattr(here, step):
                    here.add_module(step, nn.Module())
                here = getattr(here, step)
            here.add_module(name, made)
    return root


@pytest.mark.parametrize(("family", "form", "alpha"), CASES)
def test_peft_does_what_the_oracle_says(family: str, form: str, alpha: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    spec = Adapter(family, "peft", form, "denoiser", alpha=alpha)
    weights = build.weights(family)
    made = build.adapter(spec, tmp_path / "folder")
    assert made is not None
    meant = spelling.effect(made.modules, weights)
    model = _model(family, weights)
    wrapped = peft.PeftModel.from_pretrained(model, tmp_path / "folder")
    merged = wrapped.double().merge_and_unload().state_dict()
    found = {}
    for layer in LAYERS[family]:
        for part in () if layer.component else layer.parts:
            rows = merged[f"{part.name}.weight"].double().numpy()
            rows = rows - build.seen(weights[layer.name], part)
            rows = spelling.exchange(rows) if part.swapped else rows
            found.setdefault(layer.name, np.zeros(layer.shape))[part.start : part.stop] = rows
    assert judge.relative(found, meant) < 2e-6
