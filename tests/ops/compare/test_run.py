"""compare: every pair of algorithms, formats and cuts against float64 NumPy that shares no code with the package."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit import engine
from adaptkit.adapter import Adapter
from adaptkit.algorithms.lora import Lora
from adaptkit.errors import (
    AdaptkitError,
    NonFinite,
    NoSuchName,
    NotEnoughMemory,
    NothingToDo,
    NotRepresentable,
    ShapeMismatch,
    UnknownAdapter,
)
from adaptkit.ops import compare, merge
from adaptkit.ops.compare import distance, matching
from tests import oracle
from tests.ops.models import save, small, tiny_base

State = dict[str, torch.Tensor]
Array = np.ndarray

LINEAR = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_mid_block_resnets_0_conv1"
OTHER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_v"
TO_Q = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"


def run(a: Any, b: Any, **options: Any) -> compare.Report:
    report = compare.run(compare.plan(a, b, compare.Options(**options)))
    json.dumps(report.to_dict(), allow_nan=False)  # what cannot be said is null
    return report


def draw(seed: int) -> Callable[..., Array]:
    random = np.random.default_rng(seed)
    return lambda *shape: random.standard_normal(shape).astype(np.float32)


# every algorithm: stored tensors by suffix, and ΔW of shape (out, in, *kernel)


def lora(shape: tuple[int, ...], new: Callable[..., Array]) -> tuple[dict[str, Array], Array]:
    o, i, *kernel = shape
    up, down = new(o, 3), new(3, i, *kernel)
    ones = (1,) * len(kernel)
    stored = {
        "lora_up.weight": up.reshape(o, 3, *ones),
        "lora_down.weight": down,
        "alpha": np.float32(1.2),
    }
    return stored, oracle.lora(up, down, float(np.float32(1.2)) / 3)


def tucker(shape: tuple[int, ...], new: Callable[..., Array]) -> tuple[dict[str, Array], Array]:
    o, i, *kernel = shape
    up, mid, down = new(o, 2, 1, 1), new(2, 2, *kernel), new(2, i, 1, 1)
    return {"lora_up.weight": up, "lora_mid.weight": mid, "lora_down.weight": down}, oracle.lora(
        up, down, 1.0, mid
    )


def loha(shape: tuple[int, ...], new: Callable[..., Array]) -> tuple[dict[str, Array], Array]:
    o, i, *kernel = shape
    columns = i * int(np.prod(kernel))
    t = {"w1_a": new(o, 2), "w1_b": new(2, columns), "w2_a": new(o, 2), "w2_b": new(2, columns)}
    return _named("hada_", t, 3.0), oracle.loha(t, 3.0, tuple(kernel))


def loha_tucker(
    shape: tuple[int, ...], new: Callable[..., Array]
) -> tuple[dict[str, Array], Array]:
    o, i, *kernel = shape
    t = {f"t{n}": new(2, 2, *kernel) for n in "12"}
    t |= {f"w{n}_a": new(2, o) for n in "12"} | {f"w{n}_b": new(2, i) for n in "12"}
    return _named("hada_", t, None), oracle.loha(t, None, tuple(kernel))


def lokr(factor: int, one: bool = False, two: bool = False, core: bool = False) -> Any:
    """LoKr; either factor as a product, or the second one with a Tucker core."""

    def make(shape: tuple[int, ...], new: Callable[..., Array]) -> tuple[dict[str, Array], Array]:
        o, i, *kernel = shape
        a, b = factor, factor
        c, d, window = o // a, i // b, int(np.prod(kernel))
        t = {"w1_a": new(a, 2), "w1_b": new(2, b)} if one else {"w1": new(a, b)}
        if core:
            t |= {"t2": new(2, 2, *kernel), "w2_a": new(2, c), "w2_b": new(2, d)}
        else:
            t |= (
                {"w2_a": new(c, 2), "w2_b": new(2, d * window)}
                if two
                else {"w2": new(c, d, *kernel)}
            )
        alpha = (
            1.0 if one or two or core else 1e10
        )  # which says nothing where both factors are full
        return _named("lokr_", t, alpha), oracle.lokr_stored(t, alpha, tuple(kernel))

    return make


def full(shape: tuple[int, ...], new: Callable[..., Array]) -> tuple[dict[str, Array], Array]:
    diff = new(*shape)
    return {"diff": diff}, diff.astype(np.float64)


def _named(prefix: str, tensors: Mapping[str, Array], alpha: float | None) -> dict[str, Array]:
    stored = {f"{prefix}{role}": t for role, t in tensors.items()}
    return stored if alpha is None else stored | {"alpha": np.float32(alpha)}


KINDS: dict[str, Any] = {
    "lora": lora,
    "loha": loha,
    "lokr": lokr(4),
    "lokr-2": lokr(2),
    "lokr-product": lokr(4, two=True),
    "lokr-products": lokr(2, one=True, two=True),
    "full": full,
}
CONVOLUTIONS = KINDS | {
    "tucker": tucker,
    "loha-tucker": loha_tucker,
    "lokr-core": lokr(4, core=True),
}


def file(path: Path, modules: Mapping[str, Mapping[str, Any]]) -> Path:
    """An adapter: stored tensors by suffix, by stem."""
    state = {
        f"{stem}.{suffix}": torch.as_tensor(t)
        for stem, stored in modules.items()
        for suffix, t in stored.items()
    }
    save_file({key: t.contiguous().clone() for key, t in state.items()}, path)
    return path


def relative(a: Array, b: Array) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def cosine(a: Array, b: Array) -> float:
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("way", ["usual", "factors", "rows"])
@pytest.mark.parametrize("shape", [(32, 24), (32, 8, 3, 3)])
def test_every_pair_of_algorithms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], way: str
) -> None:
    """By factors, by rows, or as it chooses: always what the oracle says."""
    if way != "usual":
        monkeypatch.setattr(matching, "THIN", 1e9 if way == "factors" else 0.0)
        monkeypatch.setattr(distance, "BLOCK", 100)
    kinds = KINDS if len(shape) == 2 else CONVOLUTIONS
    made = {name: make(shape, draw(n)) for n, (name, make) in enumerate(kinds.items())}
    pairs = {
        f"diffusion_model.layer.{n}": pair for n, pair in enumerate(itertools.product(made, made))
    }
    a, b = (
        file(
            tmp_path / f"{n}.safetensors", {stem: made[pair[n]][0] for stem, pair in pairs.items()}
        )
        for n in range(2)
    )
    report = run((a, 0.7), (b, -1.5))
    assert len(report.modules) == len(pairs)
    for found in report.modules:
        names = pairs[found.module.replace("transformer.", "diffusion_model.")]
        one, other = 0.7 * made[names[0]][1], -1.5 * made[names[1]][1]
        assert found.norm_a == pytest.approx(np.linalg.norm(one), rel=1e-12), names
        assert found.norm_b == pytest.approx(np.linalg.norm(other), rel=1e-12), names
        assert found.relative_error == pytest.approx(relative(one, other), rel=1e-12), names
        assert found.cosine == pytest.approx(cosine(one, other), abs=1e-12), names
    whole = [np.concatenate([made[pair[n]][1] for pair in pairs.values()]) for n in range(2)]
    assert report.relative_error == pytest.approx(
        relative(0.7 * whole[0], -1.5 * whole[1]), rel=1e-12
    )
    assert report.cosine == pytest.approx(cosine(0.7 * whole[0], -1.5 * whole[1]), abs=1e-12)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_equal_tensors_are_at_a_distance_of_exactly_nothing(tmp_path: Path, name: str) -> None:
    stored, delta = CONVOLUTIONS[name]((32, 8, 3, 3), draw(1))
    a, b = (file(tmp_path / f"{n}.safetensors", {CONV: stored}) for n in "ab")
    report = run(a, b, family="sd1", tolerance=0.0)
    assert (report.relative_error, report.cosine, report.exceeded) == (0.0, 1.0, None)
    assert report.norm_a == report.norm_b == pytest.approx(np.linalg.norm(delta), rel=1e-12)


def test_formats_do_not_matter(tiny: Path) -> None:
    """kohya's and lycoris' files have alpha = rank / 2 of the same tensors."""
    for format in ("diffusers", "comfy"):
        report = run((tiny / "lora-kohya.safetensors", 2.0), tiny / f"lora-{format}.safetensors")
        assert (report.relative_error, len(report.modules), report.only_a, report.only_b) == (
            0.0,
            104,
            (),
            (),
        )
        report = run(
            tiny / f"lora-{format}.safetensors", tiny / "lora-lycoris.safetensors", only=("unet",)
        )
        assert report.relative_error == pytest.approx(1.0, rel=1e-14)
        assert report.cosine == pytest.approx(1.0, rel=1e-14)


def test_another_factorization_is_told_apart_to_machine_precision(tmp_path: Path) -> None:
    """The difference of Gram numbers alone would say 1e-8."""
    random = np.random.default_rng(0)
    up, down = random.standard_normal((64, 4)), random.standard_normal((4, 48))
    turn = np.linalg.qr(random.standard_normal((4, 4)))[0]
    a = file(tmp_path / "a.safetensors", {LINEAR: {"lora_up.weight": up, "lora_down.weight": down}})
    again = {"lora_up.weight": 1e-5 * up @ turn, "lora_down.weight": 1e5 * turn.T @ down}
    b = file(tmp_path / "b.safetensors", {LINEAR: again})
    assert run(a, b, family="sd1").relative_error < 3e-15
    moved = up @ turn + 1e-11 * random.standard_normal((64, 4))
    c = file(
        tmp_path / "c.safetensors",
        {LINEAR: {"lora_up.weight": moved, "lora_down.weight": turn.T @ down}},
    )
    true = relative(up @ turn @ (turn.T @ down), moved @ (turn.T @ down))
    assert run(a, c, family="sd1").relative_error == pytest.approx(true, rel=1e-3)


def test_a_lokr_and_its_lora_agree(tmp_path: Path) -> None:
    """(L1 R1) ⊗ (L2 R2) = (L1 ⊗ L2)(R1 ⊗ R2), in float64."""
    random = np.random.default_rng(0)
    w1, left, right = (random.standard_normal(shape) for shape in ((2, 2), (32, 2), (2, 24)))
    one = {"lokr_w1": w1, "lokr_w2_a": left, "lokr_w2_b": right}
    two = {"lora_up.weight": np.kron(w1, left), "lora_down.weight": np.kron(np.eye(2), right)}
    a, b = (file(tmp_path / f"{n}.safetensors", {LINEAR: t}) for n, t in (("a", one), ("b", two)))
    for first, second in ((a, b), (b, a)):
        assert run(first, second, family="sd1").relative_error < 3e-15
    full = file(tmp_path / "c.safetensors", {LINEAR: {"diff": np.kron(w1, left @ right)}})
    assert run(a, full, family="sd1").relative_error < 3e-15


def test_small_factors_never_form_the_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dense(self: Lora) -> torch.Tensor:
        raise AssertionError("ΔW was formed")

    monkeypatch.setattr(Lora, "delta", dense)
    monkeypatch.setattr(distance, "_dense", dense)
    a, b = (
        file(tmp_path / f"{n}.safetensors", {LINEAR: lora((64, 48), draw(n))[0]}) for n in (1, 2)
    )
    kron = file(tmp_path / "k.safetensors", {LINEAR: lokr(4)((64, 48), draw(3))[0]})
    for one, other in ((a, b), (a, kron), (kron, a), (kron, kron)):
        run((one, 2.0), other, family="sd1")


def test_modules_of_one_side_count_in_full(tmp_path: Path) -> None:
    (s1, d1), (s2, d2), (s3, d3), (s4, d4) = (lora((16, 12), draw(n)) for n in range(4))
    k = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_k"
    out = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0"
    a = file(tmp_path / "a.safetensors", {LINEAR: s1, k: s2})
    b = file(tmp_path / "b.safetensors", {LINEAR: s3, out: s4})
    report = run(a, b, family="sd1")
    assert [one.module for one in report.modules] == [
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    ]
    assert report.only_a == ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k",)
    assert report.only_b == ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",)
    none = np.zeros_like(d1)
    one, two = np.stack([d1, d2, none]), np.stack([d3, none, d4])
    assert report.relative_error == pytest.approx(relative(one, two), rel=1e-12)
    assert report.cosine == pytest.approx(cosine(one, two), rel=1e-12)
    assert (
        report.relative_error_common
        == report.modules[0].relative_error
        == pytest.approx(relative(d1, d3), rel=1e-12)
    )


def test_a_difference_from_nothing_has_no_relative_error(tmp_path: Path) -> None:
    stored, _ = lora((16, 12), draw(0))
    a = file(tmp_path / "a.safetensors", {LINEAR: stored})
    report = run(a, (a, 0.0), family="sd1", tolerance=1e9)
    assert (report.relative_error, report.cosine, report.norm_b) == (None, None, 0.0)
    assert "no relative error" in (report.exceeded or "")
    assert "ΔW of B is zero" in report.notes[0]
    assert run((a, 0.0), a, family="sd1").relative_error == pytest.approx(1.0)
    assert run((a, 0.0), (a, 0.0), family="sd1").relative_error == 0.0


# fused and split, in FLUX.1 ---------------------------------------------------------------------------------------

QKV, LINEAR1 = "lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_single_blocks_0_linear1"
ATTENTION = "transformer.transformer_blocks.0.attn"
SINGLE = "transformer.single_transformer_blocks.0"
NORM_OUT, FINAL = "transformer.norm_out.linear", "lora_unet_final_layer_adaLN_modulation_1"


def peft(stored: Mapping[str, Array]) -> dict[str, Array]:
    """kohya's LoRA as diffusers spells it, its alpha in the weights."""
    scale = float(stored["alpha"]) / len(stored["lora_down.weight"])
    up = stored["lora_up.weight"].astype(np.float64)
    return {
        "lora_B.weight": up * scale,
        "lora_A.weight": stored["lora_down.weight"].astype(np.float64),
    }


