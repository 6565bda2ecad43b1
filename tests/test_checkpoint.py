from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from adaptkit.checkpoint import Checkpoint, Piece, _averaged
from adaptkit.detect import formats
from adaptkit.errors import ShapeMismatch
from adaptkit.files.header import TensorInfo
from adaptkit.names import Rows, Slot, Target
from tests.ops.models import State, small, tiny_base

FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
KEY = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
CONV = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"


def decoded(stored: torch.Tensor) -> np.ndarray:
    """fp8 bytes to float64, bit by bit (Micikevicius et al. 2022, arXiv:2209.05433)."""
    code = stored.view(torch.uint8).numpy().astype(np.int64)
    bits, bias = (3, 7) if stored.dtype == torch.float8_e4m3fn else (2, 15)
    exponent, mantissa = (code & 0x7F) >> bits, (code & ((1 << bits) - 1)) / (1 << bits)
    size = np.where(
        exponent == 0, mantissa * 2.0 ** (1 - bias), (1 + mantissa) * 2.0 ** (exponent - bias)
    )
    return np.where(code & 0x80, -size, size)


def scale_of(kind: str, shape: tuple[int, ...]) -> torch.Tensor | None:
    random = np.random.default_rng(1)
    shapes = {
        "one": (),
        "one in a list": (1,),
        "rows": (shape[0],),
        "column": (shape[0], *[1] * (len(shape) - 1)),
        "blocks": (shape[0], 4, 1),
    }
    if kind == "none":
        return None
    return torch.from_numpy(np.asarray(random.uniform(1e-3, 2e-3, shapes[kind]))).float()


