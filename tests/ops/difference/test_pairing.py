"""Pairs of checkpoints of every kind: other layouts, dtypes, containers, fp8, averaged weights, families without a table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit.checkpoint import Checkpoint
from adaptkit.detect import families, formats
from adaptkit.errors import NoSuchName, ShapeMismatch, Unclaimed, UnknownAdapter
from adaptkit.families.contract import Name, Row
from adaptkit.keymap import CheckpointMap, Place, compile_checkpoint
from adaptkit.names import Slot
from adaptkit.ops import extract
from adaptkit.ops.difference.pairing import Pairing, Wanted, open_pair
from adaptkit.ops.shared import Shared
from tests.ops.models import (
    State,
    changed,
    distance,
    lora_delta,
    matrices,
    noise_delta,
    save,
    small,
    tiny_base,
)
from tests.synth import expand, fill
from tests.test_checkpoint import KEY, average, decoded

FAMILIES = {
    "sd1": ("input_blocks.1.1", "middle_block.1.proj_in", "out.2", "layers.3.mlp"),
    "sdxl": (
        "input_blocks.4.1.transformer_blocks.0",
        "in_proj_weight",
        "text_projection",
        "layers.3.mlp",
    ),
    "flux": ("double_blocks.0.", "single_blocks.0.linear", "final_layer", "img_in"),
    "sd3": ("joint_blocks.0.", "final_layer", "x_embedder"),
}


def pairing(first: Checkpoint, second: Checkpoint, to: str = "kohya", **options: Any) -> Pairing:
    return Pairing(
        first, second, first.keys(formats()[to]), Wanted("lora", False, Shared(**options))
    )


# one model in several layouts ----------------------------------------------------------------------------------------


def whole(state: State, family: str) -> dict[tuple[str, str, str], torch.Tensor]:
    """Every parameter as its target has it, by (component, module, parameter), from the tensors of any layout."""
    keys = compile_checkpoint(family)
    parts: dict[tuple[str, str, str], list[tuple[Place, torch.Tensor]]] = {}
    for key, tensor in state.items():
        place = keys.parse(key)
        assert place is not None, key
        target = place.slot.target
        parts.setdefault((target.component, target.module, target.param), []).append(
            (place, tensor)
        )
    return {
        target: torch.cat([_turned(*part) for part in sorted(found, key=_start)])
        for target, found in parts.items()
    }


def _start(part: tuple[Place, torch.Tensor]) -> float:
    rows = part[0].slot.rows
    return rows.start / rows.total if rows else 0.0


def _turned(place: Place, tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.T if place.transposed else tensor
    return torch.cat(tensor.tensor_split(2)[::-1]) if place.swapped else tensor


def as_folder(state: State, family: str) -> dict[str, State]:
    """The same weights as diffusers' folders name and cut them."""
    targets = whole(state, family)
    folders: dict[str, State] = {}
    for part in families()[family].components:
        for row in part.rows:
            for name, indices in _names(row):
                for param, key in (("weight", name.weight), ("bias", name.bias)):
                    tensor = targets.get((part.name, fill(row.target, indices), param))
                    if tensor is not None:
                        spelled = Place(Slot(None, name.rows), row.kind, "", False, name.swapped)  # type: ignore[arg-type]
                        cut = (
                            tensor
                            if name.rows is None
                            else tensor[slice(*name.rows.bounds(len(tensor)))]
                        )  # type: ignore[misc]
                        folders.setdefault(part.name, {})[fill(key, indices)] = (
                            _turned(spelled, cut).contiguous().clone()
                        )
    return folders


def _names(row: Row) -> Iterator[tuple[Name, dict[str, int]]]:
    for indices in expand(row):
        for name in row.names["diffusers"]:
            yield name, indices


def save_folder(path: Path, folders: dict[str, State]) -> Path:
    for part, state in folders.items():
        (path / part).mkdir(parents=True)
        stem = "model" if part.startswith("text") else "diffusion_pytorch_model"
        save_file(state, path / part / f"{stem}.safetensors")
    (path / "model_index.json").write_text("{}")
    return path


def save_shards(path: Path, state: State) -> Path:
    path.mkdir()
    names = list(state)
    table = {name: f"model-0000{1 + n % 2}-of-00002.safetensors" for n, name in enumerate(names)}
    for shard in set(table.values()):
        save_file({name: state[name] for name in names if table[name] == shard}, path / shard)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    return path