@pytest.mark.parametrize("fused", [lora, lokr(3), lokr(2), full, loha])
@pytest.mark.parametrize("missing", [None, "to_k", "to_v"])
def test_fused_against_split(tmp_path: Path, fused: Any, missing: str | None) -> None:
    """q, k and v apart against one matrix of all three; a part that is missing is rows of zeros. Both ways round."""
    whole, dense = fused((48, 12), draw(0))
    parts = {name: lora((16, 12), draw(n)) for n, name in enumerate(("to_q", "to_k", "to_v"), 1)}
    held = [np.zeros((16, 12)) if name == missing else d for name, (_, d) in parts.items()]
    a = file(tmp_path / "a.safetensors", {QKV: whole})
    b = file(
        tmp_path / "b.safetensors",
        {f"{ATTENTION}.{n}": peft(s) for n, (s, _) in parts.items() if n != missing},
    )
    split = np.concatenate(held)
    report = run(a, b)
    (found,) = report.modules
    assert found.module == "transformer.double_blocks.0.img_attn.qkv"
    assert (
        report.relative_error
        == found.relative_error
        == pytest.approx(relative(dense, split), rel=1e-12)
    )
    assert report.cosine == pytest.approx(cosine(dense, split), rel=1e-9)
    back = run(b, a)
    assert {one.module for one in back.modules} == {
        f"{ATTENTION}.{name}" for name in parts if name != missing
    }
    assert len(back.only_b) == (missing is not None)
    assert back.relative_error == pytest.approx(relative(split, dense), rel=1e-12)
    for one in back.modules:
        n = list(parts).index(one.module.rpartition(".")[2])
        expected = relative(held[n], dense[16 * n : 16 * n + 16])
        assert one.relative_error == pytest.approx(expected, rel=1e-12)


