from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adaptkit import engine
from adaptkit.errors import (
    NonFinite,
    NoSuchName,
    NotRepresentable,
    ShapeMismatch,
    Unclaimed,
    UnknownAdapter,
)
from adaptkit.keymap import compile_checkpoint, compile_keys
from adaptkit.ops import merge
from tests import oracle
from tests.ops.models import save, small, tiny_base

State = dict[str, torch.Tensor]


def run(output: Path, base: Path, *adapters: Any, **options: Any) -> merge.Report:
    """A merge that is read back and checked."""
    pairs = [item if isinstance(item, tuple) else (item, 1.0) for item in adapters]
    options = {"verify": True, **options}
    return merge.run(
        merge.plan(base, pairs, merge.Options(output=output, overwrite=True, **options))
    )


def deltas(adapter: Path, scale: float = 1.0) -> dict[str, np.ndarray]:
    """ΔW by checkpoint key, from the file alone: grouped by stem, rebuilt by the oracle."""
    keys, places = compile_keys("sd1", "kohya"), compile_checkpoint("sd1")
    base = tiny_base()
    names = {place.slot: key for key in base if (place := places.parse(key)) is not None}
    stems: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in load_file(adapter).items():
        stem, _, suffix = key.partition(".")
        stems.setdefault(stem, {})[
            suffix.removesuffix(".weight").removeprefix("lora_").removeprefix("lokr_")
        ] = tensor.numpy()
    found = {}
    for stem, tensors in stems.items():
        slot = keys.slot(stem)
        shape = tuple(base[names[slot]].shape)
        alpha = tensors.pop("alpha", None)
        alpha = None if alpha is None else float(alpha)
        if "diff" in tensors:
            delta = tensors["diff"].astype(np.float64)
        elif "up" in tensors:
            rank = tensors["down"].shape[0]
            delta = oracle.lora(
                tensors["up"],
                tensors["down"],
                1.0 if alpha is None else alpha / rank,
                tensors.get("mid"),
            )
        else:
            delta = oracle.lokr_stored(tensors, alpha, shape[2:])
        found[names[slot]] = scale * delta.reshape(shape)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "name", ["lora-kohya", "lokr-kohya", "lokr-factored-kohya", "tucker-kohya", "full-kohya"]
)
def test_the_merged_weight_is_the_oracles_within_one_rounding(
    tmp_path: Path, tiny: Path, name: str, dtype: torch.dtype
) -> None:
    base = tiny_base(dtype)
    report = run(
        tmp_path / "out.safetensors",
        save(tmp_path / "base.safetensors", base),
        (tiny / f"{name}.safetensors", -0.7),
    )
    found, expected = (
        load_file(tmp_path / "out.safetensors"),
        deltas(tiny / f"{name}.safetensors", -0.7),
    )
    assert len(expected) == report.tensors_changed == report.modules
    for key, tensor in found.items():
        if key not in expected:
            assert torch.equal(tensor, base[key])
            continue
        exact = base[key].double().numpy() + expected[key]
        # half a unit in the last place of the output dtype, and float32's own
        allowed = np.abs(exact) * torch.finfo(dtype).eps / 2 * 1.01 + 2e-6
        assert (np.abs(tensor.double().numpy() - exact) <= allowed).all(), key
        assert (
            np.abs(exact - base[key].double().numpy()).max() > 10 * allowed.max()
            or dtype != torch.float32
        )


def test_every_format_of_one_lora_gives_one_result(tmp_path: Path, tiny: Path) -> None:
    results = {}
    for format, strength in (
        ("kohya", 2.0),
        ("lycoris", 2.0),
        ("diffusers", 1.0),
        ("peft", 1.0),
        ("comfy", 1.0),
    ):
        output = (
            tmp_path / f"{format}.safetensors"
        )  # kohya's and lycoris' files have alpha = rank / 2
        run(
            output,
            tiny / "base.safetensors",
            (tiny / f"lora-{format}.safetensors", strength),
            only=("unet",),
        )
        results[format] = load_file(output)
    for format, state in results.items():
        for key, tensor in state.items():
            torch.testing.assert_close(
                tensor, results["kohya"][key], rtol=2e-3, atol=1e-3, msg=f"{format} {key}"
            )
    assert not torch.equal(results["kohya"][_to_q()], load_file(tiny / "base.safetensors")[_to_q()])


