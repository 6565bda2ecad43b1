"""Cases that were reported in 2026-11 and that no other test holds: the right value of each, worked out here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit.errors import NotRepresentable, Unclaimed
from adaptkit.ops import combine, convert, extract, inspect, resize
from tests import oracle
from tests.ops.models import changed, lora_delta, matrices, noise_delta, save, small, tiny_base

Array = np.ndarray
Tensors = dict[str, torch.Tensor]


def normal(*shape: int, seed: int = 0, size: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size


def product(tensors: Tensors, stem: str) -> Array:
    """ΔW of a LoRA, a dense difference or a LoKr of full factors, in float64."""
    mine = {
        k.removeprefix(f"{stem}."): t.double().numpy()
        for k, t in tensors.items()
        if k.startswith(f"{stem}.")
    }
    if "diff" in mine:
        return mine["diff"].reshape(len(mine["diff"]), -1)
    if "lokr_w1" in mine:
        return np.kron(mine["lokr_w1"], mine["lokr_w2"])
    up = mine.get("lora_up.weight", mine.get("lora_B.weight"))
    down = mine.get("lora_down.weight", mine.get("lora_A.weight"))
    return float(mine.get("alpha", len(down))) / len(down) * up @ down


# ------------------------------------------------------- LoKr of the parts of a fused layer

PARTS = [f"lycoris_transformer_blocks_0_attn_to_{name}" for name in "qkv"]
FUSED = "lora_unet_double_blocks_0_img_attn_qkv"


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Path, Array]:
    """SimpleTuner's LoKr of q, k and v, and ΔW of the fused layer."""
    state: Tensors = {}
    for n, stem in enumerate(PARTS):
        state[f"{stem}.lokr_w1"] = normal(4, 4, seed=n)
        state[f"{stem}.lokr_w2"] = normal(12, 12, seed=10 + n)
        state[f"{stem}.alpha"] = torch.tensor(1.0)
    save_file(state, tmp_path / "parts.safetensors")
    return tmp_path / "parts.safetensors", np.concatenate([product(state, stem) for stem in PARTS])


def test_lokr_of_parts_is_refused_for_a_fused_layer_and_the_hint_works(
    parts: tuple[Path, Array], tmp_path: Path
) -> None:
    path, wanted = parts
    options: dict[str, Any] = {
        "to": "kohya",
        "family": "flux",
        "output": tmp_path / "out.safetensors",
    }
    with pytest.raises(NotRepresentable, match="different second factors") as caught:
        convert.run(convert.plan(path, convert.Options(**options)))
    assert not options["output"].exists()
    for algo in ("lora", "full"):
        assert f"--algo {algo}" in (caught.value.hint or "")
        report = convert.run(
            convert.plan(path, convert.Options(algo=algo, overwrite=True, **options))
        )
        found = product(load_file(options["output"]), FUSED)
        assert np.linalg.norm(found - wanted) <= 1e-6 * np.linalg.norm(wanted)
        assert report.relative_error is not None
        assert report.relative_error < 1e-6


@pytest.mark.parametrize("options", [{"algo": "lora"}, {"algo": "full"}, {"to": "diffusers"}, {}])
@pytest.mark.parametrize("first", ["fused", "parts"])
def test_it_is_combined_with_a_fused_lora_in_either_order(
    parts: tuple[Path, Array], tmp_path: Path, options: dict[str, Any], first: str
) -> None:
    path, delta = parts
    lora = {
        f"{FUSED}.lora_up.weight": normal(144, 4, seed=1),
        f"{FUSED}.lora_down.weight": normal(4, 48, seed=2),
        f"{FUSED}.alpha": torch.tensor(4.0),
    }
    save_file(lora, tmp_path / "fused.safetensors")
    wanted = delta + 0.5 * product(lora, FUSED)
    inputs = [(path, 1.0), (tmp_path / "fused.safetensors", 0.5)]
    output = tmp_path / "out.safetensors"
    chosen = combine.Options(family="flux", dtype="fp32", output=output, **options)
    report = combine.run(combine.plan(inputs[:: -1 if first == "fused" else 1], chosen))
    made = load_file(output)
    stems = list(
        dict.fromkeys(
            key.rpartition(".lora")[0] or key.rpartition(".diff")[0]
            for key in made
            if not key.endswith("alpha")
        )
    )
    found = np.concatenate(
        [product(made, stem) for stem in sorted(stems, key=lambda s: "qkv".find(s[-1]))]
    )
    assert np.linalg.norm(found - wanted) <= 1e-6 * np.linalg.norm(wanted)
    assert report.relative_error is not None
    assert report.relative_error < 1e-6