def test_a_lokr_is_cut_anywhere(tmp_path: Path) -> None:
    """linear1 is q, k, v and an mlp of four shares: cuts that fall into the blocks of two LoKr."""
    (one, dense), (two, other) = lokr(4)((56, 12), draw(0)), lokr(2)((56, 12), draw(1))
    a, b = (
        file(tmp_path / "a.safetensors", {LINEAR1: one}),
        file(tmp_path / "b.safetensors", {LINEAR1: two}),
    )
    assert run(a, b, family="flux").relative_error == pytest.approx(
        relative(dense, other), rel=1e-12
    )
    for n, name in enumerate(("attn.to_q", "attn.to_k", "attn.to_v")):
        stored, delta = lora((8, 12), draw(9))
        c = file(tmp_path / "c.safetensors", {f"{SINGLE}.{name}": peft(stored)})
        (found,) = run(c, a, family="flux").modules
        assert found.relative_error == pytest.approx(
            relative(delta, dense[8 * n : 8 * n + 8]), rel=1e-12
        )


@pytest.mark.parametrize("other", [lora, lokr(4), lokr(3), full, loha])
def test_halves_in_the_other_order(tmp_path: Path, other: Any) -> None:
    """norm_out holds scale and shift the other way round; a LoKr of three blocks cannot be turned round as one."""
    (one, dense), (two, delta) = lora((24, 12), draw(0)), other((24, 12), draw(1))
    a = file(tmp_path / "a.safetensors", {FINAL: one})
    b = file(tmp_path / "b.safetensors", {NORM_OUT: _as_diffusers(two)})
    turned = np.concatenate([delta[12:], delta[:12]])
    assert run(a, b, family="flux").relative_error == pytest.approx(
        relative(dense, turned), rel=1e-12
    )
    assert run(b, a, family="flux").relative_error == pytest.approx(
        relative(turned, dense), rel=1e-12
    )
    assert run(b, b, family="flux").relative_error == 0.0