def _to_q() -> str:
    return "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"


def test_m1_m2_strength_zero_and_untouched_tensors_are_identical(
    tmp_path: Path, tiny: Path
) -> None:
    base = load_file(tiny / "base.safetensors")
    report = run(
        tmp_path / "zero.safetensors",
        tiny / "base.safetensors",
        (tiny / "lora-kohya.safetensors", 0.0),
    )
    assert report.tensors_changed == 0
    assert all(
        torch.equal(tensor, base[key])
        for key, tensor in load_file(tmp_path / "zero.safetensors").items()
    )
    run(tmp_path / "one.safetensors", tiny / "base.safetensors", tiny / "lora-kohya.safetensors")
    with (
        safe_open(tiny / "base.safetensors", "pt") as one,
        safe_open(tmp_path / "one.safetensors", "pt") as two,
    ):
        assert list(one.keys()) == list(two.keys())
        same = [key for key in one.keys() if torch.equal(one.get_tensor(key), two.get_tensor(key))]  # noqa: SIM118
    assert len(base) - len(same) == 104


def test_m3_the_order_of_additive_adapters_does_not_matter(tmp_path: Path, tiny: Path) -> None:
    adapters = [
        (tiny / "lora-kohya.safetensors", 0.5),
        (tiny / "lokr-kohya.safetensors", -1.0),
        (tiny / "full-kohya.safetensors", 0.3),
    ]
    base = save(tmp_path / "base.safetensors", tiny_base())
    run(tmp_path / "a.safetensors", base, *adapters)
    run(tmp_path / "b.safetensors", base, *reversed(adapters))
    first, second = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=1e-6, atol=1e-6)


def test_several_adapters_are_rounded_once(tmp_path: Path) -> None:
    """Two halves of an amount that fp16 cannot hold by itself: each alone is lost, together they are not (F32)."""
    key = _to_q()
    base = tiny_base(torch.float16)
    base[key] = torch.ones_like(base[key])
    step = torch.finfo(torch.float16).eps / 2 * 0.75  # below half a unit at 1
    slot = compile_checkpoint("sd1").parse(key).slot
    name = compile_keys("sd1", "kohya").spell(slot, "full", "diff")
    save_file(
        {name: torch.full_like(base[key], step, dtype=torch.float32)}, tmp_path / "a.safetensors"
    )
    path = save(tmp_path / "base.safetensors", base)
    run(tmp_path / "one.safetensors", path, tmp_path / "a.safetensors")
    assert torch.equal(load_file(tmp_path / "one.safetensors")[key], base[key])
    run(tmp_path / "two.safetensors", path, tmp_path / "a.safetensors", tmp_path / "a.safetensors")
    assert (load_file(tmp_path / "two.safetensors")[key] > 1).all()


def test_adding_and_subtracting_gives_the_base_back(tmp_path: Path, tiny: Path) -> None:
    base = save(tmp_path / "base.safetensors", tiny_base())
    run(tmp_path / "plus.safetensors", base, tiny / "lora-kohya.safetensors")
    run(
        tmp_path / "minus.safetensors",
        tmp_path / "plus.safetensors",
        (tiny / "lora-kohya.safetensors", -1.0),
    )
    torch.testing.assert_close(
        load_file(tmp_path / "minus.safetensors"), tiny_base(), rtol=1e-6, atol=1e-6
    )


