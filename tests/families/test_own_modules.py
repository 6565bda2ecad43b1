"""Models made of another, with layers of their own, by the names in their own checkpoints.

No package here has a class for them. The names and sizes are written down from public loaders: ComfyUI's
`comfy/ldm/wan/model.py`, `chroma_radiance` and `hidream_o1`, ReCamMaster's training script, musubi-tuner's
`lora_hidream_o1`. Nothing below is taken from adaptkit's tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit.detect import detect_adapter, detect_checkpoint, formats
from adaptkit.errors import AdaptkitError
from adaptkit.files.header import TensorInfo
from adaptkit.ops import convert, extract, merge

Shapes = dict[str, tuple[int, ...]]
RANK = 2


class Widths:
    """The published widths, or small ones that keep what must be equal equal."""

    def __init__(self, small: bool) -> None:
        self.small = small

    def __call__(self, *sizes: int) -> tuple[int, ...]:
        return tuple(-(-size // 128) for size in sizes) if self.small else sizes


def wan(own: Shapes, w: Widths, blocks: int) -> Shapes:
    found: Shapes = {"patch_embedding": (*w(5120, 16), 1, 2, 2), "text_embedding.0": w(5120, 4096),
                     "time_projection.1": w(30720, 5120), "head.head": w(64, 5120)}  # fmt: skip
    for n in range(blocks):
        for name in ("self_attn", "cross_attn"):
            found |= {f"blocks.{n}.{name}.{letter}": w(5120, 5120) for letter in "qkvo"}
        found |= {f"blocks.{n}.ffn.0": w(13824, 5120), f"blocks.{n}.ffn.2": w(5120, 13824)}
    return found | own


def s2v(w: Widths, blocks: int) -> Shapes:
    encoder = "casual_audio_encoder.encoder."
    own: Shapes = {
        f"{encoder}conv1_local.conv": (*w(5120, 1024), 3), f"{encoder}conv1_global.conv": (*w(1280, 1024), 3),
        f"{encoder}conv2.conv": (*w(2560, 1280), 3), f"{encoder}conv3.conv": (*w(5120, 2560), 3),
        f"{encoder}final_linear": w(5120, 5120), "cond_encoder": (*w(5120, 16), 1, 2, 2),
        "frame_packer.proj": (*w(5120, 16), 1, 2, 2), "frame_packer.proj_2x": (*w(5120, 16), 2, 4, 4),
        "frame_packer.proj_4x": (*w(5120, 16), 4, 8, 8),
    }  # fmt: skip
    for n in range(1 if w.small else 12):
        own |= {f"audio_injector.injector.{n}.{letter}": w(5120, 5120) for letter in "qkvo"}
        own[f"audio_injector.injector_adain_layers.{n}.linear"] = w(10240, 5120)
    return wan(own, w, blocks)


def fun_camera(w: Widths, blocks: int) -> Shapes:
    residual = "control_adapter.residual_blocks.0."
    own = {"control_adapter.conv": (*w(5120, 1536), 2, 2), f"{residual}conv1": (*w(5120, 5120), 3, 3),
           f"{residual}conv2": (*w(5120, 5120), 3, 3)}  # fmt: skip
    return wan(own, w, blocks)


def fun_control(w: Widths, blocks: int) -> Shapes:
    return wan({"ref_conv": (*w(5120, 16), 2, 2)}, w, blocks)


def recam(w: Widths, blocks: int) -> Shapes:
    own = {f"blocks.{n}.cam_encoder": w(5120, 12) for n in range(blocks)}
    return wan(own | {f"blocks.{n}.projector": w(5120, 5120) for n in range(blocks)}, w, blocks)


def humo(w: Widths, blocks: int) -> Shapes:
    own = {f"audio_proj.audio_proj_glob_{n}.layer": w(*size)
           for n, size in ((1, (512, 51200)), (2, (512, 512)), (3, (24576, 512)))}  # fmt: skip
    for n in range(blocks):
        stem = f"blocks.{n}.audio_cross_attn_wrapper.audio_cross_attn."
        own |= {stem + letter: w(5120, 1536 if letter in "kv" else 5120) for letter in "qkvo"}
    return wan(own, w, blocks)


def scail(w: Widths, blocks: int) -> Shapes:
    own = {f"patch_embedding_{name}": (*w(5120, n), 1, 2, 2) for name, n in (("pose", 20), ("mask", 28))}  # fmt: skip
    return wan(own, w, blocks)


def radiance(w: Widths, blocks: int, head: str = "nerf_final_layer_conv.conv") -> Shapes:
    d = 3072
    found: Shapes = {"img_in_patch": (*w(d, 3), 16, 16), "txt_in": w(d, 4096), "nerf_image_embedder.embedder.0": w(64, 67),
                     head: (*w(3, 64), *((3, 3) if head.endswith("conv") else ()))}  # fmt: skip
    for n in range(blocks):
        for side in ("img", "txt"):
            stem = f"double_blocks.{n}.{side}_"
            found |= {f"{stem}attn.qkv": w(3 * d, d), f"{stem}attn.proj": w(d, d), f"{stem}mlp.0": w(4 * d, d), f"{stem}mlp.2": w(d, 4 * d)}  # fmt: skip
        found |= {f"single_blocks.{n}.linear1": w(7 * d, d), f"single_blocks.{n}.linear2": w(d, 5 * d)}  # fmt: skip
    return found | {f"nerf_blocks.{n}.param_generator": w(49152, d) for n in range(1 if w.small else 4)}  # fmt: skip


def radiance_linear(w: Widths, blocks: int) -> Shapes:
    return radiance(w, blocks, "nerf_final_layer.linear")


def hidream_o1(w: Widths, blocks: int) -> Shapes:
    found: Shapes = {"t_embedder1.mlp.0": w(4096, 256), "t_embedder1.mlp.2": w(4096, 4096), "x_embedder.proj1": w(1024, 3072),
                     "x_embedder.proj2": w(4096, 1024), "final_layer2.linear": w(3072, 4096),
                     "visual.patch_embed.proj": (*w(1152, 3), 2, 16, 16)}  # fmt: skip
    for n in range(blocks):
        stem = f"language_model.layers.{n}."
        found |= {f"{stem}self_attn.{name}_proj": w(rows, 4096) for name, rows in (("q", 4096), ("k", 1024), ("v", 1024), ("o", 4096))}  # fmt: skip
        found |= {f"{stem}mlp.gate_proj": w(12288, 4096), f"{stem}mlp.up_proj": w(12288, 4096), f"{stem}mlp.down_proj": w(4096, 12288)}  # fmt: skip
    for n in range(min(blocks, 27)):
        stem = f"visual.blocks.{n}."
        found |= {f"{stem}attn.qkv": w(3456, 1152), f"{stem}attn.proj": w(1152, 1152), f"{stem}mlp.linear_fc1": w(4304, 1152), f"{stem}mlp.linear_fc2": w(1152, 4304)}  # fmt: skip
    return found


# model -> its names, blocks, family, the prefix of its checkpoint, and of its kohya keys
MODELS = {
    "Wan S2V": (s2v, 40, "wan", "", "lora_unet_"),
    "Wan Fun-Camera": (fun_camera, 40, "wan", "", "lora_unet_"),
    "Wan Fun-Control": (fun_control, 40, "wan", "", "lora_unet_"),
    "ReCamMaster": (recam, 30, "wan", "", "lora_unet_"),
    "HuMo": (humo, 40, "wan", "", "lora_unet_"),
    "SCAIL-2": (scail, 40, "wan", "", "lora_unet_"),
    "Chroma Radiance": (radiance, 19, "chroma", "", "lora_unet_"),
    "Chroma Radiance, linear": (radiance_linear, 19, "chroma", "", "lora_unet_"),
    "HiDream-O1": (hidream_o1, 36, "hidream-o1", "model.", "lora_unet_model_"),
}


@cache
def shapes(name: str, small: bool) -> Shapes:
    make, blocks, *_ = MODELS[name]
    return make(Widths(small), 1 if small else blocks)


def factors(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    rows, *rest = shape
    return (rows, RANK, *(1 for _ in rest[1:])), (RANK, *rest)


def header(found: Mapping[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    return {key: TensorInfo(key, "F16", shape, 0, 0) for key, shape in found.items()}


def spelled(found: Shapes, prefix: str, joiner: str, up: str, down: str) -> Shapes:
    return {
        f"{prefix}{module.replace('.', joiner)}.{end}.weight": shape
        for module, weight in found.items()
        for end, shape in zip((up, down), factors(weight), strict=True)
    }


@pytest.mark.parametrize("name", MODELS)
def test_the_published_model_is_recognised(name: str) -> None:
    """As an adapter in three spellings, and as a checkpoint in two."""
    _, _, family, prefix, kohya = MODELS[name]
    found = shapes(name, False)
    for stem, joiner, up, down in (
        ("diffusion_model.", ".", "lora_B", "lora_A"),
        (kohya, "_", "lora_up", "lora_down"),
        ("transformer.", ".", "lora_B", "lora_A"),
    ):
        said = detect_adapter(header(spelled(found, stem, joiner, up, down)), {})
        assert (said.family, said.claimed, said.alternatives) == (family, said.total, ()), stem
    for stem in (prefix, "model.diffusion_model."):
        said = detect_checkpoint(header({f"{stem}{m}.weight": s for m, s in found.items()}), {})
        assert (said.family, said.claimed, said.alternatives) == (family, said.total, ()), stem


def own(name: str) -> Shapes:
    """The layers that the models it is made of have not."""
    plain = {**wan({}, Widths(False), 40), "txt_in": (), "time_embedding.0": ()}
    found = shapes(name, False)
    return {m: s for m, s in found.items() if m not in plain and "_blocks." not in m.replace("nerf_blocks", "")}  # fmt: skip


def test_own_layers_alone_are_enough() -> None:
    for name in set(MODELS) - {"HiDream-O1", "Wan Fun-Control"}:  # one narrow layer tells nothing
        said = detect_adapter(header(spelled(own(name), "diffusion_model.", ".", "lora_B", "lora_A")), {})  # fmt: skip
        assert (said.family, said.claimed) == (MODELS[name][2], said.total), name


def test_qwen3_vl_itself_is_not_hidream() -> None:
    """HiDream-O1 is Qwen3-VL 8B with patches; neither that model nor an adapter of it is one of HiDream-O1's."""
    found = {m: s for m, s in shapes("HiDream-O1", False).items() if m.startswith(("visual.", "language_model."))}  # fmt: skip
    for prefix in ("model.", "model.diffusion_model.", ""):
        said = detect_checkpoint(header({f"{prefix}{m}.weight": s for m, s in found.items()}), {})
        assert said.family is None, prefix
    for prefix in ("base_model.model.model.", "base_model.model.", "model.", ""):
        said = detect_adapter(header(spelled(found, prefix, ".", "lora_B", "lora_A")), {})
        assert said.family is None, prefix


