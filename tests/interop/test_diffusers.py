"""A LoRA that adaptkit wrote, in a real diffusers U-Net and transformers text encoder.

`peft` layers tell what they add (`get_delta_weight`), so that a module that was dropped, or scaled, is seen.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.interop.conftest import Sd1, clip_names, close, deltas, lokr, lora, noise, unet_names

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("peft")

pytestmark = pytest.mark.interop


def load(sd1: Sd1, path: Path) -> tuple[Any, Any]:
    """(U-Net, text encoder) with the adapter, as `StableDiffusionPipeline.load_lora_weights` loads it."""
    pipeline, unet, clip = diffusers.StableDiffusionPipeline, sd1.unet(), sd1.clip()
    state, alphas, metadata = pipeline.lora_state_dict(
        str(path.parent), weight_name=path.name, unet_config=unet.config, return_lora_metadata=True
    )
    pipeline.load_lora_into_unet(state, network_alphas=alphas, unet=unet, metadata=metadata)
    pipeline.load_lora_into_text_encoder(
        state, network_alphas=alphas, text_encoder=clip, metadata=metadata
    )
    return unet, clip


def in_layers(unet: Any, clip: Any) -> dict[str, torch.Tensor]:
    """What each adapted layer adds to its weight, by adaptkit's labels."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = {}
    for part, model in (("unet", unet), ("text_encoder", clip)):
        for name, module in model.named_modules():
            if isinstance(module, BaseTunerLayer):
                (adapter,) = module.active_adapters
                root = (
                    "text_encoder.text_model." if part == "text_encoder" else "unet."
                )  # transformers 5 leaves it out
                found[root + name.removeprefix("text_model.")] = module.get_delta_weight(
                    adapter
                ).detach()
    return found


