"""Layers that may meet in a stack on a device, drawn at random: each is computed as it is on the CPU.

Equal shapes with unlike dtypes, kinds, ranks, alphas, rows and recipes. Run by `test_device.py`, as `on_device.py` is;
`ADAPTKIT_STACKS=40 python -m pytest tests/ops/on_device_stacks.py` draws that many models of each kind.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit.ops import advise, combine, compare, extract, merge, resize
from tests import made
from tests.ops.models import small
from tests.ops.on_device import both, device, run

__all__ = ["device"]  # a fixture

DRAWS = range(int(os.environ.get("ADAPTKIT_STACKS", "1")))
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
KINDS = (*made.KINDS, "dora", "oft", "glora")
State = dict[str, torch.Tensor]


def one_of(draw: np.random.Generator, *choices: Any) -> Any:
    return choices[int(draw.integers(len(choices)))]


def normal(draw: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(draw.standard_normal(shape)).float()


def module(name: str, kind: str, rows: int, columns: int, draw: np.random.Generator) -> State:
    """The tensors of one module, kohya's names."""
    if kind == "oft":
        return {
            f"{name}.oft_blocks": normal(draw, rows // 8, 8, 8) * 0.1,
            f"{name}.alpha": torch.tensor(one_of(draw, 0.0, 1e-3)),
        }
    if kind == "glora":
        a, b = one_of(draw, 2, 3), one_of(draw, 2, 3)
        return {
            f"{name}.a1.weight": normal(draw, columns, a) * 0.1,
            f"{name}.a2.weight": normal(draw, a, columns) * 0.1,
            f"{name}.b1.weight": normal(draw, rows, b) * 0.1,
            f"{name}.b2.weight": normal(draw, b, columns) * 0.1,
        }
    plain = "lora" if kind in ("dora", "tucker") else kind
    arrays = made.module(plain, name, (rows, columns), draw, one_of(draw, 2, 2, 2, 3))
    dtype = one_of(draw, torch.float32, torch.float16)
    found = {key: torch.tensor(array, dtype=dtype) for key, array in arrays.items()}
    if f"{name}.alpha" in found:
        found[f"{name}.alpha"] = torch.tensor(one_of(draw, 1.0, 1.0, 2.0))
    if kind == "dora":
        shape = one_of(draw, (rows, 1), (1, columns))
        found[f"{name}.dora_scale"] = normal(draw, *shape).abs() + 1.0
    return found


def close(one: State, two: State) -> None:
    """Within a rounding of the stored dtype."""
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        steps = torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0.0
        torch.testing.assert_close(
            tensor.float(), two[key].float(), rtol=max(2 * steps, 1e-5), atol=1e-5,
            msg=lambda text, key=key: f"{key}: {text}",
        )  # fmt: skip


@pytest.mark.parametrize("seed", DRAWS)
def test_merge(seed: int, device: str, tmp_path: Path) -> None:
    """Fused layers in four dtypes; one adapter of every kind by whole layers, one of q, k and v apart."""
    draw = np.random.default_rng(seed)
    base, whole, parts = {}, {}, {}
    # few kinds and dtypes in one model, so that many layers differ in the rest alone
    kinds, dtypes = draw.permutation(KINDS)[:3], draw.permutation(len(DTYPES))[:2]
    for n in range(18):
        stem = f"double_blocks.{n}.img_attn.qkv"
        base[f"{stem}.weight"] = (normal(draw, 48, 16) / 4).to(DTYPES[one_of(draw, *dtypes)])
        name = f"lora_unet_double_blocks_{n}_img_attn_qkv"
        whole |= module(name, one_of(draw, *kinds), 48, 16, draw)
        for part in ("to_q", "to_k", "to_v"):
            if draw.random() < 0.15:
                k = one_of(draw, 1, 2)
                key = f"transformer.transformer_blocks.{n}.attn.{part}"
                parts[f"{key}.lora_A.weight"] = normal(draw, k, 16)
                parts[f"{key}.lora_B.weight"] = normal(draw, 16, k) * 0.3
    for file, tensors in (("base", base), ("whole", whole), ("parts", parts)):
        save_file(tensors, tmp_path / f"{file}.safetensors", {"format": "pt"})
    adapters = [
        (tmp_path / "whole.safetensors", one_of(draw, 1.0, 0.5)),
        (tmp_path / "parts.safetensors", one_of(draw, 1.0, -0.7)),
    ]
    found = {}
    for where in ("cpu", device):
        options = {"family": "flux", "verify": True, "device": where, "overwrite": True}
        target = tmp_path / "merged.safetensors"
        report = run(merge, (tmp_path / "base.safetensors", adapters), options, output=target)
        found[where] = load_file(report.output), report
    (one, here), (two, there) = found.values()
    close(one, two)
    assert there.relative_error == pytest.approx(here.relative_error, rel=1e-3)


def test_halves_stored_exchanged_are_merged_apart(device: str, tmp_path: Path) -> None:
    """HunyuanVideo: two of three modulations of one shape have their halves exchanged in the file."""
    base = small("hunyuan-video", torch.float32, 32)
    names = [key for key in base if key.endswith("adaLN_modulation.1.weight")]
    rows, columns = base[names[0]].shape
    draw, lora = np.random.default_rng(0), {}
    refiner = "context_embedder.token_refiner.refiner_blocks"
    for key in (f"{refiner}.0.norm_out.linear", f"{refiner}.1.norm_out.linear", "norm_out.linear"):
        lora[f"transformer.{key}.lora_A.weight"] = normal(draw, 4, columns)
        lora[f"transformer.{key}.lora_B.weight"] = normal(draw, rows, 4) * 0.1
    save_file(base, tmp_path / "base.safetensors", {"format": "pt"})
    save_file(lora, tmp_path / "lora.safetensors")
    merged = {}
    for where in ("cpu", device):
        options = {"family": "hunyuan-video", "device": where, "overwrite": True}
        inputs = (tmp_path / "base.safetensors", [(tmp_path / "lora.safetensors", 1.0)])
        run(merge, inputs, options, output=tmp_path / "merged.safetensors")
        merged[where] = load_file(tmp_path / "merged.safetensors")
    assert len(names) == 3
    close(*merged.values())


def pair(draw: np.random.Generator, folder: Path) -> tuple[Path, Path]:
    """Layers of two shapes whose dtypes, on either side, and differences are unlike."""
    base, tuned = {}, {}
    here, there = draw.permutation(3)[:2], draw.permutation(len(DTYPES))[:2]
    for n in range(20):
        shape = one_of(draw, (48, 32), (48, 32), (48, 32), (32, 48))
        key = f"blocks.{n}.layer.weight"
        base[key] = (normal(draw, *shape) / 6).to(DTYPES[here[int(draw.random() < 0.2)]])
        match one_of(draw, "lora", "kron", "full", "falling", "none"):
            case "lora":
                delta = normal(draw, shape[0], 2) @ normal(draw, 2, shape[1]) * 0.02
            case "kron":
                delta = torch.kron(normal(draw, 4, 4), normal(draw, shape[0] // 4, shape[1] // 4))
            case "falling":
                sides = torch.linalg.svd(normal(draw, *shape), full_matrices=False)
                fall = 1 / torch.arange(1, 33) ** one_of(draw, 0.4, 1.0, 1.6)
                delta = (sides[0] * fall) @ sides[2]
            case "full":
                delta = normal(draw, *shape) * 0.1
            case _:
                delta = torch.zeros(shape)
        dtype = DTYPES[there[int(draw.random() < 0.2)]]
        tuned[key] = (base[key].float() + 0.2 * delta).to(dtype)
    return saved(folder, base, tuned)


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 3},
        {"size": 30_000},
        {"algo": "lokr", "factor": 4},
        {"algo": "lokr", "factor": 4, "rank": 2, "dtype": "fp32"},
        {"algo": "lokr", "factor": 4, "size": 9_000, "dtype": "fp32"},
        {"algo": "auto", "error": 0.2},
        {"algo": "full"},
    ],
)
@pytest.mark.parametrize("seed", DRAWS)
def test_extract(seed: int, options: dict[str, Any], device: str, tmp_path: Path) -> None:
    files = pair(np.random.default_rng(100 + seed), tmp_path)
    here, there = both(extract, files, options, device, tmp_path)
    assert [(d["module"], d["rank"]) for d in here.details] == [
        (d["module"], d["rank"]) for d in there.details
    ]


