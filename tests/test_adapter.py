"""An adapter file as it is understood: where alpha comes from, what is left over, what is wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from adaptkit.adapter import Adapter, open_adapter_source
from adaptkit.errors import UnknownAdapter
from adaptkit.names import Slot, Target
from tests import made

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
RANK = 4


def peft(path: Path, config: dict[str, object], *modules: str) -> Path:
    """A folder as `save_pretrained` leaves it."""
    path.mkdir()
    tensors = {}
    for module in modules:
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.ones(RANK, 320)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.ones(320, RANK)
    save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def scales(adapter: Adapter) -> dict[str, float]:
    found = {slot.target.module: entry.facts.scale for slot, entry in adapter.entries.items()}
    assert found
    return found


@pytest.mark.parametrize("kind", made.KINDS)
def test_weights_are_those_of_the_file(kind: str, tmp_path: Path) -> None:
    path = made.adapter(tmp_path / "a.safetensors", kind)
    expected = made.deltas(path)
    with Adapter.open(path) as adapter:
        assert (adapter.known, adapter.unclaimed, adapter.problems) == (True, {}, ())
        found = {
            adapter.keys.stem(slot): adapter.weights(entry).delta().double().numpy()
            for slot, entry in adapter.entries.items()
        }
        for entry in adapter.entries.values():
            assert "alpha" not in adapter.read(entry)
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        np.testing.assert_allclose(found[name], delta, rtol=1e-4, atol=1e-4)


def test_the_alpha_of_a_tensor_goes_before_all_else(tmp_path: Path) -> None:
    path = made.adapter(tmp_path / "a.safetensors", rank=6)
    with Adapter.open(path) as adapter:
        assert set(scales(adapter).values()) == {0.75}
        assert {entry.alpha for entry in adapter.entries.values()} == {4.5}
        assert adapter.alpha_source == "tensor"


def test_alpha_sources_differ_or_are_none(tmp_path: Path) -> None:
    silent = made.module("lora", made.LINEAR, (24, 32), np.random.default_rng(0))
    tensors = {key: torch.tensor(value) for key, value in silent.items()}
    del tensors[f"{made.LINEAR}.alpha"]
    alone = tmp_path / "alone.safetensors"
    save_file(tensors, alone)
    mixed = made.adapter(tmp_path / "mixed.safetensors", names=[made.WIDE], extra=tensors)
    full = made.adapter(tmp_path / "full.safetensors", "full")
    for path, source in ((alone, "none"), (mixed, "mixed"), (full, "none")):
        with Adapter.open(path, family="sd1") as adapter:
            assert adapter.alpha_source == source, path
            assert adapter.entries


def test_a_peft_configuration_states_alpha_and_rank(tmp_path: Path) -> None:
    config: dict[str, object] = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 6,
        "alpha_pattern": {"attn1.to_k": 2, "to_q": 1, r"attn\d.to_v": 3},
    }
    modules = [f"{BLOCK}.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]
    with Adapter.open(peft(tmp_path / "a", config, *modules), family="sd1") as adapter:
        assert scales(adapter) == {
            f"{BLOCK}.to_q": 1 / RANK,
            f"{BLOCK}.to_k": 2 / RANK,
            f"{BLOCK}.to_v": 3 / RANK,
            f"{BLOCK}.to_out.0": 6 / RANK,
        }
        assert adapter.alpha_source == "metadata"
        assert adapter.format.name == "peft"


def test_a_pattern_stands_for_whole_words_at_the_end(tmp_path: Path) -> None:
    config: dict[str, object] = {"lora_alpha": 6, "alpha_pattern": {"o_q": 1, "to": 2, "attn1": 3}}
    with Adapter.open(peft(tmp_path / "a", config, f"{BLOCK}.to_q"), family="sd1") as adapter:
        assert set(scales(adapter).values()) == {6 / RANK}


def test_rank_stabilised_alphas_are_divided_by_the_root(tmp_path: Path) -> None:
    config: dict[str, object] = {"lora_alpha": 6, "use_rslora": True}
    with Adapter.open(peft(tmp_path / "a", config, f"{BLOCK}.to_q"), family="sd1") as adapter:
        assert set(scales(adapter).values()) == {6 / math.sqrt(RANK)}


def test_without_an_alpha_the_scale_is_one(tmp_path: Path) -> None:
    with Adapter.open(peft(tmp_path / "a", {"r": 4}, f"{BLOCK}.to_q"), family="sd1") as adapter:
        assert set(scales(adapter).values()) == {1.0}
        assert adapter.alpha_source == "none"


def test_diffusers_states_alpha_for_each_part_of_the_pipeline(tmp_path: Path) -> None:
    stems = {
        f"unet.{BLOCK}.to_q": 320,
        "text_encoder.text_model.encoder.layers.0.mlp.fc1": 768,
    }
    tensors = {}
    for stem, width in stems.items():
        tensors[f"{stem}.lora_A.weight"] = torch.ones(RANK, width)
        tensors[f"{stem}.lora_B.weight"] = torch.ones(4 * width if width == 768 else width, RANK)
    told = {"unet.lora_alpha": 8, "text_encoder.lora_alpha": 2, "unet.alpha_pattern": {"x": 1}}
    path = tmp_path / "a.safetensors"
    for metadata, expected in (
        ({"lora_adapter_metadata": json.dumps(told)}, (2.0, 0.5)),
        ({"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 8})}, (2.0, 1.0)),
        ({"lora_adapter_metadata": "not JSON"}, (1.0, 1.0)),
        ({"lora_adapter_metadata": "[1]"}, (1.0, 1.0)),
    ):
        save_file(tensors, path, metadata)
        with Adapter.open(path, family="sd1") as adapter:
            found = {slot.component: e.facts.scale for slot, e in adapter.entries.items()}
        assert (found["unet"], found["text_encoder"]) == expected


def test_what_fits_nothing_is_listed_with_the_reason(tmp_path: Path) -> None:
    extra = {
        "lora_te7_nowhere.lora_up.weight": torch.ones(2, 2),
        f"{made.WIDE}.lora_up.weight": torch.ones(48, 4),
        f"{made.POINT}.lora_up.weight": torch.ones(20, 4, 1, 1),
        f"{made.POINT}.lora_down.weight": torch.ones(3, 16, 1, 1),
        "bundle_emb.style.clip_l": torch.ones(2, 3),
    }
    path = made.adapter(tmp_path / "a.safetensors", names=[made.LINEAR, made.CONV], extra=extra)
    with Adapter.open(path, family="sd1") as adapter:
        assert {adapter.keys.stem(slot) for slot in adapter.entries} == {made.LINEAR, made.CONV}
        reasons = dict(adapter.unclaimed)
        assert adapter.carried == ("bundle_emb.style.clip_l",)
        problems = {problem.module: problem for problem in adapter.problems}
    assert reasons.keys() == extra.keys() - {"bundle_emb.style.clip_l"}
    assert "no such module" in reasons["lora_te7_nowhere.lora_up.weight"]
    assert reasons[f"{made.WIDE}.lora_up.weight"] == "lora_down.weight is missing"
    assert "do not fit together" in reasons[f"{made.POINT}.lora_up.weight"]
    assert len(problems) == 2
    assert {problem.severity for problem in problems.values()} == {"error"}
    assert "unet.down_blocks.0.attentions.0.proj_in" in problems


def test_a_weight_is_labelled_as_its_file_names_it(tmp_path: Path) -> None:
    stem = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    tensors = {
        f"{stem}.lora_up.weight": torch.ones(640, 4),
        f"{stem}.lora_down.weight": torch.ones(4, 640),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    with Adapter.open(tmp_path / "a.safetensors") as adapter:
        (slot,) = adapter.entries
        assert adapter.label(slot) == "unet.input_blocks.4.1.transformer_blocks.0.attn1.to_q"
        other = Slot(Target("unet", "down_blocks.1.attentions.0.proj_in"))
        assert adapter.label(other) == "unet.down_blocks.1.attentions.0.proj_in"


def test_kinds_are_counted_the_most_frequent_first(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    extra = made.module("loha", made.CONV, made.SHAPES[made.CONV], draw)
    path = made.adapter(
        tmp_path / "a.safetensors",
        names=[made.LINEAR, made.WIDE],
        extra={key: torch.tensor(value) for key, value in extra.items()},
    )
    with Adapter.open(path, family="sd1") as adapter:
        assert list(adapter.algorithms().items()) == [("lora", 2), ("loha", 1)]


def test_flat_factors_of_a_convolution_take_the_kernel_of_the_table(tmp_path: Path) -> None:
    with Adapter.open(made.adapter(tmp_path / "a.safetensors", "loha")) as adapter:
        kernels = {adapter.keys.stem(s): e.facts.kernel for s, e in adapter.entries.items()}
    assert kernels[made.CONV] == (3, 3)
    assert kernels[made.LINEAR] == ()


def test_an_oft_whose_rotation_is_another_is_a_problem(tmp_path: Path) -> None:
    for config, count in (
        ({"peft_type": "OFT"}, 0),
        ({"peft_type": "OFT", "use_cayley_neumann": True, "coft": False}, 0),
        ({"peft_type": "OFT", "coft": True}, 1),
        ({"peft_type": "OFT", "use_cayley_neumann": False, "num_cayley_neumann_terms": 7}, 2),
        ({"peft_type": "LORA", "coft": True}, 0),
    ):
        path = peft(tmp_path / f"{len(list(tmp_path.iterdir()))}", config, f"{BLOCK}.to_q")
        with Adapter.understand(*open_adapter_source(path), family="sd1") as adapter:
            assert len(adapter.problems) == count, config
            assert all("not supported" in problem.what for problem in adapter.problems)


def test_a_folder_with_a_broken_configuration_is_refused_by_name(tmp_path: Path) -> None:
    path = peft(tmp_path / "a", {}, f"{BLOCK}.to_q")
    (path / "adapter_config.json").write_text("{")
    with pytest.raises(UnknownAdapter, match="not valid JSON") as caught:
        open_adapter_source(path)
    assert caught.value.file == str(path / "adapter_config.json")


def test_a_checkpoint_is_no_adapter(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"model.diffusion_model.out.2.weight": torch.ones(4, 4)}, path)
    with pytest.raises(UnknownAdapter, match="no known family and key format") as caught:
        Adapter.open(path)
    assert caught.value.file == str(path)
    assert "model.diffusion_model.out.2.weight" in (caught.value.hint or "")


def test_modules_nobody_has_a_table_for_are_named_by_the_file(tmp_path: Path) -> None:
    stem = "transformer.strange.0.mixer"
    tensors = {
        f"{stem}.lora_A.weight": torch.ones(2, 8),
        f"{stem}.lora_B.weight": torch.ones(8, 2),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    with Adapter.open(tmp_path / "a.safetensors") as adapter:
        assert not adapter.known
        assert list(adapter.entries) == [Slot(Target("transformer", "strange.0.mixer"))]
    with pytest.raises(UnknownAdapter):
        Adapter.open(tmp_path / "a.safetensors", family="flux")
