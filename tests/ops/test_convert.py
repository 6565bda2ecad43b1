"""convert: laws C1 to C3 over every family and format, and what is copied, split, fused, folded or refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adaptkit.adapter import Adapter
from adaptkit.detect import families, formats
from adaptkit.errors import (
    AmbiguousAdapter,
    NoSuchName,
    NothingToDo,
    NotRepresentable,
    Unclaimed,
    WouldOverwrite,
)
from adaptkit.formats.contract import Alpha
from adaptkit.keymap import compile_keys
from adaptkit.names import Target
from adaptkit.ops import convert
from tests.synth import tiny_slots

COLUMNS, RANK = 6, 3
WRITTEN = [name for name, format in formats().items() if not format.owns]


def lora(family: str, format: str, path: Path, *, scale: float = 1.0, seed: int = 0) -> Path:
    """A LoRA on the first and last block of every kind, alpha where the format has a place for it."""
    keys, draw = compile_keys(family, format), torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for slot, rows in tiny_slots(family, format):
        tensors[keys.spell(slot, "lora", "up")] = torch.randn(rows, RANK, generator=draw).half()
        tensors[keys.spell(slot, "lora", "down")] = torch.randn(
            RANK, COLUMNS, generator=draw
        ).half()
        if formats()[format].alpha in (Alpha.TENSOR, Alpha.OPTIONAL):
            tensors[keys.spell(slot, "lora", "alpha")] = torch.tensor(RANK * scale)
    save_file(tensors, path)
    return path


def deltas(path: Path, family: str, format: str) -> dict[Target, np.ndarray]:
    """ΔW of every target in the family's own order of rows, in float64; parts that are not there are zero."""
    found: dict[Target, np.ndarray] = {}
    with Adapter.open(path, family=family, format=format) as adapter:
        assert not adapter.unclaimed
        for slot, entry in adapter.entries.items():
            delta = adapter.weights(entry).delta().double().numpy()
            if slot.rows is None:
                found[slot.target] = delta
                continue
            total = entry.facts.rows * slot.rows.total // (slot.rows.stop - slot.rows.start)
            whole = found.setdefault(slot.target, np.zeros((total, delta.shape[1])))
            whole[slice(*slot.rows.bounds(total))] = delta  # type: ignore[misc]
    return found


def run(path: Path, output: Path, **options: object) -> convert.Report:
    plan = convert.plan(path, convert.Options(output=output, **options))  # type: ignore[arg-type]
    try:
        return convert.run(plan)
    finally:
        plan.close()


def out(folder: Path, name: str, format: str) -> Path:
    return folder / (name if formats()[format].alpha is Alpha.CONFIG else f"{name}.safetensors")


PAIRS = [
    (family, a, b)
    for family in families()
    for a in ("kohya", "diffusers")
    for b in WRITTEN
    if a != b
]


@pytest.mark.share(8)
@pytest.mark.parametrize(("family", "first", "second"), PAIRS)
def test_c1_c2_there_and_back(family: str, first: str, second: str, tmp_path: Path) -> None:
    if not components(family, first) & components(family, second):
        return
    source = lora(family, first, tmp_path / "a.safetensors")
    options = {"family": family, "overwrite": True}
    there, back = out(tmp_path, "b", second), tmp_path / "c.safetensors"
    narrow = (
        formats()[second].private or len(components(family, first) - components(family, second)) > 0
    )
    report = run(source, there, to=second, format=first, allow_unused=narrow, **options)
    mine, theirs = deltas(source, family, first), deltas(there, family, second)
    assert theirs
    # what the other format has no place for counts as lost
    energy = [float((mine[t] ** 2).sum()) for t in mine]
    kept = sum(e for t, e in zip(mine, energy, strict=True) if t in theirs)
    assert report.relative_error == pytest.approx((1 - kept / sum(energy)) ** 0.5, abs=2e-4)
    if not narrow:
        assert theirs.keys() == mine.keys()
    for target, delta in theirs.items():
        equal(delta, mine[target], fused="fused" in report.changes)
    run(there, back, to=first, format=second, **options)
    for target, delta in deltas(back, family, first).items():
        equal(delta, mine[target], fused="fused" in report.changes)
    if not narrow:
        ours, again = load_file(source), load_file(back)
        if formats()[first].alpha is not Alpha.OPTIONAL:
            assert ours.keys() == again.keys()
        kept = {key: t for key, t in ours.items() if not key.endswith("alpha")}
        split = report.changes.keys() & {"split", "fused"}
        if not split or "split" in split:  # parts with a `down` each cannot come back from one
            assert all(torch.equal(tensor, again[key]) for key, tensor in kept.items())