def saved(folder: Path, base: State, tuned: State) -> tuple[Path, Path]:
    for name, state in (("base", base), ("tuned", tuned)):
        save_file(state, folder / f"{name}.safetensors", {"format": "pt"})
    return folder / "base.safetensors", folder / "tuned.safetensors"


def test_layers_of_a_stack_have_recipes_of_their_own(device: str, tmp_path: Path) -> None:
    """`auto`: a Kronecker product is fitted as one, white noise between them in full."""
    draw, base, tuned = np.random.default_rng(0), {}, {}
    for n in range(6):
        key = f"blocks.{n}.layer.weight"
        kron = torch.kron(normal(draw, 8, 8), normal(draw, 8, 8)) * 0.02
        base[key] = normal(draw, 64, 64) / 8
        tuned[key] = base[key] + (normal(draw, 64, 64) * 0.2 if n % 2 else kron)
    options = {"algo": "auto", "error": 0.01, "dtype": "fp32"}
    found = both(extract, saved(tmp_path, base, tuned), options, device, tmp_path)
    for report in found:
        assert [d["algorithm"] for d in report.details] == ["lokr", "full"] * 3
        assert report.relative_error < 1e-6


def test_layers_of_a_stack_are_refitted_at_ranks_of_their_own(device: str, tmp_path: Path) -> None:
    draw, base, tuned = np.random.default_rng(0), {}, {}
    for n in range(6):
        key = f"blocks.{n}.layer.weight"
        base[key] = normal(draw, 96, 96) / 10
        one, two = (torch.linalg.qr(normal(draw, 96, 96))[0] for _ in range(2))
        tuned[key] = base[key] + 0.1 * (one * torch.arange(1, 97) ** (-0.2 - 0.25 * n)) @ two
    options = {"algo": "lokr", "factor": 4, "size": 6000, "dtype": "fp32"}
    here, there = both(extract, saved(tmp_path, base, tuned), options, device, tmp_path)
    assert len({d["rank"] for d in here.details}) > 1
    # a stack is swept from all starts; without the refit the error is 3e-4 larger
    assert there.relative_error == pytest.approx(here.relative_error, rel=5e-5)


