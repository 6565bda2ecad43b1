from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adaptkit import engine
from adaptkit.adapter import Adapter
from adaptkit.detect import families
from adaptkit.errors import (
    AdaptkitError,
    NonFinite,
    NoSuchName,
    NothingToDo,
    ShapeMismatch,
    Unclaimed,
    WouldOverwrite,
)
from adaptkit.ops import extract, merge
from tests.ops.models import (
    changed,
    distance,
    lokr_delta,
    lora_delta,
    matrices,
    noise_delta,
    save,
    small,
    tiny_base,
)


def run(
    folder: Path, base: dict[str, torch.Tensor], tuned: dict[str, torch.Tensor], **options: Any
) -> extract.Report:
    first, second = (
        save(folder / "base.safetensors", base),
        save(folder / "tuned.safetensors", tuned),
    )
    options.setdefault("output", folder / "out.safetensors")
    chosen = extract.Options(overwrite=True, **options)
    return extract.run(extract.plan(first, second, chosen))


def merged(folder: Path, adapter: Path | None = None) -> dict[str, torch.Tensor]:
    target = merge.Options(output=folder / "merged.safetensors", overwrite=True)
    adapter = adapter or folder / "out.safetensors"
    merge.run(merge.plan(folder / "base.safetensors", [(adapter, 1.0)], target))
    return load_file(folder / "merged.safetensors")


ATTENTION = (
    "attn1.to_q",
    "attn2.to_v",
    "proj_in",
    "in_layers.2",
    "skip_connection",
    "self_attn.q_proj",
    "fc1",
)


@pytest.mark.parametrize("algo", ["lora", "lokr", "lokr-rank"])
def test_e1_a_known_adapter_is_recovered_in_float32(tmp_path: Path, algo: str) -> None:
    base = tiny_base()
    make = {"lora": lora_delta(3), "lokr": lokr_delta(8), "lokr-rank": lokr_delta(2, rank=1)}[algo]
    tuned, deltas = changed(base, matrices(base, *ATTENTION), make)
    options = {"lora": {"rank": 4}, "lokr": {}, "lokr-rank": {"factor": 2, "rank": 1}}[algo]
    report = run(tmp_path, base, tuned, algo=algo.partition("-")[0], **options)
    assert report.modules == len(deltas)
    assert report.relative_error <= 1e-3
    result = merged(tmp_path)
    true = {
        key: base[key].double() + deltas[key] if key in deltas else base[key].double()
        for key in base
    }
    whole = sum(d.square().sum() for d in deltas.values()) ** 0.5
    assert distance(result, true) <= 1e-3 * whole


@pytest.mark.parametrize("algo", ["lora", "lokr"])
def test_e1_recovered_to_the_rounding_of_an_fp16_checkpoint(tmp_path: Path, algo: str) -> None:
    base = tiny_base(torch.float16)
    tuned, deltas = changed(
        base, matrices(base, *ATTENTION), {"lora": lora_delta(3), "lokr": lokr_delta(8)}[algo]
    )
    rounding = (
        sum(
            float((tuned[k].double() - base[k].double() - d).square().sum())
            for k, d in deltas.items()
        )
        ** 0.5
    )
    report = run(tmp_path, base, tuned, algo=algo, **({"rank": 3} if algo == "lora" else {}))
    whole = sum(float(d.square().sum()) for d in deltas.values()) ** 0.5
    # what is left is the checkpoint's rounding and the adapter's own
    assert report.relative_error <= rounding / whole + 6e-4
    with Adapter.open(tmp_path / "out.safetensors") as adapter:
        assert set(adapter.algorithms()) == {algo}


@pytest.mark.parametrize("algo", ["lora", "lokr", "full"])
def test_the_merge_is_off_by_exactly_the_reported_error(tmp_path: Path, algo: str) -> None:
    base = tiny_base()
    # a full fine-tune: every matrix, bias and norm changes, nothing in it is low-rank
    keys = [key for key in base if "embedding" not in key]
    tuned, _ = changed(base, keys, noise_delta())
    report = run(
        tmp_path, base, tuned, algo=algo, **({"rank": 4, "conv_rank": 2} if algo == "lora" else {})
    )
    left = distance(merged(tmp_path), tuned)
    whole = distance(base, tuned)
    assert left / whole == pytest.approx(report.relative_error, rel=1e-4, abs=1e-6)
    assert report.captured == pytest.approx(1 - (left / whole) ** 2, abs=1e-6)
    if algo == "full":  # E3: within one rounding of the sum
        assert left / whole < 1e-5
    assert (algo == "full") == (report.unused == ())


def test_e2_nothing_differs(tmp_path: Path, tiny: Path) -> None:
    plan = extract.plan(
        tiny / "base.ckpt",
        tiny / "base.safetensors",
        extract.Options(output=tmp_path / "o.safetensors"),
    )
    with pytest.raises(NothingToDo, match="nothing differs"):
        extract.run(plan)
    assert not list(tmp_path.iterdir())


