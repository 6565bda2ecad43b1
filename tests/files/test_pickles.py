"""Torch pickles: `torch.load(weights_only=True)` is the oracle; nothing in a file is ever run."""

from __future__ import annotations

import io
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter, OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptkit.errors import AdaptkitError, CorruptFile, UnreadableFile, UnsafePickle
from adaptkit.files import limits
from adaptkit.files.open import open_source
from adaptkit.files.pickled import catalogue as pickles
from adaptkit.files.tensors import tensor_bytes

FORMATS = pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
DTYPES = [
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32,
]  # fmt: skip


def save(path, value, new=True):
    torch.save(value, path, _use_new_zipfile_serialization=new)
    return path


def assert_equal(found: torch.Tensor, wanted: torch.Tensor):
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    assert found.stride() == torch.empty(found.shape).stride()
    assert tensor_bytes(found) == tensor_bytes(wanted)


def assert_same(path, state):
    with open_source(path) as source:
        assert set(source.infos) == set(state)
        for name, wanted in state.items():
            assert_equal(source.read(name), wanted)
            if wanted.ndim:
                assert_equal(source.read(name, slice(1, None)), wanted[1:])
                assert_equal(source.read(name, slice(0, 1)), wanted[:1])
            span = source.span(name)
            if span is not None:
                assert span[0].read_bytes()[span[1] : span[2]] == tensor_bytes(wanted)
            assert source.infos[name].nbytes == wanted.numel() * wanted.element_size()
    return source


def kinds():
    base = torch.arange(24, dtype=torch.float32)
    return {
        "plain": base.reshape(4, 6).clone(),
        "view.a": base[3:9],
        "view.b": base[8:20].reshape(3, 4),
        "transposed": base.reshape(4, 6).t(),
        "every second": base[::2],
        "expanded": torch.tensor([[1.0], [2.0]]).expand(2, 5),
        "number": torch.tensor(0.5),
        "empty": torch.zeros(0, 3),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "one by one": torch.randn(3, 4, 1, 1).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "ü 名": torch.ones(3),
    }


@FORMATS
def test_views_shared_storage_and_parameters_read_as_torch_reads_them(tmp_path, new):
    path = save(tmp_path / "mit Leerzeichen ü.ckpt", kinds(), new)
    source = assert_same(path, torch.load(path, weights_only=True))
    assert source.span("transposed") is None
    assert source.span("expanded") is None
    assert source.span("view.a") is not None
    assert source.span("one by one") is not None  # its odd strides belong to dimensions of size 1
    with source:
        assert source.scalar("number") == 0.5


@FORMATS
def test_every_dtype(tmp_path, new):
    state = {str(dtype): torch.tensor([0, 1, 3]).to(dtype) for dtype in DTYPES}
    path = save(tmp_path / "x.pt", state, new)
    assert_same(path, state)  # torch itself cannot read back float8 from its legacy format


@FORMATS
def test_modules_state_dict_with_its_metadata(tmp_path, new):
    module = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3))
    path = save(tmp_path / "x.bin", module.state_dict(), new)
    assert_same(path, torch.load(path, weights_only=True))


@FORMATS
def test_wrappers_and_what_is_ignored(tmp_path, new):
    state = {"a": torch.ones(2), "_step": 3, 7: torch.ones(1), ("t",): 1}
    path = save(
        tmp_path / "x.ckpt", {"epoch": 1, "state_dict": state, "ema": {"a": torch.zeros(2)}}, new
    )
    with open_source(path) as source:
        assert list(source.infos) == ["a"]
        assert source.read("a").tolist() == [1, 1]
        assert sorted(source.ignored) == ["(tuple)", "7", "_step", "ema", "epoch"]
    path = save(
        tmp_path / "y.ckpt", OrderedDict(optimizer=[1], model=OrderedDict(b=torch.ones(1))), new
    )
    assert list(open_source(path).infos) == ["b"]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@FORMATS
def test_later_pickle_protocols(tmp_path, new, protocol):
    state = {"a": torch.arange(3), "b": torch.ones(2, 2).t()}
    torch.save(
        state, tmp_path / "x.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=new
    )
    assert_same(tmp_path / "x.pt", state)


def test_harmless_bystanders(tmp_path):
    others = {"size": torch.Size([1, 2]), "count": Counter("aab"), "set": {1, 2}, "raw": b"ab\xff", "c": 1j,
              "device": torch.device("cpu"), "dtype": torch.float16, "array": bytearray(b"x")}  # fmt: skip
    path = save(tmp_path / "x.pt", {"state_dict": {"a": torch.ones(1)}, **others})
    source = assert_same(path, {"a": torch.ones(1)})
    assert set(source.ignored) == set(others)


