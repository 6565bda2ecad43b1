"""The ComfyUI node of the guide, executed against the shape of the interfaces it meets, and checked in NumPy.

`ModelPatcher.add_patches`, `calculate_weight` and `CLIP` are as in ComfyUI of 2026-11 (comfy/model_patcher.py,
comfy/lora.py, comfy/sd.py), as far as a node sees them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import jobs
from tests.examples import GUIDE, blocks
from tests.jobs import LINEAR, TEXT, adapter, deltas

(BLOCK,) = (
    one.body for one in blocks(GUIDE / "reference" / "comfyui-node.md") if one.language == "py"
)
Patch = tuple[float, Any, float, None, None]


class ModelPatcher:
    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self.weights, self.patches = weights, {}  # type: tuple[dict[str, torch.Tensor], dict[str, list[Patch]]]

    def clone(self) -> ModelPatcher:
        made = ModelPatcher(self.weights)
        made.patches = {key: list(held) for key, held in self.patches.items()}
        return made

    def model_state_dict(self, filter_prefix: str | None = None) -> dict[str, torch.Tensor]:
        assert filter_prefix is None
        return dict(self.weights)

    def add_patches(
        self, patches: dict[str, Any], strength_patch: float = 1.0, strength_model: float = 1.0
    ) -> list[str]:
        known = [key for key in patches if key in self.weights]
        for key in known:
            held = self.patches.setdefault(key, [])
            held.append((strength_patch, patches[key], strength_model, None, None))
        return known

    def weight(self, key: str) -> torch.Tensor:
        """What ComfyUI computes with: the weight with its patches, in float32."""
        weight = self.weights[key].float()
        for strength, (kind, (diff, *_)), _, _, _ in self.patches.get(key, []):
            assert kind == "diff"
            assert diff.shape == weight.shape  # a mismatch is a warning and no patch
            weight = weight + strength * diff.to(weight.dtype)
        return weight


class Clip:
    """comfy.sd.CLIP: a patcher inside."""

    def __init__(self, patcher: ModelPatcher) -> None:
        self.patcher = patcher

    def clone(self) -> Clip:
        return Clip(self.patcher.clone())

    def add_patches(self, patches: dict[str, Any], strength_patch: float = 1.0) -> list[str]:
        return self.patcher.add_patches(patches, strength_patch)


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    paths = ModuleType("folder_paths")
    paths.get_filename_list = lambda kind: (
        sorted(p.name for p in tmp_path.iterdir()) if kind == "loras" else []
    )  # type: ignore[attr-defined]
    paths.get_full_path = lambda _, name: str(tmp_path / name)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "folder_paths", paths)
    space: dict[str, Any] = {}
    exec(compile(BLOCK, "comfyui-node.md", "exec"), space)
    return space["NODE_CLASS_MAPPINGS"]["AdaptkitStack"]


def loaded() -> tuple[ModelPatcher, Clip]:
    """The parts of the tiny SD 1.x checkpoint under the names that ComfyUI gives them."""
    stored = load_file(jobs.TINY / "base.safetensors")
    unet, text = "model.diffusion_model.", "cond_stage_model."
    model = {k.removeprefix("model."): t for k, t in stored.items() if k.startswith(unet)}
    clip = {f"clip_l.{k.removeprefix(text)}": t for k, t in stored.items() if k.startswith(text)}
    return ModelPatcher(model), Clip(ModelPatcher(clip))


def test_the_node_is_short_and_says_its_inputs(node: Any, tmp_path: Path) -> None:
    assert len(BLOCK.splitlines()) <= 60
    adapter(tmp_path / "a.safetensors")
    inputs = node.INPUT_TYPES()["required"]
    assert inputs["first"] == (["a.safetensors"],)
    assert node.RETURN_TYPES == ("MODEL", "CLIP")
    assert set(inputs) == {"model", "clip", "rank", "first", "second", "weight_1", "weight_2"}
    assert callable(getattr(node, node.FUNCTION))


def test_the_node_patches_a_model_with_the_sum_of_two_adapters(node: Any, tmp_path: Path) -> None:
    one = adapter(tmp_path / "a.safetensors")
    two = adapter(tmp_path / "b.safetensors", "lokr", seed=1)
    model, clip = loaded()
    made, encoder = getattr(node(), node.FUNCTION)(
        model, clip, 1024, one.name, two.name, weight_1=0.8, weight_2=-0.5
    )
    assert model.patches == clip.patcher.patches == {}  # the originals are as they were
    expected = jobs.added((deltas(one), 0.8), (deltas(two), -0.5))
    for name in LINEAR:
        key = jobs.original(name).removeprefix("model.").replace("cond_stage_model.", "clip_l.")
        held = encoder.patcher if name == TEXT else made
        before = held.weights[key].double()
        meant = before + torch.from_numpy(expected[jobs.dotted(name)]).reshape(before.shape)
        assert torch.allclose(held.weight(key).double(), meant, rtol=0, atol=1e-5)
        assert not torch.allclose(held.weight(key).double(), before, rtol=0, atol=1e-3)
    changed = {*made.patches, *encoder.patcher.patches}
    assert len(changed) == len(LINEAR)


def test_the_rank_cuts_and_a_stranger_is_refused(node: Any, tmp_path: Path) -> None:
    one = adapter(tmp_path / "a.safetensors")
    model, clip = loaded()
    made, _ = node().apply(model, clip, 1, one.name, one.name, 0.5, 0.5)
    (key, ((_, (_, (diff,)), *_),)) = next(iter(made.patches.items()))
    assert key.startswith("diffusion_model.")
    assert torch.linalg.matrix_rank(diff.reshape(len(diff), -1), rtol=1e-4) == 1
    del model.weights[key]
    with pytest.raises(ValueError, match="1 layers are not in this model"):
        node().apply(model, clip, 4, one.name, one.name, 0.5, 0.5)