# ------------------------------------------------------- what is recognised, and how it is said


def test_half_of_the_names_are_no_other_family(tmp_path: Path) -> None:
    """ACE-Step 1.5: `layers.N.self_attn` and `cross_attn`; half of it was called HunyuanImage's text encoder."""
    state: Tensors = {}
    for block in range(2):
        for attention in ("self_attn", "cross_attn"):
            for name, rows in (
                ("q_proj", 2048),
                ("k_proj", 1024),
                ("v_proj", 1024),
                ("o_proj", 2048),
            ):
                stem = f"base_model.model.layers.{block}.{attention}.{name}"
                state[f"{stem}.lora_A.weight"] = torch.zeros(1, 2048)
                state[f"{stem}.lora_B.weight"] = torch.zeros(rows, 1)
    save_file(state, tmp_path / "a.safetensors")
    record = inspect.run(tmp_path / "a.safetensors").record
    assert record["family"] == "ace-step"
    assert record["unclaimed"] == []


def test_a_vote_of_samples_is_not_told_as_a_fact(tmp_path: Path) -> None:
    """Rank 2 in most layers, rank 6 in others: two ranks do not keep all of it."""
    base = tiny_base()
    names = matrices(base, "attn1.to_q", "attn2.to_k", "attn2.to_v")
    low, high = names[::2] + names[1::4], names[3::4]
    tuned, _ = changed(base, low, lora_delta(2))
    tuned, _ = changed(tuned, high, lora_delta(6))
    pair = save(tmp_path / "base.safetensors", base), save(tmp_path / "tuned.safetensors", tuned)
    options = extract.Options(rank=4, output=tmp_path / "out.safetensors")
    report = extract.run(extract.plan(*pair, options))
    (note,) = [note for note in report.notes if "sampled layers are" in note]
    assert "rank-2 LoRA" in note
    assert not any("keeps all" in note for note in report.notes)
    options = extract.Options(rank=2, output=tmp_path / "out.safetensors", overwrite=True)
    report = extract.run(extract.plan(*pair, options))
    kept = load_file(options.output)
    delta = {k: tuned[k].double().numpy() - base[k].double().numpy() for k in names}
    best = sum(float((np.linalg.svd(d, compute_uv=False)[:2] ** 2).sum()) for d in delta.values())
    total = sum(float((d**2).sum()) for d in delta.values())
    assert len(kept) == 3 * len(names)
    assert report.captured == pytest.approx(best / total, abs=1e-5)
    assert report.captured < 0.999


# ------------------------------------------------------- figures of a DoRA beside its base

ATTENTION = "model.diffusion_model.middle_block.1.transformer_blocks.0."
THEIRS = "lora_unet_mid_block_attentions_0_transformer_blocks_0_"
LAYERS = {
    f"{THEIRS}attn1_to_q": f"{ATTENTION}attn1.to_q.weight",
    f"{THEIRS}attn2_to_k": f"{ATTENTION}attn2.to_k.weight",
}


def dora(path: Path, base: Tensors, axis: int, seed: int) -> Path:
    state: Tensors = {}
    for n, (stem, key) in enumerate(LAYERS.items()):
        rows, columns = base[key].shape
        state[f"{stem}.lora_up.weight"] = normal(rows, 6, seed=seed + n, size=0.2)
        state[f"{stem}.lora_down.weight"] = normal(6, columns, seed=seed + 5 + n)
        state[f"{stem}.alpha"] = torch.tensor(3.0)
        norms = base[key].double().norm(dim=1 - axis, keepdim=True).float()
        state[f"{stem}.dora_scale"] = norms * (1 + 0.1 * normal(*norms.shape, seed=seed + 9 + n))
    save_file(state, path)
    return path


def change(path: Path, base: Tensors) -> dict[str, Array]:
    """What a file of DoRAs, LoRAs or differences changes, by layer; nothing where it has none."""
    state, found = load_file(path), {}
    for stem, key in LAYERS.items():
        weight = base[key].double().numpy()
        if not any(name.startswith(f"{stem}.") for name in state):
            found[stem] = 0 * weight
        elif f"{stem}.dora_scale" in state:
            scale = state[f"{stem}.dora_scale"].double().numpy()
            axis = 0 if scale.shape[0] == len(weight) else 1
            found[stem] = oracle.dora(weight, product(state, stem), scale, axis) - weight
        else:
            found[stem] = product(state, stem)
    return found