def test_file_order(tmp_path):
    big = torch.arange(10.0)
    path = save(tmp_path / "x.pt", {"z": torch.ones(1), "late": big[6:], "early": big[:3]})
    source = open_source(path)
    assert [source.order(name) for name in source.infos] == sorted(
        source.order(name) for name in source.infos
    )
    assert list(source.infos).index("early") < list(source.infos).index("late")


def test_compressed_entries(tmp_path):
    state = {
        "a": torch.arange(100),
        "t": torch.arange(6.0).reshape(2, 3).t(),
        "n": torch.tensor(2.5),
    }
    stored = save(tmp_path / "x.pt", state)
    with (
        zipfile.ZipFile(stored) as old,
        zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    source = assert_same(tmp_path / "y.pt", state)
    assert source.span("a") is None
    with source:
        assert source.scalar("n") == 2.5


# --- hostile and damaged files ---------------------------------------------------------------------------------------


class Run:
    def __init__(self, call, *args):
        self.call = call, args

    def __reduce__(self):
        return self.call


class Set:
    """Pickles as a call with a BUILD on top."""

    def __init__(self, call, args, state):
        self.parts = call, args, state

    def __reduce__(self):
        return self.parts


def zip_of(path, raw, entries=()):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", raw)
        for name, data in entries:
            archive.writestr("archive/" + name, data)
    return path


@FORMATS
def test_a_pickle_that_runs_a_command_is_refused_and_runs_nothing(tmp_path, new):
    marker = tmp_path / "marker"
    path = save(
        tmp_path / "x.ckpt", {"a": torch.ones(1), "b": Run(os.system, f"touch '{marker}'")}, new
    )
    with pytest.raises(UnsafePickle) as caught:
        open_source(path)
    assert f"refers to {os.system.__module__}.system: loading it would run code" in str(
        caught.value
    )
    assert "trust" in caught.value.hint
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the file is as dangerous as it claims
    assert marker.exists() or os.name == "nt"


@pytest.mark.parametrize(
    "raw",
    [
        b"cos\nsystem\n(S'touch MARK'\ntR.",
        b"(S'touch MARK'\nios\nsystem\n.",
        b"(cos\nsystem\nS'touch MARK'\no.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0atouch MARK\x85R.",
        b"\x80\x02cbuiltins\neval\n\x8c\x011\x85R.",
        b"\x80\x02c__builtin__\nexec\n.",
        b"\x80\x02ctorch.storage\n_load_from_bytes\n.",
        b"\x80\x02ctorch\nload\n.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2.__globals__\n.",
        b"\x80\x02cnumpy.core.multiarray\nscalar\n.",
        b"\x80\x02\x82\x01.",
        b"Pabc\n.",
    ],
)
def test_globals_by_every_opcode(tmp_path, raw, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnsafePickle):
        open_source(zip_of(tmp_path / "x.ckpt", raw))
    assert [item.name for item in tmp_path.iterdir()] == ["x.ckpt"]


V2 = b"ctorch._utils\n_rebuild_tensor_v2\n"
FLOAT = b"(\x8c\x07storagectorch\nFloatStorage\n\x8c\x010\x8c\x03cpuK\x04tQ"


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (V2 + b"(K\x01K\x02tR.", "a tensor has arguments"),
        (V2 + b"(" + FLOAT + b"J\xff\xff\xff\xff(K\x04t(K\x01ttR.", "a tensor has arguments"),
        (V2 + b"(" + FLOAT + b"K\x00(J\xff\xff\xff\xfft(K\x01ttR.", "a size has arguments"),
        (V2 + b"(" + FLOAT + b"K\x00(K\x04t(K\x01K\x01ttR.", "a tensor has arguments"),
        (V2 + b"(" + FLOAT + b"K\x00)K\x05tR.", "a size has arguments"),
        (
            b"}\x8c\x01a" + V2 + b"(" + FLOAT + b"K\x01(K\x04t(K\x01ttRs.",
            "ends at byte 20 of a storage of 16",
        ),
        (
            b"}\x8c\x01a" + V2 + b"(" + FLOAT + b"K\x00(K\x04K\x04t(K\x04K\x02ttRs.",
            "of a storage of 16",
        ),
        (
            b"}\x8c\x01a" + V2 + b"(" + FLOAT + b"K\x00(J\xff\xff\xff\x7ft(K\x00ttRs.",
            "more than the limit 'expanded views'",
        ),
        (
            b"}\x8c\x01a"
            + V2
            + b"("
            + FLOAT.replace(b"\x010", b"\x019")
            + b"K\x00(K\x04t(K\x01ttRs.",
            "'9' is missing",
        ),
        (FLOAT.replace(b"storage", b"nothing") + b".", "persistent id"),
        (FLOAT.replace(b"K\x04t", b"J\xff\xff\xff\xfft") + b".", "persistent id"),
        (FLOAT.replace(b"ctorch\nFloatStorage\n", b"K\x01") + b".", "persistent id"),
        (b"ccollections\nOrderedDict\n(K\x01tR.", "OrderedDict has arguments"),
        (b"ccollections\nOrderedDict\n}\x8c\x03run" + V2 + b"sb.", "not a table"),
        (b"ctorch._utils\n_rebuild_parameter\n)R.", "a parameter has arguments"),
        (
            b"ctorch._tensor\n_rebuild_from_type_v2\n(" + V2 + b"K\x01)tR.",
            "a tensor has arguments",
        ),
        (b"ctorch\nfloat32\n(K\x01tR.", "not a table"),
        (b"ctorch\nFloatStorage\n)\x81.", "damaged pickle"),
        (V2 + b"N}\x8c\x08__code__K\x01s\x86b.", "not a table"),
        (b"r\xff\xff\xff\x7f.", "memo index"),
        (b"K\x01r\xff\xff\xff\x7f.", "memo index"),
        (b"\x96\xff\xff\xff\xff\xff\x00\x00\x00.", "damaged pickle"),
        (b"(" * 9_000 + b".", "damaged pickle"),
        (b"(" * 100_000 + b".", "the limit 'pickle steps' of"),
        (b"", "damaged pickle"),
        (b"K\x01", "damaged pickle"),
        (b"h\x05.", "damaged pickle"),
        (b"\x80\x02})" + b"\x85" * 9_000 + b"K\x01s.", "a name in a table is neither text"),
        (b"\x80\x02})" + b"\x85" * 2_000_000 + b"K\x01s.", "the limit 'pickle steps' of"),
        # tuples of one tuple, whose hash would take 2**60 steps
        (b"\x80\x02}(K\x01" + b"2\x86" * 60 + b"K\x01u.", "a name in a table is neither text"),
        (b"\x80\x02K\x01" + b"2\x86" * 60 + b"\x85\x91.", "damaged pickle"),
        (b"\x80\x04(K\x01" + b"2\x86" * 60 + b"\x91.", "a name in a table is neither text"),
        (b"\x80\x04\x8f(K\x01" + b"2\x86" * 60 + b"\x90.", "a name in a table is neither text"),
        (b"(K\x01" + b"2\x86" * 60 + b"K\x01d.", "a name in a table is neither text"),
        (b"}K\x01" + b"2\x86" * 60 + b"q\x000h\x00K\x01s.", "a name in a table is neither text"),
        (
            b"ccollections\nOrderedDict\n(](](K\x01" + b"2\x86" * 60 + b"K\x01eetR.",
            "OrderedDict has arguments",
        ),
        # integers whose hashes are all 0
        (b"}\x8a\x09" + bytes(8) + b"\x01K\x01s.", "a name in a table is neither text"),
        (b"}I1000000000000000000000\nK\x01s.", "a name in a table is neither text"),
        (b"L" + b"9" * 500 + b"L\n.", "the limit 'digits' of 400"),
        (
            b"}\x8c\x03\xed\xa0\x80" + V2 + b"(" + FLOAT + b"K\x00(K\x04t(K\x01ttRs.",
            "not Unicode text",
        ),
        (
            b"\x80\x02})" + b"q\x00h\x00\x86" * 2000 + b"K\x01s.",
            "a name in a table is neither text",
        ),
        (b"}]K\x01s.", "damaged pickle"),
        (b"]" * 2 + b"a.", "holds a list"),
        (V2 + b"(" + FLOAT + b"K\x00(K\x04t(K\x01ttR.", "holds a single tensor"),
        (b"}.", "no table of tensors"),
    ],
    ids=lambda value: None if isinstance(value, str) else repr(value[-24:]),
)
def test_misused_stand_ins_and_damage(tmp_path, raw, reason):
    path = zip_of(tmp_path / "x.ckpt", raw, [("data/0", bytes(16))])
    with pytest.raises(CorruptFile) as caught:
        open_source(path)
    assert reason in str(caught.value)
    assert caught.value.file == str(path)
    assert not isinstance(caught.value, UnsafePickle)


