"""Laws F1 and F2 for headers; the official library is the oracle of what must be refused."""

from __future__ import annotations

import json
import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.torch import save

from adaptkit.errors import (
    AdaptkitError,
    CannotWrite,
    CorruptFile,
    NotRepresentable,
    UnreadableFile,
)
from adaptkit.files.header import (
    DTYPES,
    TensorSpec,
    build_header,
    itemsize,
    nbytes,
    parse_header,
    read_header,
)

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(
    lambda name: name != "__metadata__"
)
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def spec_lists(draw):
    names = draw(st.lists(NAMES, unique=True, max_size=6))
    specs = [
        TensorSpec(name, draw(st.sampled_from(sorted(DTYPES))), draw(SHAPES)) for name in names
    ]
    return [spec for spec in specs if math.prod(spec.shape) * DTYPES[spec.dtype] % 8 == 0]


def whole(header: bytes, infos) -> bytes:
    size = max((info.stop for info in infos.values()), default=len(header))
    return header + bytes(size - len(header))


def file_of(table, data: bytes = b"") -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + data


@settings(deadline=None, max_examples=150)
@given(spec_lists(), st.dictionaries(NAMES, NAMES, max_size=3))
def test_parse_undoes_build_and_the_library_agrees(specs, metadata):
    header, infos = build_header(specs, metadata)
    data = whole(header, infos)
    parsed = parse_header(data, len(data), "x")
    assert len(header) % 8 == 0
    assert parsed.infos == infos
    assert parsed.metadata == metadata
    assert list(parsed.metadata) == list(metadata)
    assert [(i.name, i.dtype, i.shape) for i in infos.values()] == [
        (s.name, s.dtype, s.shape) for s in specs
    ]
    assert {i.name: i.start for i in parsed.infos.values()} == {
        name: i.start for name, i in infos.items()
    }
    official = {
        name: (entry["dtype"], tuple(entry["shape"]), len(entry["data"]))
        for name, entry in deserialize(data)
    }
    assert official == {i.name: (i.dtype, i.shape, i.nbytes) for i in infos.values()}
    assert build_header(specs, metadata)[0] == header


def test_reads_what_the_library_writes(tmp_path):
    tensors = {
        "b": torch.zeros(2, 3),
        "ä/名": torch.tensor(1.0, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 4, dtype=torch.int8),
    }
    path = tmp_path / "mit Leerzeichen ü.safetensors"
    path.write_bytes(save(tensors, {"who": "library"}))
    header = read_header(path)
    assert {n: (i.dtype, i.shape) for n, i in header.infos.items()} == {
        "b": ("F32", (2, 3)), "ä/名": ("BF16", ()), "empty": ("I8", (0, 4))
    }  # fmt: skip
    assert header.metadata == {"who": "library"}
    assert header.size == path.stat().st_size
    info = header.infos["ä/名"]
    assert path.read_bytes()[info.start : info.stop] == b"\x80\x3f"


def entry(**changes):
    return {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]} | changes


def two(**changes):
    return {"a": entry(), "b": entry(data_offsets=[2, 4]) | changes}


GOOD = json.dumps({"a": entry()}).encode()