def _as_diffusers(stored: Mapping[str, Array]) -> Mapping[str, Array]:
    return peft(stored) if "lora_up.weight" in stored else stored


def test_two_modules_on_the_same_rows_are_named(tmp_path: Path) -> None:
    whole, part = lora((48, 12), draw(0))[0], lora((16, 12), draw(1))[0]
    q = "lora_unet_transformer_blocks_0_attn_to_q"
    one = file(tmp_path / "a.safetensors", {QKV: whole})
    both = file(tmp_path / "b.safetensors", {QKV: whole, q: part})
    for a, b in ((one, both), (both, one)):
        report = run(a, b, family="flux")
        assert report.relative_error == 0.0
        assert {item.key for item in report.unused} == {f"{q}.{suffix}" for suffix in part}
        assert "another module of this file" in report.unused[0].reason


# kinds that are no difference -------------------------------------------------------------------------------------


def base_weight() -> Array:
    return tiny_base()[TO_Q].double().numpy()


def dora(seed: int, size: int = 32) -> tuple[dict[str, Array], Callable[[Array], Array]]:
    """Stored tensors, and W' − W."""
    new = draw(seed)
    stored, delta = lora((size, 32), new)
    magnitude = np.abs(new(size, 1)) + 0.5
    return stored | {
        "dora_scale": magnitude
    }, lambda w: oracle.dora(w, delta, magnitude.astype(np.float64).ravel(), 0) - w


def oft(seed: int) -> tuple[dict[str, Array], Callable[[Array], Array]]:
    blocks = 0.2 * draw(seed)(8, 4, 4)
    return {"oft_blocks": blocks}, lambda w: oracle.oft(w, blocks.astype(np.float64), 0.0, None) - w


def glora(seed: int) -> tuple[dict[str, Array], Callable[[Array], Array]]:
    new = draw(seed)
    t = {"a1": new(32, 2), "a2": new(2, 32), "b1": new(32, 2), "b2": new(2, 32)}
    wide = {name: value.astype(np.float64) for name, value in t.items()}
    return {
        f"{role}.weight": value for role, value in t.items()
    }, lambda w: oracle.glora(w, wide, 1.0) - w


def ia3(seed: int) -> tuple[dict[str, Array], Callable[[Array], Array]]:
    factor = draw(seed)(32)
    return {
        "weight": factor,
        "on_input": np.array(False),
    }, lambda w: oracle.ia3(w, factor.astype(np.float64), 0) - w


DEPENDENT = {"dora": dora, "oft": oft, "glora": glora, "ia3": ia3}


@pytest.mark.parametrize("name", DEPENDENT)
def test_kinds_that_depend_on_the_weight(tmp_path: Path, tiny: Path, name: str) -> None:
    make = DEPENDENT[name]
    (one, first), (two, second) = make(1), make(2)
    a, again, b = (
        file(tmp_path / f"{n}.safetensors", {LINEAR: stored})
        for n, stored in (("a", one), ("again", one), ("b", two))
    )
    report = run(a, again, family="sd1", tolerance=0.0)
    assert (report.relative_error, report.cosine, report.norm_a, report.norm_b) == (
        0.0,
        None,
        None,
        None,
    )
    (found,) = report.modules
    assert (found.relative_error, found.norm_a, found.norm_b, report.exceeded) == (
        0.0,
        None,
        None,
        None,
    )
    assert "--base" in report.notes[0]
    for other, strength in ((b, 1.0), (a, 0.5)):
        with pytest.raises(
            NotRepresentable, match=r"mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
        ) as caught:
            run(a, (other, strength), family="sd1")
        assert "--base" in (caught.value.hint or "")
    weight = base_weight()
    base = tiny / "base.safetensors"
    report = run((a, 0.5), b, family="sd1", base=base)
    assert report.relative_error == pytest.approx(
        relative(0.5 * first(weight), second(weight)), rel=1e-6
    )
    assert report.norm_a == pytest.approx(np.linalg.norm(0.5 * first(weight)), rel=1e-6)
    report = run(a, again, family="sd1", base=base)
    assert (report.relative_error, report.cosine) == (0.0, 1.0)
    assert report.norm_a == pytest.approx(np.linalg.norm(first(weight)), rel=1e-6)
    stored, delta = lora((32, 32), draw(5))
    plain = file(tmp_path / "plain.safetensors", {LINEAR: stored})
    assert run(a, plain, family="sd1", base=base).relative_error == pytest.approx(
        relative(first(weight), delta), rel=1e-6
    )
    with pytest.raises(NotRepresentable, match="attn1.to_q"):
        run(plain, a, family="sd1")


