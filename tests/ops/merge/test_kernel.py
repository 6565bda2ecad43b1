"""Numbers, report figures and errors of the merge kernel, in blocks and whole (float64 oracle)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit import engine
from adaptkit.errors import NonFinite
from adaptkit.ops import merge
from adaptkit.ops.merge import kernel, steps
from tests import made, oracle
from tests.ops.merge import test_fp8 as fp8
from tests.ops.merge.test_verify import PLACES, base_file
from tests.ops.models import save

State = dict[str, torch.Tensor]
Array = np.ndarray
QKV = "double_blocks.0.img_attn.qkv.weight"
LINEAR1 = "single_blocks.3.linear1.weight"
FUSED = {QKV: 48, LINEAR1: 112}
MLP = "transformer.single_transformer_blocks.3.proj_mlp"
TURNED = "conditioner.embedders.1.model.text_projection"
STEM = "lora_te2_text_projection"
# merged in blocks of rows, and whole
EITHER = [torch.float16, torch.float8_e4m3fn]
SPLIT = [f"transformer.transformer_blocks.0.attn.to_{name}" for name in "qkv"]


def planned(base: Path, *adapters: tuple[Path, float], **options: Any) -> merge.Plan:
    chosen = {"output": base.with_name("out.safetensors"), "family": "sd1", **options}
    return merge.plan(base, adapters, merge.Options(**chosen))


def run(base: Path, *adapters: tuple[Path, float], **options: Any) -> merge.Report:
    return merge.run(planned(base, *adapters, **options))


def norm(*arrays: Array) -> float:
    """The Frobenius norm of all entries."""
    return float(np.sqrt(sum((array.astype(np.float64) ** 2).sum() for array in arrays)))


def numbers(tensor: torch.Tensor) -> Array:
    return tensor.double().numpy()


def factors(stem: str, rows: int, columns: int, seed: int = 0) -> State:
    """A LoRA of rank 3 without alpha, in PEFT's names (or kohya's for a kohya stem)."""
    draw = torch.Generator().manual_seed(seed)
    up, down = ("lora_up", "lora_down") if stem.startswith("lora_") else ("lora_B", "lora_A")
    return {
        f"{stem}.{up}.weight": torch.randn(rows, 3, generator=draw),
        f"{stem}.{down}.weight": torch.randn(3, columns, generator=draw),
    }


def product(state: State) -> Array:
    """ΔW of `factors`."""
    up, down = (numbers(tensor) for tensor in state.values())
    return oracle.lora(up, down, 1.0)


def check_figures(
    report: merge.Report,
    before: Mapping[str, Array],
    exact: Mapping[str, Array],
    after: Mapping[str, Array],
) -> None:
    """Every relative change and error of the report, by tensor and in sum."""
    named = {item["tensor"]: item for item in report.details}
    assert named.keys() == exact.keys()
    for key, whole in exact.items():
        change = norm(whole - before[key])
        item = named[key]
        assert item["relative_change"] == pytest.approx(change / norm(before[key]), rel=1e-5), key
        wanted = norm(after[key] - whole) / change
        assert item["relative_error"] == pytest.approx(wanted, rel=2e-3), key
    change = norm(*(exact[key] - before[key] for key in exact))
    total = norm(*(before[key] for key in exact))
    assert report.relative_change == pytest.approx(change / total, rel=1e-5)
    error = norm(*(after[key] - exact[key] for key in exact))
    assert report.relative_error == pytest.approx(error / change, rel=2e-3)


def check_numbers(found: Array, exact: Array, dtype: torch.dtype) -> None:
    """Half a unit in the last place, and what float32 adds."""
    info = torch.finfo(dtype)
    allowed = info.eps / 2 * 1.01 * np.maximum(np.abs(exact), info.smallest_normal) + 5e-6
    assert (np.abs(found - exact) <= allowed).all()


@pytest.fixture(params=[1 << 19, 100], ids=["one-block", "blocks"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tensors in one block, and in several with a shorter last one."""
    monkeypatch.setattr(steps, "BLOCK", request.param)
    return request.param


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("strengths", [(0.7,), (-1.5,), (0.5, -2.0), (0.0, 0.3)], ids=str)
@pytest.mark.parametrize("kind", ["lora", "lokr", "tucker", "full"])
def test_figures_and_numbers(tmp_path: Path, kind: str, strengths: tuple[float, ...]) -> None:
    check_merge(tmp_path, kind, strengths, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("strengths", [(0.7,), (-1.5,), (0.5, -2.0)], ids=str)
@pytest.mark.parametrize("kind", [*made.KINDS])
def test_figures_and_numbers_of_stacks(
    tmp_path: Path,
    kind: str,
    strengths: tuple[float, ...],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine.Resources, "on_cpu", property(lambda _: False))
    check_merge(tmp_path, kind, strengths, dtype)


def check_merge(
    tmp_path: Path, kind: str, strengths: tuple[float, ...], dtype: torch.dtype
) -> None:
    """Numbers and figures of a merge of adapters of one kind, against float64."""
    base = base_file(tmp_path, dtype)
    paths = [
        made.adapter(tmp_path / f"{n}.safetensors", kind, seed=n) for n in range(len(strengths))
    ]
    report = run(base, *zip(paths, strengths, strict=True))
    found, held = load_file(report.output), load_file(base)
    deltas = [made.deltas(path) for path in paths]
    before, exact, after = {}, {}, {}
    for name, key in PLACES.items():
        before[key] = numbers(held[key])
        change = sum(s * delta[name] for s, delta in zip(strengths, deltas, strict=True))
        exact[key] = before[key] + change.reshape(before[key].shape)
        after[key] = numbers(found[key])
        check_numbers(after[key], exact[key], dtype)
    if dtype == torch.float32:  # float32 is not rounded again, so no error is measured
        assert report.relative_error == 0.0
        after = exact
    check_figures(report, before, exact, after)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn], ids=str)