def equal(one: np.ndarray, other: np.ndarray, *, fused: bool) -> None:
    """The same bits; where parts were fused, the same but for the order in which the product is summed up."""
    if fused:
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    else:
        np.testing.assert_array_equal(one, other)


def components(family: str, format: str) -> set[str]:
    return {slot.component for slot, _ in tiny_slots(family, format)}


@pytest.mark.share(4)
@pytest.mark.parametrize("family", list(families()))
@pytest.mark.parametrize("scale", [0.5, 0.3])
def test_c1_folding(family: str, scale: float, tmp_path: Path) -> None:
    """A scale that is a power of two folds exactly; another one within one rounding of float16."""
    source = lora(family, "kohya", tmp_path / "a.safetensors", scale=scale)
    report = run(source, tmp_path / "b.safetensors", to="diffusers", family=family)
    assert report.changes["folded"] == report.modules
    assert not any(key.endswith("alpha") for key in load_file(tmp_path / "b.safetensors"))
    mine, theirs = (
        deltas(source, family, "kohya"),
        deltas(tmp_path / "b.safetensors", family, "diffusers"),
    )
    norm = sum(float((d**2).sum()) for d in mine.values())
    error = sum(float(((theirs[t] - d) ** 2).sum()) for t, d in mine.items())
    assert report.relative_error == pytest.approx((error / norm) ** 0.5, rel=1e-2, abs=1e-7)
    assert (report.relative_error == 0.0) == (scale == 0.5)
    assert report.relative_error < 2**-11


@pytest.mark.share(4)
@pytest.mark.parametrize("family", list(families()))
def test_c3_by_way_of_another(family: str, tmp_path: Path) -> None:
    source = lora(family, "diffusers", tmp_path / "a.safetensors")
    options = {"family": family, "allow_unused": True}
    run(source, tmp_path / "b.safetensors", to="comfy", **options)
    run(tmp_path / "b.safetensors", tmp_path / "c.safetensors", to="kohya", **options)
    run(source, tmp_path / "d.safetensors", to="kohya", **options)
    one, two = (
        deltas(tmp_path / "c.safetensors", family, "kohya"),
        deltas(tmp_path / "d.safetensors", family, "kohya"),
    )
    assert one.keys() == two.keys()
    for target, delta in one.items():
        equal(delta, two[target], fused=True)


def test_missing_parts_become_rows_of_zeros(tmp_path: Path) -> None:
    """q and v trained, k not: the others are not dropped (sd-scripts' converter raises or loses them)."""
    source = lora("flux", "diffusers", tmp_path / "a.safetensors")
    kept = {
        key: t
        for key, t in load_file(source).items()
        if ".to_k." not in key and ".add_k_proj." not in key
    }
    save_file(kept, tmp_path / "a.safetensors")
    report = run(source, tmp_path / "b.safetensors", to="kohya", family="flux")
    assert report.changes["fused"]
    mine, theirs = (
        deltas(source, "flux", "diffusers"),
        deltas(tmp_path / "b.safetensors", "flux", "kohya"),
    )
    qkv = next(target for target in theirs if target.module.endswith("img_attn.qkv"))
    third = theirs[qkv].shape[0] // 3
    assert not theirs[qkv][third : 2 * third].any()
    np.testing.assert_array_equal(theirs[qkv][:third], mine[qkv][:third])
    np.testing.assert_array_equal(theirs[qkv][2 * third :], mine[qkv][2 * third :])