def test_rounding_is_measured_in_the_dtype_of_each_layer(device: str, tmp_path: Path) -> None:
    """An fp8 layer among bf16 ones: its rank is what stands out of its own rounding."""
    draw, base, tuned = np.random.default_rng(0), {}, {}
    for n in range(4):
        key = f"blocks.{n}.layer.weight"
        base[key] = (normal(draw, 256, 256) / 16).bfloat16()
        change = normal(draw, 256, 8) @ normal(draw, 8, 256) * (0.01 / 16)
        tuned[key] = (base[key].float() + change).to(torch.bfloat16 if n else torch.float8_e4m3fn)
    options = {"size": 120_000, "dtype": "bf16"}
    found = both(extract, saved(tmp_path, base, tuned), options, device, tmp_path)
    for report in found:
        ranks = {d["module"].split(".")[-2]: d["rank"] for d in report.details}
        assert ranks["0"] <= 8, "rounding noise is stored"
        assert {ranks[n] for n in "123"} == {8}


@pytest.mark.parametrize("rule", [{"rank": 2}, {"energy": 0.8}, {"size": 6_000}])
@pytest.mark.parametrize("seed", DRAWS)
def test_resize(seed: int, rule: dict[str, float], device: str, tmp_path: Path) -> None:
    draw = np.random.default_rng(200 + seed)
    tensors = {}
    for n in range(12):
        block = f"{n % 3}_attentions_{n % 2}_transformer_blocks_0_attn{n // 6 + 1}_to_q"
        name = f"lora_unet_down_blocks_{block}"
        kind = one_of(draw, *made.KINDS)
        dtype = one_of(draw, torch.float32, torch.float16)
        for key, array in made.module(kind, name, (24, 32), draw, one_of(draw, 3, 6)).items():
            tensors[key] = torch.tensor(array, dtype=dtype)
            if key.endswith("alpha"):
                tensors[key] = torch.tensor(one_of(draw, 1.0, 3.0))
    save_file(tensors, tmp_path / "a.safetensors")
    here, there = both(resize, (tmp_path / "a.safetensors",), rule, device, tmp_path)
    assert [item["rank"] for item in here.details] == [item["rank"] for item in there.details]
    shapes = {key.split(".")[0]: (24, 32) for key in tensors}
    one, two = (made.deltas(tmp_path / f"{name}.safetensors", shapes) for name in ("cpu", "device"))
    assert made.relative(one, two) < 1e-5


@pytest.mark.parametrize("seed", DRAWS)
def test_combine(seed: int, device: str, tmp_path: Path) -> None:
    """Layers that only one of two files has: their weights differ, their shapes do not."""
    draw = np.random.default_rng(300 + seed)
    names = [f"{made.BLOCK}_attn{n}_to_{part}" for n in (1, 2) for part in "qkv"]
    inputs = []
    for file, weight in (("a", 0.7), ("b", -0.4)):
        tensors = {}
        for name in names:
            if draw.random() < 0.7:
                arrays = made.module("lora", name, (24, 32), draw, 6)
                tensors |= {k: torch.tensor(v, dtype=torch.float32) for k, v in arrays.items()}
        save_file(tensors, tmp_path / f"{file}.safetensors")
        inputs.append((tmp_path / f"{file}.safetensors", weight))
    both(combine, (inputs,), {"rank": 4}, device, tmp_path)
    shapes = dict.fromkeys(names, (24, 32))
    one, two = (made.deltas(tmp_path / f"{name}.safetensors", shapes) for name in ("cpu", "device"))
    assert made.relative(one, two) < 1e-5


