"""The files that the commands of `adaptkit help every-job` name, and what NumPy reads in what they write.

Nothing here is read by adaptkit: names of SD 1.x are mangled by the rules of kohya's trainer and of CompVis' UNet.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests import made, oracle
from tests.synth import FIXTURES, load_listing, shrink

Array = np.ndarray
TINY = FIXTURES / "tiny"
NEAR = 1e-5  # of ‖ΔW‖: products of float32 factors

# two kinds of layers of the UNet, a convolution of 1×1, one of 3×3, and one of the text encoder
ATTENTION = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
UP = "lora_unet_up_blocks_1_attentions_2_transformer_blocks_0_attn2_to_v"
POINT = "lora_unet_down_blocks_0_attentions_1_proj_in"
WINDOW = "lora_unet_down_blocks_1_resnets_0_conv1"
TEXT = "lora_te_text_model_encoder_layers_3_mlp_fc1"
LINEAR = (ATTENTION, UP, POINT, TEXT)


def original(stem: str) -> str:
    """The key of a module of kohya's in a checkpoint of SD 1.x as it was published."""
    if stem.startswith("lora_te_"):
        layer, rest = re.fullmatch(r"lora_te_text_model_encoder_layers_(\d+)_(\w+)", stem).groups()  # type: ignore[union-attr]
        dotted = re.sub(r"^(self_attn|mlp)_", r"\1.", rest)
        return f"cond_stage_model.transformer.text_model.encoder.layers.{layer}.{dotted}.weight"
    found = re.fullmatch(
        r"lora_unet_(?:(down|up)_blocks_(\d)|(mid)_block)_(attentions|resnets)_(\d)_(\w+)", stem
    )
    assert found, stem
    way, block, _, kind, number, rest = found.groups()
    place, n = (0 if kind == "resnets" else 1), int(number)
    home = {
        "down": lambda: f"input_blocks.{3 * int(block) + n + 1}.{place}",
        "up": lambda: f"output_blocks.{3 * int(block) + n}.{place}",
        None: lambda: f"middle_block.{2 * n if kind == 'resnets' else 1}",
    }[way]()
    for mangled, dotted in (
        ("transformer_blocks_0_", "transformer_blocks.0."),
        ("attn1_", "attn1."),
        ("attn2_", "attn2."),
        ("to_out_0", "to_out.0"),
        ("ff_net_0_proj", "ff.net.0.proj"),
        ("ff_net_2", "ff.net.2"),
        ("conv1", "in_layers.2"),
        ("conv2", "out_layers.3"),
    ):
        rest = rest.replace(mangled, dotted)
    return f"model.diffusion_model.{home}.{rest}.weight"


def dotted(stem: str) -> str:
    """A module of kohya's in one spelling with that of diffusers: no dots, one prefix."""
    return re.sub(r"^(lora_unet_|unet_|transformer_|lora_te_|text_encoder_)", "", _mangled(stem))


def _mangled(stem: str) -> str:
    return stem.removeprefix("base_model.model.").replace(".", "_")


ENDS = {
    "up": ("lora_up.weight", "lora_B.weight", "lora.up.weight"),
    "down": ("lora_down.weight", "lora_A.weight", "lora.down.weight"),
    "mid": ("lora_mid.weight",),
    "alpha": ("alpha",),
    "diff": ("diff",),
    "diff_b": ("diff_b",),
    **{r: (r,) for r in ("lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_w1_a", "lokr_w1_b")},
    **{r: (r,) for r in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
}


def tensors(path: Path) -> dict[str, Array]:
    """Every tensor in float64; fp8 and bf16 are widened."""
    return {key: tensor.double().numpy() for key, tensor in load_file(path).items()}


def raw(path: Path) -> dict[str, bytes]:
    return {
        key: tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else b""
        for key, tensor in load_file(path).items()
    }


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "np") as file:
        return dict(file.metadata() or {})


def modules(path: Path) -> dict[str, dict[str, Array]]:
    """The tensors of an adapter by module and role, whatever the spelling of their ends."""
    found: dict[str, dict[str, Array]] = {}
    for key, tensor in tensors(path).items():
        role, end = next(
            (role, end) for role, ends in ENDS.items() for end in ends if key.endswith(f".{end}")
        )
        found.setdefault(key.removesuffix(f".{end}"), {})[role] = tensor
    return found


def deltas(path: Path, alpha: float | None = None) -> dict[str, Array]:
    """ΔW of every module as a matrix; without an alpha in the file, `alpha`, or a scale of 1."""
    if path.is_dir():
        config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        alpha, path = config["lora_alpha"], path / "adapter_model.safetensors"
    return {dotted(name): _delta(parts, alpha) for name, parts in modules(path).items()}


