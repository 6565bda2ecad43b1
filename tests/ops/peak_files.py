"""Files of one layer for `tests.ops.peaks`: a checkpoint and its tuned copy, and an adapter of every kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

NAME = "transformer.blocks.0.layer"
RANK = 8
LAYER, OTHER = "blocks.0.layer.weight", "blocks.1.layer.weight"
# a module of SDXL: a kind may need to know what it is, as the OFT that sd-scripts alone writes
TO_Q = "input_blocks.4.1.transformer_blocks.0.attn1.to_q"
TO_Q_OF_DIFFUSERS = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
PACKED = ("nf4", "int8", "nvfp4", "Q8_0")
KINDS = ("lora", "lokr", "lokr-factored", "loha", "dora", "dora-input", "oft", "boft", "glora", "ia3", "tlora", "full")  # fmt: skip
# kinds of PEFT alone, with what their configurations state
PEFT: dict[str, dict[str, Any]] = {
    "adalora": {"peft_type": "ADALORA", "r": RANK, "init_r": RANK, "target_r": RANK, "lora_alpha": RANK},
    "hira": {"peft_type": "HIRA", "r": RANK},
    "hra": {"peft_type": "HRA", "r": RANK, "apply_GS": False},
    "hra-gs": {"peft_type": "HRA", "r": RANK, "apply_GS": True},
    "vera": {"peft_type": "VERA", "r": RANK, "projection_prng_key": 0},
    "delora": {"peft_type": "DELORA", "r": RANK},
    "fourierft": {"peft_type": "FOURIERFT", "random_loc_seed": 9, "scaling": 30},
    "miss": {"peft_type": "MISS", "r": RANK, "init_weights": True},
    "miss-bat": {"peft_type": "MISS", "r": RANK, "init_weights": "bat"},
    "peft-oft": {"peft_type": "OFT", "oft_block_size": 32},
    "peft-boft": {"peft_type": "BOFT", "boft_block_size": 32, "boft_n_butterfly_factor": 2},
    "peft-ia3": {"peft_type": "IA3"},
    "peft-glora": {"peft_type": "GLORA", "r": RANK},
    "pissa": {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "init_lora_weights": "pissa"},
    "olora": {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "init_lora_weights": "olora"},
}  # fmt: skip


def tensors_of(
    kind: str, rows: int, columns: int, draw: torch.Generator
) -> dict[str, torch.Tensor]:
    """The tensors of a kind by role, as its trainer stores them."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw) * 0.01

    r = RANK
    low = {"lora_up.weight": normal(rows, r), "lora_down.weight": normal(r, columns)}
    theirs = {"lora_B": normal(rows, r), "lora_A": normal(r, columns)}
    match kind:
        case "lora":
            return low
        case "dora":
            return {**low, "dora_scale": torch.ones(rows, 1)}
        case "dora-input":
            return {**low, "dora_scale": torch.ones(1, columns)}
        case "lokr":
            return {"lokr_w1": normal(8, 8), "lokr_w2": normal(rows // 8, columns // 8)}
        case "lokr-factored":
            a, b = normal(rows // 4, r), normal(r, columns // 4)
            return {"lokr_w1": normal(4, 4), "lokr_w2_a": a, "lokr_w2_b": b}
        case "loha":
            pairs = (("a", (rows, r)), ("b", (r, columns)))
            return {f"hada_w{n}_{side}": normal(*shape) for n in "12" for side, shape in pairs}
        case "oft":
            return {"oft_blocks": normal(rows // 32, 32, 32), "alpha": torch.tensor(0.0)}
        case "boft":
            return {"oft_blocks": normal(2, rows // 32, 32, 32), "alpha": torch.tensor(0.0)}
        case "glora":
            shapes = {"a1": (columns, r), "a2": (r, columns), "b1": (rows, r), "b2": (r, columns)}
            return {f"{role}.weight": normal(*shape) for role, shape in shapes.items()}
        case "ia3":
            return {"weight": normal(rows), "on_input": torch.tensor(False)}
        case "tlora":
            sides = {"p_layer.weight": normal(rows, r), "q_layer.weight": normal(r, columns)}
            return {**sides, "lambda_layer": normal(1, r)}
        case "full":
            return {"diff": normal(rows, columns)}
        case "pissa" | "olora":
            return {f"{side}.weight": t for side, t in theirs.items()}
        case "adalora":
            return {**theirs, "lora_E": normal(r, 1)}
        case "hira":
            return {"hira_B": normal(rows, r), "hira_A": normal(r, columns)}
        case "hra" | "hra-gs":
            return {"hra_u": normal(columns, r)}
        case "vera":
            scales = {"vera_lambda_b": normal(rows), "vera_lambda_d": normal(r)}
            return {**scales, "vera_A": normal(r, columns), "vera_B": normal(rows, r)}
        case "delora":
            sides = {"delora_A": normal(r, columns), "delora_B": normal(rows, r)}
            return {**sides, "delora_lambda": normal(1) + 1, "delora_w_norm": normal(columns).abs()}
        case "fourierft":
            return {"fourierft_spectrum": normal(1000)}
        case "miss":
            return {"miss_block": normal(r, rows)}
        case "miss-bat":
            return {"miss_block": normal(rows // r, r, r)}
        case "peft-oft":
            return {"oft_R.weight": normal(columns // 32, 32 * 31 // 2)}
        case "peft-boft":
            return {"boft_R": normal(2, columns // 32, 32, 32), "boft_s": torch.ones(rows, 1)}
        case "peft-ia3":
            return {"ia3_l": 1 + normal(rows, 1)}
        case "peft-glora":
            sides = {"d": (rows, r), "u": (r, columns)}
            found = {f"glora_{p}.X{s}": normal(*shape) for p in "AB" for s, shape in sides.items()}
            return found | {f"glora_{p}.zeros": torch.zeros(1) for p in "CDE"}
        case _:
            raise ValueError(kind)


def adapter(kind: str, rows: int, columns: int, folder: Path, module: str = NAME) -> Path:
    """A file, or a folder of PEFT, with one module of this kind."""
    draw = torch.Generator().manual_seed(0)
    made = {role: t.contiguous() for role, t in tensors_of(kind, rows, columns, draw).items()}
    at = folder / f"{kind}-{rows}-{columns}{'' if module == NAME else '-sdxl'}"
    if kind not in PEFT:
        path = Path(f"{at}.safetensors")
        save_file({f"{module}.{role}": t for role, t in made.items()}, path, {"format": "pt"})
        return path
    at.mkdir()
    shared = {role: made.pop(role) for role in ("vera_A", "vera_B") if role in made}
    state = {
        f"base_model.model.{module.removeprefix('transformer.')}.{role}": t
        for role, t in made.items()
    }
    state |= {f"base_model.{role}": t for role, t in shared.items()}
    save_file(state, at / "adapter_model.safetensors", {"format": "pt"})
    (at / "adapter_config.json").write_text(json.dumps(PEFT[kind]), encoding="utf-8")
    return at


def checkpoints(rows: int, columns: int, folder: Path) -> dict[str, Path]:
    """A layer and its tuned copy in fp16, and the layer in scaled fp8."""
    draw = torch.Generator().manual_seed(0)
    base = {
        LAYER: (torch.randn(rows, columns, generator=draw) / columns**0.5).half(),
        OTHER: torch.randn(64, 64, generator=draw).half(),
    }
    tuned = {
        key: (w.float() + torch.randn(w.shape, generator=draw) * 0.01 / columns**0.5).half()
        for key, w in base.items()
    }
    fp8 = {key: (w.float() * 16).to(torch.float8_e4m3fn) for key, w in base.items()}
    fp8 |= {f"{key.removesuffix('.weight')}.scale_weight": torch.tensor(1 / 16) for key in base}
    made = {"base": base, "tuned": tuned, "fp8": fp8}
    at = {name: folder / f"{name}-{rows}-{columns}.safetensors" for name in made}
    for name, state in made.items():
        save_file(state, at[name], {"format": "pt"})
    return at


def packed(kind: str, rows: int, columns: int, folder: Path) -> Path:
    """The layer as quantised files hold it, and a plain one; the numbers are drawn."""
    draw = np.random.default_rng(0)
    if kind == "Q8_0":
        return _gguf(rows, columns, draw, folder)
    stem, halves = LAYER.removesuffix(".weight"), (rows, columns // 2)
    nibbles = torch.from_numpy(draw.integers(0, 256, halves, dtype=np.uint8))
    if kind == "nf4":
        said = {"quant_type": "nf4", "blocksize": 64, "shape": [rows, columns], "dtype": "bfloat16"}
        state = {
            LAYER: nibbles.reshape(-1, 1),
            f"{LAYER}.quant_map": torch.linspace(-1, 1, 16),
            f"{LAYER}.absmax": torch.full((rows * columns // 64,), 0.05),
            f"{LAYER}.quant_state.bitsandbytes__nf4": _text(said),
        }
    elif kind == "int8":
        codes = draw.integers(-127, 128, (rows, columns), dtype=np.int8)
        state = {
            LAYER: torch.from_numpy(codes),
            f"{stem}.SCB": torch.full((rows,), 0.05),
            f"{stem}.weight_format": torch.tensor(0, dtype=torch.uint8),
        }
    else:
        scales = torch.full((-(-rows // 128) * 128, -(-columns // 64) * 4), 56, dtype=torch.uint8)
        state = {
            LAYER: nibbles,
            f"{stem}.weight_scale": scales.view(torch.float8_e4m3fn),
            f"{stem}.weight_scale_2": torch.tensor(0.01),
            f"{stem}.comfy_quant": _text({"format": "nvfp4"}),
        }
    path = folder / f"{kind}-{rows}-{columns}.safetensors"
    save_file({**state, OTHER: torch.ones(64, 64).half()}, path, {"format": "pt"})
    return path


def _text(value: dict[str, Any]) -> torch.Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def _gguf(rows: int, columns: int, draw: np.random.Generator, folder: Path) -> Path:
    import gguf

    path, kind = folder / f"Q8_0-{rows}-{columns}.gguf", gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(path, "flux")
    weight = (0.05 * draw.standard_normal((rows, columns))).astype(np.float32)
    writer.add_tensor(LAYER, gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.add_tensor(OTHER, np.ones((64, 64), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def of_sd_scripts(rows: int, columns: int, folder: Path) -> tuple[Path, Path]:
    """A checkpoint of SDXL with one layer, and an OFT of sd-scripts on it."""
    draw = torch.Generator().manual_seed(0)
    base, made = (folder / f"{name}-{rows}-{columns}.safetensors" for name in ("sdxl", "kohya-oft"))
    weight = (torch.randn(rows, columns, generator=draw) / columns**0.5).half()
    save_file({f"model.diffusion_model.{TO_Q}.weight": weight}, base, {"format": "pt"})
    blocks = torch.randn(rows // 32, 32, 32, generator=draw) * 0.01
    stem = f"oft_unet_{TO_Q.replace('.', '_')}"
    tensors = {f"{stem}.oft_blocks": blocks, f"{stem}.alpha": torch.tensor(0.01)}
    save_file(tensors, made, {"format": "pt"})
    return base, made


def recipe(path: Path, jobs: list[dict[str, Any]]) -> Path:
    """A recipe for `batch`."""
    lines = [
        line
        for job in jobs
        for line in ("[[job]]", *(f"{name} = {json.dumps(value)}" for name, value in job.items()))
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path