@pytest.mark.parametrize("seed", DRAWS)
def test_compare(seed: int, device: str, tmp_path: Path) -> None:
    """Modules of one shape: of several kinds and dtypes, equal in both files, nearly equal, or in one of them alone."""
    draw = np.random.default_rng(400 + seed)
    one: State = {}
    two: State = {}
    for n in range(12):
        block = f"{n % 3}_attentions_{n % 2}_transformer_blocks_0_attn{n // 6 + 1}_to_q"
        name, kind = (
            f"lora_unet_down_blocks_{block}",
            one_of(draw, "lora", "lora", "lokr", "tucker"),
        )
        made_here = module(name, kind, 24, 32, draw)
        change = one_of(draw, 0.0, 1e-7, 0.3, 1.0)
        there = {key: (t.double() * (1 + change)).to(t.dtype) for key, t in made_here.items()}
        one |= made_here
        two |= one_of(draw, there, there, module(name, "lora", 24, 32, draw), {})
    for name, state in (("one", one), ("two", two)):
        save_file(state, tmp_path / f"{name}.safetensors")
    paths = [
        (tmp_path / f"{name}.safetensors", weight) for name, weight in (("one", 1.0), ("two", 0.5))
    ]
    here, there = (run(compare, tuple(paths), {}, device=where) for where in ("cpu", device))
    assert there.relative_error == pytest.approx(here.relative_error, rel=1e-9)
    for ours, theirs in zip(here.modules, there.modules, strict=True):
        assert ours.module == theirs.module
        for field in ("relative_error", "norm_a", "norm_b", "cosine"):
            told = getattr(theirs, field)
            assert told == pytest.approx(getattr(ours, field), rel=1e-7, abs=1e-12), (ours, field)


@pytest.mark.parametrize("seed", DRAWS)
def test_advise_and_the_share_in_a_checkpoint(seed: int, device: str, tmp_path: Path) -> None:
    """Layers of one shape: unchanged, of low rank, Kronecker products, noise, tiny; the probe sees each as a CPU does."""
    draw, base, tuned = np.random.default_rng(500 + seed), {}, {}
    adapter: State = {}
    for n in range(14):
        key = f"blocks.{n}.layer.weight"
        base[key] = (normal(draw, 288, 288) / 17).half()
        low = normal(draw, 288, 5) @ normal(draw, 5, 288) * 0.01
        kron = torch.kron(normal(draw, 8, 8), normal(draw, 36, 36)) * 0.03
        change = one_of(draw, low, low, kron, normal(draw, 288, 288) * 0.05, low * 1e-4, low * 0)
        tuned[key] = (base[key].float() + change).half()
        left, right = normal(draw, 288, 5), normal(draw, 5, 288)
        name = f"transformer.blocks.{n}.layer"
        adapter |= {f"{name}.lora_up.weight": left, f"{name}.lora_down.weight": right}
    pair = saved(tmp_path, base, tuned)
    here, there = (run(advise, pair, {"max_rank": 8}, device=where) for where in ("cpu", device))
    assert there.made_by == here.made_by
    assert there.noise_floor == pytest.approx(here.noise_floor, rel=1e-4)
    assert (there.layers, there.unchanged) == (here.layers, here.unchanged)
    for curve in ("rank", "lokr"):
        ours, theirs = getattr(here, curve), getattr(there, curve)
        assert ours.keys() == theirs.keys()
        for k, point in ours.items():
            assert theirs[k].relative_error == pytest.approx(
                point.relative_error, rel=2e-3, abs=1e-4
            ), (curve, k)
    save_file(adapter, tmp_path / "adapter.safetensors")
    inputs = (tmp_path / "adapter.safetensors", 1.0), (pair[1], 1.0)
    one, two = (run(compare, inputs, {"base": pair[0]}, device=where) for where in ("cpu", device))
    assert two.relative_error == pytest.approx(one.relative_error, rel=1e-9)
    assert [m.norm_b for m in two.modules] == pytest.approx([m.norm_b for m in one.modules])