def written(name: str, folder: Path) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """A small checkpoint, an adapter on all its layers in ComfyUI's names, and both together in float64."""
    _, _, _, prefix, _ = MODELS[name]
    draw = torch.Generator().manual_seed(0)
    base, adapter, merged = {}, {}, {}
    for module, shape in shapes(name, True).items():
        weight = torch.randn(shape, generator=draw)
        up, down = (torch.randn(size, generator=draw) for size in factors(shape))
        base[f"{prefix}{module}.weight"] = weight
        adapter |= {f"diffusion_model.{module}.lora_A.weight": down, f"diffusion_model.{module}.lora_B.weight": up}  # fmt: skip
        product = up.double().flatten(1) @ down.double().flatten(1)
        merged[f"{prefix}{module}.weight"] = weight.double() + product.reshape(shape)
    paths = folder / "base.safetensors", folder / "adapter.safetensors"
    save_file(base, paths[0])
    save_file(adapter, paths[1])
    return *paths, merged


def run(verb: object, *arguments: object) -> object:
    plan = verb.plan(*arguments)  # type: ignore[attr-defined]
    try:
        return verb.run(plan)  # type: ignore[attr-defined]
    finally:
        plan.close()


@pytest.mark.parametrize("name", MODELS)
def test_every_verb_works_on_a_small_one(name: str, tmp_path: Path) -> None:
    family = MODELS[name][2]
    base, adapter, expected = written(name, tmp_path)
    first, reached = load_file(adapter), set()
    for to in formats():
        there, back = tmp_path / (to if to == "peft" else f"{to}.safetensors"), tmp_path / f"{to}-back.safetensors"  # fmt: skip
        try:
            run(
                convert,
                adapter,
                convert.Options(to=to, family=family, format="comfy", output=there),
            )
        except AdaptkitError:
            assert not there.exists()
            continue
        run(convert, there, convert.Options(to="comfy", family=family, format=to, output=back))
        second = load_file(back)
        assert {k for k in second if not k.endswith(".alpha")} == first.keys(), to
        assert all(torch.equal(second[key], tensor) for key, tensor in first.items()), to
        reached.add(to)
    assert {"diffusers", "kohya", "comfy"} <= reached
    output = tmp_path / "merged.safetensors"
    run(merge, base, [(adapter, 1.0)], merge.Options(output=output, family=family))
    merged = load_file(output)
    assert merged.keys() == expected.keys()
    for key, tensor in merged.items():
        torch.testing.assert_close(tensor.double(), expected[key], rtol=1e-6, atol=1e-5, msg=key)
    again = tmp_path / "extracted.safetensors"
    run(extract, base, output, extract.Options(rank=RANK, to="comfy", dtype="fp32", family=family, output=again))  # fmt: skip
    found = load_file(again)
    assert found.keys() >= first.keys()
    for key in (key for key in first if key.endswith("lora_B.weight")):
        down = key.replace("lora_B", "lora_A")
        got, want = (
            t[key].double().flatten(1) @ t[down].double().flatten(1) for t in (found, first)
        )
        assert (got - want).norm() < 1e-4 * want.norm(), key