def wrong(theirs: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> dict[str, float]:
    """Layers where diffusers' ΔW is not adaptkit's, with the factor it is off by."""
    return {
        name: float((theirs[name].reshape(mine.shape) * mine).sum() / mine.square().sum())
        for name, mine in ours.items()
        if not close(theirs[name].reshape(mine.shape), mine, 1e-5)
    }


@pytest.fixture(scope="session")
def noisy(sd1: Sd1) -> Path:
    return sd1.tuned("noise", noise)


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
@pytest.mark.parametrize("rank", [{"rank": 6, "conv_rank": 2}])
def test_every_layer_is_loaded_with_its_delta(
    sd1: Sd1, noisy: Path, tmp_path: Path, to: str, rank: dict[str, int]
) -> None:
    output = tmp_path / "out.safetensors"
    report = sd1.extract(noisy, output, to=to, **rank)
    ours = deltas(output)
    theirs = in_layers(*load(sd1, output))
    assert theirs.keys() == ours.keys()
    assert report.modules == len(theirs) == len(sd1.matrices())
    assert not wrong(theirs, ours)


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_a_fused_model_is_the_merged_checkpoint(sd1: Sd1, tmp_path: Path, to: str) -> None:
    """`fuse_lora` against `adaptkit merge`; biases and norms did not change."""
    output = tmp_path / "out.safetensors"
    tuned = sd1.tuned("lora-3", lora(3))
    sd1.extract(tuned, output, to=to, rank=3)
    merged = sd1.merge(output, tmp_path / "merged.safetensors")
    unet, clip = load(sd1, output)
    unet.fuse_lora()
    unet.unload_lora()
    fused, expected = unet.state_dict(), unet_names(merged)
    assert fused.keys() == expected.keys()
    assert all(close(fused[name], tensor, 5e-7) for name, tensor in expected.items())
    assert all(
        close(fused[name], tensor, 1e-6) for name, tensor in unet_names(load_file(tuned)).items()
    )
    texts = clip_names(merged)
    theirs = in_layers(sd1.unet(), clip)
    for label, delta in theirs.items():
        name = f"{label.removeprefix('text_encoder.')}.weight"
        assert close(texts[name], clip_names(sd1.base)[name] + delta, 5e-7)
    assert len(theirs) == 72


@pytest.mark.parametrize("to", ["kohya"])
def test_a_whole_pipeline_loads_it(sd1: Sd1, noisy: Path, tmp_path: Path, to: str) -> None:
    """`pipe.load_lora_weights(file)` and `pipe.fuse_lora()`, with half the strength."""
    output = tmp_path / "out.safetensors"
    sd1.extract(noisy, output, to=to, rank=4)
    with torch.random.fork_rng():
        vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=sd1.clip(), tokenizer=None, unet=sd1.unet(), scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.load_lora_weights(str(output.parent), weight_name=output.name)
    pipe.fuse_lora(lora_scale=0.5)
    pipe.unload_lora_weights()
    merged = sd1.merge(output, tmp_path / "merged.safetensors", strength=0.5)
    for name, tensor in unet_names(merged).items():
        assert close(pipe.unet.state_dict()[name], tensor, 5e-7), name
    found = {
        n if n.startswith("text_model.") else f"text_model.{n}": t
        for n, t in pipe.text_encoder.state_dict().items()
    }
    for name, tensor in clip_names(merged).items():
        assert close(found[name], tensor, 5e-7), name


def test_the_merged_checkpoint_predicts_what_the_loaded_lora_does(
    sd1: Sd1, noisy: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.safetensors"
    sd1.extract(noisy, output, rank=4)
    merged = sd1.merge(output, tmp_path / "merged.safetensors")
    generator = torch.Generator().manual_seed(9)
    sample, tokens = (
        torch.randn(1, 4, 16, 16, generator=generator),
        torch.randint(2, 256, (1, 20), generator=generator),
    )

    @torch.no_grad()
    def predict(unet: Any, clip: Any) -> torch.Tensor:
        text = clip.eval()(tokens).last_hidden_state
        return unet.eval()(sample, 500, text).sample

    ours, theirs = predict(sd1.unet(merged), sd1.clip(merged)), predict(*load(sd1, output))
    base = predict(sd1.unet(), sd1.clip())
    assert close(ours, theirs, 1e-4)
    assert not close(base, theirs, 1e-2)


# --- what diffusers does not do, so that what the guide says of it stays true ---------------------------------------


def test_diffusers_refuses_vectors_under_kohya_names(sd1: Sd1, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    tuned = sd1.tuned("noise-vectors", noise, vectors=True)
    sd1.extract(tuned, output, rank=4, vectors=True)
    with pytest.raises(
        ValueError, match=r"not been correctly renamed(?s:.*)\.(diff_b|w_norm|b_norm)"
    ):
        load(sd1, output)
    report = sd1.extract(tuned, output, rank=4, only=("unet.mid_block.*", "text_encoder.*.0.*"))
    assert len(in_layers(*load(sd1, output))) == report.modules > 20


def test_diffusers_drops_norms_under_its_own_names_and_reads_biases(
    sd1: Sd1, tmp_path: Path
) -> None:
    """No error: the low-rank part and the biases are loaded, norms stay those of the base."""
    output = tmp_path / "out.safetensors"
    tuned = sd1.tuned("noise-vectors", noise, vectors=True)
    report = sd1.extract(tuned, output, rank=4, to="diffusers", vectors=True)
    stored = load_file(output)
    norms = [key for key in stored if key.endswith((".diff_b", ".w_norm", ".b_norm"))]
    biases = [key for key in stored if key.endswith(".lora_B.bias")]
    unet, clip = load(sd1, output)
    layers = len(in_layers(unet, clip))
    assert layers == len(sd1.matrices()) == report.modules - len(norms) - len(biases)
    assert len(norms) > 200
    assert len(biases) > 200
    assert any("fuse_lora" in note for note in report.notes)
    wide = {f"unet.{n}": t for n, t in unet.state_dict().items()}
    for key in (key for key in biases if key.startswith("unet.")):
        assert torch.equal(wide[key.replace("lora_B", "lora_B.default_0")], stored[key].float())
    before = sd1.unet().state_dict()
    kept = {
        n.replace(".base_layer", ""): t for n, t in unet.state_dict().items() if "lora" not in n
    }
    assert all(torch.equal(t, before[name]) for name, t in kept.items() if t.ndim == 1)


def test_diffusers_misscales_attention_where_alphas_differ(
    sd1: Sd1, noisy: Path, tmp_path: Path
) -> None:
    """A kohya file whose ranks differ (here: rank 32 clipped by small layers), each alpha equal to its rank.

    diffusers spells the alpha of an attention layer so that its own pattern never matches, and takes the commonest
    alpha of the file instead. Its own format, without alphas, comes out right.
    """
    output, only = tmp_path / "out.safetensors", ("unet.*.attentions.*",)
    sd1.extract(noisy, output, rank=32, only=only)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # peft does say that patterns match nothing
        off = wrong(in_layers(*load(sd1, output)), deltas(output))
    assert {round(factor, 3) for factor in off.values()} == {
        0.25,
        0.333,
        0.5,
    }  # the commonest alpha here is 8
    assert all(".attn" in name for name in off)
    sd1.extract(noisy, output, rank=32, to="diffusers", only=only)
    assert not wrong(in_layers(*load(sd1, output)), deltas(output))


def test_diffusers_refuses_lokr_under_kohya_names(sd1: Sd1, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    sd1.extract(sd1.tuned("lokr-factor-4", lokr(4)), output, algo="lokr", factor=4)
    with pytest.raises(ValueError, match="not been correctly renamed"):
        load(sd1, output)


@pytest.mark.parametrize("rank", [None, 2])
def test_diffusers_loads_lokr_of_linear_layers_under_its_own_names(
    sd1: Sd1, noisy: Path, tmp_path: Path, rank: int | None
) -> None:
    """Where every side is at least the square of the factor: PEFT cuts 8 by 4 as (4, 2), LyCORIS as (2, 4)."""
    output = tmp_path / "out.safetensors"
    only = ("unet.mid_block.*.attn?.*", "unet.mid_block.*.ff.*")
    report = sd1.extract(noisy, output, algo="lokr", to="diffusers", factor=4, rank=rank, only=only)
    ours, theirs = deltas(output), in_layers(*load(sd1, output))
    assert theirs.keys() == ours.keys()
    assert report.modules == len(ours) == 10
    assert not wrong(theirs, ours)


def test_diffusers_refuses_lokr_of_convolutions(sd1: Sd1, noisy: Path, tmp_path: Path) -> None:
    """diffusers 0.42 takes every full w2 for a matrix."""
    output = tmp_path / "out.safetensors"
    sd1.extract(noisy, output, algo="lokr", to="diffusers", factor=4, only=("unet.mid_block.*",))
    with pytest.raises(ValueError, match="too many values to unpack"):
        load(sd1, output)
