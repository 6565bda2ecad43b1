"""Write everything in fixtures/: `python -m tests.generate` (needs the `interop` extra; no download, no weights).

Shapes come from diffusers' and transformers' model classes, instantiated from the published configurations on the meta
device; names from adaptkit's tables; numbers from a seeded generator. Nothing is copied from another project.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from adaptkit.detect import families
from adaptkit.families.contract import Kind
from adaptkit.keymap import compile_keys
from tests import oracle
from tests.synth import (
    FIXTURES,
    Listing,
    Parameter,
    adapter_listing,
    checkpoint_listing,
    parameters,
    save_listing,
)

Shapes = dict[str, dict[str, tuple[int, ...]]]

CLIP_L: dict[str, Any] = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
)
CLIP_H: dict[str, Any] = dict(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16
)
CLIP_G: dict[str, Any] = dict(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    projection_dim=1280,
)
SD1_BLOCKS: dict[str, Any] = dict(
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
)
SDXL: dict[str, Any] = dict(
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 2, 10),
    cross_attention_dim=2048,
    attention_head_dim=(5, 10, 20),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
REFINER: dict[str, Any] = dict(
    block_out_channels=(384, 768, 1536, 1536),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=4,
    cross_attention_dim=1280,
    attention_head_dim=(6, 12, 24, 24),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2560,
)
SD35_MEDIUM: dict[str, Any] = dict(
    num_layers=24,
    num_attention_heads=24,
    caption_projection_dim=1536,
    pos_embed_max_size=384,
    dual_attention_layers=tuple(range(13)),
    qk_norm="rms_norm",
)
SD35_LARGE: dict[str, Any] = dict(
    num_layers=38,
    num_attention_heads=38,
    caption_projection_dim=2432,
    pos_embed_max_size=192,
    qk_norm="rms_norm",
)
WAN_I2V: dict[str, Any] = dict(in_channels=36, image_dim=1280, added_kv_proj_dim=5120)
HIDREAM: dict[str, Any] = dict(
    caption_channels=[4096, 4096],
    num_layers=16,
    num_single_layers=32,
    attention_head_dim=128,
    num_attention_heads=20,
    text_emb_dim=2048,
    num_routed_experts=4,
    num_activated_experts=2,
    in_channels=16,
    out_channels=16,
    patch_size=2,
    llama_layers=list(range(48)),
)
HUNYUAN_DIT: dict[str, Any] = dict(
    num_attention_heads=16,
    attention_head_dim=88,
    in_channels=4,
    patch_size=2,
    sample_size=128,
    hidden_size=1408,
    num_layers=40,
    mlp_ratio=4.3637,
)
LONGCAT: dict[str, Any] = dict(num_layers=10, num_single_layers=20)
CASCADE: dict[str, Any] = dict(
    in_channels=16,
    out_channels=16,
    conditioning_dim=2048,
    block_out_channels=(2048, 2048),
    num_attention_heads=(32, 32),
    down_num_layers_per_block=(8, 24),
    up_num_layers_per_block=(24, 8),
    down_blocks_repeat_mappers=(1, 1),
    up_blocks_repeat_mappers=(1, 1),
    block_types_per_layer=(("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),)
    * 2,
    clip_text_in_channels=1280,
    clip_text_pooled_in_channels=1280,
    clip_image_in_channels=768,
    dropout=(0.1, 0.1),
    timestep_conditioning_type=("sca", "crp"),
    switch_level=(False,),
)
KANDINSKY_PRO: dict[str, Any] = dict(
    model_dim=4096, ff_dim=16384, time_dim=1024, num_visual_blocks=60, num_text_blocks=4
)
COSMOS_25: dict[str, Any] = dict(
    num_attention_heads=16,
    extra_pos_embed_type=None,
    use_crossattn_projection=True,
    crossattn_proj_in_channels=100352,
)
ANIMA: dict[str, Any] = dict(num_attention_heads=16, extra_pos_embed_type=None)
# diffusers' class of each transformer, and the published configuration where it is not the class's own
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "flux": ("FluxTransformer2DModel", dict(guidance_embeds=True)),
    "chroma": ("ChromaTransformer2DModel", {}),
    "flux2": ("Flux2Transformer2DModel", {}),  # dev
    "sd3": ("SD3Transformer2DModel", SD35_MEDIUM),
    "sd35-large": ("SD3Transformer2DModel", SD35_LARGE),
    "hunyuan-video": ("HunyuanVideoTransformer3DModel", {}),
    "framepack": (
        "HunyuanVideoFramepackTransformer3DModel",
        dict(has_image_proj=True, has_clean_x_embedder=True),
    ),
    "hunyuan-video-15": ("HunyuanVideo15Transformer3DModel", {}),
    "hunyuan-image": ("HunyuanImageTransformer2DModel", dict(text_embed_2_dim=1472)),
    "qwen-image": ("QwenImageTransformer2DModel", {}),
    "wan": ("WanTransformer3DModel", WAN_I2V),
    "z-image": ("ZImageTransformer2DModel", {}),
    "lumina2": ("Lumina2Transformer2DModel", dict(cap_feat_dim=2304)),
    "anima": ("CosmosTransformer3DModel", ANIMA),
    "krea2": ("Krea2Transformer2DModel", {}),
    "ideogram4": ("Ideogram4Transformer2DModel", {}),
    "auraflow": ("AuraFlowTransformer2DModel", {}),
    "ltx": ("LTXVideoTransformer3DModel", {}),
    "ltx2": ("LTX2VideoTransformer3DModel", {}),
    "ltx-13b": (
        "LTXVideoTransformer3DModel",
        dict(num_layers=48, attention_head_dim=128, cross_attention_dim=4096),
    ),
    "minimax-h3": ("MiniMaxH3Transformer3DModel", {}),
    "qwen-image-21": ("QwenImage21Transformer2DModel", {}),
    "ernie-image": ("ErnieImageTransformer2DModel", {}),
    "hidream": ("HiDreamImageTransformer2DModel", HIDREAM),
    "ace-step": ("AceStepTransformer1DModel", {}),
    "kandinsky5": ("Kandinsky5Transformer3DModel", KANDINSKY_PRO),
    "cogvideox": ("CogVideoXTransformer3DModel", dict(num_attention_heads=48, num_layers=42)),
    "cogview4": (
        "CogView4Transformer2DModel",
        dict(num_layers=28, num_attention_heads=32, attention_head_dim=128),
    ),
    "mochi": ("MochiTransformer3DModel", {}),
    "sana": ("SanaTransformer2DModel", {}),
    "flux3": ("Flux3Transformer2DModel", {}),
    "bria-fibo": ("BriaFiboTransformer2DModel", dict(num_layers=8, num_single_layers=38)),
    "bria-fibo2": ("BriaFibo2Transformer2DModel", {}),
    "prx": ("PRXTransformer2DModel", {}),
    "cosmos": ("CosmosTransformer3DModel", COSMOS_25),
    "cosmos-14b": (
        "CosmosTransformer3DModel",
        dict(num_attention_heads=40, num_layers=36, extra_pos_embed_type=None),
    ),
    "glm-image": (
        "GlmImageTransformer2DModel",
        dict(num_attention_heads=32, attention_head_dim=128),
    ),
    "pixart": (
        "PixArtTransformer2DModel",
        dict(cross_attention_dim=1152, caption_channels=4096, out_channels=8, num_layers=28),
    ),
    "hunyuan-dit": ("HunyuanDiT2DModel", HUNYUAN_DIT),
    "wan-animate2": ("WanAnimate2Transformer3DModel", {}),
    "longcat-image": ("LongCatImageTransformer2DModel", LONGCAT),
    "ovis-image": ("OvisImageTransformer2DModel", {}),
}
# what the transformer's keys begin with in the published file, where it is not the first prefix of the table
PREFIXES = {"auraflow": "model.", "hidream-o1": ""} | dict.fromkeys(
    set(TRANSFORMERS)
    - {"ace-step", "anima", "auraflow", "cosmos", "cosmos-14b", "ltx", "ltx-13b", "ltx2", "sd3"}
    - {"sd35-large"},
    "",
)
# the format that a family's trainers write beside diffusers', where it is not kohya's
TRAINED = {"auraflow": "lycoris", "ace-step": "peft", "hunyuan-dit": "onetrainer", "pixart": "onetrainer"} | dict.fromkeys(
    (
        "bria-fibo", "bria-fibo2", "cogvideox", "cogview4", "cosmos", "cosmos-14b", "flux3", "glm-image", "hidream", "longcat-image", "ltx", "ltx-13b", "ltx2", "mochi",
        "ovis-image", "prx", "sana", "wan-animate2",
    ),
    "comfy",
)  # fmt: skip
BLOCKS = r"(?:.*?\.)?\w*(?:blocks|layers|norms|refiner)"  # lists of equal blocks, in diffusers' and transformers' names
UNET_BLOCKS = r".*transformer_blocks"

# the SD 1 structure with widths divided: 320, 640, 1280, 1280 → 8, 16, 32, 32; CLIP-L 768 → 24
TINY_UNET: dict[str, Any] = dict(
    **SD1_BLOCKS,
    block_out_channels=(8, 16, 32, 32),
    cross_attention_dim=24,
    attention_head_dim=2,
    norm_num_groups=4,
)
TINY_CLIP: dict[str, Any] = dict(
    hidden_size=24,
    intermediate_size=96,
    num_hidden_layers=12,
    num_attention_heads=2,
    vocab_size=256,
)

# what kohya's sd-scripts trains by default: attention blocks, without (or with) the convolutions around them
KOHYA_UNET = r"unet\..*attentions\..*(attn[12]\.to_\w+(\.0)?|ff\.net\.\d(\.proj)?|proj_in|proj_out)"
KOHYA_TE = r"text_encoder(_2)?\.text_model\.encoder\..*(self_attn\.\w+|mlp\.\w+)"
KOHYA = f"({KOHYA_UNET}|{KOHYA_TE})"
KOHYA_SD2 = KOHYA.replace(
    r"encoder\.", r"encoder\.layers\.(?!23)\d+\."
)  # trainers leave the last layer out, as hosts do
REFINED = KOHYA.replace("attentions", r"attentions\.0")
LOCON = f"({KOHYA}|" + r"unet\..*(conv1|conv2|conv_shortcut|time_emb_proj|samplers\.0\.conv))"


def unet(**config: Any) -> dict[str, tuple[int, ...]]:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return {
            name: tuple(t.shape) for name, t in UNet2DConditionModel(**config).state_dict().items()
        }


def clip(projection: bool = False, **config: Any) -> dict[str, tuple[int, ...]]:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    with torch.device("meta"):
        state = kind(CLIPTextConfig(**config)).state_dict()
    named = {name: tuple(t.shape) for name, t in state.items() if not name.endswith("position_ids")}
    # transformers 5 leaves `text_model.` out of CLIPTextModel's names
    return {
        n if n.startswith(("text_model.", "text_projection")) else f"text_model.{n}": s
        for n, s in named.items()
    }


def blocks_of(
    shapes: Mapping[str, tuple[int, ...]], *, last: bool = True, blocks: str = BLOCKS
) -> dict[str, tuple[int, ...]]:
    """Of every list of blocks only the first and (`last`) the last: a few kilobytes, with the real names and bounds."""
    found = {name: re.match(rf"({blocks})\.(\d+)\.", name) for name in shapes}
    kept = {match[1]: {0} for match in found.values() if match}
    for match in filter(None, found.values() if last else ()):
        kept[match[1]] = {0, max(int(match[2]), *kept[match[1]])}
    return {n: s for n, s in shapes.items() if (m := found[n]) is None or int(m[2]) in kept[m[1]]}


def transformer(name: str, **config: Any) -> dict[str, tuple[int, ...]]:
    import diffusers

    with torch.device("meta"):
        return blocks_of(
            {
                key: tuple(t.shape)
                for key, t in getattr(diffusers, name)(**config).state_dict().items()
            }
        )


def hidream_o1() -> dict[str, tuple[int, ...]]:
    """Qwen3-VL 8B and what HiDream-O1 adds to it, which is in no package."""
    from transformers import Qwen3VLConfig, Qwen3VLModel

    text = dict(intermediate_size=12288, num_hidden_layers=36, num_key_value_heads=8)
    with torch.device("meta"):
        model = Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=dict(out_hidden_size=4096)))  # fmt: skip
    own = {
        "t_embedder1.mlp.0": (4096, 256),
        "t_embedder1.mlp.2": (4096, 4096),
        "x_embedder.proj1": (1024, 3072),
        "x_embedder.proj2": (4096, 1024),
        "final_layer2.linear": (3072, 4096),
    }
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    for name, shape in own.items():
        shapes[f"{name}.weight"] = shape
        if name != "x_embedder.proj1":
            shapes[f"{name}.bias"] = shape[:1]
    return shapes


def short_shapes() -> dict[str, Shapes]:
    """Shapes of the families of which the fixtures hold the outer blocks only, with what their single files hold beside."""
    shapes: dict[str, Shapes] = {
        family: {"transformer": transformer(name, **config)}
        for family, (name, config) in TRANSFORMERS.items()
    }
    clip_g = clip(projection=True, **CLIP_G | {"num_hidden_layers": 1})
    clip_l = clip(projection=True, **CLIP_L | {"num_hidden_layers": 1, "projection_dim": 768})
    for family in ("sd3", "sd35-large"):
        shapes[family] |= {"text_encoder": clip_l, "text_encoder_2": clip_g}
    shapes["anima"]["text_conditioner"] = transformer("AnimaTextConditioner")
    shapes["sdxl-refiner"] = {
        "unet": blocks_of(unet(**REFINER), last=False, blocks=UNET_BLOCKS),
        "text_encoder_2": clip_g,
    }
    shapes["stable-cascade"] = {
        "prior": blocks_of(
            transformer("StableCascadeUNet", **CASCADE), blocks=r"(?:down|up)_blocks\.\d"
        ),
        "text_encoder": clip_g,
    }
    shapes["hidream-o1"] = {"transformer": blocks_of(hidream_o1())}
    return {
        family: {part.name: {} for part in families()[family].components} | s
        for family, s in shapes.items()
    }


def model_shapes() -> dict[str, Shapes]:
    """Shapes of every parameter by component and diffusers name, per family."""
    sd1 = unet(cross_attention_dim=768, **SD1_BLOCKS)
    sd2 = unet(
        cross_attention_dim=1024,
        use_linear_projection=True,
        attention_head_dim=(5, 10, 20, 20),
        **SD1_BLOCKS,
    )
    return {
        "sd1": {"unet": sd1, "text_encoder": clip(**CLIP_L)},
        "sd2": {"unet": sd2, "text_encoder": clip(**CLIP_H)},
        "sdxl": {
            "unet": unet(**SDXL),
            "text_encoder": clip(**CLIP_L),
            "text_encoder_2": clip(projection=True, **CLIP_G),
        },
    }


def tiny_shapes() -> Shapes:
    return {"unet": unet(**TINY_UNET), "text_encoder": clip(**TINY_CLIP)}


def vae_listing() -> Listing:
    """The autoencoder of SD checkpoints (CompVis `AutoencoderKL`, 83.7 M parameters), which no adapter touches."""
    listing: Listing = {}
    prefix = "first_stage_model."

    def conv(name: str, o: int, i: int, k: int) -> None:
        listing[f"{prefix}{name}.weight"] = ("F16", (o, i, k, k))
        listing[f"{prefix}{name}.bias"] = ("F16", (o,))

    def norm(name: str, n: int) -> None:
        listing[f"{prefix}{name}.weight"] = listing[f"{prefix}{name}.bias"] = ("F16", (n,))

    def resnet(name: str, i: int, o: int) -> None:
        norm(f"{name}.norm1", i)
        conv(f"{name}.conv1", o, i, 3)
        norm(f"{name}.norm2", o)
        conv(f"{name}.conv2", o, o, 3)
        if i != o:
            conv(f"{name}.nin_shortcut", o, i, 1)

    def middle(side: str) -> None:
        resnet(f"{side}.mid.block_1", 512, 512)
        norm(f"{side}.mid.attn_1.norm", 512)
        for name in ("q", "k", "v", "proj_out"):
            conv(f"{side}.mid.attn_1.{name}", 512, 512, 1)
        resnet(f"{side}.mid.block_2", 512, 512)

    widths = (128, 256, 512, 512)
    conv("encoder.conv_in", 128, 3, 3)
    before = 128
    for level, width in enumerate(widths):
        for n in range(2):
            resnet(f"encoder.down.{level}.block.{n}", before, width)
            before = width
        if level < 3:
            conv(f"encoder.down.{level}.downsample.conv", width, width, 3)
    middle("encoder")
    norm("encoder.norm_out", 512)
    conv("encoder.conv_out", 8, 512, 3)
    conv("decoder.conv_in", 512, 4, 3)
    middle("decoder")
    for level in reversed(range(4)):
        for n in range(3):
            resnet(f"decoder.up.{level}.block.{n}", before, widths[level])
            before = widths[level]
        if level:
            conv(f"decoder.up.{level}.upsample.conv", before, before, 3)
    norm("decoder.norm_out", 128)
    conv("decoder.conv_out", 3, 128, 3)
    conv("quant_conv", 8, 8, 1)
    conv("post_quant_conv", 4, 4, 1)
    return listing


def write_key_lists(folder: Path) -> None:
    note = "written by `python -m tests.generate`: names from adaptkit's tables, shapes from diffusers and transformers"
    shapes = model_shapes()
    for family, found in shapes.items():
        listing = checkpoint_listing(family, found)
        extra = vae_listing()
        save_listing(folder / "checkpoints" / f"{family}.tsv", listing | extra, note)
    unets = {
        family: {part: names if part == "unet" else {} for part, names in found.items()}
        for family, found in shapes.items()
    }
    lists = {
        "sd1-kohya": adapter_listing("sd1", "kohya", shapes["sd1"], only=KOHYA),
        "sd1-kohya-locon": adapter_listing("sd1", "kohya", shapes["sd1"], only=LOCON),
        "sd1-comfy": adapter_listing("sd1", "comfy", shapes["sd1"], only=KOHYA, alpha=False),
        "sd1-diffusers": adapter_listing(
            "sd1", "diffusers", shapes["sd1"], only=KOHYA, alpha=False
        ),
        "sd1-peft": adapter_listing("sd1", "peft", unets["sd1"], only=KOHYA, alpha=False),
        "sd2-kohya": adapter_listing("sd2", "kohya", shapes["sd2"], only=KOHYA_SD2),
        "sdxl-kohya": adapter_listing("sdxl", "kohya", shapes["sdxl"], only=KOHYA),
        "sdxl-comfy": adapter_listing("sdxl", "comfy", unets["sdxl"], alpha=False),
        "sdxl-lycoris": adapter_listing("sdxl", "lycoris", unets["sdxl"]),
        "sdxl-diffusers": adapter_listing("sdxl", "diffusers", shapes["sdxl"], alpha=False),
    }
    for name, listing in lists.items():
        save_listing(folder / "keys" / f"{name}.tsv", listing, note)


def as_published(family: str, listing: Listing) -> Listing:
    """What the original has otherwise than diffusers: flat modulations in Krea 2, a norm nobody uses in Lumina 2."""
    flat = re.compile(r"blocks\.\d+\.mod\.lin" if family == "krea2" else r"(?!)")
    extra: Listing = {"norm_final.weight": ("F16", (2304,))} if family == "lumina2" else {}
    return {
        k: (d, (math.prod(s),) if flat.fullmatch(k) else s) for k, (d, s) in listing.items()
    } | extra


def write_short_lists(folder: Path) -> None:
    note = "written by `python -m tests.generate`: some blocks, names from adaptkit's tables, shapes from diffusers"
    for family, shapes in short_shapes().items():
        prefixes = {"transformer": PREFIXES[family]} if family in PREFIXES else {}
        listing = as_published(family, checkpoint_listing(family, shapes, prefixes=prefixes))
        save_listing(folder / "checkpoints" / f"{family}.tsv", listing, note)
        only = REFINED if family == "sdxl-refiner" else ".*"
        # the adapters have the first blocks alone, but for Stable Diffusion 3, whose last block differs
        last = family in ("sd3", "sd35-large")
        blocks = UNET_BLOCKS if family == "sdxl-refiner" else BLOCKS
        adapted = {
            part: blocks_of(names, last=last, blocks=blocks) for part, names in shapes.items()
        }
        for format in (TRAINED.get(family, "kohya"), "diffusers"):
            adapter = adapter_listing(
                family, format, adapted, only=only, alpha=format in ("kohya", "lycoris")
            )
            save_listing(folder / "keys" / f"{family}-{format}.tsv", adapter, note)


class Tiny:
    """A tiny SD 1 checkpoint with real names, tuned by a LoKr and a few exact changes."""

    def __init__(self, seed: int = 1) -> None:
        self.random = np.random.default_rng(seed)
        self.shapes = tiny_shapes()
        self.family = families()["sd1"]
        self.base: dict[str, torch.Tensor] = {}
        self.tuned: dict[str, torch.Tensor] = {}
        for part in self.family.components:
            for parameter in parameters(part, self.shapes[part.name]):
                self._add(part.name, parameter)

    def _add(self, component: str, parameter: Parameter) -> None:
        part = self.family.component(component)
        naming = "native" if "native" in part.checkpoints else "diffusers"
        ((key, _, _),) = parameter.names.get(naming, parameter.names["diffusers"])
        name = part.checkpoints[naming][0] + key
        fan = int(np.prod(parameter.shape[1:])) or 1
        base = self.random.standard_normal(parameter.shape) / np.sqrt(fan)
        if parameter.kind is Kind.NORM:
            base = (
                np.ones(parameter.shape)
                if parameter.target.param == "weight"
                else np.zeros(parameter.shape)
            )
        self.base[name] = torch.from_numpy(base).half()
        self.tuned[name] = (
            self.base[name].double() + torch.from_numpy(self._change(parameter))
        ).half()

    def _change(self, parameter: Parameter) -> np.ndarray:
        """A LoKr of factor 8 in the attention layers, noise in a few biases and norms, nothing elsewhere."""
        module = parameter.target.module
        if parameter.target.param == "bias" or parameter.kind is not Kind.MATRIX:
            changed = module.endswith(("to_out.0", "final_layer_norm"))
            return self.random.standard_normal(parameter.shape) * (0.01 if changed else 0.0)
        if "attn" not in module:
            return np.zeros(parameter.shape)
        rows, columns = parameter.shape
        (a, c), (b, d) = oracle.factorization(rows, 8), oracle.factorization(columns, 8)
        w1, w2 = self.random.standard_normal((a, b)), self.random.standard_normal((c, d))
        return 0.1 / np.sqrt(columns) * oracle.lokr(w1, w2)

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, state in (("base", self.base), ("tuned", self.tuned)):
            save_file(state, folder / f"{name}.safetensors", metadata={"format": "pt"})
            torch.save({"state_dict": state}, folder / f"{name}.ckpt")

    def write_adapters(self, folder: Path) -> None:
        """A rank-2 LoRA of the attention layers in every format, and one LoKr, LoCon-Tucker and full file in kohya's."""
        for format in ("kohya", "lycoris", "diffusers", "peft", "comfy"):
            save_file(
                self._lora(format), folder / f"lora-{format}.safetensors", metadata={"format": "pt"}
            )
        for algorithm in ("lokr", "lokr-factored", "tucker", "full"):
            save_file(
                self._other(algorithm),
                folder / f"{algorithm}-kohya.safetensors",
                metadata={"format": "pt"},
            )

    def _matrices(self, ending: tuple[str, ...], component: str = "unet") -> list[Parameter]:
        part = self.family.component(component)
        found = parameters(part, self.shapes[component])
        return [
            p
            for p in found
            if p.target.param == "weight"
            and p.target.module.endswith(ending)
            and p.kind is Kind.MATRIX
        ]

    def _lora(self, format: str) -> dict[str, torch.Tensor]:
        random, keys = np.random.default_rng(7), compile_keys("sd1", format)
        state: dict[str, torch.Tensor] = {}
        matrices = self._matrices(("to_q", "to_v", "proj_in"))
        if format not in ("lycoris", "peft"):
            matrices += self._matrices(("q_proj", "v_proj"), "text_encoder")
        for parameter in matrices:
            (slot,) = keys.slots(parameter.target)
            ones = (1,) * (len(parameter.shape) - 2)
            down = random.standard_normal((2, *parameter.shape[1:])) * 0.1
            up = random.standard_normal((parameter.shape[0], 2, *ones)) * 0.1
            state[keys.spell(slot, "lora", "down")] = torch.from_numpy(down).half()
            state[keys.spell(slot, "lora", "up")] = torch.from_numpy(up).half()
            if format in ("kohya", "lycoris"):
                state[keys.spell(slot, "lora", "alpha")] = torch.tensor(1.0)
        return state

    def _other(self, algorithm: str) -> dict[str, torch.Tensor]:
        random, keys = np.random.default_rng(11), compile_keys("sd1", "kohya")
        state: dict[str, torch.Tensor] = {}
        ending = (
            ("resnets.0.conv1",) if algorithm == "tucker" else ("attn1.to_q", "resnets.0.conv1")
        )
        for parameter in self._matrices(ending):
            (slot,) = keys.slots(parameter.target)
            kind = "lora" if algorithm == "tucker" else algorithm.partition("-")[0]
            for role, shape in _role_shapes(algorithm, parameter.shape).items():
                state[keys.spell(slot, kind, role)] = torch.from_numpy(
                    random.standard_normal(shape) * 0.1
                ).half()
            if kind != "full":
                state[keys.spell(slot, kind, "alpha")] = torch.tensor(2.0)
        return state