def test_a_split_adapter_applies_to_the_rows_of_a_fused_layer(tmp_path: Path) -> None:
    base = small("sdxl")
    fused = "conditioner.embedders.1.model.transformer.resblocks.3.attn.in_proj_weight"
    width = base[fused].shape[1]
    up, down = torch.randn(width, 2), torch.randn(2, width)
    stem = "lora_te2_text_model_encoder_layers_3_self_attn_v_proj"
    save_file(
        {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down}, tmp_path / "a.safetensors"
    )
    run(
        tmp_path / "out.safetensors",
        save(tmp_path / "base.safetensors", base),
        tmp_path / "a.safetensors",
    )
    found = load_file(tmp_path / "out.safetensors")[fused]
    assert torch.equal(found[: 2 * width], base[fused][: 2 * width])
    torch.testing.assert_close(found[2 * width :], base[fused][2 * width :] + up @ down)


def test_a_transposed_layer_gets_the_transposed_difference(tmp_path: Path) -> None:
    base = small("sdxl")
    key = "conditioner.embedders.1.model.text_projection"
    base[key] = torch.randn(40, 24)
    up, down = torch.randn(24, 2), torch.randn(2, 40)
    stem = "text_encoder_2.text_projection"
    save_file(
        {f"{stem}.lora_B.weight": up, f"{stem}.lora_A.weight": down}, tmp_path / "a.safetensors"
    )
    run(
        tmp_path / "out.safetensors",
        save(tmp_path / "base.safetensors", base),
        tmp_path / "a.safetensors",
    )
    torch.testing.assert_close(
        load_file(tmp_path / "out.safetensors")[key], base[key] + (up @ down).T
    )


def test_a_module_without_a_place_fails_unless_allowed(tmp_path: Path, tiny: Path) -> None:
    base = load_file(tiny / "base.safetensors")
    del base[_to_q()]
    path = save(tmp_path / "base.safetensors", base)
    with pytest.raises(Unclaimed, match="3 keys would be lost.*mid_block") as caught:
        run(tmp_path / "out.safetensors", path, tiny / "lora-kohya.safetensors")
    assert "--allow-unused" in caught.value.hint
    assert not (tmp_path / "out.safetensors").exists()
    report = run(
        tmp_path / "out.safetensors", path, tiny / "lora-kohya.safetensors", allow_unused=True
    )
    assert len(report.unused) == 3
    assert report.modules == 103


def test_keys_nobody_understands_fail_unless_allowed(tmp_path: Path, tiny: Path) -> None:
    state = load_file(tiny / "lora-kohya.safetensors")
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    extra = {
        f"{stem}.dora_scale": torch.ones(4),
        "mystery": torch.ones(1),
        "lora_unet_nowhere.lora_up.weight": torch.ones(2, 2),
    }
    save_file(state | extra, tmp_path / "a.safetensors")
    with pytest.raises(Unclaimed, match="keys would be lost"):
        run(tmp_path / "out.safetensors", tiny / "base.safetensors", tmp_path / "a.safetensors")
    report = run(
        tmp_path / "out.safetensors",
        tiny / "base.safetensors",
        tmp_path / "a.safetensors",
        allow_unused=True,
    )
    assert {item.key for item in report.unused} >= set(extra)
    half = {key: value for key, value in state.items() if key != f"{stem}.lora_up.weight"}
    save_file(half, tmp_path / "half.safetensors")
    with pytest.raises(Unclaimed, match=r"lora_up\.weight is missing"):
        run(tmp_path / "out.safetensors", tiny / "base.safetensors", tmp_path / "half.safetensors")


