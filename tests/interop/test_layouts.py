"""merge --layout against diffusers: its single-file converters give what we write, and its models load it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adaptkit.ops import merge
from tests.ops.merge.test_relayout import adapter, read, same, whole
from tests.ops.models import save

pytest.importorskip("diffusers")

import diffusers
from diffusers.loaders import single_file_utils

CHANNELS = (4, 8, 16, 16)


def vae(channels: tuple[int, ...] = CHANNELS) -> torch.nn.Module:
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=channels,
        layers_per_block=2,
        norm_num_groups=2,
    )


def test_the_autoencoder_is_named_as_diffusers_names_it(tmp_path: Path) -> None:
    """Its converter and ours agree on every tensor, and the model loads each of them."""
    state = whole("sd1", torch.float32)
    base = save(tmp_path / "base.safetensors", state)
    lora = adapter(tmp_path, "sd1", base, state)
    merge.run(
        merge.plan(base, [(lora, 1.0)], merge.Options(output=tmp_path / "out", layout="folder"))
    )
    found = load_file(tmp_path / "out" / "vae" / "diffusion_pytorch_model.safetensors")
    model = vae()
    theirs = single_file_utils.convert_ldm_vae_checkpoint(dict(state), dict(model.config))
    same(
        found,
        {
            key: tensor.squeeze() if "attentions" in key and tensor.ndim == 4 else tensor
            for key, tensor in theirs.items()
        },
    )
    assert found.keys() == model.state_dict().keys()


def test_a_folder_that_diffusers_wrote_becomes_the_single_file(tmp_path: Path) -> None:
    """A real (narrow) U-Net and autoencoder, saved by diffusers; its own converters lead from our file back to them."""
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16, 16, 16),
        norm_num_groups=2,
        cross_attention_dim=768,
        attention_head_dim=2,
    )
    parts = {"unet": unet, "vae": vae()}
    for name, model in parts.items():
        model.save_pretrained(tmp_path / "model" / name)
    state = unet.state_dict()
    target = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    rows, columns = state[f"{target}.weight"].shape
    lora = save(
        tmp_path / "lora.safetensors",
        {
            f"unet.{target}.lora_A.weight": torch.randn(2, columns),
            f"unet.{target}.lora_B.weight": torch.randn(rows, 2),
        },
    )
    output = tmp_path / "one.safetensors"
    options = merge.Options(output=output, layout="single-file", family="sd1", verify=True)
    merge.run(merge.plan(tmp_path / "model", [(lora, 0.5)], options))
    single = read(output)
    ours = single_file_utils.convert_ldm_unet_checkpoint(dict(single), dict(unet.config))
    up, down = load_file(lora).values()
    expected = {**state, f"{target}.weight": state[f"{target}.weight"] + 0.5 * (down @ up)}
    assert ours.keys() == expected.keys()
    assert all(torch.allclose(ours[key], tensor, atol=1e-6) for key, tensor in expected.items())
    back = single_file_utils.convert_ldm_vae_checkpoint(dict(single), dict(parts["vae"].config))
    theirs = parts["vae"].state_dict()
    assert back.keys() == theirs.keys()
    assert all(
        torch.equal(back[key].reshape(tensor.shape), tensor) for key, tensor in theirs.items()
    )