def test_a_module_that_depends_on_the_weight_needs_the_base_where_it_is_alone(
    tmp_path: Path, tiny: Path
) -> None:
    plain, (other, change) = lora((32, 32), draw(0)), dora(1)
    a = file(tmp_path / "a.safetensors", {OTHER: plain[0]})
    b = file(tmp_path / "b.safetensors", {OTHER: plain[0], LINEAR: other})
    for one, two in ((a, b), (b, a)):
        with pytest.raises(NotRepresentable, match="attn1.to_q"):
            run(one, two, family="sd1")
    report = run(a, b, family="sd1", base=tiny / "base.safetensors")
    size = np.linalg.norm(change(base_weight()))
    assert report.relative_error == pytest.approx(
        size / np.hypot(size, np.linalg.norm(plain[1])), rel=1e-6
    )


def test_equal_parts_of_a_dora_are_equal(tmp_path: Path) -> None:
    """A fused DoRA against the same, cut: equal without a base, in either direction; and not where one number moved."""
    new = draw(0)
    up, down, magnitude = new(48, 2), new(2, 12), np.abs(new(48, 1)) + 0.5
    a = {QKV: {"lora_up.weight": up, "lora_down.weight": down, "dora_scale": magnitude}}
    parts = {
        f"{ATTENTION}.{name}": {
            "lora_B.weight": up[16 * n : 16 * n + 16],
            "lora_A.weight": down,
            "lora_magnitude_vector": magnitude[16 * n : 16 * n + 16, 0],
        }
        for n, name in enumerate(("to_q", "to_k", "to_v"))
    }
    one, two = file(tmp_path / "a.safetensors", a), file(tmp_path / "b.safetensors", parts)
    assert run(one, two).relative_error == 0.0
    assert run(two, one).relative_error == 0.0
    parts[f"{ATTENTION}.to_v"]["lora_magnitude_vector"] = magnitude[32:, 0] + np.float32(1e-3)
    file(two, parts)
    with pytest.raises(NotRepresentable, match=r"img_attn\.qkv"):
        run(one, two)
    with pytest.raises(NotRepresentable, match=r"attn\.to_v"):
        run(two, one)


def test_a_fused_dora_and_its_base_in_parts(tmp_path: Path) -> None:
    """The norm of an input column needs all rows of the fused weight, which the checkpoint may hold in parts."""
    new = draw(0)
    weight, up, down = new(48, 12), new(48, 2), new(2, 12)
    magnitude = np.abs(new(1, 12)) + 0.5
    parts = {name: lora((16, 12), draw(n)) for n, name in enumerate(("to_q", "to_k", "to_v"), 1)}
    held = {
        f"transformer_blocks.0.attn.{name}.weight": weight[16 * n : 16 * n + 16]
        for n, name in enumerate(parts)
    }
    save_file(
        {key: torch.from_numpy(t).contiguous() for key, t in held.items()},
        tmp_path / "base.safetensors",
    )
    stored = {"lora_up.weight": up, "lora_down.weight": down, "dora_scale": magnitude}
    a = file(tmp_path / "a.safetensors", {QKV: stored})
    b = file(
        tmp_path / "b.safetensors",
        {f"{ATTENTION}.{name}": peft(s) for name, (s, _) in parts.items()},
    )
    wide = weight.astype(np.float64)
    fused = (
        oracle.dora(wide, oracle.lora(up, down, 1.0), magnitude.astype(np.float64).ravel(), 1)
        - wide
    )
    split = np.concatenate([d for _, d in parts.values()])
    options = {"family": "flux", "base": tmp_path / "base.safetensors"}
    assert run(a, b, **options).relative_error == pytest.approx(relative(fused, split), rel=1e-6)
    assert run(b, a, **options).relative_error == pytest.approx(relative(split, fused), rel=1e-6)


def test_the_base_has_to_have_the_layer(tmp_path: Path) -> None:
    state = tiny_base()
    del state[TO_Q]
    a, b = (file(tmp_path / f"{n}.safetensors", {LINEAR: dora(n)[0]}) for n in (1, 2))
    with pytest.raises(NotRepresentable, match=r"the base has no .*to_q"):
        run(a, b, family="sd1", base=save(tmp_path / "base.safetensors", state))
    wide, again = (
        file(tmp_path / f"wide{n}.safetensors", {LINEAR: dora(n, 48)[0]}) for n in (1, 2)
    )
    with pytest.raises(ShapeMismatch, match="32 × 32 in .*, 48 × 32 in this adapter"):
        run(wide, again, family="sd1", base=save(tmp_path / "base.safetensors", tiny_base()))


# an adapter in a checkpoint ---------------------------------------------------------------------------------------


def merged(folder: Path, base: Path, *adapters: tuple[Path, float]) -> Path:
    output = folder / "merged.safetensors"
    merge.run(merge.plan(base, adapters, merge.Options(output=output, overwrite=True)))
    return output


