"""A tiny SD 1 model under its real names, as a single-file checkpoint and as the diffusers modules that it makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit.adapter import Adapter
from adaptkit.ops import extract, merge
from tests.ops.models import Delta, lokr_delta, lora_delta, noise_delta

State = dict[str, torch.Tensor]

UNET, CLIP = "model.diffusion_model.", "cond_stage_model.transformer."


SIZE = 0.1  # of the differences, beside weights of unit gain


def lora(rank: int) -> Delta:
    return lora_delta(rank, SIZE)


def lokr(factor: int, rank: int | None = None) -> Delta:
    return lokr_delta(factor, rank, SIZE)


noise = noise_delta(SIZE)


class Sd1:
    """The base checkpoint, what it becomes under a known difference, and what adaptkit makes of the pair."""

    def __init__(self, folder: Path) -> None:
        from tests.generate import Tiny

        random = np.random.default_rng(17)
        self.folder = folder
        self.base: State = {name: t.float() for name, t in Tiny().base.items()}
        for name, tensor in self.base.items():  # norms and biases that are not all alike
            if tensor.ndim == 1:
                self.base[name] = (
                    tensor + torch.from_numpy(0.1 * random.standard_normal(tensor.shape)).float()
                )
        self.path = self._save("base", self.base)
        self._tuned: dict[str, Path] = {}

    def _save(self, name: str, state: State) -> Path:
        path = self.folder / f"{name}.safetensors"
        save_file(state, path, metadata={"format": "pt"})
        return path

    def matrices(self) -> list[str]:
        """The weights an adapter may hold low-rank: linear layers and convolutions."""
        return [name for name, t in self.base.items() if t.ndim >= 2 and "embedding" not in name]

    def tuned(self, name: str, delta: Delta, *, vectors: bool = False) -> Path:
        """base + delta in every matrix (`vectors`: and in every bias and norm), as a checkpoint."""
        if name not in self._tuned:
            random = np.random.default_rng(23)
            state = dict(self.base)
            for key in self.matrices() + (
                [k for k, t in self.base.items() if t.ndim == 1] if vectors else []
            ):
                change = delta if self.base[key].ndim > 1 else noise
                state[key] = (
                    state[key].double() + torch.from_numpy(change(tuple(state[key].shape), random))
                ).float()
            self._tuned[name] = self._save(f"tuned-{name}", state)
        return self._tuned[name]

    def extract(self, tuned: Path, output: Path, **options: Any) -> extract.Report:
        """`adaptkit extract`."""
        return extract.run(
            extract.plan(
                self.path, tuned, extract.Options(output=output, overwrite=True, **options)
            )
        )

    def merge(self, adapter: Path, output: Path, strength: float = 1.0, **options: Any) -> State:
        """`adaptkit merge`."""
        merge.run(
            merge.plan(
                self.path,
                [(adapter, strength)],
                merge.Options(output=output, overwrite=True, **options),
            )
        )
        return load_file(output)

    def unet(self, state: State | None = None) -> Any:
        """A real UNet2DConditionModel with the weights of a checkpoint, named by diffusers' own converter."""
        from diffusers import UNet2DConditionModel

        from tests.generate import TINY_UNET

        model = UNet2DConditionModel(**TINY_UNET)
        model.load_state_dict(unet_names(self.base if state is None else state))
        return model.eval()

    def clip(self, state: State | None = None) -> Any:
        """A real CLIPTextModel with the weights of a checkpoint."""
        from transformers import CLIPTextConfig, CLIPTextModel

        from tests.generate import TINY_CLIP

        model = CLIPTextModel(CLIPTextConfig(**TINY_CLIP, bos_token_id=0, eos_token_id=1))
        found = clip_names(self.base if state is None else state)
        if not hasattr(model, "text_model"):  # transformers 5
            found = {name.removeprefix("text_model."): t for name, t in found.items()}
        missing, unexpected = model.load_state_dict(found, strict=False)
        assert not unexpected
        assert all(name.endswith("position_ids") for name in missing)
        return model.eval()


def unet_names(state: State) -> State:
    """The U-Net of a checkpoint under diffusers' names, by diffusers' own converter: no table of ours is asked."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    part = {name: t for name, t in state.items() if name.startswith(UNET)}
    return dict(
        convert_ldm_unet_checkpoint(part, {"layers_per_block": 2, "class_embed_type": None})
    )


def clip_names(state: State) -> State:
    """The text encoder of a checkpoint under transformers' names (`text_model.…`)."""
    return {name.removeprefix(CLIP): t for name, t in state.items() if name.startswith(CLIP)}


def deltas(path: Path, **options: Any) -> dict[str, torch.Tensor]:
    """What adaptkit reads in a file: ΔW by label (`unet.….to_q`), in float64; kernels are flattened."""
    with Adapter.open(path, **options) as adapter:
        assert not adapter.problems
        assert not adapter.unclaimed
        found = {}
        for slot, entry in adapter.entries.items():
            wide = {role: tensor.double() for role, tensor in adapter.read(entry).items()}
            found[adapter.label(slot)] = entry.kind.decode(wide, entry.facts).delta()
        return found


def close(one: torch.Tensor, two: torch.Tensor, tolerance: float = 1e-6) -> bool:
    """‖one − two‖ ≤ tolerance ‖two‖, for something that is not zero."""
    one, two = one.detach().double(), two.detach().double()
    size = float(two.norm())
    return size > 0 and float((one - two).norm()) <= tolerance * size


@pytest.fixture(scope="session")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Sd1:
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    return Sd1(tmp_path_factory.mktemp("sd1"))
