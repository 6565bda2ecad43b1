"""Adapters in an arrangement of their own, against NumPy that places every number by its formula.

nunchaku's own converter wrote the file that the formulas were first compared with.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit.adapter import Adapter
from adaptkit.errors import AdaptkitError, ShapeMismatch, UnknownAdapter
from adaptkit.ops import convert, inspect, merge, resize
from tests.ops.models import small

W, BASE = 96, 32  # a FLUX.1 of a thirty-second of its width, and the rank of a base's branch
DOUBLE, SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"
# nunchaku's layers, (rows, columns) in widths, and the parameters of BFL's checkpoint that they are
LAYERS = {
    f"{DOUBLE}.qkv_proj": (3, 1, "double_blocks.0.img_attn.qkv"),
    f"{DOUBLE}.qkv_proj_context": (3, 1, "double_blocks.0.txt_attn.qkv"),
    f"{DOUBLE}.out_proj": (1, 1, "double_blocks.0.img_attn.proj"),
    f"{DOUBLE}.out_proj_context": (1, 1, "double_blocks.0.txt_attn.proj"),
    f"{DOUBLE}.mlp_fc1": (4, 1, "double_blocks.0.img_mlp.0"),
    f"{DOUBLE}.mlp_fc2": (1, 4, "double_blocks.0.img_mlp.2"),
    f"{DOUBLE}.mlp_context_fc1": (4, 1, "double_blocks.0.txt_mlp.0"),
    f"{DOUBLE}.mlp_context_fc2": (1, 4, "double_blocks.0.txt_mlp.2"),
    f"{SINGLE}.qkv_proj": (3, 1, "single_blocks.0.linear1"),
    f"{SINGLE}.mlp_fc1": (4, 1, "single_blocks.0.linear1"),
    f"{SINGLE}.out_proj": (1, 1, "single_blocks.0.linear2"),
    f"{SINGLE}.mlp_fc2": (1, 4, "single_blocks.0.linear2"),
    f"{DOUBLE}.norm1.linear": (6, 1, "double_blocks.0.img_mod.lin"),
    f"{DOUBLE}.norm1_context.linear": (6, 1, "double_blocks.0.txt_mod.lin"),
    f"{SINGLE}.norm.linear": (3, 1, "single_blocks.0.modulation.lin"),
}
# where a layer's rows and columns begin in the parameter, in widths
PLACE = {f"{SINGLE}.mlp_fc1": (3, 0), f"{SINGLE}.mlp_fc2": (0, 1)}


def packed(matrix: np.ndarray, *, down: bool) -> np.ndarray:
    """(channels, ranks) numbers in tiles; of D the ranks are the rows of a tile."""
    ranks, channels = matrix.shape if down else matrix.shape[::-1]
    stored = np.full(channels * ranks, np.nan, matrix.dtype)
    for row in range(matrix.shape[0]):
        for column in range(matrix.shape[1]):
            channel, rank = (column, row) if down else (row, column)
            tile = (channel // 16) * (ranks // 16) + rank // 16
            a, b = divmod(row % 16, 8)
            c, rest = divmod(column % 16, 8)
            d, e = divmod(rest, 2)
            lane = 4 * b + d  # of 32, each with four pairs
            stored[256 * tile + 8 * lane + 4 * a + 2 * c + e] = matrix[row, column]
    assert not np.isnan(stored).any()
    return stored.reshape(channels, ranks)


def interleaved(matrix: np.ndarray, parts: int) -> np.ndarray:
    width = len(matrix) // parts
    return np.stack([matrix[part * width + n] for n in range(width) for part in range(parts)])


def nunchaku_file(path: Path, rank: int = 16) -> dict[str, np.ndarray]:
    """A file of every layer that nunchaku knows, and what it adds to each parameter."""
    draw = np.random.default_rng(1)
    tensors: dict[str, np.ndarray] = {}
    deltas: dict[str, np.ndarray] = {}
    for name, (rows, columns, parameter) in LAYERS.items():
        plain = name.endswith(".linear")
        whole = rank if plain else BASE + rank
        up = draw.standard_normal((rows * W, whole)).astype(np.float32) / 8
        down = draw.standard_normal((whole, columns * W)).astype(np.float32) / 8
        tensors[f"{name}.lora_down"] = down if plain else packed(down, down=True)
        tensors[f"{name}.lora_up"] = interleaved(up, rows) if plain else packed(up, down=False)
        skip = 0 if plain else BASE
        delta = up[:, skip:].astype(np.float64) @ down[skip:].astype(np.float64)
        top, left = (W * n for n in PLACE.get(name, (0, 0)))
        sizes = {"linear1": (7, 1), "linear2": (1, 5)}.get(parameter.rsplit(".", 1)[1], (rows, columns))  # fmt: skip
        place = deltas.setdefault(f"{parameter}.weight", np.zeros([W * n for n in sizes]))
        place[top : top + rows * W, left : left + columns * W] = delta
    for name, shape in (("context_embedder", (W, 128)), ("norm_out.linear", (2 * W, W))):
        up, down = (draw.standard_normal(s).astype(np.float32) for s in ((shape[0], 3), (3, shape[1])))  # fmt: skip
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        delta = up.astype(np.float64) @ down
        if name == "norm_out.linear":  # diffusers: scale, shift; the checkpoint: shift, scale
            deltas["final_layer.adaLN_modulation.1.weight"] = np.roll(delta, W, 0)
        else:
            deltas["txt_in.weight"] = delta
    for name, parameter in (
        (f"{DOUBLE}.attn.to_qkv", "double_blocks.0.img_attn.qkv"),
        (f"{DOUBLE}.ff.net.0.proj", "double_blocks.0.img_mlp.0"),
        (f"{SINGLE}.proj_out", "single_blocks.0.linear2"),
        ("context_embedder", "txt_in"),
    ):
        bias = draw.standard_normal(len(deltas[f"{parameter}.weight"])).astype(np.float32)
        tensors[f"{name}.bias"], deltas[f"{parameter}.bias"] = bias, bias.astype(np.float64)
    save_file({key: torch.from_numpy(value.copy()) for key, value in tensors.items()}, path)
    return deltas


def run(verb: object, *arguments: object) -> None:
    plan = verb.plan(*arguments)  # type: ignore[attr-defined]
    verb.run(plan)  # type: ignore[attr-defined]
    plan.close()


@pytest.mark.parametrize("way", ["itself", "comfy", "resized"])
def test_what_nunchaku_packed_is_merged_as_numpy_places_it(tmp_path: Path, way: str) -> None:
    deltas = nunchaku_file(tmp_path / "a.safetensors")
    base = {key: value.double() for key, value in small("flux").items()}
    save_file(base, tmp_path / "base.safetensors")
    adapter = tmp_path / "a.safetensors"
    if way == "resized":  # to more than any rank
        run(resize, adapter, resize.Options(rank=64, family="flux", output=tmp_path / "b.safetensors"))  # fmt: skip
    elif way != "itself":
        run(convert, adapter, convert.Options(to=way, family="flux", output=tmp_path / "b.safetensors"))  # fmt: skip
    adapter = adapter if way == "itself" else tmp_path / "b.safetensors"
    run(
        merge,
        tmp_path / "base.safetensors",
        [(adapter, 1.0)],
        merge.Options(family="flux", output=tmp_path / "m.safetensors"),
    )
    merged = load_file(tmp_path / "m.safetensors")
    touched = 0
    for key, weight in base.items():
        delta = deltas.get(key.removeprefix("model.diffusion_model."))
        if delta is None:
            assert torch.equal(merged[key], weight), key
            continue
        touched += 1
        error = np.abs(merged[key].numpy() - weight.numpy() - delta).max() / np.abs(delta).max()
        assert error < 2e-6, (key, error)
    assert touched == len(deltas) == 19


def test_it_is_said_that_a_file_is_packed_and_its_tensors_are_plain(tmp_path: Path) -> None:
    nunchaku_file(tmp_path / "a.safetensors")
    report = inspect.run(tmp_path / "a.safetensors", inspect.Options(family="flux")).to_dict()
    assert (report["family"], report["format"], report["layout"]) == ("flux", "diffusers", "nunchaku")  # fmt: skip
    assert report["ranks"] == {"16": 19, "32": 1, "3": 2}
    assert "packed for nunchaku" in report["problems"][0]["what"]
    assert set(report["loads_in"].values()) == {None}
    assert not report["unclaimed"]
    with Adapter.open(tmp_path / "a.safetensors", family="flux") as adapter:
        key = "transformer.transformer_blocks.0.attn.to_k.lora_B.weight"
        whole = adapter.source.read(key)
        assert whole.is_contiguous()
        assert torch.equal(adapter.source.read(key, slice(5, 9)), whole[5:9])
        assert bytes(adapter.source.raw(key)) == whole.numpy().tobytes()
        assert adapter.source.span(key) is None


def test_metadata_scale_nothing_that_nunchaku_reads(tmp_path: Path) -> None:
    """Its ranks are filled up, and its loader reads no metadata."""
    nunchaku_file(tmp_path / "a.safetensors")
    stated = {"lora_adapter_metadata": '{"transformer.r": 8, "transformer.lora_alpha": 8}', "rank": "16", "lora_alpha": "4"}  # fmt: skip
    save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", stated)
    with Adapter.open(tmp_path / "b.safetensors", family="flux") as adapter:
        assert {entry.facts.scale for entry in adapter.entries.values()} == {1.0}


def test_a_layer_that_an_adapter_does_not_change_is_not_in_it(tmp_path: Path) -> None:
    """nunchaku writes the base's branch of every layer."""
    nunchaku_file(tmp_path / "a.safetensors", rank=16)
    tensors = load_file(tmp_path / "a.safetensors")
    for end, rows in (("down", W), ("up", 3 * W)):
        tensors[f"{DOUBLE}.qkv_proj.lora_{end}"] = torch.ones(rows, BASE)
        tensors[f"{SINGLE}.out_proj.lora_{end}"] = torch.ones(W, BASE)
    save_file(tensors, tmp_path / "b.safetensors")
    with Adapter.open(tmp_path / "b.safetensors", family="flux") as adapter:
        assert not adapter.unclaimed
        names = {adapter.label(slot) for slot in adapter.entries}
        assert "transformer.transformer_blocks.0.attn.to_add_out" in names
        assert "transformer.transformer_blocks.0.attn.to_q" not in names
        (joined,) = (e for s, e in adapter.entries.items() if adapter.label(s).endswith("proj_out"))
        assert (joined.facts.rank, joined.facts.columns) == (16, 5 * W)
        assert not adapter.weights(joined).delta()[:, :W].any()