def deltas(adapter: Path) -> dict[str, Array]:
    """ΔW of kohya's LoRA file, by its stems."""
    state = load_file(adapter)
    stems = {key.partition(".")[0] for key in state}
    return {
        stem: oracle.lora(
            state[f"{stem}.lora_up.weight"].numpy(),
            state[f"{stem}.lora_down.weight"].numpy(),
            float(state[f"{stem}.alpha"]) / len(state[f"{stem}.lora_down.weight"]),
        )
        for stem in stems
    }


@pytest.mark.parametrize("strength", [1.0, -0.6])
def test_the_strength_is_found_in_an_fp16_checkpoint(
    tmp_path: Path, tiny: Path, strength: float
) -> None:
    base, adapter = tiny / "base.safetensors", tiny / "lora-kohya.safetensors"
    tuned = merged(tmp_path, base, (adapter, strength))
    report = run(adapter, tuned, base=base)
    before, after = load_file(base), load_file(tuned)
    change = np.sqrt(
        sum(float(((after[k].double() - before[k].double()) ** 2).sum()) for k in before)
    )
    size = np.sqrt(sum((d**2).sum() for d in deltas(adapter).values()))
    assert report.norm_a == pytest.approx(size, rel=1e-12)
    assert report.norm_b == pytest.approx(change, rel=1e-12)
    assert report.strength == pytest.approx(strength, rel=2e-3)
    assert report.cosine == pytest.approx(np.sign(strength), abs=2e-3)
    assert (len(report.modules), report.only_a, report.only_b, report.outside) == (104, (), (), 0.0)
    if strength == 1.0:
        assert 0 < report.relative_error < 0.05
        assert run(tuned, adapter, base=base).to_dict() | {"seconds": 0} == report.to_dict() | {
            "seconds": 0
        }
    else:
        assert report.relative_error == pytest.approx(1.6, rel=1e-2)
    # the strength that is found is the adapter's own, whatever it was given
    again = run((adapter, strength), tuned, base=base)
    assert again.strength == pytest.approx(report.strength, rel=1e-12)
    assert again.relative_error < 0.05


def test_each_number_of_a_merged_module(tmp_path: Path, tiny: Path) -> None:
    base, tuned = tiny_base(), tiny_base()
    stored, delta = lora((32, 32), draw(0))
    noise = np.random.default_rng(1).standard_normal((32, 32))
    tuned[TO_Q] = (base[TO_Q].double() + torch.from_numpy(0.3 * delta + noise)).float()
    elsewhere = "model.diffusion_model.middle_block.1.proj_in.weight"
    tuned[elsewhere] = base[elsewhere] + 0.5
    vae = {"first_stage_model.conv.weight": torch.zeros(4, 4)}
    tuned |= {name: t + 1.0 for name, t in vae.items()}
    first, second = (
        save(tmp_path / "base.safetensors", base | vae),
        save(tmp_path / "tuned.safetensors", tuned),
    )
    a = file(tmp_path / "a.safetensors", {LINEAR: stored})
    report = run(a, second, base=first)
    change = tuned[TO_Q].double().numpy() - base[TO_Q].double().numpy()
    (found,) = report.modules
    assert found.norm_b == pytest.approx(np.linalg.norm(change), rel=1e-12)
    assert found.relative_error == pytest.approx(
        np.linalg.norm(change - delta) / np.linalg.norm(delta), rel=1e-12
    )
    assert found.cosine == pytest.approx(cosine(delta, change), rel=1e-12)
    assert found.strength == pytest.approx((change * delta).sum() / (delta**2).sum(), rel=1e-12)
    assert (report.strength, report.cosine) == (found.strength, found.cosine)
    other = (tuned[elsewhere].double() - base[elsewhere].double()).square().sum().item()
    other += 16.0  # the VAE's
    assert report.outside == pytest.approx(other / (other + (change**2).sum()), rel=1e-12)
    assert report.only_b == ("unet.mid_block.attentions.0.proj_in", "first_stage_model.conv.weight")
    assert run(a, second, base=first, only=("*attn1*",)).only_b == ()


@pytest.mark.parametrize("name", DEPENDENT)
def test_kinds_that_are_no_difference_in_a_checkpoint(tmp_path: Path, name: str) -> None:
    base = save(tmp_path / "base.safetensors", tiny_base())
    stored, change = DEPENDENT[name](1)
    a = file(tmp_path / "a.safetensors", {LINEAR: stored})
    weight = base_weight()
    state = tiny_base(torch.float64)
    state[TO_Q] = torch.from_numpy(weight + 0.4 * change(weight))
    report = run(a, save(tmp_path / "tuned.safetensors", state), base=base, family="sd1")
    assert report.strength == pytest.approx(0.4, rel=1e-6)
    assert report.relative_error == pytest.approx(0.6, rel=1e-6)
    assert report.norm_a == pytest.approx(np.linalg.norm(change(weight)), rel=1e-6)


def test_a_split_adapter_in_a_fused_checkpoint(tmp_path: Path) -> None:
    base = small("sdxl")
    fused = "conditioner.embedders.1.model.transformer.resblocks.3.attn.in_proj_weight"
    width = base[fused].shape[1]
    up, down = draw(0)(width, 2), draw(0)(2, width)
    a = file(
        tmp_path / "a.safetensors",
        {
            "lora_te2_text_model_encoder_layers_3_self_attn_v_proj": {
                "lora_up.weight": up,
                "lora_down.weight": down,
            }
        },
    )
    tuned = base | {fused: base[fused].clone()}
    tuned[fused][2 * width :] += 0.5 * torch.from_numpy(up @ down)
    tuned[fused][:width] += 1.0
    first, second = (
        save(tmp_path / "base.safetensors", base),
        save(tmp_path / "tuned.safetensors", tuned),
    )
    report = run(a, second, base=first)
    (found,) = report.modules
    assert found.module.endswith("layers.3.self_attn.v_proj")
    assert found.strength == pytest.approx(0.5, rel=1e-5)
    assert [name.rpartition(".")[2] for name in report.only_b] == ["q_proj"]