def off(found: dict[str, Array], wanted: dict[str, Array]) -> float:
    rest = sum(float(((found[s] - w) ** 2).sum()) for s, w in wanted.items())
    return (rest / sum(float((w**2).sum()) for w in wanted.values())) ** 0.5


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    "options",
    [
        {"rank": 2},
        {"size": 9000},
        {"algo": "lora"},
        {"algo": "lora", "rank": 8},
        {"algo": "full"},
        {"algo": "lokr"},
    ],
    ids=str,
)
def test_the_figure_beside_the_base_is_the_measured_one(
    tmp_path: Path, options: dict[str, Any], axis: int
) -> None:
    """Modules left out count too, in the norm of the change."""
    base = tiny_base()
    source, out = dora(tmp_path / "a.safetensors", base, axis, 1), tmp_path / "out.safetensors"
    chosen = {
        "base": save(tmp_path / "base.safetensors", base),
        "output": out,
        "dtype": "fp32",
        **options,
    }
    if "algo" in options:
        report = convert.run(convert.plan(source, convert.Options(to="kohya", **chosen)))
    else:
        report = resize.run(resize.plan(source, resize.Options(**chosen)))
    measured = off(change(out, base), change(source, base))
    assert report.relative_error == pytest.approx(measured, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("weights", [(0.5, -1.0), (0.5,)])
def test_a_part_of_a_dora_is_a_difference_beside_its_base(
    tmp_path: Path, weights: tuple[float, ...]
) -> None:
    base = tiny_base()
    paths = [dora(tmp_path / f"{n}.safetensors", base, 0, 1 + 50 * n) for n in range(len(weights))]
    out = tmp_path / "out.safetensors"
    options = combine.Options(
        base=save(tmp_path / "base.safetensors", base), dtype="fp32", output=out
    )
    report = combine.run(combine.plan(list(zip(paths, weights, strict=True)), options))
    parts = [change(path, base) for path in paths]
    wanted = {s: sum(w * part[s] for w, part in zip(weights, parts, strict=True)) for s in LAYERS}
    assert off(change(out, base), wanted) == pytest.approx(report.relative_error or 0.0, abs=1e-7)
    assert (report.relative_error or 0.0) < 1e-6


# ------------------------------------------------------- a base and a tuned file in two layouts

Split = tuple[str, tuple[str, ...], tuple[int, ...]]


def as_diffusers(state: Tensors) -> Tensors:
    """The first double and single block of FLUX.1, and what stands after them, under diffusers' names."""
    a, b, c, d = (
        "double_blocks.0.",
        "transformer_blocks.0.",
        "single_blocks.0.",
        "single_transformer_blocks.0.",
    )
    plain = {
        f"{a}img_attn.proj": f"{b}attn.to_out.0", f"{a}txt_attn.proj": f"{b}attn.to_add_out",
        f"{a}img_mlp.0": f"{b}ff.net.0.proj", f"{a}img_mlp.2": f"{b}ff.net.2",
        f"{a}txt_mlp.0": f"{b}ff_context.net.0.proj", f"{a}txt_mlp.2": f"{b}ff_context.net.2",
        f"{a}img_mod.lin": f"{b}norm1.linear", f"{a}txt_mod.lin": f"{b}norm1_context.linear",
        f"{c}linear2": f"{d}proj_out", f"{c}modulation.lin": f"{d}norm.linear",
        "img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out",
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    }  # fmt: skip
    split = {
        f"{a}img_attn.qkv": ([f"{b}attn.to_{x}" for x in "qkv"], (1, 1, 1)),
        f"{a}txt_attn.qkv": ([f"{b}attn.add_{x}_proj" for x in "qkv"], (1, 1, 1)),
        f"{c}linear1": ([*(f"{d}attn.to_{x}" for x in "qkv"), f"{d}proj_mlp"], (1, 1, 1, 4)),
    }
    found: Tensors = {}
    for name, tensor in state.items():
        module, _, param = name.rpartition(".")
        if module in plain:
            found[f"{plain[module]}.{param}"] = tensor
        elif module in split:
            names, shares = split[module]
            unit = len(tensor) // sum(shares)
            for part, theirs in zip(tensor.split([unit * n for n in shares]), names, strict=True):
                found[f"{theirs}.{param}"] = part.clone()
        elif module == "final_layer.adaLN_modulation.1":
            found[f"norm_out.linear.{param}"] = torch.cat(tensor.chunk(2)[::-1])
    return found


@pytest.mark.parametrize(
    "layouts", [("bfl", "diffusers"), ("diffusers", "bfl"), ("diffusers", "diffusers")]
)
@pytest.mark.parametrize("to", ["kohya", "diffusers", "peft", "lycoris", "bare"])
def test_the_layouts_of_a_pair_change_nothing(
    tmp_path: Path, layouts: tuple[str, str], to: str
) -> None:
    """The rank-4 products of the file, put back under the original's names: off by what is reported."""
    whole = small("flux", by=64)
    base = {k: t for k, t in whole.items() if "blocks." not in k or "blocks.0." in k}
    base = {
        k: t
        for k, t in base.items()
        if t.ndim == 2 and k.endswith("weight") and "guidance" not in k
    }
    base = {k.removeprefix("model.diffusion_model."): t for k, t in base.items() if "text" not in k}
    tuned, deltas = changed(base, list(base), noise_delta())
    states = {"bfl": lambda s: s, "diffusers": as_diffusers}
    pair = [
        save(tmp_path / f"{n}.safetensors", states[layout](state))
        for n, (layout, state) in enumerate(zip(layouts, (base, tuned), strict=True))
    ]
    output = tmp_path / ("out" if to == "peft" else "out.safetensors")
    options = extract.Options(rank=4, to=to, family="flux", dtype="fp32", output=output)
    report = extract.run(extract.plan(pair[0], pair[1], options))
    made = load_file(output / "adapter_model.safetensors" if to == "peft" else output)
    stems = {k.rpartition(".lora")[0] for k in made if ".lora" in k}
    theirs = as_diffusers({k: t.float() for k, t in deltas.items()})
    named = {k: t.float() for k, t in deltas.items()} if to == "kohya" else theirs
    joiner = "." if to in ("diffusers", "peft", "bare") else "_"
    wanted = {
        k.removesuffix(".weight").replace(".", joiner): t.double().numpy() for k, t in named.items()
    }
    prefix = {
        "kohya": "lora_unet_",
        "diffusers": "transformer.",
        "peft": "base_model.model.",
        "lycoris": "lycoris_",
    }.get(to, "")
    found = {stem.removeprefix(prefix): product(made, stem) for stem in stems}
    assert found.keys() == wanted.keys()
    assert off(found, wanted) == pytest.approx(report.relative_error, rel=1e-4)
    best = sum(float((np.linalg.svd(w, compute_uv=False)[4:] ** 2).sum()) for w in wanted.values())
    total = sum(float((w**2).sum()) for w in wanted.values())
    assert report.relative_error == pytest.approx((best / total) ** 0.5, rel=1e-3)


def test_names_of_an_unknown_family_are_refused_with_a_hint_that_works(tmp_path: Path) -> None:
    """A toy FLUX in kohya's names, whose sizes are those of no model; stored as fp8."""
    state: Tensors = {}
    for n, (stem, rows, columns) in enumerate(
        (("double_blocks_0_img_mlp_0", 1536, 384), ("single_blocks_0_linear2", 384, 1920))
    ):
        state[f"lora_unet_{stem}.lora_up.weight"] = normal(rows, 4, seed=n)
        state[f"lora_unet_{stem}.lora_down.weight"] = normal(4, columns, seed=5 + n)
        state[f"lora_unet_{stem}.alpha"] = torch.tensor(3.0)
    stored = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in state.items()}
    save_file(stored, tmp_path / "a.safetensors")
    output = tmp_path / "out.safetensors"
    options = convert.Options(to="comfy", dtype="fp16", output=output)
    for allowed in (False, True):
        with pytest.raises(Unclaimed, match="family is unknown") as caught:
            convert.plan(tmp_path / "a.safetensors", replace(options, allow_unused=allowed))
        assert "--family flux" in (caught.value.hint or "")
    report = convert.run(convert.plan(tmp_path / "a.safetensors", replace(options, family="flux")))
    assert report.relative_error == 0.0
    made = load_file(output)
    assert {t.dtype for key, t in made.items() if not key.endswith("alpha")} == {torch.float16}
    given = {key: tensor.float() for key, tensor in stored.items()}
    for ours, theirs in (
        ("double_blocks_0_img_mlp_0", "double_blocks.0.img_mlp.0"),
        ("single_blocks_0_linear2", "single_blocks.0.linear2"),
    ):
        found = product(made, f"diffusion_model.{theirs}")
        np.testing.assert_allclose(found, product(given, f"lora_unet_{ours}"), rtol=1e-6)
