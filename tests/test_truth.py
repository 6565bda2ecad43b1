"""Files at the edges: what a verb says of them is what a reader of its output finds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit.errors import NonFinite, NotRepresentable, ShapeMismatch
from adaptkit.ops import combine, convert, merge, resize
from tests import made, oracle
from tests.cli.test_cli import adaptkit
from tests.synth import FIXTURES

Tensors = dict[str, torch.Tensor]
LINEAR = made.LINEAR


def lora(
    path: Path, rows: int = 24, columns: int = 32, rank: int = 4, **extra: torch.Tensor
) -> Path:
    draw = torch.Generator().manual_seed(rows)
    tensors = {
        f"{LINEAR}.lora_up.weight": torch.randn(rows, rank, generator=draw),
        f"{LINEAR}.lora_down.weight": torch.randn(rank, columns, generator=draw),
        f"{LINEAR}.alpha": torch.tensor(rank / 2),
    }
    save_file(tensors | {f"{LINEAR}.{key}": value for key, value in extra.items()}, path)
    return path


def combined(folder: Path, *paths: Path, **options: object) -> combine.Report:
    chosen = combine.Options(output=folder / "out.safetensors", overwrite=True, **options)  # type: ignore[arg-type]
    return combine.run(combine.plan([(path, 1.0) for path in paths], chosen))


@pytest.mark.parametrize(
    "kinds", [("lora", "lora"), ("lokr", "lokr"), ("lora", "lokr"), ("full", "full")]
)
def test_adapters_of_models_of_two_sizes_are_refused_by_name(
    tmp_path: Path, kinds: tuple[str, str]
) -> None:
    first = made.adapter(tmp_path / "a.safetensors", kinds[0], names=[LINEAR])
    draw = np.random.default_rng(3)
    tensors = made.module(kinds[1], LINEAR, (48, 64), draw)
    second = tmp_path / "b.safetensors"
    save_file({key: torch.tensor(value).float() for key, value in tensors.items()}, second)
    with pytest.raises(ShapeMismatch, match="is 48 × 64 in this adapter, 24 × 32 in a.safetensors"):
        combined(tmp_path, first, second)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("method", ["sum", "ties", "dare", "dare-ties", "magnitude"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_nan_in_an_input_is_refused_by_every_method(
    tmp_path: Path, method: str, value: float, order: tuple[int, int]
) -> None:
    paths = [lora(tmp_path / "good.safetensors"), lora(tmp_path / "bad.safetensors")]
    tensors = load_file(paths[1])
    tensors[f"{LINEAR}.lora_up.weight"][0, 0] = value
    save_file(tensors, paths[1])
    options = {} if method == "sum" else {"method": method, "density": 0.5}
    with pytest.raises(NonFinite, match=r"bad.safetensors.*lora_up"):
        combined(tmp_path, *(paths[n] for n in order), **options)


@pytest.mark.parametrize("method", ["ties", "magnitude"])
def test_biases_are_mixed_by_the_method_too(tmp_path: Path, method: str) -> None:
    """Two equal inputs: ties averages what agrees, magnitude adds it."""
    bias = torch.randn(24, generator=torch.Generator().manual_seed(5))
    paths = [lora(tmp_path / f"{n}.safetensors", diff_b=bias) for n in "ab"]
    combined(tmp_path, *paths, method=method, density=1.0)
    found = load_file(tmp_path / "out.safetensors")
    factor = 1.0 if method == "ties" else 2.0
    assert torch.allclose(found[f"{LINEAR}.diff_b"], factor * bias)
    one = made.deltas(lora(tmp_path / "c.safetensors"))[LINEAR]
    whole = found[f"{LINEAR}.diff"].double().numpy().reshape(24, -1)
    assert np.abs(whole - factor * one).max() <= 1e-5


@pytest.mark.parametrize("wide", ["lora_up.weight", "lora_down.weight"])
def test_factors_of_two_dtypes_in_one_module_are_merged(tmp_path: Path, wide: str) -> None:
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    key = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    base = load_file(FIXTURES / "tiny" / "base.safetensors")
    rows, columns = base[key].shape
    draw = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.lora_up.weight": torch.randn(rows, 4, generator=draw),
        f"{name}.lora_down.weight": torch.randn(4, columns, generator=draw),
        f"{name}.alpha": torch.tensor(4.0),
    }
    tensors[f"{name}.{wide}"] = tensors[f"{name}.{wide}"].double()
    save_file(tensors, tmp_path / "a.safetensors")
    options = merge.Options(output=tmp_path / "m.safetensors", dtype="fp32")
    source = FIXTURES / "tiny" / "base.safetensors"
    merge.run(merge.plan(source, [(tmp_path / "a.safetensors", 1.0)], options))
    up, down = (tensors[f"{name}.lora_{role}.weight"].double() for role in ("up", "down"))
    found = load_file(tmp_path / "m.safetensors")[key].double()
    assert torch.allclose(found, base[key].double() + up @ down, atol=1e-5)


FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def narrow(path: Path, dtype: torch.dtype) -> Tensors:
    """Store the factors in fp8; their values as they are then."""
    tensors = load_file(lora(path))
    stored = {k: t if k.endswith("alpha") else t.to(dtype) for k, t in tensors.items()}
    save_file(stored, path)
    return {key: tensor.float() for key, tensor in stored.items()}


def delta(tensors: Tensors) -> torch.Tensor:
    up, down = (tensors[f"{LINEAR}.lora_{role}.weight"].double() for role in ("up", "down"))
    return tensors[f"{LINEAR}.alpha"].double() / down.shape[0] * up @ down


@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize(
    ("option", "written"),
    [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)],
)
def test_dtype_holds_for_adapters_stored_as_fp8(
    tmp_path: Path, dtype: torch.dtype, option: str, written: torch.dtype
) -> None:
    values = narrow(tmp_path / "a.safetensors", dtype)
    options = convert.Options(to="lycoris", dtype=option, output=tmp_path / "o.safetensors")
    report = convert.run(convert.plan(tmp_path / "a.safetensors", options))
    found = load_file(tmp_path / "o.safetensors")
    factors = {key: tensor for key, tensor in found.items() if not key.endswith("alpha")}
    assert {tensor.dtype for tensor in factors.values()} == {written}
    assert report.relative_error == 0.0  # every value of fp8 is one of the wider formats
    wide = sorted((tensor.float() for tensor in factors.values()), key=lambda t: t.shape)
    named = {k: t for k, t in values.items() if not k.endswith("alpha")}
    assert all(map(torch.equal, wide, sorted(named.values(), key=lambda t: t.shape)))


@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize("verb", ["resize", "combine", "full"])
def test_adapters_stored_as_fp8_are_ordinary_input(
    tmp_path: Path, dtype: torch.dtype, verb: str
) -> None:
    path, out = tmp_path / "a.safetensors", tmp_path / "o.safetensors"
    wanted = delta(narrow(path, dtype))
    if verb == "resize":
        resize.run(resize.plan(path, resize.Options(rank=4, dtype="fp32", output=out)))
        found = delta(load_file(out))
    elif verb == "combine":
        combine.run(
            combine.plan([(path, 1.0), (path, 1.0)], combine.Options(dtype="fp32", output=out))
        )
        found = delta(load_file(out)) / 2
    else:
        options = convert.Options(to="kohya", algo="full", output=out)
        report = convert.run(convert.plan(path, options))
        found = load_file(out)[f"{LINEAR}.diff"].double()
        assert load_file(out)[f"{LINEAR}.diff"].dtype == torch.float16
        measured = float((found - wanted).norm() / wanted.norm())
        assert report.relative_error == pytest.approx(measured, rel=1e-3)
    assert float((found - wanted).norm()) <= 1e-3 * float(wanted.norm())


@pytest.mark.parametrize("to", ["diffusers", "peft"])
def test_no_file_for_peft_holds_a_lora_mid(tmp_path: Path, to: str) -> None:
    path = made.adapter(tmp_path / "a.safetensors", "tucker", names=[made.CONV])
    output = tmp_path / ("o" if to == "peft" else "o.safetensors")
    options = convert.Options(to=to, output=output, dtype="fp32")
    report = convert.run(convert.plan(path, options))
    assert report.relative_error is not None
    assert report.relative_error <= 1e-6
    weights = output / "adapter_model.safetensors" if to == "peft" else output
    assert not [key for key in load_file(weights) if "mid" in key]
    # the same ΔW under the first names
    back = tmp_path / "back.safetensors"
    options = convert.Options(to="kohya", family="sd1", output=back)
    convert.run(convert.plan(output, options))
    one, two = made.deltas(path)[made.CONV], made.deltas(back)[made.CONV]
    assert np.abs(one - two).max() <= 1e-5 * np.abs(one).max()


def dependent(path: Path, shape: Sequence[int] = (32, 32)) -> Path:
    """A DoRA and a LoRA of ones: casting changes the first, and not the second."""
    draw = torch.Generator().manual_seed(7)
    rows, columns = shape
    tensors = {
        f"{LINEAR}.lora_up.weight": torch.randn(rows, 4, generator=draw),
        f"{LINEAR}.lora_down.weight": torch.randn(4, columns, generator=draw),
        f"{LINEAR}.dora_scale": torch.rand(rows, 1, generator=draw) + 0.5,
        f"{LINEAR}.alpha": torch.tensor(4.0),
    }
    other = LINEAR.replace("to_q", "to_out_0")
    tensors |= {
        f"{other}.lora_up.weight": torch.ones(rows, 4),
        f"{other}.lora_down.weight": torch.ones(4, columns),
        f"{other}.alpha": torch.tensor(4.0),
    }
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_rounding_of_a_dora_is_unknown_without_its_base(tmp_path: Path, dtype: str) -> None:
    """Its change depends on the weight that it scales, so ‖ΔW‖ is not in the file."""
    out = tmp_path / "o.safetensors"
    options = convert.Options(to="lycoris", dtype=dtype, output=out)
    report = convert.run(convert.plan(dependent(tmp_path / "a.safetensors"), options))
    assert report.to_dict()["relative_error"] is None
    known = {item["algorithm"]: item["relative_error"] for item in report.details}
    assert known == {"lora+dora": None, "lora": 0.0}
    shown = adaptkit(
        *("convert", tmp_path / "a.safetensors", "--to", "lycoris", "--dtype", dtype),
        *("-o", out, "--overwrite"),
    )
    assert "error unknown without --base" in shown.stderr + shown.stdout
    assert "exact" not in shown.stderr + shown.stdout
    options = convert.Options(to="lycoris", dtype="fp32", output=tmp_path / "wide.safetensors")
    report = convert.run(convert.plan(tmp_path / "a.safetensors", options))
    assert report.relative_error == 0.0  # nothing was rounded


def test_an_error_that_cannot_hold_is_refused_and_the_hint_works(
    tmp_path: Path, tiny: Path
) -> None:
    """The factors of a DoRA within 30 % gave a weight that was off by 98 %."""
    base, out = tiny / "base.safetensors", tmp_path / "o.safetensors"
    source = dependent(tmp_path / "a.safetensors", load_file(base)[TO_Q].shape)
    with pytest.raises(NotRepresentable, match=r"--error cannot hold for a lora\+dora") as caught:
        resize.plan(source, resize.Options(error=0.3, output=out))
    assert not out.exists()
    assert "--algo lora and --base" in str(caught.value.hint)
    options = resize.Options(error=0.02, algo="lora", base=base, output=out)
    report = resize.run(resize.plan(source, options))
    assert report.relative_error is not None
    assert report.relative_error <= 0.02
    changed = {key: value.double().numpy() for key, value in load_file(base).items()}[TO_Q]
    stored = {key.rpartition(f"{LINEAR}.")[2]: t for key, t in load_file(source).items()}
    up, down, magnitude = (
        stored[role].double().numpy()
        for role in ("lora_up.weight", "lora_down.weight", "dora_scale")
    )
    exact = oracle.dora(changed, up @ down, magnitude, 0) - changed
    shape = tuple(exact.shape)
    kept = made.deltas(out, {LINEAR: shape, LINEAR.replace("to_q", "to_out_0"): shape})[LINEAR]
    error = np.linalg.norm(kept - exact) / np.linalg.norm(exact)
    (own,) = (item for item in report.details if item["module"].endswith("to_q"))
    assert own["relative_error"] == pytest.approx(error, rel=1e-4)
    for rule in ({"rank": 2}, {"energy": 0.9}, {"size": 50_000}):
        resize.run(resize.plan(source, resize.Options(output=out, overwrite=True, **rule)))  # type: ignore[arg-type]


TO_Q = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"


def test_a_base_of_another_size_is_refused_by_name(tmp_path: Path, tiny: Path) -> None:
    options = resize.Options(rank=2, base=tiny / "base.safetensors", output=tmp_path / "o")
    with pytest.raises(ShapeMismatch, match=r"is 8 × 8 in base.*, 32 × 32 in this adapter"):
        resize.plan(dependent(tmp_path / "a.safetensors"), options)


def test_a_merge_of_two_doras_says_that_their_order_counts(tmp_path: Path, tiny: Path) -> None:
    base = tiny / "base.safetensors"
    before = load_file(base)[TO_Q].double().numpy()
    dora = dependent(tmp_path / "a.safetensors", before.shape)
    plain = lora(tmp_path / "b.safetensors", *before.shape)
    stored = load_file(dora)
    up, down = (stored[f"{LINEAR}.lora_{role}.weight"].double().numpy() for role in ("up", "down"))
    magnitude = stored[f"{LINEAR}.dora_scale"].double().numpy()
    added = delta(load_file(plain)).numpy()

    def changed(weight: np.ndarray) -> np.ndarray:
        return oracle.dora(weight, up @ down, magnitude, 0)

    for order, expected in (
        ((dora, plain), changed(before) + added),
        ((plain, dora), changed(before + added)),
        ((dora, dora), changed(changed(before))),
    ):
        report, found = merged(base, *order)
        assert np.abs(found - expected).max() <= 1e-5
        assert [note for note in report.notes if "order of the adapters" in note] == [
            f"the order of the adapters counts in 1 of {report.tensors_changed} tensors: each is "
            "applied to the result of those before it"
        ]
    for order in ((plain, plain), (dora,)):
        assert not [note for note in merged(base, *order)[0].notes if "order" in note]


def merged(base: Path, *paths: Path) -> tuple[merge.Report, np.ndarray]:
    output = paths[0].with_name("merged.safetensors")
    options = merge.Options(output=output, dtype="fp32", overwrite=True)
    report = merge.run(merge.plan(base, [(path, 1.0) for path in paths], options))
    return report, load_file(output)[TO_Q].double().numpy()


def test_the_family_that_is_stated_counts_for_the_adapter_too(tmp_path: Path) -> None:
    """By its names alone, this adapter may be of many families."""
    key = "double_blocks.0.img_attn.qkv.weight"
    weight = torch.randn(48, 16, generator=torch.Generator().manual_seed(0))
    save_file({key: weight}, tmp_path / "base.safetensors")
    stem = "transformer.transformer_blocks.0.attn.to_k"
    up, down = torch.randn(16, 2), torch.randn(2, 16)
    save_file(
        {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}, tmp_path / "a.safetensors"
    )
    options = merge.Options(family="flux", output=tmp_path / "m.safetensors")
    adapters = [(tmp_path / "a.safetensors", 1.0)]
    merge.run(merge.plan(tmp_path / "base.safetensors", adapters, options))
    weight[16:32] += up @ down
    assert torch.allclose(load_file(tmp_path / "m.safetensors")[key], weight, atol=1e-5)