def test_modules_that_the_checkpoint_does_not_have(tmp_path: Path, tiny: Path) -> None:
    state = load_file(tiny / "base.safetensors")
    del state[TO_Q]
    base = save(tmp_path / "base.safetensors", state)
    tuned = save(tmp_path / "tuned.safetensors", state)
    report = run(tiny / "lora-kohya.safetensors", tuned, base=base)
    assert report.only_a == ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",)
    assert (len(report.modules), report.relative_error, report.strength, report.cosine) == (
        103,
        1.0,
        0.0,
        None,
    )


# what is refused --------------------------------------------------------------------------------------------------


def test_files_that_do_not_go_together(tmp_path: Path, tiny: Path) -> None:
    lora1, base = tiny / "lora-kohya.safetensors", tiny / "base.safetensors"
    with pytest.raises(ShapeMismatch, match=r"Stable Diffusion XL.*Stable Diffusion 1"):
        run(lora1, tiny / "sdxl.safetensors")
    with pytest.raises(ShapeMismatch, match="Stable Diffusion XL"):
        run(tiny / "sdxl.safetensors", tiny / "tuned.safetensors", base=base)
    with pytest.raises(UnknownAdapter, match="neither") as caught:
        run(base, tiny / "tuned.safetensors", base=base)
    assert "--base" in (caught.value.hint or "")
    with pytest.raises(AdaptkitError, match="tuned.safetensors: a checkpoint") as caught:
        run(lora1, tiny / "tuned.safetensors")
    assert "--base" in (caught.value.hint or "")
    with pytest.raises(AdaptkitError, match="takes no strength"):
        run(lora1, (tiny / "tuned.safetensors", 0.5), base=base)
    xl = save(tmp_path / "xl.safetensors", small("sdxl"))
    with pytest.raises(ShapeMismatch) as caught:
        run(lora1, tiny / "tuned.safetensors", base=xl)
    assert "--base" in (caught.value.hint or "")
    with pytest.raises(ShapeMismatch, match="Stable Diffusion XL"):
        run(lora1, lora1, base=xl)
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(AdaptkitError, match="tolerance"):
            run(lora1, lora1, tolerance=wrong)


def test_nothing_in_common(tmp_path: Path, tiny: Path) -> None:
    (one, _), (two, _) = (lora((16, 12), draw(n)) for n in range(2))
    a, b = (
        file(tmp_path / "a.safetensors", {LINEAR: one}),
        file(tmp_path / "b.safetensors", {OTHER: two}),
    )
    with pytest.raises(NothingToDo, match="no module in common"):
        run(a, b, family="sd1")
    with pytest.raises(NoSuchName, match=r"'x\.\*' matches no module"):
        run(tiny / "lora-kohya.safetensors", tiny / "lora-kohya.safetensors", only=("x.*",))
    with pytest.raises(NoSuchName, match=r"'x\.\*' matches no module"):
        run(
            tiny / "lora-kohya.safetensors",
            tiny / "tuned.ckpt",
            base=tiny / "base.ckpt",
            only=("x.*",),
        )


def test_sizes_that_differ(tmp_path: Path) -> None:
    (one, _), (two, _), (three, _) = (
        lora(shape, draw(0)) for shape in ((16, 12), (32, 12), (16, 24))
    )
    a = file(tmp_path / "a.safetensors", {LINEAR: one})
    for stored, size in ((two, "32 × 12"), (three, "16 × 24")):
        b = file(tmp_path / "b.safetensors", {LINEAR: stored})
        with pytest.raises(
            ShapeMismatch, match=rf"16 × 12 in a.safetensors, {size} in this adapter"
        ) as caught:
            run(a, b, family="sd1")
        assert Path(str(caught.value.file)).name == "b.safetensors"


@pytest.mark.parametrize("kind", [lora, loha, lokr(4), full])
@pytest.mark.parametrize("where", ["a", "b"])
def test_nan_names_the_file_and_the_tensor(tmp_path: Path, kind: Any, where: str) -> None:
    paths = {}
    for n, name in enumerate("ab"):
        stored = kind((32, 24), draw(n))[0]
        suffix = next(suffix for suffix in stored if suffix != "alpha")
        if name == where:
            stored[suffix].flat[3] = np.nan
        paths[name] = file(tmp_path / f"{name}.safetensors", {LINEAR: stored})
    with pytest.raises(NonFinite, match="NaN or infinity") as caught:
        run(paths["a"], paths["b"], family="sd1")
    assert (Path(str(caught.value.file)).name, caught.value.tensor) == (
        f"{where}.safetensors",
        f"{LINEAR}.{suffix}",
    )