REFUSED = {
    "empty": (b"", "is empty"),
    "four bytes": (b"abcd", "too few"),
    "length 2^63": (struct.pack("<Q", 2**63) + b"{}", "would take 9223372036854775808"),
    "length beyond file": (
        struct.pack("<Q", 1000) + b"{}",
        "the header takes 1008 bytes, the file has 10",
    ),
    "length 0": (struct.pack("<Q", 0), "zero bytes"),
    "truncated data": (file_of({"a": entry()}, b"x"), "truncated: the header describes"),
    "rest": (file_of({"a": entry()}, b"xxx"), "1 bytes follow the last"),
    "rest without tensors": (file_of({}, b"x"), "1 bytes follow the last"),
    "not utf-8": (file_of(b'{"\xff":1}'), "not UTF-8 at byte 10"),
    "not json": (file_of(b"{nope}"), "not valid JSON"),
    "array": (file_of(b"[]"), "not start with"),
    "after the object": (file_of(b"{}x"), "not valid JSON"),
    "zero padding": (file_of(b"{}\0\0"), "not valid JSON"),
    "nan": (file_of(b'{"a":NaN}'), "NaN is not JSON"),
    "huge float": (file_of(GOOD.replace(b"[2]", b'[2],"z":1e999'), b"xx"), "out of range"),
    "minus zero": (file_of(GOOD.replace(b"[2]", b"[-0]"), b"xx"), "shape is not a list of sizes"),
    "long integer": (
        file_of(GOOD.replace(b"[2]", b"[" + b"9" * 5000 + b"]"), b"xx"),
        "not valid JSON",
    ),
    "lone surrogate": (file_of(GOOD.replace(b'"a"', b'"\\ud800"'), b"xx"), "not valid JSON"),
    "control character": (file_of(GOOD.replace(b'"a"', b'"\x01"'), b"xx"), "not valid JSON"),
    "deep": (file_of(b'{"a":' + b"[" * 100_000), "not valid JSON"),
    "nested extra": (
        file_of(GOOD.replace(b"[2]", b'[2],"z":' + b"[" * 130 + b"]" * 130), b"xx"),
        "nested value",
    ),
    "twice inside": (
        file_of(GOOD.replace(b'"dtype"', b'"dtype":"U8","dtype"'), b"xx"),
        "key 'dtype' twice",
    ),
    "metadata twice": (
        file_of(b'{"__metadata__":{},"__metadata__":{}}'),
        "key '__metadata__' twice",
    ),
    "metadata number": (file_of({"__metadata__": {"k": 1}}), "metadata 'k' is not a string but 1"),
    "metadata list": (file_of({"__metadata__": []}), "not a table"),
    "entry not a table": (file_of({"a": 3}), "not a table"),
    "no dtype": (file_of({"a": {"shape": [], "data_offsets": [0, 0]}}), "lacks 'dtype'"),
    "unknown dtype": (file_of({"a": entry(dtype="F8")}, b"xx"), "unknown dtype 'F8'"),
    "dtype number": (file_of({"a": entry(dtype=3)}, b"xx"), "unknown dtype 3"),
    "negative size": (file_of({"a": entry(shape=[-2])}, b"xx"), "shape is not a list"),
    "float size": (file_of({"a": entry(shape=[2.0])}, b"xx"), "shape is not a list"),
    "true size": (file_of({"a": entry(shape=[True])}, b"x"), "shape is not a list"),
    "size 2^64": (file_of({"a": entry(shape=[2**64])}, b"xx"), "shape is not a list"),
    "overflow": (file_of({"a": entry(shape=[2**63 - 1, 4, 0], data_offsets=[0, 0])}), "too large"),
    "overflow in bits": (file_of({"a": entry(shape=[2**63], data_offsets=[0, 0])}), "too large"),
    "wraps to 0 bytes": (
        file_of({"a": entry(shape=[2**32, 2**32], data_offsets=[0, 0])}),
        "too large",
    ),
    "three offsets": (
        file_of({"a": entry(data_offsets=[0, 1, 2])}, b"xx"),
        "not a start and a stop",
    ),
    "backwards": (file_of({"a": entry(data_offsets=[2, 0])}, b"xx"), "not a start and a stop"),
    "negative offset": (
        file_of({"a": entry(data_offsets=[-2, 0])}, b"xx"),
        "data_offsets is not a list",
    ),
    "shape and bytes": (
        file_of({"a": entry(shape=[3])}, b"xx"),
        "takes 3 bytes, the header reserves 2",
    ),
    "half bytes": (file_of({"a": entry(dtype="F4", shape=[3])}, b"xx"), "do not fill whole bytes"),
    "overlap": (file_of(two(data_offsets=[1, 3]), b"xxx"), "overlap those of 'a'"),
    "same place": (file_of(two(data_offsets=[0, 2]), b"xx"), "overlap those of 'a'"),
    "hole": (file_of(two(data_offsets=[3, 5]), b"xxxxx"), "1 bytes between 'a' and it"),
    "hole in front": (file_of({"a": entry(data_offsets=[1, 3])}, b"xxx"), "1 bytes before it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_the_library_refuses_each_with_its_reason(case, tmp_path):
    data, reason = REFUSED[case]
    with pytest.raises(SafetensorError):
        deserialize(data)
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(CorruptFile) as caught:
        read_header(path)
    assert reason in caught.value.message
    assert caught.value.file == str(path)


def test_refuses_equal_names_and_leading_space_though_the_library_does_not():
    text = b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[],"data_offsets":[1,2]}}'
    with pytest.raises(CorruptFile, match="key 'a' twice"):
        parse_header(file_of(text, b"xx"), len(text) + 10, "x")
    with pytest.raises(CorruptFile, match="does not start"):
        parse_header(file_of(b" {}"), 11, "x")