STRANGE = {
    f"{DOUBLE}.qkv_proj": ((W, 16), (3 * W, 16)),  # less than the base's own rank
    f"{DOUBLE}.qkv_proj_context": ((W, 48), (3 * W, 64)),
    f"{DOUBLE}.out_proj": ((W, 40), (W, 40)),  # no whole tiles
    f"{SINGLE}.qkv_proj": ((W, 48), (32, 48)),  # not three layers
    f"{DOUBLE}.norm1.linear": ((16, W), (6 * W + 1, 16)),
    f"{DOUBLE}.norm.linear": ((16, W), (3 * W, 16)),  # of single blocks
    f"{DOUBLE}.mystery_proj": ((W, 48), (W, 48)),
}


def test_what_nunchaku_does_not_write_is_named_and_stops_a_verb(tmp_path: Path) -> None:
    nunchaku_file(tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    strange: set[str] = set()
    for name, shapes in STRANGE.items():
        keys = [f"{name}.lora_{end}" for end in ("down", "up")]
        tensors |= {key: torch.ones(shape) for key, shape in zip(keys, shapes, strict=True)}
        strange.update(keys)
    save_file(tensors, tmp_path / "b.safetensors")
    with Adapter.open(tmp_path / "b.safetensors", family="flux") as adapter:
        assert set(adapter.unclaimed) == strange
    options = convert.Options(to="comfy", family="flux", output=tmp_path / "c.safetensors")
    with pytest.raises(AdaptkitError, match="lora_(down|up)"):
        run(convert, tmp_path / "b.safetensors", options)
    assert not (tmp_path / "c.safetensors").exists()


def test_of_two_tensors_of_one_name_neither_is_lost(tmp_path: Path) -> None:
    nunchaku_file(tmp_path / "a.safetensors")
    twice = {f"{DOUBLE}.attn.to_q.lora_A.weight": torch.ones(16, W), f"{DOUBLE}.attn.to_q.lora_B.bias": torch.ones(W)}  # fmt: skip
    save_file({**load_file(tmp_path / "a.safetensors"), **twice}, tmp_path / "b.safetensors")
    with Adapter.open(tmp_path / "b.safetensors", family="flux") as adapter:
        assert set(adapter.unclaimed) == twice.keys()
    stem = "diffusion_model.middle_block.1.proj_in"
    tensors = {f"{stem}.weight::lora::0": torch.ones(1280, 4), f"{stem}.weight::lora::1": torch.ones(4, 1280)}  # fmt: skip
    odd = {f"{stem}.weight::lora::00": torch.ones(1280, 4)}
    save_file({**tensors, **odd}, tmp_path / "c.safetensors")
    with Adapter.open(tmp_path / "c.safetensors", family="sdxl") as adapter:
        assert set(adapter.unclaimed) == odd.keys()


def test_half_of_a_single_block_s_output_is_not_guessed(tmp_path: Path) -> None:
    nunchaku_file(tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    kept = {key: value for key, value in tensors.items() if f"{SINGLE}.out_proj" not in key}
    save_file(kept, tmp_path / "b.safetensors")
    with Adapter.open(tmp_path / "b.safetensors", family="flux") as adapter:
        assert set(adapter.unclaimed) == {f"{SINGLE}.mlp_fc2.lora_{end}" for end in ("down", "up")}


def test_a_quantised_checkpoint_is_no_adapter(tmp_path: Path) -> None:
    """It has the same factors, of its own branch, beside its packed weights."""
    nunchaku_file(tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    tensors = {key: value for key, value in tensors.items() if "lora_down" in key or "lora_up" in key}  # fmt: skip
    tensors[f"{DOUBLE}.qkv_proj.qweight"] = torch.zeros(3 * W, W // 2, dtype=torch.int8)
    save_file(tensors, tmp_path / "b.safetensors")
    with pytest.raises(UnknownAdapter, match="nunchaku"):
        Adapter.open(tmp_path / "b.safetensors", family="flux")


# DiffSynth-Studio's MiniMax-H3

HEADS, HEAD = 2, 128


def diffsynth_file(path: Path, prefix: str = "", heads: int = HEADS) -> torch.Tensor:
    """A file of DiffSynth-Studio's trainer; ΔW in the rows of all other tools."""
    draw = torch.Generator().manual_seed(2)
    height = 3 * heads * HEAD
    down = torch.randn(4, 5376, generator=draw)
    up = torch.randn(height, 4, generator=draw)
    stem = f"{prefix}blocks.0.attn.qkv_proj"
    # row (head, part, n) of the file is row (part, head, n) of the layer
    stored = torch.stack([up[part * heads * HEAD + head * HEAD + n] for head in range(heads) for part in range(3) for n in range(HEAD)])  # fmt: skip
    tensors = {f"{stem}.lora_A.default.weight": down, f"{stem}.lora_B.default.weight": stored}
    for name, rows, columns in (("attn.out_proj", 5376, 7168), ("mlp.fc2", 5376, 14336)):
        tensors[f"{prefix}blocks.0.{name}.lora_A.default.weight"] = torch.randn(4, columns, generator=draw)  # fmt: skip
        tensors[f"{prefix}blocks.0.{name}.lora_B.default.weight"] = torch.randn(rows, 4, generator=draw)  # fmt: skip
    save_file(tensors, path)
    return up.double() @ down.double()


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "pipe.dit."])
def test_rows_that_diffsynth_stores_head_by_head_are_put_in_order(
    tmp_path: Path, prefix: str
) -> None:
    delta = diffsynth_file(tmp_path / "a.safetensors", prefix)
    options = convert.Options(to="diffusers", family="minimax-h3", output=tmp_path / "b.safetensors")  # fmt: skip
    run(convert, tmp_path / "a.safetensors", options)
    found = load_file(tmp_path / "b.safetensors")
    stem = "transformer.transformer_blocks.0.attn.to_"
    thirds = [
        found[f"{stem}{n}.lora_B.weight"].double() @ found[f"{stem}{n}.lora_A.weight"].double()
        for n in "qkv"
    ]
    assert torch.equal(torch.cat(thirds), delta)
    report = inspect.run(tmp_path / "a.safetensors", inspect.Options(family="minimax-h3")).to_dict()
    assert report["layout"] == "diffsynth"
    assert "head by head" in report["problems"][0]["what"]


def test_rows_of_no_whole_heads_are_refused(tmp_path: Path) -> None:
    diffsynth_file(tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    key = "blocks.0.attn.qkv_proj.lora_B.default.weight"
    save_file({**tensors, key: tensors[key][:-3]}, tmp_path / "b.safetensors")
    with pytest.raises(ShapeMismatch, match="heads of 128"):
        Adapter.open(tmp_path / "b.safetensors", family="minimax-h3")