def test_nan_in_a_dora_or_a_checkpoint(tmp_path: Path, tiny: Path) -> None:
    stored, _ = dora(1)
    a = file(tmp_path / "a.safetensors", {LINEAR: stored})
    stored["dora_scale"][3] = np.inf
    b = file(tmp_path / "b.safetensors", {LINEAR: stored})
    for base in (None, tiny / "base.safetensors"):
        with pytest.raises(NonFinite, match="b.safetensors.*dora_scale.*NaN or infinity"):
            run(a, b, family="sd1", base=base)
    state = load_file(tiny / "base.safetensors")
    state[TO_Q][0, 0] = np.nan
    tuned = save(tmp_path / "tuned.safetensors", state)
    with pytest.raises(NonFinite, match=f"tuned.safetensors.*{TO_Q}.*NaN or infinity"):
        run(tiny / "lora-kohya.safetensors", tuned, base=tiny / "base.safetensors")


def test_keys_that_nobody_understands_are_named_and_keep_no_tolerance(tmp_path: Path) -> None:
    stored, _ = lora((16, 12), draw(0))
    a = file(tmp_path / "a.safetensors", {LINEAR: stored, OTHER: stored})
    b = file(
        tmp_path / "b.safetensors", {LINEAR: stored, OTHER: stored, "lora_te7_nowhere": stored}
    )
    report = run(a, b, family="sd1", tolerance=0.5)
    assert (report.relative_error, len(report.unused)) == (0.0, 3)
    assert all("b.safetensors" in item.reason for item in report.unused)
    assert "3 keys are unknown" in (report.exceeded or "")
    beside = file(
        tmp_path / "c.safetensors",
        {LINEAR: stored, OTHER: stored, "bundle_emb.x": {"clip_l": np.ones(4)}},
    )
    report = run(a, beside, family="sd1", tolerance=0.5)
    assert ([item.key for item in report.unused], report.exceeded) == (
        ["bundle_emb.x.clip_l"],
        None,
    )


# families and the engine ------------------------------------------------------------------------------------------


def test_a_look_alike_follows_the_other(tmp_path: Path) -> None:
    """Names alone do not tell SD 1 from SD 2; the width of a text projection does."""
    one, _ = lora((32, 32), draw(0))
    two, _ = lora((320, 1024), draw(1))
    k = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    plain = file(tmp_path / "plain.safetensors", {LINEAR: one})
    sure = file(tmp_path / "sure.safetensors", {LINEAR: one, k: two})
    with Adapter.open(plain) as first, Adapter.open(sure) as second:
        assert (first.family.name, second.family.name) == ("sd1", "sd2")
    for a, b in ((plain, sure), (sure, plain)):
        report = run(a, b)
        assert (report.family, len(report.modules)) == ("sd2", 1)
    weight = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    base = small("sd2")
    assert base[weight].shape == (40, 40)
    square = file(tmp_path / "square.safetensors", {LINEAR: lora((40, 40), draw(0))[0]})
    first, second = (
        save(tmp_path / "base.safetensors", base),
        save(tmp_path / "tuned.safetensors", base),
    )
    assert run(square, second, base=first).family == "sd2"
    assert run(square, square, base=first).family == "sd2"


def test_families_nobody_knows(tmp_path: Path) -> None:
    new = draw(0)
    state = {
        f"diffusion_model.strange.{i}": {"lora_B.weight": new(8, 2), "lora_A.weight": new(2, 6)}
        for i in range(3)
    }
    a = file(tmp_path / "a.safetensors", state)
    b = file(tmp_path / "b.safetensors", dict(list(state.items())[1:]))
    report = run(a, b)
    assert (report.family, len(report.modules), report.only_a) == (
        "unknown",
        2,
        ("transformer.strange.0",),
    )
    assert report.relative_error_common == 0.0


def test_modules_are_chosen_by_as_names(tiny: Path) -> None:
    a, b = tiny / "lora-kohya.safetensors", tiny / "lora-diffusers.safetensors"
    assert len(run(a, b, only=("text_encoder",)).modules) == 24
    report = run(a, b, skip=("text_encoder", "*to_v"))
    assert len(report.modules) == 80 - sum(one.module.endswith("to_v") for one in run(a, b).modules)
    assert not report.only_a
    assert not report.only_b


def test_s1_stacked_buckets_give_the_same_numbers(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"base": tiny / "base.safetensors"}
    pairs = [
        (tiny / "lora-kohya.safetensors", tiny / "lora-peft.safetensors"),
        (tiny / "full-kohya.safetensors", tiny / "lokr-kohya.safetensors"),
        (tiny / "lora-kohya.safetensors", tiny / "tuned.safetensors"),
    ]
    found = [run(*pair, **options).modules for pair in pairs]
    monkeypatch.setattr(engine.Resources, "on_cpu", property(lambda _: False))
    assert [run(*pair, **options).modules for pair in pairs] == found


def test_the_memory_bound(tiny: Path) -> None:
    with pytest.raises(NotEnoughMemory, match="working memory"):
        run(tiny / "lora-kohya.safetensors", tiny / "lora-kohya.safetensors", memory=1000)


def test_the_plan_of_a_large_layer_fits_a_small_bound(tmp_path: Path) -> None:
    """18,432 × 3,072 in FLUX.1: 450 MB in float64, formed a block of rows at a time."""
    new = draw(0)
    stem = "lora_unet_single_blocks_0_linear1"
    stored = {"lora_up.weight": new(21504, 16), "lora_down.weight": new(16, 3072)}
    other = {"lokr_w1": new(8, 8), "lokr_w2": new(2688, 384)}
    a, b = (
        file(tmp_path / f"{n}.safetensors", {stem: t}) for n, t in (("a", stored), ("b", other))
    )
    plan = compare.plan((a, 1.0), (b, 1.0), compare.Options(memory=100_000_000))
    plan.close()
