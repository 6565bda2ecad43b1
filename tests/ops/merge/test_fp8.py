"""merge into fp8 checkpoints: read with their scales, added to in float32, stored with fresh ones (float64 NumPy oracle)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit import engine
from adaptkit.errors import NonFinite, NotRepresentable
from adaptkit.ops import merge
from tests import made
from tests.ops.merge.test_verify import PLACES, VAE

State = dict[str, torch.Tensor]
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
KEYS = {PLACES[name]: name for name in (made.LINEAR, made.WIDE)}
SCALES = {"one": (), "one-1d": (1,), "rows": (-1,), "rows-2d": (-1, 1), "blocks": (-1, 4, 1)}


def grid(dtype: torch.dtype) -> np.ndarray:
    """Every finite number of an 8-bit format, as NumPy reads its bits."""
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype).double().numpy()
    return np.unique(numbers[np.isfinite(numbers)])


def base_file(
    folder: Path, dtype: torch.dtype = E4M3, scales: str | None = "one", key: str = "scale_weight"
) -> Path:
    """Scaled fp8 as ComfyUI writes it: weight, scale, a mark and a scale of the activations; convolutions in fp16."""
    draw = torch.Generator().manual_seed(3)
    state: State = {VAE: torch.randn(5, 3, 3, 3, generator=draw).half()}
    if scales:
        state["scaled_fp8"] = torch.zeros(2, dtype=dtype)
    for name, shape in made.SHAPES.items():
        weight = torch.randn(shape, generator=draw) / 4
        place = PLACES[name]
        if place not in KEYS:
            state[place] = weight.half()
            continue
        if scales is None:
            state[place] = weight.to(dtype)
            continue
        size = tuple(shape[0] if n < 0 else n for n in SCALES[scales])
        scale = 0.01 * (1 + torch.rand(size, generator=draw))
        groups = weight.reshape(max(1, scale.numel()), -1) / scale.reshape(-1, 1)
        end = torch.finfo(dtype).max
        state[place] = groups.reshape(shape).clamp(-end, end).to(dtype)
        stem = place.removesuffix("weight")
        state[stem + key] = scale
        state[stem + ("scale_input" if key == "scale_weight" else "input_scale")] = torch.tensor(
            0.5
        )
    save_file(state, folder / "base.safetensors", metadata={"format": "pt"})
    return folder / "base.safetensors"


def scale_of(state: State, place: str) -> np.ndarray:
    """The scale of every entry of a weight."""
    stem = place.removesuffix("weight")
    scale = state.get(stem + "scale_weight", state.get(stem + "weight_scale"))
    shape = state[place].shape
    if scale is None:
        return np.ones(shape)
    numbers = scale.double().numpy().reshape(-1, 1)
    return np.broadcast_to(numbers, (len(numbers), int(np.prod(shape)) // len(numbers))).reshape(
        shape
    )


def meant(state: State, place: str) -> np.ndarray:
    return state[place].double().numpy() * scale_of(state, place)


def run(base: Path, *adapters: tuple[Path, float], **options: Any) -> merge.Report:
    options = {
        "output": base.with_name("out.safetensors"),
        "family": "sd1",
        "overwrite": True,
        **options,
    }
    return merge.run(merge.plan(base, adapters, merge.Options(**options)))


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("scales", [None, *SCALES])
def test_f9_a_scaled_weight_gets_the_whole_difference(
    tmp_path: Path, scales: str | None, dtype: torch.dtype
) -> None:
    """sd-scripts adds to the codes: 0.009 of the strength for a scale of 0.009."""
    base = base_file(tmp_path, dtype, scales)
    adapter = made.adapter(tmp_path / "a.safetensors")
    report = run(base, (adapter, 0.5), verify=True)
    before, after, deltas = (
        load_file(base),
        load_file(tmp_path / "out.safetensors"),
        made.deltas(adapter),
    )
    assert {k: (t.dtype, t.shape) for k, t in before.items()} == {
        k: (t.dtype, t.shape) for k, t in after.items()
    }
    lost, moved = 0.0, 0.0
    for place, name in KEYS.items():
        old = meant(before, place)
        exact = old + 0.5 * deltas[name].reshape(old.shape)
        unit = scale_of(after, place)
        # the stored number is the nearest that the format has, for its own scale
        codes = np.clip(exact / unit, -float(torch.finfo(dtype).max), float(torch.finfo(dtype).max))
        numbers = grid(dtype)
        nearest = np.abs(codes[..., None] - numbers).min(axis=-1)
        found = after[place].double().numpy()
        assert (np.abs(found - codes) <= nearest * (1 + 1e-5) + 3e-7 * codes.max()).all()
        if scales is not None:
            ends = np.abs(exact).reshape(unit.shape) / unit
            for one in np.unique(
                unit
            ):  # each scale puts the largest it scales at the end of the format
                assert ends[unit == one].max() == pytest.approx(torch.finfo(dtype).max, rel=1e-5)
        lost += ((found * unit - exact) ** 2).sum()
        moved += ((exact - old) ** 2).sum()
        detail = next(d for d in report.details if d["tensor"] == place)
        error = (((found * unit - exact) ** 2).sum() / ((exact - old) ** 2).sum()) ** 0.5
        assert detail["relative_error"] == pytest.approx(error, rel=1e-3)
    untouched = [
        k
        for k in before
        if k not in PLACES.values() and not k.endswith((".scale_weight", ".weight_scale"))
    ]
    assert all(torch.equal(before[k].double(), after[k].double()) for k in untouched)
    assert (report.quantised, report.tensors_changed) == (2, 4)
    assert report.verified is not None
    assert 0 < report.verified.largest <= 1
    assert 0.001 < (lost / moved) ** 0.5 < 0.2


def test_the_newer_names_of_scales(tmp_path: Path) -> None:
    old = base_file(tmp_path)
    run(old, (made.adapter(tmp_path / "a.safetensors"), 0.5))
    first = load_file(tmp_path / "out.safetensors")
    run(base_file(tmp_path, key="weight_scale"), (tmp_path / "a.safetensors", 0.5), verify=True)
    second = load_file(tmp_path / "out.safetensors")
    for place in KEYS:
        assert torch.equal(first[place].view(torch.uint8), second[place].view(torch.uint8))
        stem = place.removesuffix("weight")
        assert torch.equal(first[f"{stem}scale_weight"], second[f"{stem}weight_scale"])


def test_a_difference_below_the_steps_of_the_format_is_reported_as_lost(tmp_path: Path) -> None:
    base, adapter = (
        base_file(tmp_path, scales=None),
        made.adapter(tmp_path / "a.safetensors", names=[made.LINEAR]),
    )
    report = run(base, (adapter, 1e-5))
    assert report.relative_error == pytest.approx(1.0, abs=0.2)
    assert run(base, (adapter, 0.3)).relative_error < 0.1


def test_strength_zero_leaves_every_byte_of_a_scaled_base(tmp_path: Path) -> None:
    base, adapter = base_file(tmp_path), made.adapter(tmp_path / "a.safetensors")
    report = run(base, (adapter, 0.0), verify=True)
    before, after = load_file(base), load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(before[k].double(), after[k].double()) for k in before)
    assert report.verified is not None
    assert (report.tensors_changed, report.verified.copied) == (0, len(before))
    # so does a difference that is nothing beside the weights: no fresh scales for old numbers
    run(base, (adapter, 1e-30), verify=True)
    after = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(before[k].double(), after[k].double()) for k in before)


@pytest.mark.parametrize("scales", [None, "one", "blocks"])
def test_with_dtype_the_scales_are_multiplied_in_and_go(tmp_path: Path, scales: str | None) -> None:
    """Touched or not: nothing in the output needs a scale, and none is left."""
    base, adapter = (
        base_file(tmp_path, E4M3, scales),
        made.adapter(tmp_path / "a.safetensors", names=[made.LINEAR]),
    )
    report = run(base, (adapter, 0.5), dtype="bf16", verify=True)
    before, after = load_file(base), load_file(tmp_path / "out.safetensors")
    assert set(after) == {*PLACES.values(), VAE}
    assert {t.dtype for t in after.values()} == {torch.bfloat16}
    delta = made.deltas(adapter)[made.LINEAR]
    for place, name in KEYS.items():
        exact = meant(before, place) + (0.5 * delta if name == made.LINEAR else 0.0)
        error = np.abs(after[place].double().numpy() - exact)
        assert (error <= 2**-8 * 1.01 * np.abs(exact) + 1e-6).all()
    assert (report.quantised, report.tensors_changed) == (0, 1)


def test_add_and_subtract_in_bf16_gives_the_scaled_base_back(tmp_path: Path) -> None:
    base, adapter = base_file(tmp_path), made.adapter(tmp_path / "a.safetensors")
    run(base, (adapter, 1.0), dtype="fp32")
    run(tmp_path / "out.safetensors", (adapter, -1.0), output=tmp_path / "back.safetensors")
    before, back = load_file(base), load_file(tmp_path / "back.safetensors")
    for place in KEYS:
        np.testing.assert_allclose(back[place].double().numpy(), meant(before, place), atol=1e-5)


def test_what_does_not_fit_plain_fp8_is_refused_not_clamped(tmp_path: Path) -> None:
    base, adapter = (
        base_file(tmp_path, scales=None),
        made.adapter(tmp_path / "a.safetensors", "full"),
    )
    with pytest.raises(NonFinite, match="does not fit float8_e4m3fn") as caught:
        run(base, (adapter, 1000.0))
    assert "bf16" in str(caught.value.hint)
    assert (
        run(base_file(tmp_path, scales="rows"), (adapter, 1000.0)).tensors_changed == 4
    )  # a scale makes room


@pytest.mark.parametrize(
    ("extra", "what"), [("SCB", "int8"), ("weight_scale_inv", "block"), ("weight_scale_2", "nvfp4")]
)
def test_what_cannot_be_stored_again_is_refused_by_name(
    tmp_path: Path, extra: str, what: str
) -> None:
    state = load_file(base_file(tmp_path))
    place = PLACES[made.LINEAR]
    state[place.removesuffix("weight") + extra] = torch.ones(2)
    save_file(state, tmp_path / "base.safetensors")
    adapter = made.adapter(tmp_path / "a.safetensors")
    for dtype in ("keep", "bf16"):
        with pytest.raises(NotRepresentable, match=what) as caught:
            run(tmp_path / "base.safetensors", (adapter, 1.0), dtype=dtype)
        assert caught.value.tensor == place
        assert caught.value.hint
    # what no adapter touches may be stored as it likes
    report = run(tmp_path / "base.safetensors", (adapter, 1.0), skip=("*attn1.to_q",), verify=True)
    assert report.tensors_changed == 3


@pytest.mark.parametrize("scales", [None, "one", "rows", "blocks"])
def test_stacked_layers_give_the_same_bytes(
    tmp_path: Path, scales: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: two layers of one shape in one batch, each with scales of its own."""
    base, shape = base_file(tmp_path, E4M3, scales), made.SHAPES[made.LINEAR]
    state = load_file(base)
    place = PLACES[made.LINEAR]
    twin = place.replace("to_q", "to_k")
    for key in [key for key in state if key.startswith(place.removesuffix("weight"))]:
        state[key.replace("to_q", "to_k")] = (
            state[key] * 3 if key.endswith("scale_weight") else state[key].clone()
        )
    save_file(state, base)
    monkeypatch.setitem(made.SHAPES, made.LINEAR.replace("to_q", "to_k"), shape)
    adapter = made.adapter(
        tmp_path / "a.safetensors", names=[made.LINEAR, made.LINEAR.replace("to_q", "to_k")]
    )
    run(base, (adapter, 0.5))
    alone = load_file(tmp_path / "out.safetensors")
    monkeypatch.setattr(engine.Resources, "on_cpu", property(lambda _: False))
    run(base, (adapter, 0.5))
    stacked = load_file(tmp_path / "out.safetensors")
    assert not torch.equal(alone[place].double(), alone[twin].double())
    for key, tensor in alone.items():
        torch.testing.assert_close(stacked[key].double(), tensor.double(), rtol=1e-5, atol=1e-6)