def test_lokr_says_when_lora_would_keep_more(tmp_path: Path) -> None:
    base = tiny_base()
    tuned, _ = changed(base, matrices(base, "attn1", "attn2"), lora_delta(1))
    report = run(tmp_path, base, tuned, algo="lokr", factor=4)
    assert report.captured_by_lora_of_same_size > report.captured
    made, note = report.notes
    assert "sampled layers are a rank-1 LoRA" in made
    assert note.startswith("This LoKr keeps only")
    assert "--algo lora" in note
    (poor,) = run(tmp_path, *_lokr_pair(), algo="lokr").notes
    assert poor.startswith("relative error 0.56")


def _lokr_pair() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    base = tiny_base()
    return base, changed(base, matrices(base, "attn1"), lokr_delta(8))[0]


def test_the_lora_beside_a_lokr_is_measured(tmp_path: Path) -> None:
    """The share that a LoRA of as many parameters keeps equals what extracting one keeps."""
    base, key = (
        tiny_base(),
        "model.diffusion_model.middle_block.1.transformer_blocks.0.ff.net.0.proj.weight",
    )
    tuned, _ = changed(base, [key], noise_delta())
    lokr = run(tmp_path, base, tuned, algo="lokr", factor=4)
    rank = lokr.parameters // sum(base[key].shape)
    lora = run(tmp_path, base, tuned, algo="lora", rank=rank)
    assert lokr.captured_by_lora_of_same_size == pytest.approx(lora.captured, rel=2e-3)


def test_vectors_are_carried_or_listed(tmp_path: Path) -> None:
    base = tiny_base()
    keys = [
        key
        for key in base
        if key.endswith((".bias", "norm1.weight", "layer_norm1.weight")) and "unet" not in key
    ]
    tuned, _ = changed(base, [*keys, *matrices(base, "attn1.to_q")], noise_delta())
    carried = run(tmp_path, base, tuned, rank=2, vectors=True)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        names = list(file.keys())
    assert any(name.endswith(".diff_b") for name in names)
    assert any(name.endswith(".w_norm") for name in names)
    assert any(name.endswith(".b_norm") for name in names)
    without = run(tmp_path, base, tuned, rank=2)
    assert without.modules == len(matrices(base, "attn1.to_q"))
    assert len(without.unused) == len(keys)
    assert {"--vectors" in item.reason for item in without.unused} == {True}
    assert without.relative_error > carried.relative_error  # what is left out counts
    assert any("not in the adapter" in note for note in without.notes)


def test_what_an_adapter_cannot_hold_is_listed(tmp_path: Path) -> None:
    base = tiny_base() | {
        "first_stage_model.conv.weight": torch.zeros(4, 4),
        "model_ema.decay": torch.zeros(1),
    }
    token = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    keys = [token, "first_stage_model.conv.weight", *matrices(base, "attn1.to_q")]
    tuned, deltas = changed(base, keys, noise_delta())
    report = run(tmp_path, base, tuned, rank=64)
    reasons = {item.key: item.reason for item in report.unused}
    assert "embeddings" in reasons["text_encoder.text_model.embeddings.token_embedding"]
    assert "vae" in reasons["first_stage_model.conv.weight"]
    assert "ema" in reasons["model_ema.decay"]
    whole = sum(float(d.square().sum()) for d in deltas.values())
    left = sum(float(deltas[key].square().sum()) for key in keys[:2])
    assert report.relative_error == pytest.approx((left / whole) ** 0.5, rel=1e-3)
    apart = run(tmp_path, base, tuned, rank=64, skip=("vae",))  # left out of the figures too
    whole -= float(deltas[keys[1]].square().sum())
    left = float(deltas[token].square().sum())
    assert apart.relative_error == pytest.approx((left / whole) ** 0.5, rel=1e-3)
    full = run(tmp_path, base, tuned, algo="full", skip=("vae",))
    assert full.relative_error < 1e-6  # a full difference does hold the embedding


def test_layers_without_a_partner_fail_unless_allowed(tmp_path: Path) -> None:
    base = tiny_base()
    tuned, _ = changed(base, matrices(base, "attn1.to_q"), noise_delta())
    gone, odd = (
        "model.diffusion_model.out.2.weight",
        "model.diffusion_model.input_blocks.0.0.weight",
    )
    del tuned[gone]
    tuned[odd] = torch.zeros(8, 9, 3, 3)  # an inpainting model's input
    with pytest.raises(Unclaimed, match="2 keys would be lost") as caught:
        run(tmp_path, base, tuned)
    assert "--allow-unused" in caught.value.hint
    assert not (tmp_path / "out.safetensors").exists()
    reasons = {
        item.key: item.reason for item in run(tmp_path, base, tuned, allow_unused=True).unused
    }
    assert "not in the tuned" in reasons[gone]
    assert "[8, 4, 3, 3] in the base, [8, 9, 3, 3]" in reasons[odd]
    assert run(tmp_path, base, tuned, skip=("unet.conv_in", "*conv_out")).unused == ()


