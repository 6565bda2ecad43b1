"""A few layers of every family: what each naming calls them, and which rows of the original weight
each name holds.

Written from the reference of the formats (model classes and converters), not from the package's
tables. Widths are tiny; every command is told the family.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

D = 32  # width of every model here
THIRDS = (Fraction(1, 3),) * 3


@dataclass(frozen=True)
class Part:
    """One module of the diffusers naming: rows [start, stop) of the original weight, halves
    exchanged or not.
    """

    name: str
    start: int
    stop: int
    swapped: bool = False


@dataclass(frozen=True)
class Layer:
    """A weight of the original checkpoint, by its name there; `parts` are its diffusers modules, in
    row order.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    component: str = ""  # "" is the denoiser, else text_encoder, text_encoder_2
    tag: str = "linear"
    comfy: str = ""  # where ComfyUI's name is not the original one

    @property
    def rows(self) -> int:
        return self.shape[0]


def _layer(
    native: str,
    diffusers: str,
    shape: tuple[int, ...] = (D, D),
    *,
    tag: str = "linear",
    shares: tuple[Fraction, ...] = (),
    swapped: bool = False,
    component: str = "",
    comfy: str = "",
) -> Layer:
    """`diffusers` names one module, or several with a blank between them."""
    names = diffusers.split()
    shares = shares or (Fraction(1, len(names)),) * len(names)
    parts, at = [], 0
    for name, share in zip(names, shares, strict=True):
        rows = int(shape[0] * share)
        parts.append(Part(name, at, at + rows, swapped))
        at += rows
    assert at == shape[0]
    tag = "swapped" if swapped else "fused" if len(parts) > 1 else tag
    return Layer(native, shape, tuple(parts), component, tag, comfy)


def _clip(component: str, layer: int = 0) -> list[Layer]:
    stem = f"text_model.encoder.layers.{layer}."
    return [
        _layer(stem + "self_attn.q_proj", stem + "self_attn.q_proj", tag="te", component=component),
        _layer(stem + "mlp.fc1", stem + "mlp.fc1", (4 * D, D), tag="te", component=component),
    ]


def _unet(block: str, there: str, attention: str, conv_in: bool) -> list[Layer]:
    stem, other = f"{block}.1", f"{there}.attentions.0"
    one, two = f"{stem}.transformer_blocks.0", f"{other}.transformer_blocks.0"
    width = (D, D, 1, 1) if conv_in else (D, D)
    tag = "conv1" if conv_in else "linear"
    context = {"sd1": 768, "sdxl": 2048}[attention]
    return [
        _layer(f"{one}.attn1.to_q", f"{two}.attn1.to_q"),
        _layer(f"{one}.attn2.to_k", f"{two}.attn2.to_k", (D, context)),
        _layer(f"{one}.attn1.to_out.0", f"{two}.attn1.to_out.0"),
        _layer(f"{one}.ff.net.0.proj", f"{two}.ff.net.0.proj", (8 * D, D)),
        _layer(f"{stem}.proj_in", f"{other}.proj_in", width, tag=tag),
        _layer(f"{block}.0.in_layers.2", f"{there}.resnets.0.conv1", (D, D, 3, 3), tag="conv3"),
    ]


def _bigg() -> list[Layer]:
    stem, other = "transformer.resblocks.0", "text_model.encoder.layers.0"
    parts = " ".join(f"{other}.self_attn.{n}_proj" for n in "qkv")
    return [
        _layer(f"{stem}.attn.in_proj", parts, (3 * D, D), component="text_encoder_2"),
        _layer(
            f"{stem}.mlp.c_fc", f"{other}.mlp.fc1", (4 * D, D), tag="te", component="text_encoder_2"
        ),
    ]