def scaled(weight: np.ndarray, scale: torch.Tensor | None) -> np.ndarray:
    """The weight that codes and their scale mean, in float64."""
    if scale is None:
        return weight
    factors = scale.double().numpy()
    if factors.ndim == 3 and weight.ndim == 2:
        rows, blocks, _ = factors.shape
        width = weight.shape[1] // blocks
        return np.stack(
            [
                [weight[r, c] * factors[r, c // width, 0] for c in range(weight.shape[1])]
                for r in range(rows)
            ]
        )
    return weight * (
        factors if factors.size == 1 else factors.reshape(-1, *[1] * (weight.ndim - 1))
    )


def narrowed(weight: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    codes = weight.double().numpy() / scaled(np.ones(tuple(weight.shape)), scale)
    return torch.from_numpy(codes).float().clamp(-400, 400).to(dtype)


def open_saved(
    path: Path, state: State, metadata: Mapping[str, str] | None = None, **options: bool
) -> Checkpoint:
    save_file(state, path, metadata=dict(metadata or {}))
    return Checkpoint.open(path, **options)  # type: ignore[arg-type]


def pieces_of(checkpoint: Checkpoint, name: str) -> tuple[Piece, ...]:
    slot = checkpoint.places[name].slot
    pieces = checkpoint.locate(slot, checkpoint.targets()[slot.target])
    assert pieces is not None
    return pieces


# fp8 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize("kind", ["none", "one", "one in a list", "rows", "column", "blocks"])
@pytest.mark.parametrize("spelled", ["scale_weight", "weight_scale"])
def test_fp8_is_read_with_its_scale(tmp_path: Path, dtype: str, kind: str, spelled: str) -> None:
    state = tiny_base()
    for key in (KEY, CONV):
        scale = scale_of(
            "rows" if kind == "blocks" and key == CONV else kind, tuple(state[key].shape)
        )
        state[key] = narrowed(state[key], scale, FP8[dtype])
        if scale is not None:
            state[f"{key.removesuffix('weight')}{spelled}"] = scale
    with open_saved(tmp_path / "a.safetensors", state) as checkpoint:
        assert checkpoint.family.name == "sd1"
        for key in (KEY, CONV):
            scale = state.get(f"{key.removesuffix('weight')}{spelled}")
            read = checkpoint.read(pieces_of(checkpoint, key))
            true = scaled(decoded(state[key]), scale)
            assert read.dtype == torch.float32
            assert read.is_contiguous()
            np.testing.assert_allclose(
                read.double().numpy(), true.reshape(len(true), -1), rtol=1.2e-7, atol=0
            )
            assert np.abs(true).max() > 0


def test_a_scaled_weight_in_plain_floats_is_multiplied_too(tmp_path: Path) -> None:
    """ComfyUI's scaled files have a scale beside every linear layer, also those that stay in bf16."""
    state = tiny_base(torch.bfloat16)
    state[KEY.replace("weight", "scale_weight")] = torch.tensor(0.25)
    with open_saved(tmp_path / "a.safetensors", state) as checkpoint:
        read = checkpoint.read(pieces_of(checkpoint, KEY))
        assert torch.equal(read, state[KEY].float() / 4)


def test_parts_of_a_fused_fp8_weight_take_their_own_rows_of_the_scale(tmp_path: Path) -> None:
    state = small("flux")
    key, swapped = "double_blocks.0.img_attn.qkv.weight", "final_layer.adaLN_modulation.1.weight"
    truth = {}
    for name in (key, swapped):
        scale = scale_of("rows", tuple(state[name].shape))
        assert scale is not None
        state[name] = narrowed(state[name], scale, torch.float8_e4m3fn)
        state[name.replace("weight", "scale_weight")] = scale
        truth[name] = scaled(decoded(state[name]), scale)
    with open_saved(tmp_path / "a.safetensors", state) as checkpoint:
        target = checkpoint.places[key].slot.target
        rows = len(truth[key]) // 3
        for n in range(3):
            pieces = checkpoint.locate(
                Slot(target, Rows(n, n + 1, 3)), checkpoint.targets()[target]
            )
            assert pieces is not None
            read = checkpoint.read(pieces).double().numpy()
            np.testing.assert_allclose(read, truth[key][n * rows : (n + 1) * rows], rtol=1.2e-7)
            assert checkpoint.nbytes(pieces) == 5 * read.size
        halves = [Piece(swapped, swapped=True), Piece(swapped)]
        read, plain = (checkpoint.read((piece,)).double().numpy() for piece in halves)
        np.testing.assert_allclose(plain, truth[swapped], rtol=1.2e-7)
        half = len(plain) // 2
        assert np.array_equal(read, np.concatenate([plain[half:], plain[:half]]))


def test_a_transposed_fp8_weight_is_widened_too(tmp_path: Path) -> None:
    state = small("sdxl")
    key = "conditioner.embedders.1.model.text_projection"
    state[key] = state[key].to(torch.float8_e5m2)
    with open_saved(tmp_path / "a.safetensors", state) as checkpoint:
        read = checkpoint.read(pieces_of(checkpoint, key))
        assert read.dtype == torch.float32
        assert np.array_equal(read.double().numpy(), decoded(state[key]).T)


def test_the_keys_of_a_scaled_file_are_neither_unknown_nor_counted(tmp_path: Path) -> None:
    """Two extra keys beside each weight: by themselves they would hide the family."""
    plain = {
        key: tensor for key, tensor in tiny_base(torch.float16).items() if key.endswith("weight")
    }
    state = dict(plain)
    for key, tensor in plain.items():
        if tensor.ndim == 2:
            state[key] = tensor.to(torch.float8_e4m3fn)
            for name in ("scale_weight", "scale_input", "comfy_quant"):
                state[key.replace("weight", name)] = torch.ones(())
    state["model.diffusion_model.scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    before = open_saved(tmp_path / "plain.safetensors", plain)
    after = open_saved(tmp_path / "scaled.safetensors", state)
    assert (after.family, after.places) == (before.family, before.places)
    assert (after.detection.claimed, after.detection.total) == (
        before.detection.claimed,
        before.detection.total,
    )
    assert set(after.others.values()) == {"scale"}
    assert len(after.others) == len(state) - len(plain)


def test_memory_counts_the_widened_weight_beside_the_stored_one(tmp_path: Path) -> None:
    state = tiny_base(torch.float16)
    state[KEY] = state[KEY].to(torch.float8_e4m3fn)
    with open_saved(tmp_path / "a.safetensors", state) as checkpoint:
        n, other = state[KEY].numel(), state[CONV].numel()
        narrow, wide = pieces_of(checkpoint, KEY), pieces_of(checkpoint, CONV)
        assert (checkpoint.stored_bytes(narrow), checkpoint.nbytes(narrow)) == (n, n + 4 * n)
        assert (checkpoint.stored_bytes(wide), checkpoint.nbytes(wide)) == (2 * other, 2 * other)
        assert checkpoint.dtypes(narrow + wide) == {"F8_E4M3", "F16"}


BYTES = torch.zeros(8, 4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("weight", "beside", "reason"),
    [
        (
            BYTES,
            {"weight.absmax": torch.ones(2), "weight.quant_state.bitsandbytes__nf4": BYTES + 1},
            "nf4 (bitsandbytes)",
        ),
        (BYTES, {"weight.absmax": torch.ones(2)}, "integers (bitsandbytes)"),
        (BYTES, {"weight_scale": torch.ones(2), "weight_scale_2": torch.ones(())}, "nvfp4"),
        (BYTES, {}, "packed integers"),
        (BYTES.to(torch.int8), {"weight_scale": torch.ones(())}, "int8"),
        (BYTES.to(torch.int8), {"SCB": torch.ones(7)}, "int8 (bitsandbytes)"),
        (
            BYTES.to(torch.float8_e4m3fn),
            {"weight_scale": torch.ones(8, 1).to(torch.float8_e8m0fnu)},
            "mxfp8",
        ),
        (
            BYTES.to(torch.float8_e4m3fn),
            {"weight_scale_inv": torch.ones(1, 1)},
            "fp8 with a scale per block of rows and columns",
        ),
        (
            BYTES.to(torch.float8_e4m3fn),
            {"weight_scale": torch.ones(4, 2)},
            "F8_E4M3 [8, 4] with scales [4, 2]",
        ),
        (
            BYTES.to(torch.float8_e4m3fn),
            {"weight_scale": torch.ones(8, 3, 1)},
            "F8_E4M3 [8, 4] with scales [8, 3, 1]",
        ),
        (
            BYTES.to(torch.float8_e4m3fn),
            {"weight_scale": torch.ones(()), "scale_weight": torch.ones(())},
            "a weight with two scales",
        ),
        (
            BYTES.to(torch.float8_e4m3fn),
            {"weight_scale": torch.ones(()), "pre_quant_scale": torch.ones(4)},
            "weights with their input channels rescaled",
        ),
    ],
)
def test_what_cannot_be_widened_is_named(
    tmp_path: Path, weight: torch.Tensor, beside: dict[str, torch.Tensor], reason: str
) -> None:
    state = tiny_base() | {KEY: weight}
    state |= {KEY.removesuffix("weight") + name: tensor for name, tensor in beside.items()}
    with open_saved(tmp_path / "a.safetensors", state) as checkpoint:
        assert checkpoint.refusal([CONV, KEY]) == reason
        assert checkpoint.refusal([CONV]) is None
        assert set(checkpoint.others.values()) <= {"scale"}


# averaged weights -----------------------------------------------------------------------------------------------------


def average(key: str) -> str:
    """What LitEma calls the average of a parameter: `model` holds the wrapper, whose own names lose their dots."""
    assert key.startswith("model.")
    return "model_ema." + key.removeprefix("model.").replace(".", "")


def with_averages(state: State, keys: list[str]) -> State:
    return state | {average(key): state[key].double().mul(2).float() for key in keys}


def test_averaged_weights_are_read_where_asked_and_there(tmp_path: Path) -> None:
    base = tiny_base(torch.float16)
    denoiser = [key for key in base if key.startswith("model.")]
    state = with_averages(base, denoiser[:-1]) | {
        "model_ema.decay": torch.ones(()),
        "model_ema.num_updates": torch.ones(()),
    }
    with (
        open_saved(tmp_path / "a.safetensors", state) as plain,
        Checkpoint.open(plain.source.path, ema=True) as averaged,
    ):
        assert (plain.ema, averaged.ema) == (0, len(denoiser) - 1)
        assert len(plain.places) == len(averaged.places) == len(base)
        for target, held in plain.targets().items():
            for slot, key in held.items():
                twice = 2 if key in denoiser[:-1] else 1
                pieces = averaged.locate(slot, averaged.targets()[target])
                assert pieces is not None
                ours = plain.read(pieces_of(plain, key))
                assert torch.equal(
                    averaged.read(pieces), twice * ours.float() if twice == 2 else ours
                ), key
        assert {averaged.others[key] for key in denoiser[:-1]} == {"replaced"}
        assert averaged.others["model_ema.decay"] == "ema"
        assert set(plain.others.values()) == {"ema"}


def test_an_average_of_another_shape_is_an_error(tmp_path: Path) -> None:
    state = tiny_base() | {average(KEY): torch.zeros(3)}
    with pytest.raises(ShapeMismatch, match=r"model_emadiffusion|model_ema\.diffusion_modelinput"):
        open_saved(tmp_path / "a.safetensors", state, ema=True)
    open_saved(tmp_path / "a.safetensors", state).close()


def test_averages_that_two_names_could_mean_are_not_used() -> None:
    """Without dots `blocks.1.10` and `blocks.11.0` are one name; such an average says nothing."""
    one, two = "model.blocks.1.10.weight", "model.blocks.11.0.weight"
    infos = {name: TensorInfo(name, "F32", (2, 2), 0, 16) for name in (one, two, average(one))}
    assert average(one) == average(two)
    assert _averaged(infos, [one, two]) == {}
    assert _averaged(infos, [one]) == {one: average(one)}


def test_a_target_is_what_it_was(tmp_path: Path) -> None:
    """The place of an averaged weight is that of the plain one."""
    state = with_averages(tiny_base(), [KEY])
    with open_saved(tmp_path / "a.safetensors", state, ema=True) as checkpoint:
        target = Target(
            "unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "weight"
        )
        assert checkpoint.targets()[target] == {Slot(target): average(KEY)}


def fp8_with_scales(state: State) -> State:
    state[KEY] = state[KEY].to(torch.float8_e4m3fn)
    return state | {KEY.replace("weight", "scale_weight"): torch.rand(len(state[KEY]))}


def turned(state: State) -> State:
    """With strides that a pickle keeps, so that rows do not lie together."""
    return state | {KEY: state[KEY].t().contiguous().t()}


@pytest.mark.share(2)
@pytest.mark.parametrize(
    ("state", "suffix"),
    [
        (lambda: fp8_with_scales(tiny_base(torch.float16)), "safetensors"),
        (lambda: turned(tiny_base()), "ckpt"),
        (lambda: small("sdxl", torch.bfloat16), "safetensors"),  # a transposed projection
        (
            lambda: small("flux"),
            "safetensors",
        ),  # fused projections, a modulation with its halves swapped
    ],
)
def test_blocks_are_what_read_gives(
    state: Callable[[], State], suffix: str, tmp_path: Path
) -> None:
    """Of every slot, parts of fused weights too."""
    made = state()
    path = tmp_path / f"a.{suffix}"
    save_file(made, path) if suffix == "safetensors" else torch.save(made, path)
    ways = {True: 0, False: 0}
    with Checkpoint.open(path) as checkpoint:
        keys = checkpoint.keys(formats()["diffusers"])
        for target, held in checkpoint.targets().items():
            for slot in (*held, *keys.slots(target)):
                if (pieces := checkpoint.locate(slot, held)) is None:
                    continue
                checkpoint.announce(pieces)
                whole = checkpoint.read(pieces)
                for rows in {1, 3, len(whole), 10_000} if len(whole) < 100 else {37}:
                    blocks = list(checkpoint.blocks(pieces, rows))
                    assert torch.equal(torch.cat(blocks), whole)
                    assert max(map(len, blocks)) <= rows
                ways[checkpoint.streams(pieces)] += 1
    assert ways[True] > 20
    assert ways[False] or suffix == "safetensors"