def test_only_and_skip_choose_modules(tmp_path: Path) -> None:
    base = tiny_base()
    tuned, _ = changed(base, matrices(base, "attn1.to_q", "self_attn.q_proj"), noise_delta())
    assert {
        d["module"].partition(".")[0]
        for d in run(tmp_path, base, tuned, only=("text_encoder",)).details
    } == {"text_encoder"}
    assert {
        d["module"].partition(".")[0]
        for d in run(tmp_path, base, tuned, skip=("text_encoder",)).details
    } == {"unet"}
    assert run(tmp_path, base, tuned, only=("*mid_block*",)).modules == 1
    with pytest.raises(NoSuchName, match="nothing.like.this.*matches no module"):
        run(tmp_path, base, tuned, only=("nothing.like.this",))


@pytest.mark.parametrize("where", ["base", "tuned"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_names_the_file_and_the_tensor(tmp_path: Path, where: str, value: float) -> None:
    base = tiny_base()
    tuned, _ = changed(base, matrices(base, "attn1.to_q"), noise_delta())
    key = matrices(base, "attn1.to_q")[3]
    (base if where == "base" else tuned)[key].view(-1)[7] = value
    with pytest.raises(NonFinite, match="NaN or infinity") as caught:
        run(tmp_path, base, tuned)
    assert (caught.value.tensor, Path(caught.value.file).name) == (key, f"{where}.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_what_does_not_fit_fp16_is_refused_not_written_as_infinity(tmp_path: Path) -> None:
    """LyCORIS and ComfyUI write Inf here (F29)."""
    base = tiny_base()
    key = matrices(base, "attn1.to_q")[0]
    tuned = base | {key: base[key] + 1e6}
    with pytest.raises(NonFinite, match="float16") as caught:
        run(tmp_path, base, tuned, dtype="fp16", algo="full")
    assert "bf16" in caught.value.hint
    assert run(tmp_path, base, tuned, dtype="bf16", algo="full").relative_error < 1e-2


def test_different_families_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "two.safetensors", small("sd2", by=64))
    save(tmp_path / "one.safetensors", tiny_base())
    with pytest.raises(ShapeMismatch, match=r"Stable Diffusion 1\.x.*Stable Diffusion 2\.x"):
        extract.plan(tmp_path / "one.safetensors", tmp_path / "two.safetensors", extract.Options())


def test_unknown_names_are_refused_before_work(tmp_path: Path, tiny: Path) -> None:
    pair = (tiny / "base.ckpt", tiny / "tuned.ckpt")
    for options, match in (
        (extract.Options(algo="lokrr"), "unknown algorithm"),
        (extract.Options(to="koyha"), "unknown format"),
        (extract.Options(family="sd9"), "unknown family"),
        (extract.Options(dtype="fp12"), "unknown dtype"),
    ):
        with pytest.raises(NoSuchName, match=match):
            extract.plan(*pair, options)
    (tmp_path / "there.safetensors").write_bytes(b"")
    with pytest.raises(WouldOverwrite):
        extract.plan(*pair, extract.Options(output=tmp_path / "there.safetensors"))
    with pytest.raises(AdaptkitError, match="no such folder"):
        extract.plan(*pair, extract.Options(output=tmp_path / "nowhere" / "o.safetensors"))


@pytest.mark.parametrize("algo", ["lora", "lokr", "full"])
def test_equal_inputs_give_equal_bytes_in_any_container(
    tmp_path: Path, tiny: Path, algo: str
) -> None:
    contents = []
    for n, suffix in enumerate(("ckpt", "safetensors", "ckpt")):
        output = tmp_path / str(n) / "out.safetensors"
        output.parent.mkdir()
        extract.run(
            extract.plan(
                tiny / f"base.{suffix}",
                tiny / f"tuned.{suffix}",
                extract.Options(output=output, algo=algo),
            )
        )
        contents.append(output.read_bytes())
    assert contents[0] == contents[2]
    assert (
        load_file(tmp_path / "0" / "out.safetensors").keys()
        == load_file(tmp_path / "1" / "out.safetensors").keys()
    )


@pytest.mark.parametrize("algo", ["lora", "lokr"])
def test_s1_stacked_buckets_give_the_same_adapter(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, algo: str
) -> None:
    """The path a GPU takes, run on the CPU: many layers of one shape at once."""
    found = []
    for stacked in (False, True):
        monkeypatch.setattr(
            engine.Resources, "on_cpu", property(lambda _, stacked=stacked: not stacked)
        )
        options = extract.Options(output=tmp_path / f"{stacked}.safetensors", algo=algo, rank=4)
        extract.run(extract.plan(tiny / "base.safetensors", tiny / "tuned.safetensors", options))
        found.append(load_file(options.output))
    assert found[0].keys() == found[1].keys()
    for key, tensor in found[0].items():
        assert torch.equal(tensor, found[1][key]), key


def test_sdxl_with_its_fused_text_encoder(tmp_path: Path) -> None:
    """in_proj of OpenCLIP is one tensor in the checkpoint and three modules in the adapter; text_projection is transposed."""
    base = small("sdxl")
    g = "conditioner.embedders.1.model."
    keys = [f"{g}transformer.resblocks.{n}.attn.in_proj_weight" for n in (0, 31)]
    keys += [
        f"{g}text_projection",
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight",
    ]
    tuned, _ = changed(base, keys, noise_delta())
    report = run(tmp_path, base, tuned, rank=512)
    names = set(load_file(tmp_path / "out.safetensors"))
    assert report.modules == 2 * 3 + 2
    assert "lora_te2_text_model_encoder_layers_31_self_attn_k_proj.lora_up.weight" in names
    assert "lora_te2_text_projection.lora_down.weight" in names
    assert "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k.lora_up.weight" in names
    assert report.relative_error < 1e-5
    assert distance(merged(tmp_path), tuned) < 1e-5 * distance(base, tuned)


@pytest.mark.parametrize("format", ["kohya", "lycoris", "diffusers", "peft", "comfy"])
def test_every_format_is_read_back_as_the_same_weights(tmp_path: Path, format: str) -> None:
    base = tiny_base()
    tuned, _ = changed(base, matrices(base, "attn1.to_q", "in_layers.2"), noise_delta())
    output = tmp_path / ("out" if format == "peft" else "out.safetensors")
    run(tmp_path, base, tuned, rank=64, to=format, only=("unet",), output=output)
    with Adapter.open(output) as adapter:
        assert adapter.format.name == format
        assert not adapter.unclaimed
    assert distance(merged(tmp_path, output), tuned) < 1e-5 * distance(base, tuned)


def test_a_diffusers_folder_pairs_with_a_single_file(tmp_path: Path) -> None:
    from adaptkit.keymap import compile_checkpoint, label

    base = tiny_base()
    tuned, _ = changed(base, matrices(base, "attn1.to_q"), noise_delta())
    places = {key: compile_checkpoint("sd1").parse(key) for key in tuned}
    for part in ("unet", "text_encoder"):
        folder = tmp_path / "tuned" / part
        folder.mkdir(parents=True)
        names = {
            key: label(families()["sd1"], p.slot).removeprefix(f"{part}.")
            for key, p in places.items()
            if p.slot.component == part
        }
        state = {
            name if name.endswith("bias") else f"{name}.weight": tuned[key]
            for key, name in names.items()
        }
        save_file(
            state,
            folder
            / ("diffusion_pytorch_model.safetensors" if part == "unet" else "model.safetensors"),
        )
    save(tmp_path / "base.safetensors", base)
    plan = extract.plan(
        tmp_path / "base.safetensors",
        tmp_path / "tuned",
        extract.Options(output=tmp_path / "o.safetensors", rank=64),
    )
    report = extract.run(plan)
    assert report.modules == len(matrices(base, "attn1.to_q"))
    assert report.relative_error < 1e-5


def test_metadata_says_what_was_done(tmp_path: Path, tiny: Path) -> None:
    output = tmp_path / "out.safetensors"
    report = extract.run(
        extract.plan(
            tiny / "base.ckpt", tiny / "tuned.ckpt", extract.Options(output=output, rank=4)
        )
    )
    with safe_open(output, "pt") as file:
        metadata = file.metadata()
    (record,) = json.loads(metadata["adaptkit"])
    assert (record["command"], record["base"], record["tuned"], record["rank"]) == (
        "extract",
        "base.ckpt",
        "tuned.ckpt",
        4,
    )
    assert record["relative_error"] == pytest.approx(report.relative_error, rel=1e-5)
    assert metadata["ss_network_dim"] in ("4", "Dynamic")
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"


def test_the_plan_is_made_without_reading_weights(tmp_path: Path, tiny: Path) -> None:
    plan = extract.plan(
        tiny / "base.ckpt",
        tiny / "tuned.ckpt",
        extract.Options(output=tmp_path / "o.safetensors", rank=4),
    )
    described = plan.to_dict()
    report = extract.run(plan)
    assert described["modules"] >= report.modules
    assert described["bytes_out_at_most"] >= report.parameters * 2
    assert described["peak_memory"] > 0