def _mm(prefix: str, other: str, *, spelled: str = "flux", context: bool = True) -> list[Layer]:
    """A block with two streams: FLUX, FLUX.2, Chroma, HunyuanVideo."""
    attn, mlp = {"flux": (".qkv", ".0"), "hunyuan": ("_qkv", ".fc1")}[spelled]
    proj = {"flux": ".proj", "hunyuan": "_proj"}[spelled]
    ff = "ff.linear_in" if other == "flux2" else "ff.net.0.proj"
    there = "transformer_blocks.0"
    hunyuan = spelled == "hunyuan"
    layers = [
        _layer(
            f"{prefix}.img_attn{attn}", " ".join(f"{there}.attn.to_{n}" for n in "qkv"), (3 * D, D),
            comfy=f"{prefix}.img_attn.qkv" if hunyuan else "",
        ),
        _layer(
            f"{prefix}.img_attn{proj}", f"{there}.attn.to_out.0",
            comfy=f"{prefix}.img_attn.proj" if hunyuan else "",
        ),
        _layer(
            f"{prefix}.img_mlp{mlp}", f"{there}.{ff}", (4 * D, D),
            comfy=f"{prefix}.img_mlp.0" if hunyuan else "",
        ),
    ]  # fmt: skip
    if context:
        layers.append(
            _layer(
                f"{prefix}.txt_attn{attn}",
                " ".join(f"{there}.attn.add_{n}_proj" for n in "qkv"),
                (3 * D, D),
                comfy=f"{prefix}.txt_attn.qkv" if hunyuan else "",
            )
        )
    return layers


def _single() -> list[Layer]:
    there = "single_transformer_blocks.0"
    parts = " ".join([*(f"{there}.attn.to_{n}" for n in "qkv"), f"{there}.proj_mlp"])
    shares = (*(Fraction(1, 7),) * 3, Fraction(4, 7))
    return [
        _layer("single_blocks.0.linear1", parts, (7 * D, D), shares=shares),
        _layer("single_blocks.0.linear2", f"{there}.proj_out", (D, 5 * D)),
    ]


FINAL = _layer("final_layer.adaLN_modulation.1", "norm_out.linear", (2 * D, D), swapped=True)


def _same(*names: str, component: str = "") -> list[Layer]:
    return [_layer(name, name, component=component) for name in names]