def save_pickle(path: Path, state: State) -> Path:
    torch.save({"state_dict": state, "epoch": 3}, path)
    return path


def extracted(base: Path, tuned: Path, output: Path, **options: Any) -> dict[str, torch.Tensor]:
    found = extract.run(extract.plan(base, tuned, extract.Options(output=output, **options)))
    assert not [item for item in found.unused if "differs" not in item.reason], found.unused
    return load_file(output)


@pytest.mark.share(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_extract_to_the_same_bytes(tmp_path: Path, family: str) -> None:
    """Single file, diffusers folder, shards and pickle, each as base and as tuned: one adapter."""
    base = small(family, torch.float16)
    tuned, _ = changed(base, matrices(base, *FAMILIES[family]), noise_delta())
    one, two = (
        save(tmp_path / f"{name}.safetensors", s) for name, s in (("base", base), ("tuned", tuned))
    )
    folders = [
        save_folder(tmp_path / f"{n}", as_folder(s, family))
        for n, s in (("fb", base), ("ft", tuned))
    ]
    pickle, shards = save_pickle(tmp_path / "b.ckpt", base), save_shards(tmp_path / "st", tuned)
    pairs = [
        (one, two),
        (one, folders[1]),
        (folders[0], two),
        tuple(folders),
        (pickle, shards),
        (pickle, folders[1]),
    ]
    found = [
        extracted(a, b, tmp_path / f"{n}.safetensors", rank=4) for n, (a, b) in enumerate(pairs)
    ]
    assert len(found[0]) > 9
    for (a, b), other in zip(pairs[1:], found[1:], strict=True):
        assert other.keys() == found[0].keys(), (a.name, b.name)
        for key, tensor in found[0].items():
            assert other[key].dtype == tensor.dtype
            assert other[key].numpy().tobytes() == tensor.numpy().tobytes(), (a.name, b.name, key)


@pytest.mark.parametrize("algo", ["lokr", "full"])
def test_layouts_extract_to_the_same_bytes_by_other_algorithms(tmp_path: Path, algo: str) -> None:
    base = small("flux", torch.bfloat16)
    tuned, _ = changed(base, matrices(base, "img_attn", "final_layer"), noise_delta())
    one, two = (
        save(tmp_path / "base.safetensors", base),
        save(tmp_path / "tuned.safetensors", tuned),
    )
    folder = save_folder(tmp_path / "folder", as_folder(tuned, "flux"))
    first = extracted(one, two, tmp_path / "1.safetensors", algo=algo)
    second = extracted(one, folder, tmp_path / "2.safetensors", algo=algo)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_folder_of_this_test_is_that_of_diffusers() -> None:
    """`as_folder` splits and turns: what it makes has other names, cuts and orders, and the same weights."""
    state = small("flux")
    folders = as_folder(state, "flux")
    qkv = state["double_blocks.0.img_attn.qkv.weight"]
    assert torch.equal(
        folders["transformer"]["transformer_blocks.0.attn.to_k.weight"], qkv.tensor_split(3)[1]
    )
    last = state["final_layer.adaLN_modulation.1.weight"]
    assert torch.equal(
        folders["transformer"]["norm_out.linear.weight"], torch.cat(last.tensor_split(2)[::-1])
    )
    sdxl = small("sdxl")
    key = "conditioner.embedders.1.model.text_projection"
    assert torch.equal(
        as_folder(sdxl, "sdxl")["text_encoder_2"]["text_projection.weight"], sdxl[key].T
    )


@pytest.mark.share(3)
@pytest.mark.parametrize("family", sorted(families()))
def test_every_family_reads_the_same_weights_from_a_folder(tmp_path: Path, family: str) -> None:
    state = small(family, torch.float16, by=64)
    paths = (
        save(tmp_path / "a.safetensors", state),
        save_folder(tmp_path / "b", as_folder(state, family)),
    )
    first, second = open_pair(*paths, None)
    found = pairing(first, second, skip=("text_conditioner",))  # Anima's: no folder that is read
    pairs = list(found.pairs())
    assert (found.lost, found.left) == ([], [])
    assert len(pairs) > 20
    for pair in pairs:
        assert torch.equal(first.read(pair.base), second.read(pair.tuned)), pair.label


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float16), (torch.bfloat16, torch.float64)]
)
def test_dtypes_may_differ(tmp_path: Path, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    base = tiny_base(torch.float64)
    tuned, _ = changed(base, matrices(base, "attn1", "mlp.fc1"), lora_delta(3))
    one, two = (
        {k: t.to(dtype) for k, t in s.items()}
        for s, dtype in zip((base, tuned), dtypes, strict=True)
    )
    pair = save(tmp_path / "base.safetensors", one), save(tmp_path / "tuned.safetensors", two)
    options = extract.Options(
        output=tmp_path / "out.safetensors", algo="full", vectors=False, dtype="fp32"
    )
    report = extract.run(extract.plan(*pair, options))
    norm = (
        sum(
            float((two[k].double() - one[k].double()).square().sum())
            for k in base
            if base[k].ndim > 1
        )
        ** 0.5
    )
    assert sum(item["norm"] ** 2 for item in report.details) ** 0.5 == pytest.approx(norm, rel=1e-5)


# what has no partner -------------------------------------------------------------------------------------------------


def test_missing_extra_and_reshaped_layers_are_listed(tmp_path: Path) -> None:
    base = tiny_base()
    missing, extra, reshaped = KEY, KEY.replace("to_q", "to_k"), KEY.replace("to_q", "to_v")
    changed_key = KEY.replace("attn1.to_q", "attn2.to_q")
    tuned, _ = changed(base, [changed_key], noise_delta())
    del tuned[missing]
    tuned[reshaped] = torch.zeros(2 * len(base[reshaped]), base[reshaped].shape[1])
    tuned["first_stage_model.decoder.conv_in.weight"] = torch.zeros(4, 4)
    tuned["something.else"] = torch.zeros(3)
    first = {key: t for key, t in base.items() if key != extra} | {
        "cond_stage_model.logit_scale": torch.zeros(())
    }
    pair = save(tmp_path / "base.safetensors", first), save(tmp_path / "tuned.safetensors", tuned)
    options = extract.Options(output=tmp_path / "out.safetensors")
    with pytest.raises(Unclaimed, match="3 keys would be lost"):
        extract.plan(*pair, options)
    report = extract.run(
        extract.plan(*pair, extract.Options(output=tmp_path / "out.safetensors", allow_unused=True))
    )
    why = {item.key: item.reason for item in report.unused}
    wide = [2 * len(base[reshaped]), base[reshaped].shape[1]]
    assert why == {
        missing: "not in the tuned checkpoint",
        extra: "not in the base checkpoint",
        reshaped: f"shape {list(base[reshaped].shape)} in the base, {wide} in the tuned checkpoint",
        "first_stage_model.decoder.conv_in.weight": "vae: not in the base checkpoint",
        "something.else": "unknown: not in the base checkpoint",
        "cond_stage_model.logit_scale": "unknown: not in the tuned checkpoint",
    }
    assert report.modules == 1


def test_a_vae_under_other_names_is_said_once(tmp_path: Path) -> None:
    base = tiny_base() | {f"first_stage_model.{n}.weight": torch.zeros(2) for n in range(3)}
    folders = as_folder(tiny_base(), "sd1") | {
        "vae": {f"decoder.{n}.weight": torch.zeros(2) for n in range(2)}
    }
    pair = open_pair(
        save(tmp_path / "b.safetensors", base), save_folder(tmp_path / "t", folders), None
    )
    found = pairing(*pair)
    assert not [pair for pair in found.pairs() if pair.slot is None]
    assert not found.lost
    reason = "vae: the base uses other names"
    assert {item.key: item.reason for item in found.left} == {
        f"vae.decoder.{n}.weight": reason for n in range(2)
    }


# fp8 -----------------------------------------------------------------------------------------------------------------


def quantised(
    state: State, dtype: torch.dtype, scaled: bool
) -> tuple[State, dict[str, np.ndarray]]:
    """The denoiser's matrices in fp8, as ComfyUI writes them, and what they mean in float64."""
    result, truth = dict(state), {}
    for key, tensor in state.items():
        if key.startswith("model.") and tensor.ndim == 2:
            scale = tensor.double().abs().max().div(200).float() if scaled else torch.ones(())
            result[key] = (tensor.double() / scale.double()).float().to(dtype)
            truth[key] = decoded(result[key]) * float(scale)
            if scaled:
                result[key.replace("weight", "scale_weight")] = scale
                result[key.replace("weight", "scale_input")] = torch.ones(())
    if scaled:
        result["model.diffusion_model.scaled_fp8"] = torch.zeros(2, dtype=dtype)
    return result, truth


@pytest.mark.share(2)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_difference_of_fp8_weights_is_that_of_what_they_mean(
    tmp_path: Path, dtype: torch.dtype, scaled: bool
) -> None:
    base = tiny_base(torch.bfloat16)
    tuned, truth = quantised(
        changed(base, matrices(base, "attn1"), noise_delta(0.5))[0], dtype, scaled
    )
    pair = save(tmp_path / "base.safetensors", base), save(tmp_path / "tuned.safetensors", tuned)
    options = extract.Options(output=tmp_path / "out.safetensors", algo="full", dtype="fp32")
    plan = extract.plan(*pair, options)
    assert plan.unused == ()
    report = extract.run(plan)
    norms = {item["module"]: item["norm"] for item in report.details}
    first = Checkpoint.open(pair[0])
    assert len(truth) > 9
    for key, weight in truth.items():
        delta = weight - base[key].double().numpy()
        label = first.label(first.places[key].slot)
        assert norms[label] == pytest.approx(np.linalg.norm(delta), rel=1e-6), key
        stored = load_file(tmp_path / "out.safetensors")
        name = f"{plan.keys.stem(first.places[key].slot)}.diff"
        np.testing.assert_allclose(
            stored[name].double().numpy(), delta, rtol=1e-5, atol=1e-7 * np.abs(weight).max()
        )


def test_fp8_is_written_in_the_dtype_of_its_plain_partner(tmp_path: Path) -> None:
    base = tiny_base(torch.bfloat16)
    narrow, _ = quantised(base, torch.float8_e4m3fn, scaled=True)
    one, two = save(tmp_path / "a.safetensors", base), save(tmp_path / "b.safetensors", narrow)
    for pair, expected in (((one, two), "BF16"), ((two, one), "BF16"), ((two, two), "F16")):
        pairs = [
            pair for pair in pairing(*open_pair(*pair, None)).pairs() if pair.algorithm == "lora"
        ]
        wide = {
            pair.dtype
            for pair in pairs
            if pair.tuned[0].name.startswith("model.") and len(pair.shape) == 2
        }
        assert wide == {expected}


def test_the_plan_of_an_fp8_pair_counts_the_widened_weights(tmp_path: Path) -> None:
    base = tiny_base(torch.float16)
    narrow, truth = quantised(base, torch.float8_e4m3fn, scaled=True)
    paths = save(tmp_path / "a.safetensors", base), save(tmp_path / "b.safetensors", narrow)
    options = extract.Options(output=tmp_path / "o.safetensors")
    steps = {s.payload.tuned[0].name: s for s in extract.plan(paths[1], paths[1], options).steps}
    with Checkpoint.open(paths[0]) as plain, Checkpoint.open(paths[1]) as fp8:
        for key, weight in truth.items():
            pieces = steps[key].payload.tuned
            # 2 bytes a number in float16; 1 in fp8 and 4 widened
            assert fp8.nbytes(pieces) - plain.nbytes(pieces) == (1 + 4 - 2) * weight.size
            assert steps[key].bytes >= 2 * fp8.nbytes(pieces)


def test_a_scheme_that_is_not_read_is_named(tmp_path: Path) -> None:
    base = tiny_base()
    tuned = dict(base) | {KEY: torch.zeros(base[KEY].numel() // 2, 1, dtype=torch.uint8)}
    tuned[f"{KEY}.quant_state.bitsandbytes__nf4"] = torch.zeros(9, dtype=torch.uint8)
    tuned[f"{KEY}.absmax"] = torch.zeros(4)
    pair = save(tmp_path / "base.safetensors", base), save(tmp_path / "tuned.safetensors", tuned)
    with pytest.raises(
        Unclaimed,
        match=r"1 key would be lost: .*to_q\.weight \(stored as nf4 \(bitsandbytes\).*fp16",
    ):
        extract.plan(*pair, extract.Options(output=tmp_path / "o.safetensors"))
    left_out = extract.Options(output=tmp_path / "o.safetensors", skip=("*attn1.to_q",))
    assert extract.plan(*pair, left_out).unused == ()


def test_notes_tell_of_fp8(tmp_path: Path) -> None:
    base = tiny_base(torch.bfloat16)
    narrow, truth = quantised(base, torch.float8_e4m3fn, scaled=True)
    one, two = save(tmp_path / "a.safetensors", base), save(tmp_path / "b.safetensors", narrow)
    (note,) = pairing(*open_pair(one, two, None)).notes
    assert note.startswith(f"The tuned checkpoint stores {len(truth)} weights as fp8")
    assert pairing(*open_pair(one, one, None)).notes == ()


# averaged weights ----------------------------------------------------------------------------------------------------


def test_averaged_weights_are_what_differs(tmp_path: Path) -> None:
    base = tiny_base()
    plain, _ = changed(base, [KEY], noise_delta(0.2))
    averaged, _ = changed(base, [KEY], noise_delta(0.1))
    state = plain | {
        average(key): averaged[key].clone() for key in base if key.startswith("model.")
    }
    paths = save(tmp_path / "base.safetensors", base), save(tmp_path / "tuned.safetensors", state)
    first, second = open_pair(*paths, None, ema=True)
    assert (first.ema, second.ema) == (0, len([key for key in base if key.startswith("model.")]))
    found = pairing(first, second)
    pairs = list(found.pairs())
    assert not found.lost
    assert sum(
        float((first.read(j.base) - second.read(j.tuned)).square().sum()) for j in pairs
    ) ** 0.5 == pytest.approx(distance(base, averaged), rel=1e-5)
    assert {item.reason for item in found.left} == {"replaced: its average is read instead"}
    assert found.notes == (
        f"The averaged (EMA) values of {second.ema} weights of the tuned checkpoint are read.",
    )
    first, second = open_pair(*paths, None)
    pairs = list(pairing(first, second).pairs())
    assert sum(
        float((first.read(j.base) - second.read(j.tuned)).square().sum()) for j in pairs
    ) ** 0.5 == pytest.approx(distance(base, plain), rel=1e-5)


def test_averaged_weights_that_nobody_has_are_an_error(tmp_path: Path) -> None:
    path = save(tmp_path / "base.safetensors", tiny_base())
    with pytest.raises(NoSuchName, match="neither checkpoint holds averaged"):
        open_pair(path, path, None, ema=True)


# families without a table ----------------------------------------------------------------------------------------------


def stranger(prefix: str = "") -> State:
    random = np.random.default_rng(4)
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (32, 8),
        "pooler.scale": (8,),
    }
    for n in range(3):
        layer = f"encoder.layer.{n}."
        shapes |= {
            f"{layer}attention.self.query.weight": (8, 8),
            f"{layer}attention.self.query.bias": (8,),
        }
        shapes |= {
            f"{layer}conv_{n}.weight": (8, 8, 3),
            f"{layer}norm.weight": (8,),
            f"{layer}norm.bias": (8,),
        }
    return {
        prefix + key: torch.from_numpy(random.standard_normal(shape)).float()
        for key, shape in shapes.items()
    }


@pytest.mark.parametrize(
    ("to", "query", "conv"),
    [
        (
            "kohya",
            "lora_unet_encoder_layer_1_attention_self_query",
            "lora_unet_encoder_layer_2_conv_2",
        ),
        (
            "comfy",
            "diffusion_model.encoder.layer.1.attention.self.query",
            "diffusion_model.encoder.layer.2.conv_2",
        ),
        (
            "peft",
            "base_model.model.encoder.layer.1.attention.self.query",
            "base_model.model.encoder.layer.2.conv_2",
        ),
        ("bare", "encoder.layer.1.attention.self.query", "encoder.layer.2.conv_2"),
    ],
)
@pytest.mark.parametrize(
    "prefixes", [("", ""), ("model.diffusion_model.", ""), ("diffusion_model.",) * 2]
)
def test_a_family_without_a_table_pairs_by_its_own_names(
    tmp_path: Path, to: str, query: str, conv: str, prefixes: tuple[str, str]
) -> None:
    states = [stranger(prefix) for prefix in prefixes]
    key = "encoder.layer.1.attention.self.query.weight"
    states[1][prefixes[1] + key] += 1.0
    paths = [save(tmp_path / f"{n}.safetensors", state) for n, state in enumerate(states)]
    first, second = open_pair(*paths, None)
    assert (first.known, second.known, first.family) == (False, False, second.family)
    found = pairing(first, second, to)
    pairs = {pair.label: pair for pair in found.pairs()}
    assert not found.lost
    assert found.notes[0].startswith("This model family is unknown")
    fitted = {pair.slot: pair for pair in pairs.values() if pair.algorithm == "lora"}
    stems = {found.keys.stem(slot) for slot in fitted if slot is not None}
    assert stems >= {query, conv}
    assert len(stems) == 6  # three queries, three convolutions; no embedding, no norm
    why = {label: pair.why for label, pair in pairs.items() if pair.algorithm is None}
    assert why["transformer.embeddings.word_embeddings"] == "hosts load no lora for embeddings"
    assert all(
        "biases and norms" in reason
        for label, reason in why.items()
        if "norm" in label or "bias" in label
    )
    pair = pairs["transformer.encoder.layer.1.attention.self.query"]
    assert torch.equal(first.read(pair.base), states[0][prefixes[0] + key])
    assert torch.equal(second.read(pair.tuned), states[1][prefixes[1] + key])
    assert pairs["transformer.encoder.layer.2.conv_2"].shape == (8, 8, 3)


def test_a_pipeline_without_a_table_keeps_its_parts_apart(tmp_path: Path) -> None:
    folders = {
        "transformer": stranger(),
        "text_encoder": stranger(),
        "vae": {"decoder.weight": torch.zeros(2, 2)},
    }
    pair = open_pair(
        save_folder(tmp_path / "a", folders), save_folder(tmp_path / "b", folders), None
    )
    found = pairing(*pair)
    stems = {found.keys.stem(pair.slot) for pair in found.pairs() if pair.algorithm and pair.slot}
    assert len(stems) == 12
    assert {stem.partition("_encoder")[0] for stem in stems} == {"lora_unet", "lora_te1"}


def test_modules_that_underscores_do_not_tell_apart_are_left_out(tmp_path: Path) -> None:
    state = stranger() | {"a.b_c.weight": torch.zeros(4, 4), "a_b.c.weight": torch.zeros(4, 4)}
    path = save(tmp_path / "a.safetensors", state)
    found = pairing(*open_pair(path, path, None))
    pairs = list(found.pairs())
    assert len([pair for pair in pairs if pair.algorithm]) == 6
    assert {pair.label for pair in pairs if pair.slot is None} == {
        "pooler.scale",
        "a.b_c.weight",
        "a_b.c.weight",
    }


def test_strangers_with_other_names_are_refused(tmp_path: Path) -> None:
    one = save(tmp_path / "a.safetensors", stranger())
    two = save(
        tmp_path / "b.safetensors",
        {key.replace("encoder", "decoder"): t for key, t in stranger().items()},
    )
    with pytest.raises(UnknownAdapter, match="not a checkpoint of a known family") as caught:
        open_pair(one, two, None)
    assert caught.value.hint is not None
    assert caught.value.hint.endswith("other families need the same names in both files")
    with pytest.raises(UnknownAdapter):  # a known family beside it
        open_pair(one, save(tmp_path / "c.safetensors", tiny_base()), None)
    with pytest.raises(UnknownAdapter):
        open_pair(save(tmp_path / "c.safetensors", tiny_base()), one, None)
    with pytest.raises(UnknownAdapter):  # a family that was asked for
        open_pair(one, one, "sd1")


def test_two_adapters_are_no_pair_of_checkpoints(tmp_path: Path) -> None:
    state = {
        f"blocks.{n}.{side}.weight": torch.zeros(4, 4)
        for n in range(3)
        for side in ("lora_up", "lora_down")
    }
    path = save(tmp_path / "a.safetensors", state)
    with pytest.raises(UnknownAdapter):
        open_pair(path, path, None)


def test_two_known_families_stay_refused(tmp_path: Path) -> None:
    one, two = (save(tmp_path / f"{name}.safetensors", small(name)) for name in ("sdxl", "flux"))
    with pytest.raises(ShapeMismatch, match=r"the base is Stable Diffusion XL.*FLUX"):
        open_pair(one, two, None)


def test_the_map_of_a_family_without_a_table_reads_every_name() -> None:
    from adaptkit.unknown import family_of_weights

    shapes = {key: tuple(t.shape) for key, t in stranger().items()}
    keys = CheckpointMap(family_of_weights(shapes))
    assert [key for key in shapes if keys.parse(key) is None] == ["pooler.scale"]