def test_stand_ins_keep_no_state(tmp_path):
    """A BUILD on a global must not leak into the next file."""
    evil = V2 + b"}\x8c\x03runK\x01sb0" + b"ctorch\nFloatStorage\n}\x8c\x05dtype\x8c\x03I64sb0}."
    with pytest.raises(CorruptFile):
        open_source(zip_of(tmp_path / "x.ckpt", evil))
    state = {"a": torch.ones(2)}
    assert_same(save(tmp_path / "y.ckpt", state), state)


def test_several_tables_are_not_chosen_from(tmp_path):
    path = save(
        tmp_path / "x.pt", {"params": {"a": torch.ones(1)}, "params_ema": {"a": torch.ones(1)}}
    )
    with pytest.raises(CorruptFile, match=r"several tables of tensors: params, params_ema$"):
        open_source(path)


def test_other_archives(tmp_path):
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hi")
    with pytest.raises(CorruptFile, match="0 entries named data"):
        open_source(path)
    zip_of(path, b"}.", [("constants.pkl", b")."), ("code/x.py", b"")])
    with pytest.raises(CorruptFile, match="TorchScript"):
        open_source(path)
    zip_of(path, b"}.", [("byteorder", b"big")])
    with pytest.raises(CorruptFile, match="byte order b'big'"):
        open_source(path)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    with pytest.raises(CorruptFile, match="tar"):
        open_source(path)
    path.write_bytes(pickle.dumps({"a": 1}, protocol=2))
    with pytest.raises(CorruptFile, match=r"not one that torch.save wrote"):
        open_source(path)