LAYERS: dict[str, list[Layer]] = {
    "sd1": [
        *_unet("input_blocks.1", "down_blocks.0", "sd1", True),
        *_clip("text_encoder"),
    ],
    "sdxl": [
        *_unet("input_blocks.4", "down_blocks.1", "sdxl", False),
        *_clip("text_encoder"),
        *_bigg(),
    ],
    "flux": [*_mm("double_blocks.0", "flux"), *_single(), FINAL, *_clip("text_encoder")],
    "chroma": [
        *_mm("double_blocks.0", "flux"),
        *_single(),
        *[
            _layer(
                "distilled_guidance_layer.layers.0.in_layer",
                "distilled_guidance_layer.layers.0.linear_1",
            )
        ],
    ],
    "flux2": [
        *_mm("double_blocks.0", "flux2"),
        _layer(
            "single_blocks.0.linear1",
            "single_transformer_blocks.0.attn.to_qkv_mlp_proj",
            (9 * D, D),
        ),
        _layer("single_blocks.0.linear2", "single_transformer_blocks.0.attn.to_out", (D, 4 * D)),
        FINAL,
    ],
    "hunyuan-video": [
        *_mm("double_blocks.0", "hunyuan", spelled="hunyuan"),
        *_single(),
        FINAL,
    ],
    "sd3": [
        _layer(
            "joint_blocks.0.x_block.attn.qkv",
            " ".join(f"transformer_blocks.0.attn.to_{n}" for n in "qkv"),
            (3 * D, D),
        ),
        _layer(
            "joint_blocks.0.context_block.attn.qkv",
            " ".join(f"transformer_blocks.0.attn.add_{n}_proj" for n in "qkv"),
            (3 * D, D),
        ),
        _layer("joint_blocks.0.x_block.attn.proj", "transformer_blocks.0.attn.to_out.0"),
        _layer("joint_blocks.0.x_block.mlp.fc1", "transformer_blocks.0.ff.net.0.proj", (4 * D, D)),
        _layer(
            "joint_blocks.23.context_block.adaLN_modulation.1",
            "transformer_blocks.23.norm1_context.linear",
            (2 * D, D),
            swapped=True,
        ),
        FINAL,
        _layer("x_embedder.proj", "pos_embed.proj", (D, 16, 2, 2), tag="conv2"),
    ],
    "z-image": [
        _layer(
            "layers.0.attention.qkv",
            " ".join(f"layers.0.attention.to_{n}" for n in "qkv"),
            (3 * D, D),
        ),
        _layer("layers.0.attention.out", "layers.0.attention.to_out.0"),
        *_same("layers.0.feed_forward.w1", "layers.0.feed_forward.w2"),
    ],
    "lumina2": [
        _layer(
            "layers.0.attention.qkv",
            " ".join(f"layers.0.attn.to_{n}" for n in "qkv"),
            (80, D),
            shares=(Fraction(3, 5), Fraction(1, 5), Fraction(1, 5)),
        ),
        _layer("layers.0.attention.out", "layers.0.attn.to_out.0"),
        _layer("layers.0.feed_forward.w1", "layers.0.feed_forward.linear_1", (2 * D, D)),
        _layer("layers.0.adaLN_modulation.1", "layers.0.norm1.linear", (4 * D, D)),
    ],
    "qwen-image": [
        *_same(
            "transformer_blocks.0.attn.to_q",
            "transformer_blocks.0.attn.add_k_proj",
            "transformer_blocks.0.attn.to_out.0",
        ),
        _layer(*["transformer_blocks.0.img_mlp.net.0.proj"] * 2, (4 * D, D)),
    ],
    "wan": [
        _layer("blocks.0.self_attn.q", "blocks.0.attn1.to_q"),
        _layer("blocks.0.cross_attn.k", "blocks.0.attn2.to_k"),
        _layer("blocks.0.self_attn.o", "blocks.0.attn1.to_out.0"),
        _layer("blocks.0.ffn.0", "blocks.0.ffn.net.0.proj", (4 * D, D)),
        _layer("patch_embedding", "patch_embedding", (D, 16, 1, 2, 2), tag="conv3d"),
    ],
    "krea2": [
        _layer("blocks.0.attn.wq", "transformer_blocks.0.attn.to_q"),
        _layer("blocks.0.attn.gate", "transformer_blocks.0.attn.to_gate"),
        _layer("blocks.0.attn.wo", "transformer_blocks.0.attn.to_out.0"),
    ],
    "anima": [
        _layer("blocks.0.self_attn.q_proj", "transformer_blocks.0.attn1.to_q"),
        _layer("blocks.0.self_attn.output_proj", "transformer_blocks.0.attn1.to_out.0"),
        _layer("blocks.0.mlp.layer1", "transformer_blocks.0.ff.net.0.proj", (4 * D, D)),
    ],
    "auraflow": [
        _layer("double_layers.0.attn.w2q", "joint_transformer_blocks.0.attn.to_q"),
        _layer("double_layers.0.mlpX.c_fc1", "joint_transformer_blocks.0.ff.linear_1", (2 * D, D)),
        _layer("modF.1", "norm_out.linear", (2 * D, D), swapped=True),
    ],
    "ltx": [
        *_same(
            "transformer_blocks.0.attn1.to_q",
            "transformer_blocks.0.attn2.to_k",
            "transformer_blocks.0.attn1.to_out.0",
        ),
        _layer("patchify_proj", "proj_in"),
    ],
}
UNETS = ("sd1", "sdxl")
# the denoiser's prefix in a single-file checkpoint
CHECKPOINT = {
    "sd1": "model.diffusion_model.",
    "sdxl": "model.diffusion_model.",
    "sd3": "model.diffusion_model.",
    "ltx": "model.diffusion_model.",
    "anima": "net.",
}
CHECKPOINT_TE = {
    ("sd1", "text_encoder"): "cond_stage_model.transformer.",
    ("sdxl", "text_encoder"): "conditioner.embedders.0.transformer.",
    ("sdxl", "text_encoder_2"): "conditioner.embedders.1.model.",
}
COMFY_TE = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