FOREIGN = {
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "a Git LFS pointer, not the file",
    ),
    "html": (b"\n<!DOCTYPE html><html>", "a web page"),
    "zip": (b"PK\x03\x04" + bytes(40), "a zip archive"),
    "pickle": (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", "a torch pickle"),
    "json": (b'{"weight_map": {}}', "plain JSON"),
    "zeros": (bytes(100), "zero bytes"),
    "gzip": (b"\x1f\x8b\x08" + bytes(30), "gzip"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_says_what_a_foreign_file_is(case, tmp_path):
    data, reason = FOREIGN[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(CorruptFile, match=reason):
        read_header(path)


@settings(deadline=None, max_examples=400)
@given(st.data())
def test_never_accepts_a_damaged_file_that_the_library_refuses(data):
    specs = [
        TensorSpec("a.b", "F16", (2, 3)),
        TensorSpec("ü", "F32", (1,)),
        TensorSpec("z", "U8", (0,)),
    ]
    header, infos = build_header(specs, {"k": "v"})
    raw = bytearray(whole(header, infos))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        how = data.draw(st.sampled_from(["set", "cut", "insert", "delete"]))
        byte = data.draw(st.sampled_from(b'0123456789-{}[]",:.eE \x00\xff\\u'))
        if how == "set":
            raw[at] = byte
        elif how == "cut":
            del raw[max(at, 1) :]
        elif how == "insert":
            raw.insert(at, byte)
        elif len(raw) > 1:
            del raw[at]
    try:
        official = {name: tuple(entry["shape"]) for name, entry in deserialize(bytes(raw))}
    except SafetensorError:
        official = None
    try:
        ours = {
            name: info.shape for name, info in parse_header(bytes(raw), len(raw), "x").infos.items()
        }
    except CorruptFile:
        return
    assert ours == official


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=80))
def test_random_bytes_raise_nothing_but_our_errors(raw):
    for data in (
        raw,
        struct.pack("<Q", len(raw)) + raw,
        struct.pack("<Q", len(raw) + 2) + b"{" + raw + b"}",
    ):
        try:
            parse_header(data, len(data), "x")
        except CorruptFile:
            with pytest.raises(SafetensorError):
                deserialize(data)


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(UnreadableFile) as caught:
            read_header(path)
        assert caught.value.file == str(path)


def test_item_sizes():
    assert [itemsize(d) for d in ("F64", "F32", "BF16", "F8_E4M3", "BOOL", "C64")] == [
        8,
        4,
        2,
        1,
        1,
        8,
    ]
    assert nbytes("F4", (4, 3)) == 6
    with pytest.raises(NotRepresentable):
        itemsize("F6_E2M3")


@pytest.mark.parametrize(
    ("specs", "metadata"),
    [
        ([TensorSpec("a", "F32", (1,))] * 2, {}),
        ([TensorSpec("__metadata__", "F32", (1,))], {"a": "b"}),
        ([TensorSpec("__metadata__", "F32", (1,))], {}),
        ([TensorSpec("a", "F33", (1,))], {}),
        ([TensorSpec("a", "F4", (3,))], {}),
        ([TensorSpec("a", "F64", (2**62, 4))], {}),
        ([TensorSpec("\ud800", "F32", (1,))], {}),
        ([], {"a": 1}),
    ],
)
def test_does_not_build_what_nobody_could_read(specs, metadata):
    with pytest.raises(CannotWrite) as caught:
        build_header(specs, metadata)
    assert isinstance(caught.value, AdaptkitError)


def test_metadata_stands_first_and_only_if_there_is_any():
    assert build_header([], {})[0][8:] == b"{}      "
    header, _ = build_header([TensorSpec("a", "U8", ())], {"z": "1", "b": "2"})
    assert header[8:].startswith(b'{"__metadata__":{"z":"1","b":"2"},"a":')
