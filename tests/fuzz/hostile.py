"""Files that a stranger would send: `python -m tests.fuzz.hostile FOLDER` writes them.

Each is made to cost as much as its kind can, to run code, or to break a reader. All but a few that
say so are below 1 MB.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tests.fuzz.files import DIFFUSERS, STEM, File, lora, text

MB = 1_000_000
KEY = DIFFUSERS + "q.lora_A.weight"
MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x04tQ"
HUGE = b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f"
LAUGH = b"K\x01" + b"2\x86" * 60  # sixty tuples, each of the one before, twice


def pickled(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


def zipped(raw: bytes, *, packed: bool = False, more: Iterable[tuple[str, bytes]] = ()) -> bytes:
    out = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(out, "w", kind) as archive:
        archive.writestr("a/data.pkl", raw)
        archive.writestr("a/data/0", bytes(16))
        for name, data in more:
            archive.writestr(name, data)
    return out.getvalue()


def tensor(
    offset: bytes = b"K\0", size: bytes = b"K\x02K\x02\x86", stride: bytes = b"K\x02K\x01\x86"
) -> bytes:
    head = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE
    return head + offset + size + stride + b"\x89ccollections\nOrderedDict\n)RtR"


def table(*parts: bytes) -> bytes:
    return pickled(b"}(", *parts, text(KEY), tensor(), b"u")


class Evil:
    """Would leave a folder if it were loaded."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("PWNED",)


# pickles ----------------------------------------------------------------------------------------