def test_the_size_of_a_pickle_is_limited(tmp_path, monkeypatch):
    small = {**limits.LIMITS, "pickle size": limits.Limit(800, "bytes of pickle")}
    for new in (True, False):
        path = save(tmp_path / "x.pt", {str(i): torch.ones(1) for i in range(20)}, new)
        with monkeypatch.context() as patch:
            for module in (pickles, limits):
                patch.setattr(module, "LIMITS", small)
            with pytest.raises(CorruptFile, match=r"limit|ends early"):
                open_source(path)
            with limits.allow(), open_source(path) as source:
                assert len(source.infos) == 20


@FORMATS
def test_cut_anywhere_is_refused_with_our_errors(tmp_path, new):
    raw = save(tmp_path / "x.pt", {"a": torch.ones(40), "b": torch.ones(3)}, new).read_bytes()
    path = tmp_path / "y.pt"
    for length in range(0, len(raw), 7):
        path.write_bytes(raw[:length])
        with pytest.raises(AdaptkitError):
            open_source(path)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_damage_raises_only_our_errors(tmp_path_factory, data):
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(4), "b": torch.ones(2, 3).t()}, buffer,
               _use_new_zipfile_serialization=data.draw(st.booleans()))  # fmt: skip
    raw = bytearray(
        buffer.getvalue()
    )  # its length differs by a byte or two: storages are named by their addresses
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, 4095)) % len(raw)] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    path.write_bytes(raw)
    try:
        with open_source(path) as source:
            for name in source.infos:
                source.read(name)
    except AdaptkitError:
        pass


def test_legacy_truncated_storage(tmp_path):
    path = save(tmp_path / "x.pt", {"a": torch.ones(4)}, new=False)
    raw = path.read_bytes()
    path.write_bytes(raw[:-24] + struct.pack("<q", -1) + raw[-16:])
    with pytest.raises(CorruptFile, match="truncated: storage"):
        open_source(path)


def test_missing_pickle(tmp_path):
    with pytest.raises(UnreadableFile):
        pickles.read_catalogue(tmp_path / "none.ckpt")


def test_headers_of_every_kind_and_scalars_need_no_torch(tmp_path):
    state = {"a": torch.ones(2), "n": torch.tensor(0.5, dtype=torch.bfloat16)}
    save(tmp_path / "x.ckpt", state)
    save(tmp_path / "y.ckpt", state, new=False)
    from safetensors.torch import save_file

    save_file(state, tmp_path / "z.safetensors")
    code = (
        "import sys; from adaptkit.files.open import open_source; import adaptkit.files.sink\n"
        "for p in sys.argv[1:]:\n with open_source(p) as s: assert s.scalar('n') == 0.5 and len(s.infos) == 2\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    files = [str(path) for path in tmp_path.iterdir()]
    subprocess.run([sys.executable, "-c", code, *files], check=True, timeout=60)