def test_pure_renames_copy_bytes_and_keep_what_else_is_there(tmp_path: Path) -> None:
    source = lora("sd1", "kohya", tmp_path / "a.safetensors")
    extra = {"bundle_emb.style.clip_l": torch.ones(2, 3)}
    metadata = {
        "ss_tag_frequency": "{}",
        "modelspec.title": "ä",
        "foo": "bar",
        "lora_adapter_metadata": "{}",
    }
    save_file(load_file(source) | extra, source, metadata)
    report = run(source, tmp_path / "b.safetensors", to="comfy")
    assert report.changes == {"renamed": report.modules}
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        stored = file.metadata()
        assert torch.equal(
            file.get_tensor("bundle_emb.style.clip_l"), extra["bundle_emb.style.clip_l"]
        )
    assert {key: stored[key] for key in ("ss_tag_frequency", "modelspec.title", "foo")} == {
        key: metadata[key] for key in ("ss_tag_frequency", "modelspec.title", "foo")
    }
    assert "lora_adapter_metadata" not in stored
    assert '"command":"convert"' in stored["adaptkit"]


def test_sd_scripts_hashes_are_recomputed(tmp_path: Path) -> None:
    """As sd-scripts' `precalculate_safetensors_hashes`: over `safetensors.save` of the tensors and the ss_ metadata."""
    import hashlib

    from safetensors.torch import save

    source = lora("sdxl", "kohya", tmp_path / "a.safetensors", scale=0.3)
    metadata = {
        "ss_network_dim": "3",
        "ss_note": "ü",
        "sshs_model_hash": "0" * 64,
        "sshs_legacy_hash": "0" * 8,
        "x": "y",
    }
    save_file(load_file(source), source, metadata)
    for to in ("comfy", "diffusers", "kohya"):
        output = tmp_path / f"{to}.safetensors"
        run(source, output, to=to)
        with safe_open(output, "pt") as file:
            stored = file.metadata()
        blob = save(
            load_file(output),
            {key: value for key, value in stored.items() if key.startswith("ss_")},
        )
        start = 8 + int.from_bytes(blob[:8], "little")
        assert stored["sshs_model_hash"] == hashlib.sha256(blob[start:]).hexdigest()
        assert stored["sshs_legacy_hash"] == hashlib.sha256(blob[0x100000:0x110000]).hexdigest()[:8]


def test_the_legacy_hash_is_taken_at_one_mebibyte(tmp_path: Path) -> None:
    import hashlib

    from safetensors.torch import save

    source = lora("sd1", "kohya", tmp_path / "a.safetensors")
    tensors = load_file(source)
    key = next(key for key in tensors if key.endswith("lora_down.weight"))
    up = key.replace("lora_down", "lora_up")
    tensors |= {key: torch.randn(RANK, 300_000).half(), up: tensors[up]}
    save_file(tensors, source, {"sshs_legacy_hash": "0" * 8})
    run(source, tmp_path / "b.safetensors", to="comfy")
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        stored = file.metadata()
    blob = save(load_file(tmp_path / "b.safetensors"))
    assert len(blob) > 0x110000
    assert stored["sshs_legacy_hash"] == hashlib.sha256(blob[0x100000:0x110000]).hexdigest()[:8]