GEOMETRY = {
    "offset": tensor(offset=HUGE),
    "negative": tensor(offset=b"J\xff\xff\xff\xff"),
    "stride": tensor(stride=HUGE + b"K\x01\x86"),
    "negative-stride": tensor(stride=b"J\xff\xff\xff\xffK\x01\x86"),
    "size": tensor(size=HUGE + HUGE + b"\x86"),
    "expand": tensor(size=b"\x8a\x05\0\0\0\0\x01K\x20\x86", stride=b"K\0K\0\x86"),
    "zero": tensor(size=b"K\0" + HUGE + b"\x86"),
    "bools": tensor(size=b"\x88\x88\x86"),
}
CALL = text("PWNED") + b"tR"
COLLIDE = b"".join(
    b"\x8a\x0c" + (((1 << 61) - 1) * (k + 1)).to_bytes(12, "little") + b"K\x01"
    for k in range(60_000)
)
PICKLES: dict[str, Callable[[], bytes]] = {
    "shared-key": lambda: zipped(table(LAUGH, b"K\x01")),
    "shared-protocol": lambda: MAGIC + pickled(LAUGH) + pickled(b"}") * 2 + pickled(b"]"),
    "call": lambda: zipped(pickled(b"cposix\nmkdir\n(", CALL)),
    "inst": lambda: zipped(pickled(b"(", text("PWNED"), b"iposix\nmkdir\n")),
    "stacked": lambda: zipped(b"\x80\x04\x8c\x05posix\x8c\x05mkdir\x93\x8c\x05PWNED\x85R."),
    "getattr": lambda: zipped(pickled(b"c__builtin__\ngetattr\n(c__builtin__\n__import__\n", CALL)),
    "dotted": lambda: zipped(b"\x80\x04\x8c\x0bcollections\x8c\x15OrderedDict.__class__\x93."),
    "build": lambda: zipped(table(b"ctorch\nFloatStorage\n(N}(" + text("dtype") + text("I64") + b"utb0")),
    "build-call": lambda: zipped(b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}(" + text("run") + b"Nub0" + table()[2:]),
    "many-views": lambda: zipped(pickled(b"}(", *(
        text(f"{k}.{KEY}") + tensor(size=b"J\0\0\x80\0K\x20\x86", stride=b"K\0K\0\x86") for k in range(200)
    ), b"u")),
    "packed-nones": lambda: zipped(pickled(b"(", b"N" * (31 << 20), b"l"), packed=True),
    "packed-dicts": lambda: zipped(pickled(b"(", b"}" * (31 << 20), b"l"), packed=True),
    "packed-memo": lambda: zipped(pickled(b"(", b"}\x94" * (15 << 20), b"l"), packed=True),
    "packed-copies": lambda: zipped(pickled(b"]", b"(2" * (10 << 20)), packed=True),
    "packed-number": lambda: zipped(pickled(b"\x8b" + struct.pack("<i", 20 << 20) + b"\x7f" * (20 << 20)), packed=True),
    "packed-decimal": lambda: zipped(b"I" + b"9" * (4 << 20) + b"\n.", packed=True),
    "packed-weights": lambda: zipped(table(), packed=True, more=[("a/data/1", bytes(900 << 20))]),
    "stored-nones": lambda: zipped(pickled(b"(", b"N" * 900_000, b"l")),
    "names-of-two-bytes": lambda: zipped(pickled(b"(", b"U\0" * 400_000, b"l")),
    "names-in-the-memo": lambda: zipped(pickled(b"(", b"".join(b"U\0r" + struct.pack("<I", k) for k in range(120_000)), b"l")),
    "stacked-names": lambda: zipped(b"\x80\x04(" + b"\x8c\0\x8c\0\x930" * 100_000 + b"l."),
    "long-stacked-name": lambda: zipped(b"\x80\x04X" + struct.pack("<I", 400_000) + b"a" * 400_000 + b"\x94" + b"h\0h\0\x930" * 80_000 + b"N."),
    "globals": lambda: zipped(pickled(b"(", b"ca\nb\n0" * 150_000, b"l")),
    "colliding-keys": lambda: zipped(pickled(b"}(", COLLIDE, b"u")),
    "deep-list": lambda: zipped(pickled(b"]" * 450_000 + b"a" * 449_999)),
    "deep-dict": lambda: zipped(pickled(b"}" + b"K\x01}" * 200_000 + b"s" * 200_000)),
    "tensors": lambda: zipped(pickled(b"}(", *(text(f"{k}.weight") + b"h\0" for k in range(30_000)), b"u").replace(b"}(", tensor() + b"q\x000}(", 1)),
    "entries": lambda: zipped(table(), more=((f"a/data/{k}", b"") for k in range(1, 9000))),
    "slips": lambda: zipped(table(), more=[("../../evil", b"x"), ("/etc/evil", b"x")]),
    "two-tables": lambda: zipped(table(), more=[("b/data.pkl", table())]),
    "cut": lambda: zipped(table())[:150],
    **{f"geometry-{name}": (lambda made=made: zipped(pickled(b"}(", text(KEY), made, b"u"))) for name, made in GEOMETRY.items()},
    **{f"raw-{n}": (lambda n=n: pickle.dumps({"a": Evil()}, n)) for n in range(6)},
    **{f"reduce-{n}": (lambda n=n: zipped(pickle.dumps({"a": Evil()}, n))) for n in range(6)},
}  # fmt: skip


# headers ----------------------------------------------------------------------------------------


def empties(names: Iterable[str], most: int = MB - 20_000) -> bytes:
    """Tensors of no bytes under as many of these names as a file of this size holds."""
    parts, size = [], 0
    for name in names:
        part = f'{json.dumps(name)}:{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
        size += len(part) + 1
        if size > most:
            break
        parts.append(part)
    raw = ("{" + ",".join(parts) + "}").encode()
    return struct.pack("<Q", len(raw)) + raw


def with_metadata(**metadata: str) -> bytes:
    file = lora("diffusers")
    file.metadata = dict(metadata)
    return file.bytes()


def config(**fields: object) -> bytes:
    whole = {f"unet.{name}": value for name, value in fields.items()}
    return with_metadata(lora_adapter_metadata=json.dumps(whole))


def many(stem: str) -> Iterable[str]:
    return (stem.format(k) for k in range(10**6))


SLOW = "([a-z_]+|[a-z0-9_.]+)*!"
HEADERS: dict[str, Callable[[], bytes]] = {
    "short-keys": lambda: empties(map(str, range(10**6))),
    "lora-keys": lambda: empties(many("lora_unet_double_blocks_{}_img_attn_proj.lora_down.weight")),
    "unknown-lora-keys": lambda: empties(many("lora_unet_x{}_y.lora_down.weight")),
    "peft-keys": lambda: empties(many("base_model.model.blocks.{}.attn.q.lora_A.weight")),
    "lokr-keys": lambda: empties(many("lycoris_blocks_{}_q.lokr_w1")),
    "checkpoint-keys": lambda: empties(many("model.diffusion_model.double_blocks.{}.img_attn.qkv.weight")),
    "unknown-weights": lambda: empties(many("layer{}.weight")),
    "hash-keys": lambda: empties("#" * (k % 900) + str(k) for k in range(10**6)),
    "digit-keys": lambda: empties(f"{k}_" * 80 for k in range(10**6)),
    "dotted-keys": lambda: empties("a." * 480 + str(k) for k in range(10**6)),
    "too-many-dots": lambda: empties(["a." * 400_000]),
    "underscores": lambda: empties("lora_unet_" + "_" * 900 + f"{k}.lora_up.weight" for k in range(10**6)),
    "escapes": lambda: empties("\x01" * 150 + str(k) for k in range(10**6)),
    "prefixes": lambda: empties("base_model.model." * 50 + f"{k}.weight" for k in range(10**6)),
    "nested-entry": lambda: struct.pack("<Q", 400_009) + b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}   ",
    "long-number": lambda: struct.pack("<Q", 900_021) + b'{"a":{"shape":[' + b"9" * 900_000 + b"]}}  ",
    "dimensions": lambda: File().add(STEM + "q.lora_down.weight", *(1,) * 64).bytes(),
    "metadata": lambda: with_metadata(**{f"k{n}": "x" * 60 for n in range(9_900)}),
    "long-metadata": lambda: with_metadata(a="\u202e" * 300_000),
    "deep-metadata": lambda: with_metadata(lora_adapter_metadata="[" * 900_000),
    "digits-metadata": lambda: with_metadata(lora_adapter_metadata='{"unet.lora_alpha": ' + "9" * 900_000 + "}"),
    "slow-pattern": lambda: config(lora_alpha=4, alpha_pattern={SLOW: 4}),
    "bad-pattern": lambda: config(lora_alpha=4, alpha_pattern={"((": 4}),
    "large-pattern": lambda: config(alpha_pattern={"((a{900}){900}){900}": 4}),
    "many-patterns": lambda: config(lora_alpha=4, alpha_pattern={f"{SLOW}{n}": 4 for n in range(9_900)}),
    "long-patterns": lambda: config(lora_alpha=4, alpha_pattern={("(a|b)*" * 160) + str(n): 4 for n in range(900)}),
    "nested-pattern": lambda: config(lora_alpha=4, alpha_pattern={"(" * 480 + "a" + ")*" * 480: 4}),
    "negative-length": lambda: b"\xff" * 64,
    "zeros": lambda: bytes(900_000),
}  # fmt: skip


def write(folder: Path) -> list[Path]:
    """Write all; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for kind, makers in (("ckpt", PICKLES), ("safetensors", HEADERS)):
        for name, make in makers.items():
            path = folder / f"{name}.{kind}"
            path.write_bytes(make())
            made.append(path)
    peft = folder / "peft"
    peft.mkdir(exist_ok=True)
    lora("diffusers").save(peft / "adapter_model.safetensors")
    settings = {"r": 4, "lora_alpha": 4, "rank_pattern": {f"x{n}.*y": 4 for n in range(9_900)}}
    (peft / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    index = {"weight_map": {f"{n}.weight": f"{n % 2}.safetensors" for n in range(20_000)}}
    (folder / "x.index.json").write_text(json.dumps(index), encoding="utf-8")
    return [*made, peft, folder / "x.index.json"]


if __name__ == "__main__":
    print("\n".join(map(str, write(Path(sys.argv[1])))))