def test_zero_matches_is_always_an_error(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(NoSuchName, match="matches no module"):
        run(
            tmp_path / "o.safetensors",
            tiny / "base.safetensors",
            tiny / "lora-kohya.safetensors",
            only=("x.*",),
            allow_unused=True,
        )


def test_an_adapter_for_another_family_or_size_is_refused(tmp_path: Path, tiny: Path) -> None:
    stem = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q"
    save_file(
        {f"{stem}.lora_up.weight": torch.ones(8, 2), f"{stem}.lora_down.weight": torch.ones(2, 8)},
        tmp_path / "xl.safetensors",
    )
    with pytest.raises(ShapeMismatch, match=r"Stable Diffusion XL.*Stable Diffusion 1"):
        run(tmp_path / "o.safetensors", tiny / "base.safetensors", tmp_path / "xl.safetensors")
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    wide = {
        f"{stem}.lora_up.weight": torch.ones(1280, 2),
        f"{stem}.lora_down.weight": torch.ones(2, 1280),
    }
    save_file(wide, tmp_path / "wide.safetensors")
    with pytest.raises(ShapeMismatch, match="32 × 32 in .*, 1280 × 1280 in this adapter"):
        run(
            tmp_path / "o.safetensors",
            tiny / "base.safetensors",
            tmp_path / "wide.safetensors",
            family="sd1",
        )
    with pytest.raises(UnknownAdapter, match="this is a checkpoint of"):
        run(tmp_path / "o.safetensors", tiny / "base.safetensors", tiny / "base.safetensors")


def test_a_look_alike_adapter_follows_the_checkpoint(tmp_path: Path) -> None:
    """Names alone do not tell SD 1 from SD 2; the checkpoint does, and no --family is asked for."""
    base = small("sd2")
    key = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    rows, columns = base[key].shape
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file(
        {
            f"{stem}.lora_up.weight": torch.ones(rows, 1),
            f"{stem}.lora_down.weight": torch.ones(1, columns),
        },
        tmp_path / "a.safetensors",
    )
    report = run(
        tmp_path / "o.safetensors",
        save(tmp_path / "base.safetensors", base),
        tmp_path / "a.safetensors",
    )
    assert (report.family, report.tensors_changed) == ("sd2", 1)


@pytest.mark.parametrize("where", ["base", "adapter"])
def test_nan_names_the_file_and_the_tensor(tmp_path: Path, tiny: Path, where: str) -> None:
    base, adapter = load_file(tiny / "base.safetensors"), load_file(tiny / "lora-kohya.safetensors")
    key = (
        _to_q()
        if where == "base"
        else "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight"
    )
    (base if where == "base" else adapter)[key].view(-1)[3] = float("nan")
    save_file(base, tmp_path / "base.safetensors")
    save_file(adapter, tmp_path / "adapter.safetensors")
    with pytest.raises(NonFinite, match="NaN or infinity") as caught:
        run(
            tmp_path / "o.safetensors",
            tmp_path / "base.safetensors",
            tmp_path / "adapter.safetensors",
        )
    assert (caught.value.tensor, Path(caught.value.file).name) == (key, f"{where}.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter.safetensors", "base.safetensors"]


def test_overflow_of_the_output_is_refused(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(NonFinite, match="float16") as caught:
        run(
            tmp_path / "o.safetensors",
            tiny / "base.safetensors",
            (tiny / "lora-kohya.safetensors", 1e9),
        )
    assert "bf16" in caught.value.hint


@pytest.mark.parametrize("options", [{}, {"dtype": "bf16"}], ids=["keep", "bf16"])
def test_a_quantised_base_is_refused_with_what_would_work(
    tmp_path: Path, tiny: Path, options: dict[str, Any]
) -> None:
    base = load_file(tiny / "base.safetensors")
    base[_to_q()] = base[_to_q()].to(torch.int8)
    with pytest.raises(NotRepresentable, match="int8") as caught:
        run(
            tmp_path / "o.safetensors",
            save(tmp_path / "base.safetensors", base),
            tiny / "lora-kohya.safetensors",
            **options,
        )
    assert caught.value.tensor == _to_q()
    assert "fp8" in caught.value.hint
    assert not (tmp_path / "o.safetensors").exists()


def test_a_pickle_merges_like_a_safetensors_file(tmp_path: Path, tiny: Path) -> None:
    for suffix in ("ckpt", "safetensors"):
        run(
            tmp_path / f"{suffix}.safetensors",
            tiny / f"base.{suffix}",
            tiny / "lora-kohya.safetensors",
        )
    first, second = (
        load_file(tmp_path / f"{suffix}.safetensors") for suffix in ("ckpt", "safetensors")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_writing_over_the_base_is_safe(tmp_path: Path, tiny: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((tiny / "base.safetensors").read_bytes())
    run(tmp_path / "apart.safetensors", path, tiny / "lora-kohya.safetensors")
    run(path, path, tiny / "lora-kohya.safetensors")
    apart, over = load_file(tmp_path / "apart.safetensors"), load_file(path)
    assert all(torch.equal(apart[key], over[key]) for key in apart)


def test_s1_stacked_buckets_give_the_same_checkpoint(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = (
        tiny / "lora-kohya.safetensors",
        tiny / "lokr-factored-kohya.safetensors",
        tiny / "full-kohya.safetensors",
    )
    run(tmp_path / "one.safetensors", tiny / "base.safetensors", *adapters)
    monkeypatch.setattr(engine.Resources, "on_cpu", property(lambda _: False))
    run(tmp_path / "two.safetensors", tiny / "base.safetensors", *adapters, verify=False)
    one, two = load_file(tmp_path / "one.safetensors"), load_file(tmp_path / "two.safetensors")
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=1e-4)


def test_metadata_is_kept_and_says_what_was_merged(tmp_path: Path, tiny: Path) -> None:
    save_file(
        tiny_base(),
        tmp_path / "base.safetensors",
        metadata={"modelspec.title": "x", "sshs_model_hash": "stale"},
    )
    run(
        tmp_path / "o.safetensors",
        tmp_path / "base.safetensors",
        (tiny / "lora-kohya.safetensors", 0.5),
    )
    with safe_open(tmp_path / "o.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.title"] == "x"
    assert "sshs_model_hash" not in metadata
    (record,) = json.loads(metadata["adaptkit"])
    digest = hashlib.sha256((tiny / "lora-kohya.safetensors").read_bytes()).hexdigest()
    merged = {"name": "lora-kohya.safetensors", "sha256": digest, "strength": 0.5}
    base = {"name": "base.safetensors", "sshs_model_hash": "stale"}
    assert (record["base"], record["adapters"]) == (base, [merged])
    recipe = json.loads(metadata["sd_merge_recipe"])
    assert (recipe["type"], recipe["base_model"], recipe["loras"]) == ("adaptkit", base, [merged])
    assert json.loads(metadata["sd_merge_models"]) == {digest: {"name": "lora-kohya.safetensors"}}
    assert metadata["modelspec.merged_from"] == "base, lora-kohya"


def test_a_merge_that_adds_nothing_claims_nothing(tmp_path: Path, tiny: Path) -> None:
    """F7 left `modelspec.merged_from` on a file nothing was merged into."""
    run(
        tmp_path / "o.safetensors",
        tiny / "base.safetensors",
        (tiny / "lora-kohya.safetensors", 0.0),
    )
    with safe_open(tmp_path / "o.safetensors", "pt") as file:
        assert (
            not {"modelspec.merged_from", "sd_merge_recipe", "sd_merge_models"}
            & file.metadata().keys()
        )


def test_a_second_merge_continues_the_record(tmp_path: Path, tiny: Path) -> None:
    run(tmp_path / "one.safetensors", tiny / "base.safetensors", tiny / "lora-kohya.safetensors")
    run(
        tmp_path / "two.safetensors",
        tmp_path / "one.safetensors",
        tiny / "lokr-kohya.safetensors",
        blocks=("mid=0",),
    )
    with safe_open(tmp_path / "two.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.merged_from"] == "base, lora-kohya, lokr-kohya"
    assert len(json.loads(metadata["sd_merge_models"])) == 2
    first, second = json.loads(metadata["adaptkit"])
    assert (first.get("blocks"), second["blocks"]) == (None, ["mid=0"])


def test_the_same_merge_gives_the_same_bytes(tmp_path: Path, tiny: Path) -> None:
    for name in ("one", "two"):
        run(
            tmp_path / f"{name}.safetensors",
            tiny / "base.safetensors",
            (tiny / "lora-kohya.safetensors", 0.5),
        )
    assert (tmp_path / "one.safetensors").read_bytes() == (
        tmp_path / "two.safetensors"
    ).read_bytes()


def test_the_report_sums_by_block(tmp_path: Path, tiny: Path) -> None:
    base = load_file(tiny / "base.safetensors")
    report = run(
        tmp_path / "o.safetensors",
        tiny / "base.safetensors",
        tiny / "lora-kohya.safetensors",
        only=("unet",),
    )
    found = load_file(tmp_path / "o.safetensors")
    (middle,) = [block for block in report.blocks if block["block"] == "unet.mid_block"]
    changed = [
        k
        for k in base
        if k.startswith("model.diffusion_model.middle_block") and not torch.equal(base[k], found[k])
    ]
    delta = sum(float((found[k].double() - base[k].double()).square().sum()) for k in changed)
    weight = sum(float(base[k].double().square().sum()) for k in changed)
    assert middle["tensors_changed"] == len(changed) > 3
    assert middle["relative_change"] == pytest.approx((delta / weight) ** 0.5, rel=1e-2)
    assert sum(block["tensors_changed"] for block in report.blocks) == report.tensors_changed


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_another_dtype_is_that_of_every_tensor_that_holds_numbers(
    tmp_path: Path, tiny: Path, dtype: str
) -> None:
    base = tiny_base() | {
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]
    }
    report = run(
        tmp_path / "o.safetensors",
        save(tmp_path / "base.safetensors", base),
        tiny / "lora-kohya.safetensors",
        dtype=dtype,
        verify=True,
    )
    wanted = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    found = load_file(tmp_path / "o.safetensors")
    assert {t.dtype for t in found.values()} == {wanted, torch.int64}
    expected = deltas(tiny / "lora-kohya.safetensors")
    rest = [key for key in base if key not in expected]
    assert all(torch.equal(found[key], base[key].to(found[key].dtype)) for key in rest)
    assert report.tensors_changed == len(expected)


def test_alpha_from_a_peft_folder_and_from_diffusers_metadata(tmp_path: Path, tiny: Path) -> None:
    """Hosts that ignore alpha in metadata give these the wrong strength (gotcha 11)."""
    folder = tmp_path / "peft"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(
        (tiny / "lora-peft.safetensors").read_bytes()
    )
    config = {"r": 2, "lora_alpha": 8, "alpha_pattern": {"mid_block.attentions.0.proj_in": 2}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    run(tmp_path / "peft.safetensors", tiny / "base.safetensors", folder)
    run(tmp_path / "plain.safetensors", tiny / "base.safetensors", tiny / "lora-peft.safetensors")
    base, plain, scaled = (
        load_file(p)
        for p in (
            tiny / "base.safetensors",
            tmp_path / "plain.safetensors",
            tmp_path / "peft.safetensors",
        )
    )
    ratio = (scaled[_to_q()].double() - base[_to_q()].double()).norm() / (
        plain[_to_q()].double() - base[_to_q()].double()
    ).norm()
    assert float(ratio) == pytest.approx(4.0, rel=1e-2)
    fixed = "model.diffusion_model.middle_block.1.proj_in.weight"
    assert torch.equal(plain[fixed], scaled[fixed])
    state = load_file(tiny / "lora-diffusers.safetensors")
    stored = {
        "unet.r": 2,
        "unet.lora_alpha": 8,
        "text_encoder.r": 2,
        "text_encoder.lora_alpha": 8,
        "text_encoder.use_rslora": True,
    }
    save_file(
        state, tmp_path / "d.safetensors", metadata={"lora_adapter_metadata": json.dumps(stored)}
    )
    from adaptkit.adapter import Adapter

    with Adapter.open(tmp_path / "d.safetensors") as adapter:
        scales = {
            (slot.component, round(entry.facts.scale, 6)) for slot, entry in adapter.entries.items()
        }
        assert scales == {("unet", 4.0), ("text_encoder", round(8 / 2**0.5, 6))}
        assert adapter.alpha_source == "metadata"