def _delta(parts: Mapping[str, Array], alpha: float | None) -> Array:
    stated = float(parts["alpha"]) if "alpha" in parts else alpha
    if "diff" in parts:
        return parts["diff"].reshape(len(parts["diff"]), -1)
    if "up" in parts:
        up, down = parts["up"], parts["down"]
        scale = 1.0 if stated is None else stated / len(down)
        whole = oracle.lora(up, down, scale, parts.get("mid"))
        return whole.reshape(len(up), -1)
    kernel = next((t.shape[2:] for t in parts.values() if t.ndim > 2), ())
    if "hada_w1_a" in parts:
        loha = {key.removeprefix("hada_"): t for key, t in parts.items() if key != "alpha"}
        whole = oracle.loha(loha, stated, kernel)
    else:
        lokr = {key.removeprefix("lokr_"): t for key, t in parts.items() if key != "alpha"}
        whole = oracle.lokr_stored(lokr, stated, kernel)
    return whole.reshape(len(whole), -1)


def apart(one: Mapping[str, Array], two: Mapping[str, Array]) -> float:
    """‖one − two‖ / ‖two‖ over the modules of both; one that is missing counts as zero."""
    names = one.keys() | two.keys()
    error = sum(float(((one.get(n, 0.0) - two.get(n, 0.0)) ** 2).sum()) for n in names)
    return (error / sum(float((delta**2).sum()) for delta in two.values())) ** 0.5


def added(*parts: tuple[Mapping[str, Array], float]) -> dict[str, Array]:
    """The weighted sum of the ΔW of several adapters."""
    names = dict.fromkeys(name for delta, _ in parts for name in delta)
    return {n: sum(w * delta[n] for delta, w in parts if n in delta) for n in names}  # type: ignore[misc]


def merged_as(base: Path, out: Path, expected: Mapping[str, Array], unit: float = 2.0**-10) -> None:
    """Every weight is base + ΔW within one rounding of its number format, and nothing else changed."""
    before, after = tensors(base), tensors(out)
    assert before.keys() == after.keys()
    changed = {original(f"lora_unet_{n}" if f"lora_unet_{n}" in STEMS else f"lora_te_{n}"): d
               for n, d in expected.items()}  # fmt: skip
    assert changed.keys() <= before.keys()
    old, new = raw(base), raw(out)
    for key, weight in before.items():
        if key not in changed:
            assert old[key] == new[key], key
            continue
        meant = weight + changed[key].reshape(weight.shape)
        slack = unit * np.abs(meant) + 1e-6 * np.abs(meant).max() + 2.0**-24
        slack = np.maximum(slack, 2.0**-10 if unit > 0.01 else 0.0)
        assert (np.abs(after[key] - meant) <= slack).all(), key
        assert not np.array_equal(after[key], weight), key


STEMS = frozenset((ATTENTION, UP, POINT, WINDOW, TEXT))


@cache
def shapes() -> dict[str, tuple[int, ...]]:
    with safe_open(TINY / "base.safetensors", "np") as file:
        return {stem: tuple(file.get_slice(original(stem)).get_shape()) for stem in STEMS}


def adapter(path: Path, kind: str = "lora", names: Iterable[str] = LINEAR, *, seed: int = 0,
            rank: int = 4, size: float = 0.02) -> Path:  # fmt: skip
    """An adapter of one kind in kohya's keys, in float32, small beside the weights of the base."""
    draw = np.random.default_rng(seed)
    stored: dict[str, torch.Tensor] = {}
    for name in names:
        for key, array in made.module(kind, name, shapes()[name], draw, rank).items():
            scale = size if key.endswith(("lora_up.weight", "lokr_w1", "hada_w1_a", "diff")) else 1
            stored[key] = torch.tensor(array * scale, dtype=torch.float32)
    save_file(stored, path, {"ss_network_module": "networks.lora", "ss_output_name": path.stem})
    return path


def fine_tuned(folder: Path, family: str, base: str, tuned: str) -> list[str]:
    """Two checkpoints of a family with every width divided, in bf16; the eight layers that differ, by rank 3."""
    listing = shrink(load_listing(FIXTURES / "checkpoints" / f"{family}.tsv"))
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    stored = {key: (normal(*shape) * 0.05).bfloat16() for key, (_, shape) in listing.items()}
    save_file(stored, folder / f"{base}.safetensors")
    layers = [
        key for key, t in stored.items() if t.ndim == 2 and min(t.shape) > 16 and ".0." in key
    ]
    for key in layers[:8]:
        rows, columns = stored[key].shape
        stored[key] = (stored[key].float() + normal(rows, 3) @ normal(3, columns)).bfloat16()
    save_file(stored, folder / f"{tuned}.safetensors")
    return layers[:8]
