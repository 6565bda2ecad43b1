"""extract writes what the reader of its format reads: alpha, and the order of rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from adaptkit.errors import WrongUsage
from adaptkit.ops import extract
from tests.ops.models import changed, matrices, noise_delta, save, small, tiny_base

Array = np.ndarray
SUFFIXES = {
    "lora_up.weight": "up",
    "lora_B.weight": "up",
    "lora.up.weight": "up",
    "lora_down.weight": "down",
    "lora_A.weight": "down",
    "lora.down.weight": "down",
    "alpha": "alpha",
    "diff": "diff",
}


def read(path: Path) -> dict[str, Array]:
    """ΔW of every module as any reader of LoRA computes it: alpha / rank times up · down.

    Without alpha the factor is 1, in a PEFT folder that of the configuration.
    """
    weights = path / "adapter_model.safetensors" if path.is_dir() else path
    parts: dict[str, dict[str, Array]] = {}
    for key, tensor in load_file(weights).items():
        suffix = next(s for s in SUFFIXES if key.endswith(f".{s}"))
        stem = key.removesuffix(f".{suffix}")
        parts.setdefault(stem, {})[SUFFIXES[suffix]] = tensor.double().numpy()
    config = json.loads((path / "adapter_config.json").read_text()) if path.is_dir() else {}
    return {stem: product(found, config) for stem, found in parts.items()}


def product(found: dict[str, Array], config: dict[str, Any]) -> Array:
    if "diff" in found:
        return found["diff"].reshape(len(found["diff"]), -1)
    rank = found["down"].shape[0]
    alpha = float(found["alpha"]) if "alpha" in found else config.get("lora_alpha", rank)
    up, down = found["up"].reshape(-1, rank), found["down"].reshape(rank, -1)
    return alpha / rank * up @ down


def extracted(folder: Path, base: Any, tuned: Any, to: str, **options: Any) -> extract.Report:
    pair = save(folder / "base.safetensors", base), save(folder / "tuned.safetensors", tuned)
    output = folder / ("out" if to == "peft" else "out.safetensors")
    chosen = extract.Options(to=to, output=output, overwrite=True, dtype="fp32", **options)
    return extract.run(extract.plan(*pair, chosen))


@pytest.mark.parametrize("to", ["kohya", "comfy", "lycoris", "peft", "bare"])
@pytest.mark.parametrize("alpha", [1.0, 8.0])
def test_the_file_is_the_difference_whatever_alpha_is_asked_for(
    tmp_path: Path, to: str, alpha: float
) -> None:
    base = tiny_base()
    names = matrices(base, "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q")
    tuned, deltas = changed(base, names, noise_delta())
    report = extracted(tmp_path, base, tuned, to, rank=4, alpha=alpha)
    ((_, found),) = read(report.output).items()
    ((_, delta),) = deltas.items()
    wanted = delta.numpy()
    measured = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
    assert report.relative_error == pytest.approx(measured, rel=1e-3)
    u, s, vh = np.linalg.svd(wanted)
    best = (u[:, :4] * s[:4]) @ vh[:4]
    assert measured <= 1.001 * float(np.linalg.norm(best - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("to", ["diffusers", "diffusers-old", "xlabs"])
def test_a_format_without_a_place_for_alpha_refuses_one(tmp_path: Path, to: str) -> None:
    base = tiny_base()
    tuned, _ = changed(base, matrices(base, "attn1.to_q"), noise_delta())
    with pytest.raises(WrongUsage, match=f"the {to} format stores no alpha"):
        extracted(tmp_path, base, tuned, to, rank=4, alpha=1.0)
    assert not (tmp_path / "out.safetensors").exists()


SWAPPED = {
    "flux": ("final_layer.adaLN_modulation.1.weight", "norm_out.linear"),
    "sd3": ("final_layer.adaLN_modulation.1.weight", "norm_out.linear"),
    "flux2": ("final_layer.adaLN_modulation.1.weight", "norm_out.linear"),
    "hunyuan-video": ("final_layer.adaLN_modulation.1.weight", "norm_out.linear"),
}


@pytest.mark.parametrize("family", SWAPPED)
@pytest.mark.parametrize("algo", ["full", "lora"])
@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_a_final_modulation_has_the_order_of_rows_of_its_format(
    tmp_path: Path, family: str, algo: str, to: str
) -> None:
    """Original files store (shift, scale), diffusers (scale, shift)."""
    base = small(family)
    ending, theirs = SWAPPED[family]
    (key,) = [name for name in base if name.endswith(ending)]
    tuned, deltas = changed(base, [key], noise_delta())
    rank = min(base[key].shape)
    options = {} if algo == "full" else {"rank": rank}
    report = extracted(tmp_path, base, tuned, to, algo=algo, family=family, **options)
    ((stem, found),) = read(report.output).items()
    wanted = deltas[key].numpy()
    if to == "diffusers":
        assert stem.endswith(theirs)
        wanted = np.concatenate(np.split(wanted, 2)[::-1])
    assert np.linalg.norm(found - wanted) <= 1e-4 * np.linalg.norm(wanted)
    assert report.relative_error <= 1e-4
