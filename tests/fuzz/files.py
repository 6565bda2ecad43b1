"""Tiny files of every kind, and what a stranger may have done to them."""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

WIDTH = {"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2,
         "I16": 2, "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "I8": 1,
         "U8": 1, "BOOL": 1, "F4": 0.5, "F6_E2M3": 0.75}  # fmt: skip
STEM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
DIFFUSERS = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_"
SINGLE = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_"


@dataclass
class Tensor:
    """A stored tensor; `data` may be shorter or longer than its shape says."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass
class File:
    """A safetensors file before it is written."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, object] = field(default_factory=dict)

    def add(self, key: str, *shape: int, dtype: str = "F32", value: float | None = None) -> File:
        count = int(np.prod(shape))
        numbers = np.random.default_rng(len(key) + count).normal(size=count)
        if value is not None:
            numbers = np.full(count, value)
        self.tensors[key] = Tensor(dtype, shape, encoded(numbers, dtype))
        return self

    def bytes(self) -> bytes:
        table: dict[str, object] = {"__metadata__": self.metadata} if self.metadata else {}
        body, at = [], 0
        for key, tensor in self.tensors.items():
            stop = at + len(tensor.data)
            table[key] = {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [at, stop],
            }
            body.append(tensor.data)
            at = stop
        raw = json.dumps(table).encode()
        return struct.pack("<Q", len(raw)) + raw + b"".join(body)

    def save(self, path: Path) -> Path:
        path.write_bytes(self.bytes())
        return path

    def copy(self) -> File:
        return File(
            {k: Tensor(t.dtype, t.shape, t.data) for k, t in self.tensors.items()},
            dict(self.metadata),
        )