def test_a_peft_folder(tmp_path: Path) -> None:
    import json

    source = lora("sd1", "kohya", tmp_path / "a.safetensors", scale=2.0)
    tensors = load_file(source)
    key = next(key for key in tensors if key.startswith("lora_unet_down") and key.endswith("alpha"))
    save_file(tensors | {key: torch.tensor(1.5)}, source)
    with pytest.raises(Unclaimed, match="CLIP-L|text_encoder"):
        run(source, tmp_path / "no", to="peft")
    report = run(source, tmp_path / "made", to="peft", only=("unet",))
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((tmp_path / "made" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (RANK, 2 * RANK, "LORA")
    assert list(config["alpha_pattern"].values()) == [1.5]
    with Adapter.open(tmp_path / "made") as adapter:
        assert {entry.facts.scale for entry in adapter.entries.values()} == {2.0, 0.5}
    assert report.relative_error == 0.0
    mine, theirs = deltas(source, "sd1", "kohya"), deltas(tmp_path / "made", "sd1", "peft")
    for target, delta in theirs.items():
        np.testing.assert_array_equal(delta, mine[target])
    with pytest.raises(WouldOverwrite):
        run(source, tmp_path / "made", to="peft", only=("unet",))
    (tmp_path / "made" / "holiday.jpg").touch()
    with pytest.raises(WouldOverwrite, match=r"holiday\.jpg"):
        run(source, tmp_path / "made", to="peft", only=("unet",), overwrite=True)
    (tmp_path / "made" / "holiday.jpg").unlink()
    run(source, tmp_path / "made", to="peft", only=("unet",), overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "made"]


def test_mixed_ranks_are_told_to_diffusers(tmp_path: Path) -> None:
    """diffusers before 0.42 scales every module by the first one's rank where nothing says otherwise."""
    import json

    source = lora("sd1", "kohya", tmp_path / "a.safetensors")
    tensors = load_file(source)
    stem = next(key for key in tensors if key.startswith("lora_unet_")).partition(".")[0]
    wider = {
        f"{stem}.lora_up.weight": torch.ones(8, 5).half(),
        f"{stem}.lora_down.weight": torch.ones(5, 6).half(),
    }
    save_file(tensors | wider | {f"{stem}.alpha": torch.tensor(5.0)}, source)
    run(source, tmp_path / "b.safetensors", to="diffusers")
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        told = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (told["unet.r"], told["unet.lora_alpha"]) == (RANK, RANK)
    assert (
        list(told["unet.rank_pattern"].values()) == list(told["unet.alpha_pattern"].values()) == [5]
    )
    before = deltas(source, "sd1", "kohya")
    for target, delta in deltas(tmp_path / "b.safetensors", "sd1", "diffusers").items():
        np.testing.assert_array_equal(delta, before[target])


class TestRefusals:
    def test_an_unknown_key_is_named_with_the_nearest_known_one(self, tmp_path: Path) -> None:
        source = lora("sd1", "kohya", tmp_path / "a.safetensors")
        wrong = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_atn1_to_q.lora_up.weight"
        save_file(load_file(source) | {wrong: torch.ones(2, 2)}, source)
        with pytest.raises(Unclaimed, match="atn1_to_q") as caught:
            run(source, tmp_path / "b.safetensors", to="comfy")
        assert (
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight"
            in str(caught.value)
        )
        assert not (tmp_path / "b.safetensors").exists()
        report = run(source, tmp_path / "b.safetensors", to="comfy", allow_unused=True)
        assert [item.key for item in report.unused] == [wrong]

    def test_zero_modules(self, tmp_path: Path) -> None:
        source = lora("sd1", "kohya", tmp_path / "a.safetensors")
        with pytest.raises(NothingToDo):
            run(source, tmp_path / "b.safetensors", to="comfy", skip=("*",))
        with pytest.raises(NothingToDo):
            run(source, tmp_path / "b.safetensors", to="xlabs", allow_unused=True)
        assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]

    def test_names_and_outputs(self, tmp_path: Path) -> None:
        source = lora("sd1", "kohya", tmp_path / "a.safetensors")
        with pytest.raises(NoSuchName, match="unknown format 'comfyui'"):
            run(source, tmp_path / "b.safetensors", to="comfyui")
        with pytest.raises(NoSuchName, match="unknown algorithm"):
            run(source, tmp_path / "b.safetensors", to="comfy", algo="lroa")
        with pytest.raises(WouldOverwrite):
            run(source, source, to="comfy")

    def test_over_its_own_input(self, tmp_path: Path) -> None:
        source = lora("sd1", "kohya", tmp_path / "a.safetensors")
        before = deltas(source, "sd1", "kohya")
        run(source, source, to="comfy", overwrite=True, family="sd1")
        after = deltas(source, "sd1", "comfy")
        assert all(np.array_equal(after[target], delta) for target, delta in before.items())


def test_an_unknown_family_keeps_its_names(tmp_path: Path) -> None:
    tensors = {
        f"diffusion_model.strange.{i}.layer.lora_{side}.weight": torch.ones(4, 4)
        for i in range(3)
        for side in "AB"
    }
    save_file(tensors, tmp_path / "a.safetensors")
    report = run(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="kohya")
    assert report.modules == 3
    keys = set(load_file(tmp_path / "b.safetensors"))
    assert "lora_unet_strange_1_layer.lora_up.weight" in keys
    with pytest.raises(Unclaimed, match="no place|no name"):
        run(tmp_path / "a.safetensors", tmp_path / "c.safetensors", to="diffusers")
    with pytest.raises(
        Unclaimed, match="no place|no name"
    ):  # underscores cannot be turned back into dots
        run(tmp_path / "b.safetensors", tmp_path / "c.safetensors", to="comfy")


def test_dtype_and_dry_plan(tmp_path: Path) -> None:
    source = lora("sd1", "kohya", tmp_path / "a.safetensors")
    plan = convert.plan(
        source, convert.Options(to="comfy", output=tmp_path / "b.safetensors", dtype="bf16")
    )
    assert plan.to_dict()["cast"] == plan.to_dict()["modules"]
    report = convert.run(plan)
    plan.close()
    assert 0 < report.relative_error < 2**-8
    assert {
        t.dtype for key, t in load_file(tmp_path / "b.safetensors").items() if "alpha" not in key
    } == {torch.bfloat16}
    assert replace(report, seconds=0.0).to_dict()["changes"] == {"cast": report.modules}


Maker = Callable[..., Path]


def test_look_alikes_ask_only_where_the_names_differ(tmp_path: Path) -> None:
    if "chroma" not in families():
        pytest.skip("no look-alike here yet")
    keys = compile_keys("flux", "kohya")
    slots = [
        (s, r)
        for s, r in tiny_slots("flux", "kohya")
        if s.target.module.endswith(("img_attn.proj", "linear2"))
    ]
    tensors = {keys.spell(s, "lora", "up"): torch.ones(r, 2) for s, r in slots}
    tensors |= {keys.spell(s, "lora", "down"): torch.ones(2, 4) for s, _ in slots}
    save_file(tensors, tmp_path / "a.safetensors")
    with Adapter.open(tmp_path / "a.safetensors") as adapter:
        assert adapter.family.name == "flux"
        assert "chroma" in adapter.detection.alternatives
    run(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="comfy")  # named alike in both
    q = keys.spell(slots[0][0], "lora", "up").replace("img_attn_proj", "img_attn_qkv")
    # as diffusers names, FLUX.1 and HunyuanVideo differ in what kohya calls them
    stem = "transformer.transformer_blocks.0.norm1.linear"
    ff = {f"{stem}.lora_A.weight": torch.ones(2, 4), f"{stem}.lora_B.weight": torch.ones(16, 2)}
    save_file(ff, tmp_path / "d.safetensors")
    with pytest.raises(AmbiguousAdapter, match="may be") as caught:
        run(tmp_path / "d.safetensors", tmp_path / "e.safetensors", to="kohya")
    assert "--family" in (caught.value.hint or "")
    assert q


def test_not_representable_says_what_would_work(tmp_path: Path) -> None:
    keys = compile_keys("flux", "kohya")
    slot = next(
        s for s, _ in tiny_slots("flux", "kohya") if s.target.module.endswith("img_attn.qkv")
    )
    tensors = {
        keys.spell(slot, "lokr", "w1"): torch.ones(2, 2),
        keys.spell(slot, "lokr", "w2"): torch.ones(12, 3),
        keys.spell(slot, "lokr", "alpha"): torch.tensor(1.0),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(NotRepresentable, match="Kronecker block") as caught:
        run(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="diffusers", family="flux")
    assert "lora" in (caught.value.hint or "")
    assert not (tmp_path / "b.safetensors").exists()
