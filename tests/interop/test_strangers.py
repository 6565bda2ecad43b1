"""Families without a table: diffusers' own model classes, their keys in every spelling, are called unknown.

Headers only: the classes are built without numbers, and nothing is written but what `inspect` reads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptkit.detect import Detection, detect_adapter, detect_checkpoint, families, search
from adaptkit.detect import sizes as rules
from adaptkit.files.header import TensorInfo
from adaptkit.ops import inspect
from tests.generate import HIDREAM, HUNYUAN_DIT, LONGCAT
from tests.synth import Listing, lora_shapes, write_header_only

diffusers = pytest.importorskip("diffusers")

Shapes = dict[str, tuple[int, ...]]

# class, configuration where the class's own is no published model's
STRANGERS: dict[str, tuple[str, dict[str, Any]]] = {
    name: (name, {})
    for name in (
        "AllegroTransformer3DModel", "CogView3PlusTransformer2DModel", "Cosmos3OmniTransformer", "DiTTransformer2DModel",
        "DreamLiteUNetModel", "I2VGenXLUNet", "JoyImageEditTransformer3DModel", "Kandinsky3UNet",
        "JoyImageEditPlusTransformer3DModel", "Kandinsky6Transformer3DModel", "MotionAdapter", "T2IAdapter",
        "Kandinsky6SRTransformer3DModel", "LongCatAudioDiTTransformer", "MiniMaxMusic3Transformer1DModel",
        "NucleusMoEImageTransformer2DModel", "PriorTransformer", "RFD4ProteinaTransformer",
        "SanaWMTransformer3DModel", "StableAudio3DiTModel", "StableAudioDiTModel", "UNet1DModel",
        "UNet2DModel", "UNetControlNetXSModel",
        "UNet3DConditionModel", "UNetMotionModel", "UNetSpatioTemporalConditionModel", "UVit2DModel",
    )
} | {
    "Motif-Video-2B": ("MotifVideoTransformer3DModel", dict(num_attention_heads=12)),
    "Latte": (
        "LatteTransformer3DModel",
        dict(
            in_channels=4, out_channels=8, num_attention_heads=16, attention_head_dim=72, num_layers=28, sample_size=64,
            patch_size=2, caption_channels=4096, cross_attention_dim=1152, norm_type="ada_norm_single",
            activation_fn="gelu-approximate", attention_bias=True,
        ),
    ),
    "Lumina-Next": (
        "LuminaNextDiT2DModel",
        dict(
            in_channels=4, hidden_size=2304, num_layers=24, num_attention_heads=32, num_kv_heads=8, patch_size=2,
            multiple_of=256, cross_attention_dim=2048,
        ),
    ),
    "AudioLDM-2": (
        "AudioLDM2UNet2DConditionModel",
        dict(block_out_channels=(128, 256, 384, 640), cross_attention_dim=((None, 1024, 768),) * 4),
    ),
}  # fmt: skip

# names and sizes are those of a family with a table
NAMED: dict[str, tuple[str, dict[str, Any], str]] = {
    "ACE-Step-1.5": ("AceStepTransformer1DModel", {}, "ace-step"),
    "AnyFlow": ("AnyFlowTransformer3DModel", {}, "wan"),
    "AuraFlow": ("AuraFlowTransformer2DModel", {}, "auraflow"),
    "Bria-FIBO": (
        "BriaFiboTransformer2DModel",
        dict(num_layers=8, num_single_layers=38),
        "bria-fibo",
    ),
    "Bria-FIBO-2": ("BriaFibo2Transformer2DModel", {}, "bria-fibo2"),
    "CogVideoX-2B": ("CogVideoXTransformer3DModel", {}, "cogvideox"),
    "CogVideoX-5B": (
        "CogVideoXTransformer3DModel",
        dict(num_attention_heads=48, num_layers=42),
        "cogvideox",
    ),
    "CogView4-6B": (
        "CogView4Transformer2DModel",
        dict(num_layers=28, num_attention_heads=32, attention_head_dim=128),
        "cogview4",
    ),
    "ConsisID": ("ConsisIDTransformer3DModel", {}, "cogvideox"),
    "Bria-3.2": ("BriaTransformer2DModel", {}, "flux"),
    "Chroma": ("ChromaTransformer2DModel", {}, "chroma"),
    "ChronoEdit": ("ChronoEditTransformer3DModel", {}, "wan"),
    "Cosmos-1-7B": ("CosmosTransformer3DModel", {}, "cosmos-14b"),
    "Cosmos-Predict2-2B": ("CosmosTransformer3DModel", dict(num_attention_heads=16), "cosmos"),
    "GLM-Image": (
        "GlmImageTransformer2DModel",
        dict(num_attention_heads=32, attention_head_dim=128),
        "glm-image",
    ),
    "ERNIE-Image": ("ErnieImageTransformer2DModel", {}, "ernie-image"),
    "FLUX.1": ("FluxTransformer2DModel", {}, "flux"),
    "FLUX.2": ("Flux2Transformer2DModel", {}, "flux2"),
    "FLUX.3": ("Flux3Transformer2DModel", {}, "flux3"),
    "HiDream-I1": ("HiDreamImageTransformer2DModel", HIDREAM, "hidream"),
    "Hunyuan-DiT": ("HunyuanDiT2DModel", HUNYUAN_DIT, "hunyuan-dit"),
    "Kandinsky-5": ("Kandinsky5Transformer3DModel", {}, "kandinsky5"),
    "MiniMax-H3": ("MiniMaxH3Transformer3DModel", {}, "minimax-h3"),
    "Mochi": ("MochiTransformer3DModel", {}, "mochi"),
    "PRX": ("PRXTransformer2DModel", {}, "prx"),
    "PixArt": ("PixArtTransformer2DModel", {}, "pixart"),
    "Qwen-Image-2.1": ("QwenImage21Transformer2DModel", {}, "qwen-image-21"),
    "Sana": ("SanaTransformer2DModel", {}, "sana"),
    "Sana-Video": ("SanaVideoTransformer3DModel", {}, "sana"),
    "Wan-Animate": ("WanAnimateTransformer3DModel", {}, "wan"),
    "Wan-Animate-2": ("WanAnimate2Transformer3DModel", {}, "wan-animate2"),
    "Helios": ("HeliosTransformer3DModel", {}, "wan"),
    "HunyuanImage": ("HunyuanImageTransformer2DModel", {}, "hunyuan-image"),
    "HunyuanVideo": ("HunyuanVideoTransformer3DModel", {}, "hunyuan-video"),
    "HunyuanVideo-1.5": ("HunyuanVideo15Transformer3DModel", {}, "hunyuan-video-15"),
    "Ideogram-4": ("Ideogram4Transformer2DModel", {}, "ideogram4"),
    "Krea-2": ("Krea2Transformer2DModel", {}, "krea2"),
    "LTX-2": ("LTX2VideoTransformer3DModel", {}, "ltx2"),
    "LTX-Video-2B": ("LTXVideoTransformer3DModel", {}, "ltx"),
    "LTX-Video-13B": (
        "LTXVideoTransformer3DModel",
        dict(num_layers=48, attention_head_dim=128, cross_attention_dim=4096),
        "ltx-13b",
    ),
    "LongCat-Image": ("LongCatImageTransformer2DModel", LONGCAT, "longcat-image"),
    "Ovis-Image": ("OvisImageTransformer2DModel", {}, "ovis-image"),
    "Lumina-2": ("Lumina2Transformer2DModel", {}, "lumina2"),
    "Qwen-Image": ("QwenImageTransformer2DModel", {}, "qwen-image"),
    "SD-3": (
        "SD3Transformer2DModel",
        dict(num_layers=24, num_attention_heads=24, caption_projection_dim=1536),
        "sd3",
    ),
    "SkyReels-V2-14B": (
        "SkyReelsV2Transformer3DModel",
        dict(num_attention_heads=40, num_layers=40, ffn_dim=13824),
        "wan",
    ),
    "Wan": ("WanTransformer3DModel", {}, "wan"),
    "Wan-VACE": ("WanVACETransformer3DModel", {}, "wan"),
    "Z-Image": ("ZImageTransformer2DModel", {}, "z-image"),
}
# what also fits, and cannot be told from names and sizes
ALIKE = {
    "hunyuan-video": {"framepack"},
    "chroma": {"flux"},
    "sd1": {"sd2"},
    "cosmos": {"anima"},
}  # fmt: skip
# attention alone has the names and sizes of another family's, in fewer blocks: nothing in the file tells them apart
ATTENTION_AS = {
    "MiniMaxMusic3Transformer1DModel": {"hunyuan-video-15"},
    "NucleusMoEImageTransformer2DModel": {"hunyuan-video-15"},
}

# some families, none of them of a stranger's kind
BEFORE = ("anima", "flux", "ltx", "ltx2", "ltx-13b", "qwen-image", "sd3", "wan", "z-image")

SPELLINGS = {  # prefix, joiner, names of the factors
    "diffusers": ("transformer.", ".", ("lora_A", "lora_B")),
    "peft": ("base_model.model.", ".", ("lora_A", "lora_B")),
    "kohya": ("lora_unet_", "_", ("lora_down", "lora_up")),
    "comfy": ("diffusion_model.", ".", ("lora_A", "lora_B")),
    "bare": ("", ".", ("lora_A", "lora_B")),
    "lycoris": ("lycoris_", "_", ("lora_down", "lora_up")),
}
CUTS = {
    "all": "",
    "blocks": r"^(?!.*(norm|embed)).*\.\d+\.",
    "attention": r"\.\d+\..*attn.*\.(to_[qkv]|to_out\.0|add_._proj)$",
}


@cache
def model(name: str, config: tuple[tuple[str, Any], ...]) -> tuple[Shapes, Shapes]:
    """The layers of a class, and all its parameters."""
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    with torch.device("meta"):
        made = getattr(diffusers, name)(**dict(config))
    kinds = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    layers = {
        module: tuple(layer.weight.shape)
        for module, layer in made.named_modules()
        if isinstance(layer, kinds)
    }
    return layers, {key: tuple(p.shape) for key, p in made.named_parameters()}


def built(name: str, config: Mapping[str, Any]) -> tuple[Shapes, Shapes]:
    return model(
        name, tuple((key, tuple(v) if isinstance(v, list) else v) for key, v in config.items())
    )


def lora(layers: Shapes, spelling: str) -> Listing:
    prefix, joiner, (down, up) = SPELLINGS[spelling]
    found: Listing = {}
    for module, shape in layers.items():
        stem = prefix + module.replace(".", joiner)
        shapes = lora_shapes(shape, 4)
        found |= {f"{stem}.{down}.weight": ("F16", shapes["down"]), f"{stem}.{up}.weight": ("F16", shapes["up"])}  # fmt: skip
    return found


def infos(listing: Listing) -> dict[str, TensorInfo]:
    return {key: TensorInfo(key, dtype, shape, 0, 0) for key, (dtype, shape) in listing.items()}


def found(layers: Shapes, parameters: Shapes) -> dict[str, Detection]:
    """What is detected in adapters of all spellings and cuts, and in checkpoints of two prefixes."""
    results: dict[str, Detection] = {}
    for cut, pattern in CUTS.items():
        chosen = {module: shape for module, shape in layers.items() if re.search(pattern, module)}
        for spelling in SPELLINGS if chosen else ():
            results[f"{cut} {spelling}"] = detect_adapter(infos(lora(chosen, spelling)), {})
    for prefix in ("", "transformer."):
        listing: Listing = {f"{prefix}{key}": ("BF16", shape) for key, shape in parameters.items()}
        results[f"checkpoint {prefix}"] = detect_checkpoint(infos(listing), {})
    return results


@pytest.mark.parametrize("name", STRANGERS)
def test_a_family_without_a_table_is_unknown(name: str) -> None:
    layers, parameters = built(*STRANGERS[name])
    results = found(layers, parameters)
    assert len(results) >= 14
    alike = ATTENTION_AS.get(name, set())
    wrong = {
        how: (result.family, result.alternatives)
        for how, result in results.items()
        if result.family and not (how.startswith("attention") and result.family in alike)
    }
    assert wrong == {}


@pytest.mark.share(4)
@pytest.mark.parametrize("name", NAMED)
def test_a_model_of_a_table_is_named_in_every_spelling(name: str) -> None:
    cls, config, family = NAMED[name]
    layers, parameters = built(cls, config)
    for how, result in found(layers, parameters).items():
        fits = {result.family, *result.alternatives}
        assert family in fits, (how, result)
        if how.startswith("all"):
            assert fits <= {family, *ALIKE.get(family, ())}, (how, result)


@pytest.mark.share(3)
@pytest.mark.parametrize("name", STRANGERS)
def test_inspect_says_unknown_and_promises_no_host(name: str, tmp_path: Path) -> None:
    layers, parameters = built(*STRANGERS[name])
    adapter = write_header_only(tmp_path / "a.safetensors", lora(layers, "diffusers"))
    record = inspect.run(adapter).to_dict()
    assert (record["kind"], record["family"]) == ("adapter", None)
    assert set(record["loads_in"].values()) == {None}
    weights = {key: ("F16", shape) for key, shape in parameters.items()}
    record = inspect.run(write_header_only(tmp_path / "b.safetensors", weights)).to_dict()
    assert (record["kind"], record["family"]) == ("checkpoint", None)


def test_the_nearest_family_is_said() -> None:
    near = {
        "CogView3PlusTransformer2DModel": "glm-image",
        "AllegroTransformer3DModel": "ltx2",
    }
    for name, family in near.items():
        result = detect_adapter(infos(lora(built(*STRANGERS[name])[0], "diffusers")), {})
        assert result.nearest is not None, name
        assert result.nearest.family == family, (name, result.nearest)


@pytest.mark.parametrize(
    ("rule", "value", "name", "cut"),
    [
        ("NAMES", 0.8, "Bria-FIBO", "all"),
        ("SIZES", 0.0, "PixArt", "all"),
        ("SIZES", 0.7, "Cosmos-1-7B", "blocks"),
        ("MANY", 1000, "CogView4-6B", "blocks"),
    ],
)
def test_every_rule_is_needed(
    rule: str, value: float, name: str, cut: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model whose own table is withheld is named after another without the rule."""
    cls, config, _ = NAMED[name]
    layers = {m: s for m, s in built(cls, config)[0].items() if re.search(CUTS[cut], m)}
    listing = infos(lora(layers, "diffusers"))
    old = {k: family for k, family in families().items() if k in BEFORE}
    monkeypatch.setattr(search, "KEPT", 0)  # a header seen before is judged anew
    monkeypatch.setattr(search, "families", lambda: old)
    assert detect_adapter(listing, {}).family is None
    monkeypatch.setattr(rules, rule, value)
    if rule == "SIZES":
        monkeypatch.setattr(rules, "MARKS", 0.0)
    assert detect_adapter(listing, {}).family is not None