def encoded(numbers: np.ndarray, dtype: str) -> bytes:
    """Numbers in a format, by truncation where numpy has none."""
    plain = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I8": "i1"}
    with np.errstate(all="ignore"):
        if dtype in plain:
            return numbers.astype(plain[dtype]).tobytes()
        if dtype == "BF16":
            return (numbers.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    size = int(len(numbers) * WIDTH[dtype])
    return bytes(np.random.default_rng(len(numbers)).integers(0, 126, size, dtype="u1"))


# seeds ------------------------------------------------------------------------------------


def lora(format: str = "kohya") -> File:
    made = File()
    for n, module in enumerate("qk"):
        if format == "kohya":
            made.add(f"{STEM}{module}.lora_down.weight", 3, 8)
            made.add(f"{STEM}{module}.lora_up.weight", 8, 3)
            made.add(f"{STEM}{module}.alpha", value=3.0 - n)
        else:
            made.add(f"{DIFFUSERS}{module}.lora_A.weight", 3, 8, dtype="F16")
            made.add(f"{DIFFUSERS}{module}.lora_B.weight", 8, 3, dtype="F16")
    if format != "kohya":
        config = {"unet.r": 3, "unet.lora_alpha": 2, "unet.alpha_pattern": {"attn1.to_q": 4}}
        made.metadata["lora_adapter_metadata"] = json.dumps(config)
    return made


def adapters() -> dict[str, File]:
    """One file of each algorithm."""
    q, c = STEM + "q", CONV
    found = {"lora": lora(), "peft": lora("diffusers")}
    found["conv"] = (
        File()
        .add(f"{c}.lora_down.weight", 2, 4, 3, 3)
        .add(f"{c}.lora_up.weight", 4, 2, 1, 1)
        .add(f"{c}.alpha", value=1.0)
    )
    found["locon"] = (
        File()
        .add(f"{c}.lora_mid.weight", 2, 2, 3, 3)
        .add(f"{c}.lora_down.weight", 2, 4, 1, 1)
        .add(f"{c}.lora_up.weight", 4, 2, 1, 1)
    )
    found["dora"] = lora().add(f"{q}.dora_scale", 1, 8)
    found["lokr"] = (
        File()
        .add(f"{q}.lokr_w1", 2, 2)
        .add(f"{q}.lokr_w2_a", 4, 2)
        .add(f"{q}.lokr_w2_b", 2, 4)
        .add(f"{q}.alpha", value=2.0)
    )
    found["loha"] = File()
    for part in ("w1", "w2"):
        found["loha"].add(f"{q}.hada_{part}_a", 8, 2).add(f"{q}.hada_{part}_b", 2, 8)
    found["full"] = File().add(f"{q}.diff", 8, 8).add(f"{STEM}out_0.diff_b", 8)
    found["ia3"] = File().add(f"{q}.weight", 8).add(f"{q}.on_input", value=0.0)
    found["oft"] = File().add(f"{q}.oft_blocks", 2, 4, 4).add(f"{q}.alpha", value=1.0)
    found["glora"] = File()
    for part in ("a1", "a2", "b1", "b2"):
        down = part.endswith("1")
        found["glora"].add(f"{q}.{part}.weight", *((2, 8) if down else (8, 2)))
    found["forge"] = File()
    for place, shape in enumerate(((8, 3), (3, 8), ())):
        found["forge"].add(f"{SINGLE}q.weight::lora::{place}".removeprefix("model."), *shape)
    found["nunchaku"] = File()
    for layer, rows in (("qkv_proj", 48), ("out_proj", 16), ("norm1.linear", 96)):
        name, rank = f"transformer_blocks.0.{layer}", 16 if "." in layer else 48
        down = (rank, 16) if "." in layer else (16, rank)
        found["nunchaku"].add(f"{name}.lora_down", *down).add(f"{name}.lora_up", rows, rank)
    return found


def checkpoint(dtype: str = "F32", seed: float = 0.0) -> File:
    made = File()
    for module in "qk":
        made.add(f"{SINGLE}{module}.weight", 8, 8, dtype=dtype)
    made.add("model.diffusion_model.input_blocks.1.0.in_layers.2.weight", 4, 4, 3, 3, dtype=dtype)
    made.add("model.diffusion_model.time_embed.0.bias", 8, dtype=dtype)
    if seed:
        for tensor in made.tensors.values():
            if tensor.dtype == "F32":
                plus = np.random.default_rng(int(seed)).normal(size=len(tensor.data) // 4) * 0.1
                old = np.frombuffer(tensor.data, "<f4")
                tensor.data = (old + plus).astype("<f4").tobytes()
    return made


def torch_zip(tensors: int = 3, *, packed: bool = False) -> bytes:
    """A state dict as torch.save writes it, made of opcodes so that no torch is needed."""
    out = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(out, "w", kind) as archive:
        archive.writestr("a/data.pkl", torch_pickle(tensors))
        archive.writestr("a/byteorder", "little")
        for n in range(tensors):
            archive.writestr(f"a/data/{n}", np.arange(16, dtype="<f4").tobytes())
    return out.getvalue()


def text(word: str) -> bytes:
    raw = word.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def torch_pickle(tensors: int = 3) -> bytes:
    parts = [b"\x80\x02}q\x00("]
    for n in range(tensors):
        key = f"{DIFFUSERS}q.lora_{'AB'[n % 2]}.weight" if n < 2 else f"extra.{n}"
        parts += [
            text(key),
            b"ctorch._utils\n_rebuild_tensor_v2\nq\x01((",
            text("storage") + b"ctorch\nFloatStorage\n" + text(str(n)) + text("cpu") + b"K\x10tQ",
            b"K\x00K\x04K\x04\x86K\x04K\x01\x86\x89ccollections\nOrderedDict\n)RtR",
        ]
    return b"".join([*parts, b"u."])


def torch_legacy() -> bytes:
    magic = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
    table = torch_pickle(1)
    keys = pickle.dumps(["0"], protocol=2)
    data = struct.pack("<q", 16) + np.arange(16, dtype="<f4").tobytes()
    return magic + b"\x80\x02M\xe9\x03." + b"\x80\x02}." + table + keys + data


# mutation ---------------------------------------------------------------------------------

ODD = (float("nan"), float("inf"), float("-inf"), 1e-42, 1e-45, 3e38, -3e38, 6e4, 1e-20, 1e20, 0.0)
BYTES = (b"\xff", b"\0", b"\x80", b"\x7f", b"{", b"}", b"[", b'"', b"\\", b"\n", b"9" * 30, b".",
         b"-0", b"1e999", b"NaN", b"null", b"\xed\xa0\x80", b"\xc2\x9b", "\u202e".encode())  # fmt: skip
WORDS = ("\x1b]0;x\x07", "\u202e", "\u200b", "#", "\x01", "007", "9" * 40, ".", "..", "a" * 300,
         "\n", "'", "\u0663", "[red]", "{i}", "lora_A", "weight", "default", "alpha")  # fmt: skip
JSONS = ("[", "{}", "[]", "null", '"x"', "1e400", "9" * 500, '{"unet.r": 0}', '{"r": -1}', "[" * 80,
         '{"unet.alpha_pattern": {"((": 1}}', '{"unet.alpha_pattern": {"(a|a)*b": 1}}',
         '{"unet.lora_alpha": 1e308}', '{"unet.lora_alpha": NaN}', '{"unet.rank_pattern": 3}',
         '{"unet.lora_alpha": true, "unet.use_rslora": 1}', '{"unet.r": "x"}')  # fmt: skip


def scrambled(raw: bytes, draw: random.Random, most: int = 6) -> bytes:
    """Bytes changed, inserted, removed, doubled."""
    data = bytearray(raw)
    for _ in range(draw.randint(1, most)):
        at = draw.randrange(len(data) + 1)
        match draw.randrange(6):
            case 0 if at < len(data):
                data[at] = draw.randrange(256)
            case 1 if at < len(data):
                data[at] ^= 1 << draw.randrange(8)
            case 2:
                data[at:at] = draw.choice(BYTES)
            case 3:
                del data[at : at + draw.choice((1, 2, 4, 16))]
            case 4:
                data[at:at] = data[at : at + draw.choice((1, 4, 16, 64))]
            case 5:
                data[at : at + 1] = draw.choice(BYTES)
    return bytes(data)


def mutated(file: File, draw: random.Random) -> File:
    """A file that mostly stays valid, and means something odd."""
    made = file.copy()
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        if made.tensors:
            draw.choice(CHANGES)(made, draw)
    return made


def _shape(file: File, draw: random.Random) -> None:
    tensor = file.tensors[draw.choice(list(file.tensors))]
    shape = list(tensor.shape)
    match draw.randrange(5):
        case 0:
            shape = []
        case 1 if shape:
            shape[draw.randrange(len(shape))] = draw.choice((0, 1, 2, 5, 7, 16))
        case 2:
            shape.insert(draw.randrange(len(shape) + 1), draw.choice((0, 1, 2)))
        case 3 if shape:
            shape.pop(draw.randrange(len(shape)))
        case _:
            draw.shuffle(shape)
    tensor.shape = tuple(shape)
    size = int(np.prod(shape) * WIDTH[tensor.dtype])
    tensor.data = (tensor.data * (size // max(1, len(tensor.data)) + 1))[:size].ljust(size, b"\0")


def _dtype(file: File, draw: random.Random) -> None:
    key = draw.choice(list(file.tensors))
    chosen = list(file.tensors) if draw.random() < 0.3 else [key]
    dtype = draw.choice(list(WIDTH))
    for name in chosen:
        tensor = file.tensors[name]
        count = int(np.prod(tensor.shape))
        tensor.dtype = dtype
        tensor.data = encoded(np.random.default_rng(count).normal(size=count), dtype)


def _numbers(file: File, draw: random.Random) -> None:
    key = draw.choice(list(file.tensors))
    tensor = file.tensors[key]
    count = int(np.prod(tensor.shape))
    if tensor.dtype.startswith(("I", "U", "B", "C", "F4", "F6", "F8_E8", "F8_E4M3FN")):
        tensor.data = bytes(draw.randrange(256) for _ in tensor.data)
        return
    value = draw.choice(ODD)
    if tensor.dtype.startswith("F8"):
        fill = bytes([draw.choice((0x7F, 0xFF, 0x7C, 0x7E, 0x01, 0))])
        tensor.data = fill * len(tensor.data)
        return
    numbers = encoded(np.full(count, value), tensor.dtype)
    if draw.random() < 0.5 and count:
        width = int(WIDTH[tensor.dtype])
        at = draw.randrange(count) * width
        numbers = tensor.data[:at] + numbers[:width] + tensor.data[at + width :]
    tensor.data = numbers


def _key(file: File, draw: random.Random) -> None:
    key = draw.choice(list(file.tensors))
    tensor = file.tensors.pop(key)
    at = draw.randrange(len(key) + 1)
    match draw.randrange(4):
        case 0:
            key = key[:at] + draw.choice(WORDS) + key[at:]
        case 1:
            key = key[:at] + key[at + draw.choice((1, 2, 8)) :]
        case 2:
            key = key.replace("_q", draw.choice(("_k", "_v", "_z", "_q_0")))
        case 3:
            other = draw.choice([*file.tensors, key])
            key = key[: key.rfind(".")] + other[other.find(".") :]
    file.tensors[key] = tensor


def _less(file: File, draw: random.Random) -> None:
    file.tensors.pop(draw.choice(list(file.tensors)))


def _meta(file: File, draw: random.Random) -> None:
    name = draw.choice(
        ("lora_adapter_metadata", "alpha", "rank", "modelspec.architecture", "ss_network_dim", "x")
    )
    file.metadata[name] = draw.choice((*JSONS, *WORDS, "3", "nan", "-1"))


CHANGES = (_shape, _shape, _dtype, _numbers, _numbers, _numbers, _key, _less, _meta)