def test_figures_of_equal_layers_are_their_own(
    tmp_path: Path, dtype: torch.dtype, stacked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three layers of one shape whose weights, changes and errors differ in size."""
    if stacked:
        monkeypatch.setattr(engine.Resources, "on_cpu", property(lambda _: False))
    keys = [PLACES[made.LINEAR].replace("to_q", f"to_{name}") for name in "qkv"]
    draw = torch.Generator().manual_seed(4)
    state = {
        key: (n * torch.randn(24, 24, generator=draw)).to(dtype) for n, key in enumerate(keys, 1)
    }
    lora: State = {}
    exact = {}
    for n, (name, key) in enumerate(zip("qkv", keys, strict=True)):
        one = factors(made.LINEAR.replace("to_q", f"to_{name}"), 24, 24, seed=n)
        exact[key] = numbers(state[key]) - 0.5 * product(one)
        lora |= one
    base = save(tmp_path / "base.safetensors", state)
    save_file(lora, tmp_path / "a.safetensors")
    report = run(base, (tmp_path / "a.safetensors", -0.5))
    before = {key: numbers(tensor) for key, tensor in state.items()}
    after = {key: numbers(tensor) for key, tensor in load_file(report.output).items()}
    for key in keys:
        check_numbers(after[key], exact[key], dtype)
    check_figures(report, before, exact, after)


@pytest.mark.parametrize("stacked", [False, True])
def test_equal_layers_that_are_multiplied_along_different_sides(
    tmp_path: Path, stacked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """IA³: the flags of a stack are values and may differ."""
    if stacked:
        monkeypatch.setattr(engine.Resources, "on_cpu", property(lambda _: False))
    draw = torch.Generator().manual_seed(4)
    state: State = {}
    adapter: State = {}
    exact = {}
    for name, on_input in zip("qkv", (1, 0, 1), strict=True):
        key, stem = (
            held.replace("to_q", f"to_{name}") for held in (PLACES[made.LINEAR], made.LINEAR)
        )
        state[key] = torch.randn(24, 24, generator=draw).half()
        weight = torch.randn(24, generator=draw)
        adapter |= {f"{stem}.weight": weight, f"{stem}.on_input": torch.tensor(on_input)}
        factor = 1 + 0.6 * numbers(weight)
        exact[key] = numbers(state[key]) * (factor[None] if on_input else factor[:, None])
    base = save(tmp_path / "base.safetensors", state)
    save_file(adapter, tmp_path / "a.safetensors")
    report = run(base, (tmp_path / "a.safetensors", 0.6))
    before = {key: numbers(tensor) for key, tensor in state.items()}
    after = {key: numbers(tensor) for key, tensor in load_file(report.output).items()}
    for key in state:
        check_numbers(after[key], exact[key], torch.float16)
    check_figures(report, before, exact, after)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("target", ["keep", "bf16"])
@pytest.mark.parametrize("dtype", EITHER, ids=str)
def test_figures_of_scaled_weights_are_those_of_the_decoded_numbers(
    tmp_path: Path, dtype: torch.dtype, target: str, stacked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if stacked:
        monkeypatch.setattr(engine.Resources, "on_cpu", property(lambda _: False))
    base = fp8.base_file(tmp_path, dtype, scales="rows")
    adapter = made.adapter(tmp_path / "a.safetensors", names=list(fp8.KEYS.values()))
    report = run(base, (adapter, 0.4), dtype=target)
    held, found, deltas = load_file(base), load_file(report.output), made.deltas(adapter)
    before = {key: fp8.meant(held, key) for key in fp8.KEYS}
    exact = {key: before[key] + 0.4 * deltas[name] for key, name in fp8.KEYS.items()}
    check_figures(report, before, exact, {key: fp8.meant(found, key) for key in fp8.KEYS})


@pytest.mark.parametrize("dtype", EITHER, ids=str)
@pytest.mark.parametrize("rows", [3, 7, 8, 16, 48])
@pytest.mark.parametrize("names", ["k", "qv", "qkv"])
def test_parts_of_a_fused_layer_in_blocks_across_their_edges(
    tmp_path: Path, names: str, rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "BLOCK", 16 * rows)
    draw = torch.Generator().manual_seed(1)
    state = {key: torch.randn(size, 16, generator=draw).to(dtype) for key, size in FUSED.items()}
    base = save(tmp_path / "base.safetensors", state)
    lora = factors(MLP, 64, 16, seed=3)
    last = np.concatenate([np.zeros((48, 16)), 0.6 * product(lora)])
    change = np.zeros((48, 16))
    for n, stem in enumerate(SPLIT):
        if stem[-1] in names:
            one = factors(stem, 16, 16, seed=n)
            change[16 * n : 16 * n + 16] = 0.6 * product(one)
            lora |= one
    save_file(lora, tmp_path / "a.safetensors")
    report = run(base, (tmp_path / "a.safetensors", 0.6), family="flux")
    before = {key: numbers(tensor) for key, tensor in state.items()}
    after = {key: numbers(tensor) for key, tensor in load_file(report.output).items()}
    exact = {QKV: before[QKV] + change, LINEAR1: before[LINEAR1] + last}
    for key in FUSED:
        check_numbers(after[key], exact[key], dtype)
    check_figures(report, before, exact, after)


@pytest.mark.parametrize("dtype", EITHER, ids=str)
@pytest.mark.parametrize("rows", [5, 16])
def test_a_fused_module_on_split_layers_gives_each_its_rows(
    tmp_path: Path, rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "BLOCK", 16 * rows)
    draw = torch.Generator().manual_seed(1)
    keys = [f"transformer_blocks.0.attn.to_{name}.weight" for name in "qkv"]
    state = {key: torch.randn(16, 16, generator=draw).to(dtype) for key in keys}
    base = save(tmp_path / "base.safetensors", state)
    lora = factors("lora_unet_double_blocks_0_img_attn_qkv", 48, 16)
    save_file(lora, tmp_path / "a.safetensors")
    report = run(base, (tmp_path / "a.safetensors", -0.3), family="flux")
    parts = np.split(-0.3 * product(lora), 3)
    before = {key: numbers(tensor) for key, tensor in state.items()}
    after = {key: numbers(tensor) for key, tensor in load_file(report.output).items()}
    exact = {key: before[key] + part for key, part in zip(keys, parts, strict=True)}
    for key in keys:
        check_numbers(after[key], exact[key], dtype)
    check_figures(report, before, exact, after)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("dtype", EITHER, ids=str)
def test_biases_and_norms(tmp_path: Path, dtype: torch.dtype) -> None:
    stem = "blocks.0.self_attn"
    draw = torch.Generator().manual_seed(1)
    keys = {f"{stem}.q.bias": f"{stem}.q.diff_b", f"{stem}.norm_q.weight": f"{stem}.norm_q.diff"}
    state = {key: torch.randn(130, generator=draw).to(dtype) for key in keys}
    extra = {f"{stem}.q.weight": torch.randn(130, 8, generator=draw).half()}
    base = save(tmp_path / "base.safetensors", state | extra)
    diffs = {f"diffusion_model.{key}": torch.randn(130, generator=draw) for key in keys.values()}
    save_file(diffs, tmp_path / "a.safetensors")
    report = run(base, (tmp_path / "a.safetensors", 0.7), family="wan")
    before = {key: numbers(tensor) for key, tensor in state.items()}
    after = {key: numbers(tensor) for key, tensor in load_file(report.output).items()}
    exact = {
        key: before[key] + 0.7 * numbers(diffs[f"diffusion_model.{name}"])
        for key, name in keys.items()
    }
    for key in keys:
        check_numbers(after[key], exact[key], dtype)
    check_figures(report, before, exact, after)


@pytest.mark.usefixtures("block")
def test_a_layer_with_swapped_halves(tmp_path: Path) -> None:
    key = "norm_out.linear.weight"
    weight = torch.randn(12, 16, generator=torch.Generator().manual_seed(1)).half()
    base = save(tmp_path / "base.safetensors", {key: weight})
    lora = factors("lora_unet_final_layer_adaLN_modulation_1", 12, 16)
    save_file(lora, tmp_path / "a.safetensors")
    report = run(base, (tmp_path / "a.safetensors", 0.8), family="flux")
    first, second = np.split(0.8 * product(lora), 2)
    before, after = numbers(weight), numbers(load_file(report.output)[key])
    exact = before + np.concatenate([second, first])
    check_numbers(after, exact, torch.float16)
    check_figures(report, {key: before}, {key: exact}, {key: after})


def turned(folder: Path, weight: torch.Tensor, *loras: State) -> tuple[Path, list[Path]]:
    """A checkpoint with a layer that is stored transposed, (columns, rows), and adapters of it."""
    base = save(folder / "base.safetensors", {TURNED: weight})
    paths = [folder / f"{n}.safetensors" for n in range(len(loras))]
    for path, lora in zip(paths, loras, strict=True):
        save_file(lora, path)
    return base, paths


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_a_transposed_layer(tmp_path: Path, dtype: torch.dtype) -> None:
    """Two adapters at once; a float64 weight keeps what float32 would lose."""
    weight = torch.randn(40, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    loras = [factors(STEM, 24, 40, seed=n) for n in range(2)]
    size = 1e-9 if dtype == torch.float64 else 1.0
    base, paths = turned(tmp_path, weight, *loras)
    report = run(base, *zip(paths, (0.5 * size, -size), strict=True), family="sdxl")
    before, after = numbers(weight), numbers(load_file(report.output)[TURNED])
    change = size * (0.5 * product(loras[0]) - product(loras[1])).T
    if dtype == torch.float64:
        np.testing.assert_allclose(after - before, change, rtol=1e-3, atol=1e-14)
        assert report.details[0]["relative_change"] == pytest.approx(
            norm(change) / norm(before), rel=1e-4
        )
        return
    check_numbers(after, before + change, dtype)
    check_figures(report, {TURNED: before}, {TURNED: before + change}, {TURNED: after})


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("dtypes", [("keep", "keep"), ("fp32", "bf16")])
def test_outputs_that_share_adapters_add_them_at_their_own_strengths(
    tmp_path: Path, dtypes: tuple[str, str]
) -> None:
    """ΔW is made once for all outputs: no strength, sum or block of one may reach another."""
    base = base_file(tmp_path, torch.float32)
    one = made.adapter(tmp_path / "a.safetensors")
    two = made.adapter(tmp_path / "b.safetensors", "lokr", names=[made.LINEAR, made.CONV], seed=1)
    mixes = [((one, 0.5),), ((one, -2.0),), ((one, 1.5), (two, 0.25)), ((two, -1.0), (one, 0.1))]
    plans = [
        planned(base, *mix, output=tmp_path / f"o{n}.safetensors", dtype=dtypes[n % 2])
        for n, mix in enumerate(mixes)
    ]
    reports = merge.run_together(plans)
    before = {key: numbers(load_file(base)[key]) for key in PLACES.values()}
    for n, (mix, report) in enumerate(zip(mixes, reports, strict=True)):
        found = load_file(report.output)
        for name, key in PLACES.items():
            parts = [s * made.deltas(path)[name] for path, s in mix if name in made.deltas(path)]
            change = sum(parts).reshape(before[key].shape)  # type: ignore[union-attr]
            dtype = torch.bfloat16 if dtypes[n % 2] == "bf16" else torch.float32
            assert found[key].dtype == dtype
            check_numbers(numbers(found[key]), before[key] + change, dtype)
            item = next(item for item in report.details if item["tensor"] == key)
            assert item["relative_change"] == pytest.approx(
                norm(change) / norm(before[key]), rel=1e-5
            )


def test_outputs_of_one_base_with_and_without_a_tensor(tmp_path: Path) -> None:
    """The first output copies what the second changes."""
    base = base_file(tmp_path)
    parts = [
        made.adapter(tmp_path / f"{n}.safetensors", names=[name], seed=n)
        for n, name in enumerate((made.LINEAR, made.CONV))
    ]
    reports = merge.run_together(
        [planned(base, (p, 1.0), output=p.with_name(f"o{p.name}")) for p in parts]
    )
    held = load_file(base)
    for name, part, report in zip((made.LINEAR, made.CONV), parts, reports, strict=True):
        found, key = load_file(report.output), PLACES[name]
        assert all(torch.equal(found[other], held[other]) for other in held if other != key)
        exact = numbers(held[key]) + made.deltas(part)[name].reshape(held[key].shape)
        check_numbers(numbers(found[key]), exact, torch.float16)


def test_a_tensor_without_dimensions_takes_the_new_dtype(tmp_path: Path) -> None:
    path = base_file(tmp_path, torch.float32)
    base = save(path, load_file(path) | {"first_stage_model.scale": torch.tensor(0.1)})
    adapter = made.adapter(tmp_path / "a.safetensors")
    report = run(base, (adapter, 1.0), dtype="bf16")
    found = load_file(report.output)
    assert torch.equal(found["first_stage_model.scale"], torch.tensor(0.1).bfloat16())


class Fresh:
    """Weights whose `apply` returns a new tensor, which the contract allows."""

    row_wise = False

    def apply(self, base: torch.Tensor, strength: float) -> torch.Tensor:
        return base * 2 + strength


def test_a_new_tensor_of_an_algorithm_reaches_the_weight() -> None:
    whole = torch.arange(24.0).reshape(1, 6, 4)
    exact = whole.clone()
    exact[:, 2:5] = exact[:, 2:5] * 2 + 0.5
    kernel.Part(Fresh(), 2, 5, None).add(whole, 0.5)  # type: ignore[arg-type]
    assert torch.equal(whole, exact)


# errors


def with_number(path: Path, key: str, value: float) -> Path:
    """Put a number into the last entry of a tensor of a file."""
    state = load_file(path)
    state[key].view(-1)[-1] = value
    save_file(state, path, metadata={"format": "pt"})
    return path


def caught(*plans: merge.Plan) -> tuple[str, str, str]:
    """The text, the file's name and the tensor of the error that the merges end with."""
    with pytest.raises(NonFinite) as found:
        merge.run_together(plans)
    for plan in plans:
        assert not plan.output.exists()
        plan.close()
    return found.value.message, Path(str(found.value.file)).name, str(found.value.tensor)


@pytest.mark.parametrize("whole", [False, True], ids=["rows", "whole"])
class TestErrors:
    """The same errors from tensors in blocks of rows and from whole ones."""

    @pytest.fixture(autouse=True)
    def _files(self, tmp_path: Path, whole: bool, block: int) -> None:
        if whole:
            weight = torch.randn(40, 24, generator=torch.Generator().manual_seed(1)).half()
            loras = [factors(STEM, 24, 40, seed=n) for n in range(2)]
            self.base, self.adapters = turned(tmp_path, weight, *loras)
            self.key, self.stem, self.family = TURNED, STEM, "sdxl"
        else:
            self.base = base_file(tmp_path)
            self.adapters = [
                made.adapter(tmp_path / f"{n}.safetensors", names=[made.WIDE], seed=n)
                for n in range(2)
            ]
            self.key, self.stem, self.family = PLACES[made.WIDE], made.WIDE, "sd1"

    def plan(self, *strengths: float, **options: Any) -> merge.Plan:
        pairs = zip(self.adapters, strengths, strict=False)
        return planned(self.base, *pairs, family=self.family, **options)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_the_base(self, value: float) -> None:
        with_number(self.base, self.key, value)
        message = ("holds NaN or infinity", "base.safetensors", self.key)
        assert caught(self.plan(1.0, 0.5)) == message

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("role", ["lora_up.weight", "lora_down.weight"])
    @pytest.mark.parametrize("number", [0, 1])
    def test_an_adapter(self, number: int, role: str, value: float) -> None:
        key = f"{self.stem}.{role}"
        with_number(self.adapters[number], key, value)
        message = ("holds NaN or infinity", f"{number}.safetensors", key)
        assert caught(self.plan(1.0, 0.5)) == message

    def test_a_difference_beyond_float32(self) -> None:
        plan = self.plan(1e38, 1e38, dtype="fp32")
        assert caught(plan) == ("the merged weight overflows", "out.safetensors", self.key)

    @pytest.mark.parametrize("strengths", [(1e5,), (1e5, 1e4)])
    def test_a_weight_that_does_not_fit(self, strengths: tuple[float, ...]) -> None:
        wanted = "the merged weight does not fit float16"
        assert caught(self.plan(*strengths)) == (wanted, "out.safetensors", self.key)

    def test_the_output_of_several_whose_weight_does_not_fit(self, tmp_path: Path) -> None:
        plans = [
            self.plan(s, output=tmp_path / f"o{n}.safetensors") for n, s in enumerate((1, 1e5, 2))
        ]
        wanted = "the merged weight does not fit float16"
        assert caught(*plans) == (wanted, "o1.safetensors", self.key)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 4)])
def test_an_empty_tensor_takes_the_new_dtype(tmp_path: Path, shape: tuple[int, ...]) -> None:
    base = base_file(tmp_path, torch.float32)
    save_file(load_file(base) | {"model_ema.decay": torch.zeros(shape)}, base)
    adapter = made.adapter(tmp_path / "a.safetensors")
    report = run(base, (adapter, 1.0), dtype="bf16", family="sd1")
    found = load_file(report.output)["model_ema.decay"]
    assert (tuple(found.shape), found.dtype) == (shape, torch.bfloat16)