def write_foreign(folder: Path) -> None:
    """An SDXL adapter of one module, to be refused by everything for SD 1."""
    stem = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q"
    state = {
        f"{stem}.lora_up.weight": torch.ones(8, 2).half(),
        f"{stem}.lora_down.weight": torch.ones(2, 8).half(),
    }
    save_file(
        state | {f"{stem}.alpha": torch.tensor(2.0)},
        folder / "sdxl.safetensors",
        metadata={"format": "pt"},
    )


def _role_shapes(algorithm: str, shape: tuple[int, ...]) -> Mapping[str, tuple[int, ...]]:
    o, i, *kernel = shape
    (a, c), (b, d) = oracle.factorization(o, 4), oracle.factorization(i, 4)
    window = int(np.prod(kernel)) if kernel else 1
    ones = [1] * len(kernel)
    return {
        "full": {"diff": shape},
        "lokr": {"w1": (a, b), "w2": (c, d, *kernel)},
        "lokr-factored": {"w1": (a, b), "w2_a": (c, 2), "w2_b": (2, d * window)},
        "tucker": {"up": (o, 2, *ones), "down": (2, i, *ones), "mid": (2, 2, *kernel)},
    }[algorithm]


RECIPE = """\
[defaults.resize]
dtype = "fp16"

[[matrix]]
command = "merge"
bases = ["base.safetensors", "tuned.safetensors"]
adapters = ["lora-kohya.safetensors"]
strengths = [0.5, 1.0]
output = "out/{base}-{adapter}-{strength}.safetensors"

[[matrix]]
command = "resize"
adapter = "lora-kohya.safetensors"
rank = [1, 2]
output = "out/{adapter}-rank{rank}.safetensors"

[[job]]
command = "extract"
base = "base.safetensors"
tuned = "tuned.safetensors"
algo = "lokr"
output = "out/{tuned}-lokr.safetensors"
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--into", type=Path, default=FIXTURES)
    folder = parser.parse_args().into
    write_key_lists(folder)
    write_short_lists(folder)
    tiny = Tiny()
    tiny.write(folder / "tiny")
    tiny.write_adapters(folder / "tiny")
    (folder / "tiny" / "recipe.toml").write_text(RECIPE, encoding="utf-8", newline="\n")
    write_foreign(folder / "tiny")


if __name__ == "__main__":
    main()
