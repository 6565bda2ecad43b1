"""Reading: equal to the official library (F2), whatever holds the tensors."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from adaptkit.errors import AdaptkitError, CorruptFile, NoSuchName, ShapeMismatch, UnreadableFile
from adaptkit.files import reader as module
from adaptkit.files import tensors
from adaptkit.files.header import TensorInfo, TensorSpec, build_header
from adaptkit.files.open import open_source

DTYPES = [
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu,
    torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.uint16, torch.uint32, torch.uint64,
]  # fmt: skip


@pytest.fixture(params=["pread", "portable"])
def way(request, monkeypatch):
    """Both ways of reading; the portable one is all that Windows has."""
    if request.param == "portable":
        monkeypatch.setattr(module, "HAS_PREADV", False)
        monkeypatch.delattr(os, "preadv", raising=False)
    elif not module.HAS_PREADV:
        pytest.skip("no preadv here")


def raw(tensor):
    return tensor.reshape(-1).view(torch.uint8).tolist()


def write(path, **tensors):
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name.replace("__", "."): value for name, value in tensors.items()}
    (torch.save if path.suffix == ".bin" else save_file)(tensors, path)
    return path


def ones(n=2):
    return torch.ones(n)


def test_equals_the_official_reading_for_every_dtype_and_shape(tmp_path, way):
    state = {}
    for dtype in DTYPES:
        for shape in ((), (0,), (3, 0, 2), (5,), (4, 3), (2, 3, 1, 2)):
            state[f"{dtype}{shape}"] = torch.randint(0, 2, shape).to(dtype)
    path = tmp_path / "mit Leerzeichen 名.safetensors"
    save_file(state, path, {"k": "ü"})
    with safe_open(path, "pt") as official, open_source(path) as source:
        assert source.metadata == official.metadata()
        assert set(source.infos) == set(official.keys())
        assert [i.start for i in source.infos.values()] == sorted(
            i.start for i in source.infos.values()
        )
        assert (source.files, source.size) == ((path,), path.stat().st_size)
        for name in source.infos:
            found, wanted = source.read(name), official.get_tensor(name)
            assert (found.dtype, found.shape, raw(found)) == (
                wanted.dtype,
                wanted.shape,
                raw(wanted),
            )
            assert found.is_contiguous()
            file, start, stop = source.span(name)
            assert list(file.read_bytes()[start:stop]) == raw(wanted)
            assert source.order(name) == (0, start)


@settings(deadline=None, max_examples=80)
@given(st.integers(-7, 7) | st.none(), st.integers(-7, 7) | st.none(), st.integers(0, 5))
def test_rows_are_slices(tmp_path_factory, start, stop, count):
    path = tmp_path_factory.getbasetemp() / f"rows{count}.safetensors"
    tensor = torch.arange(count * 6.0).reshape(count, 2, 3)
    if not path.exists():
        save_file({"first": ones(3), "a": tensor, "last": ones(3)}, path)
    with open_source(path) as source:
        found = source.read("a", slice(start, stop))
    assert torch.equal(found, tensor[start:stop])
    assert found.shape == tensor[start:stop].shape


def test_rows_read_only_their_bytes(tmp_path, monkeypatch, way):
    path = write(tmp_path / "a.safetensors", a=torch.arange(4000.0).reshape(1000, 4))
    asked = []
    some = module.Reader._some

    def spy(self, file, view, at):
        asked.append(len(view))
        return some(self, file, view, at)

    monkeypatch.setattr(module.Reader, "_some", spy)
    with open_source(path) as source:
        assert source.read("a", slice(10, 12)).tolist() == [[40, 41, 42, 43], [44, 45, 46, 47]]
    assert asked == [32]


def test_reads_come_in_pieces(tmp_path, monkeypatch, way):
    path = write(tmp_path / "a.safetensors", a=torch.arange(100.0))
    monkeypatch.setattr(module, "_CHUNK", 7)
    with open_source(path) as source:
        assert torch.equal(source.read("a"), torch.arange(100.0))


def test_own_memory(tmp_path, way):
    path = write(tmp_path / "a.safetensors", a=ones())
    with open_source(path) as source:
        source.read("a").zero_()
        assert source.read("a").tolist() == [1, 1]
        kept = source.read("a")
    kept += 1
    assert kept.tolist() == [2, 2]


def test_wrong_use(tmp_path):
    path = write(tmp_path / "a.safetensors", abc=ones(), n=torch.tensor(1.0))
    with open_source(path) as source:
        for call in (source.read, source.scalar, source.span, source.order):
            with pytest.raises(NoSuchName) as caught:
                call("abd")
            assert "abc" in caught.value.hint
        with pytest.raises(ShapeMismatch):
            source.scalar("abc")
        with pytest.raises(ShapeMismatch):
            source.read("n", slice(0, 1))
        with pytest.raises(ShapeMismatch):
            source.read("abc", slice(0, 2, 2))


NUMBERS = [d for d in DTYPES if not any(part in str(d) for part in ("complex", "e8m0", "fnuz"))]


@pytest.mark.parametrize("dtype", NUMBERS)
def test_scalars_equal_torch(tmp_path, dtype):
    values = [0, 1, 0.5, -2.25, 100, 3e-3] if dtype.is_floating_point else [0, 1, 3]
    state = {
        f"{i}": torch.tensor(value).to(dtype).reshape((1,) * (i % 3))
        for i, value in enumerate(values)
    }
    path = tmp_path / "s.safetensors"
    save_file(state, path)
    with open_source(path) as source:
        for name, tensor in state.items():
            assert source.scalar(name) == tensor.to(torch.float64).item()


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16]
)
def test_every_small_float_decodes_as_torch_does(tmp_path, dtype):
    step = 1 if dtype.itemsize == 1 else 97
    bits = (
        torch.arange(0, 256**dtype.itemsize, step)
        .to(torch.uint8 if step == 1 else torch.uint16)
        .view(dtype)
    )
    spelling = {v: k for k, v in tensors.TORCH_NAMES.items()}[str(dtype).removeprefix("torch.")]
    info = TensorInfo("x", spelling, (), 0, dtype.itemsize)
    found = [
        tensors.decode_scalar(bytes(b.reshape(1).view(torch.uint8).tolist()), info, Path())
        for b in bits
    ]
    assert torch.equal(
        torch.tensor(found, dtype=torch.float64).nan_to_num(-7), bits.double().nan_to_num(-7)
    )


def test_sub_byte_dtypes_are_listed_but_not_read(tmp_path):
    path = tmp_path / "a.safetensors"
    header, _ = build_header([TensorSpec("a", "F4", (2, 2)), TensorSpec("b", "F6_E2M3", (4,))])
    path.write_bytes(header + bytes(5))
    with open_source(path) as source:
        assert source.span("a")[2] - source.span("a")[1] == 2
        with pytest.raises(UnreadableFile, match="no dtype for F4"):
            source.read("a")


# --- content decides -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.safetensors", "a.sft", "a.ckpt", "a", "b.bin"])
def test_content_decides_not_the_extension(tmp_path, name):
    save_file({"a": ones()}, tmp_path / name)
    with open_source(tmp_path / name) as source:
        assert source.read("a").tolist() == [1, 1]
    torch.save({"a": ones(3)}, tmp_path / name)
    with open_source(str(tmp_path / name)) as source:
        assert source.read("a").tolist() == [1, 1, 1]


@pytest.mark.parametrize("length", [0x0280, 0x0480, 0x04034B50])
def test_a_header_length_that_looks_like_a_pickle_or_zip(tmp_path, length):
    text = b"{}".ljust(length)
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", length) + text)
    assert open_source(tmp_path / "a.safetensors").infos == {}


def test_a_file_cut_after_opening(tmp_path, way):
    path = write(tmp_path / "a.safetensors", a=torch.ones(1000), b=torch.ones(4))
    with open_source(path) as source:
        name = list(source.infos)[-1]
        source.read(name)
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(CorruptFile) as caught:
            source.read(name)
        assert caught.value.tensor == name
        assert "truncated" in str(caught.value)
    with open_source(write(tmp_path / "b.safetensors", a=ones())) as source:
        os.truncate(tmp_path / "b.safetensors", 20)
        with pytest.raises(CorruptFile, match="changed after opening"):
            source.read("a")
        (tmp_path / "b.safetensors").unlink()
        with pytest.raises(UnreadableFile):
            source.read("a")


def test_lost_and_forbidden_paths(tmp_path):
    write(tmp_path / "model.safetensors", a=ones())
    for path, hint in (
        (tmp_path / "modle.safetensors", "model.safetensors"),
        (tmp_path / "none" / "x.safetensors", "there is no folder"),
    ):
        with pytest.raises(UnreadableFile) as caught:
            open_source(path)
        assert hint in caught.value.hint
        assert caught.value.file == str(path)
    with pytest.raises(UnreadableFile):
        open_source("a\0b")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnreadableFile) as caught:
        open_source(tmp_path / "empty")
    assert caught.value.hint == "it is empty"
    (tmp_path / "empty" / "readme.md").touch()
    with pytest.raises(UnreadableFile) as caught:
        open_source(tmp_path / "empty")
    assert "readme.md" in caught.value.hint


def test_no_permission(tmp_path, monkeypatch):
    path = write(tmp_path / "a.safetensors", a=ones())

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    source = open_source(path)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UnreadableFile, match="permission denied"):
        open_source(path)
    with pytest.raises(UnreadableFile, match="permission denied"):
        source.read("a")


def test_an_unreadable_sector(tmp_path, monkeypatch):
    def broken(*args):
        raise OSError(5, "Input/output error")

    with open_source(write(tmp_path / "a.safetensors", a=ones())) as source:
        monkeypatch.setattr(module.Reader, "_some", broken)
        with pytest.raises(UnreadableFile, match="Input/output error") as caught:
            source.read("a")
        assert caught.value.tensor == "a"


# --- shards ----------------------------------------------------------------------------------------------------------


def index(folder, weight_map, name="model.safetensors.index.json"):
    (folder / name).write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}), "utf-8"
    )
    return folder / name


def shards(folder, suffix="safetensors", stem="model"):
    a = write(folder / f"{stem}-00001-of-00002.{suffix}", x=ones(1), y=ones(2))
    b = write(folder / f"{stem}-00002-of-00002.{suffix}", z=ones(3))
    return index(folder, {"x": a.name, "y": a.name, "z": b.name}, f"{stem}.{suffix}.index.json")


@pytest.mark.parametrize(("suffix", "stem"), [("safetensors", "model"), ("bin", "pytorch_model")])
def test_index_and_folder(tmp_path, suffix, stem):
    path = shards(tmp_path, suffix, stem)
    for opened in (path, tmp_path):
        with open_source(opened) as source:
            assert sorted(source.infos) == ["x", "y", "z"]
            assert [len(source.read(name)) for name in ("x", "y", "z")] == [1, 2, 3]
            assert [source.order(name)[0] for name in ("x", "y", "z")] == [0, 0, 1]
            assert len(source.files) == 2
            assert source.size == sum(file.stat().st_size for file in source.files)
            assert source.span("z")[0].name.startswith(f"{stem}-00002")
            assert source.scalar("x") == 1
            with pytest.raises(NoSuchName):
                source.read("w")


def test_shards_without_index(tmp_path):
    shards(tmp_path).unlink()
    assert sorted(open_source(tmp_path).infos) == ["x", "y", "z"]
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UnreadableFile, match="1 of 2 shards"):
        open_source(tmp_path)


def test_faulty_indices(tmp_path):
    path = shards(tmp_path)
    whole = json.loads(path.read_text())["weight_map"]
    first, second = sorted(set(whole.values()))
    assert sorted(open_source(index(tmp_path, {"x": first, "z": second})).infos) == [
        "x",
        "y",
        "z",
    ]  # extra ones count
    for weight_map, error, reason in (
        (whole | {"w": first}, CorruptFile, "does not hold it"),
        (whole | {"w": "model-3.safetensors"}, UnreadableFile, "1 of 3 shards are missing"),
        (whole | {"w": "../x.safetensors"}, CorruptFile, "outside its own folder"),
        (whole | {"w": "/etc/passwd"}, CorruptFile, "outside its own folder"),
        (whole | {"w": "..\\x"}, CorruptFile, "outside its own folder"),
        (whole | {"w": "C:\\x"}, CorruptFile, "outside its own folder"),
        (whole | {"w": 3}, CorruptFile, "outside its own folder"),
        (whole | {"w": ""}, CorruptFile, "outside its own folder"),
        ({}, UnreadableFile, "nor a shard index"),
        ([], UnreadableFile, "nor a shard index"),
    ):
        with pytest.raises(error, match=reason) as caught:
            open_source(index(tmp_path, weight_map))
        assert caught.value.file == str(path)
    for text in ("[]", "{", "\xff", "[" * 100_000):
        path.write_text(text, "latin-1")
        with pytest.raises(AdaptkitError):
            open_source(path)


def test_one_name_in_two_shards(tmp_path):
    path = shards(tmp_path)
    write(tmp_path / "model-00002-of-00002.safetensors", z=ones(3), x=ones(1))
    with pytest.raises(
        CorruptFile, match=r"both model-00001-of-00002.safetensors and model-00002"
    ) as caught:
        open_source(path)
    assert caught.value.tensor == "x"


# --- folders ---------------------------------------------------------------------------------------------------------


def test_diffusers_folder(tmp_path):
    root = tmp_path / "stable diffusion ü"
    write(root / "unet" / "diffusion_pytorch_model.safetensors", a__weight=ones(1))
    write(root / "unet" / "diffusion_pytorch_model.fp16.safetensors", a__weight=ones(9))
    write(root / "unet" / "diffusion_pytorch_model.bin", a__weight=ones(8))
    write(root / "text_encoder" / "model.fp16.safetensors", b=ones(2))
    write(root / "text_encoder" / "pytorch_model.fp16.bin", b=ones(9))
    shards(root / "text_encoder_2")
    write(root / "vae" / "diffusion_pytorch_model.bin", c=ones(4))
    (root / "scheduler").mkdir()
    (root / "model_index.json").write_text("{}")
    write(root / "v1-5-pruned.safetensors", other=ones(1))
    with open_source(root) as source:
        assert {name: source.infos[name].shape for name in source.infos} == {
            "unet.a.weight": (1,), "text_encoder.b": (2,), "text_encoder_2.x": (1,), "text_encoder_2.y": (2,),
            "text_encoder_2.z": (3,), "vae.c": (4,),
        }  # fmt: skip
        assert source.infos["vae.c"].name == "vae.c"
        assert [source.order(name)[0] for name in source.infos] == [0, 1, 2, 2, 3, 4]
        assert source.read("vae.c").tolist() == [1] * 4
        assert source.span("vae.c") is not None
        for name in source.infos:
            assert source.files[source.order(name)[0]] == source.span(name)[0]
    assert list(open_source(root / "unet").infos) == ["a.weight"]
    (root / "model_index.json").unlink()
    assert list(open_source(root).infos) == ["other"]


def test_only_variants_and_sharded_variants(tmp_path):
    write(tmp_path / "a" / "model.fp16-00001-of-00001.safetensors", x=ones(1))
    index(
        tmp_path / "a",
        {"x": "model.fp16-00001-of-00001.safetensors"},
        "model.safetensors.index.fp16.json",
    )
    write(tmp_path / "a" / "pytorch_model.fp16.bin", x=ones(9))
    assert open_source(tmp_path / "a").infos["x"].shape == (1,)


def test_folder_with_one_file_of_any_name_and_with_several(tmp_path):
    write(tmp_path / "my style.v2.safetensors", x=ones(1))
    (tmp_path / ".hidden.safetensors").touch()
    assert list(open_source(tmp_path).infos) == ["x"]
    write(tmp_path / "other.safetensors", x=ones(1))
    with pytest.raises(UnreadableFile, match="several weights") as caught:
        open_source(tmp_path)
    assert "other.safetensors" in caught.value.hint
    write(tmp_path / "adapter_model.safetensors", y=ones(1))
    assert list(open_source(tmp_path).infos) == ["y"]


# --- threads and memory ----------------------------------------------------------------------------------------------


def test_threads_read_together(tmp_path, way):
    state = {f"t{i}": torch.full((1000,), float(i)) for i in range(64)}
    save_file(state, tmp_path / "a.safetensors")
    with open_source(tmp_path / "a.safetensors") as source, ThreadPoolExecutor(8) as pool:
        for name, tensor in zip(
            list(state) * 4, pool.map(source.read, list(state) * 4), strict=True
        ):
            assert torch.equal(tensor, state[name])


def test_works_again_after_close(tmp_path):
    source = open_source(write(tmp_path / "a.safetensors", a=ones()))
    source.read("a")
    source.close()
    source.close()
    assert source.read("a").tolist() == [1, 1]
    source.close()
    assert "1 tensors" in repr(source)


@pytest.mark.skipif(sys.platform == "win32", reason="no ru_maxrss")
def test_reading_does_not_keep_the_file_resident(tmp_path):
    path = tmp_path / "big.safetensors"
    header, infos = build_header([TensorSpec(f"t{i}", "U8", (10_000_000,)) for i in range(30)])
    with path.open("wb") as file:
        file.write(header)
        file.truncate(max(info.stop for info in infos.values()))
    code = (
        "import resource, sys, torch, numpy; from adaptkit.files.open import open_source\n"
        "unit = 1 if sys.platform == 'darwin' else 1024\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit\n"
        "torch.empty(1, dtype=torch.uint8).numpy(); before = peak()\n"
        "with open_source(sys.argv[1]) as s:\n for n in s.infos: assert s.read(n).numel() == 10_000_000\n"
        "print(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], check=True, capture_output=True, timeout=60
    )
    assert int(done.stdout) < 100_000_000


# --- a file that changes while it is read ---------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["replaced", "written", "truncated"])
@pytest.mark.parametrize("opened", [False, True])
def test_a_file_that_changes_while_it_is_read_fails_the_run(tmp_path, how, opened):
    from safetensors.torch import save_file

    from adaptkit.files.header import TensorSpec
    from adaptkit.files.sink import TensorSink

    path, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file({"x": torch.zeros(8), "y": torch.zeros(8)}, path)
    save_file({"x": torch.ones(8), "y": torch.ones(8)}, other)
    os.utime(path, ns=(1, 1))
    with open_source(path) as source:
        if opened:
            source.read("x")
        if how == "replaced":
            if opened and os.name == "nt":
                pytest.skip("Windows replaces no open file")
            other.replace(path)
        elif how == "written":
            path.write_bytes(other.read_bytes())
        else:
            os.truncate(path, path.stat().st_size - 4)
        specs = [TensorSpec(name, "F32", (8,)) for name in "xy"]

        def copy() -> None:
            with TensorSink(tmp_path / "out", specs) as sink:
                sink.copy_many((name, source, name) for name in "xy")
                sink.commit()

        with pytest.raises(CorruptFile, match="while it was read|changed|truncated"):
            copy()
        assert not (tmp_path / "out").exists()
        if not (how == "replaced" and opened):  # the old file is still what is read
            with pytest.raises(CorruptFile, match="while it was read|changed|truncated"):
                source.read("y")


@pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")
def test_more_shards_than_a_process_may_open(tmp_path):
    import subprocess

    from safetensors.torch import save_file

    names = {}
    for n in range(60):
        name = f"model-{n + 1:05}-of-00060.safetensors"
        save_file({f"t{n}": torch.full((4,), float(n))}, tmp_path / name)
        names[f"t{n}"] = name
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    code = (
        "import resource, sys, torch; from adaptkit.files.open import open_source\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))\n"
        "with open_source(sys.argv[1]) as source:\n"
        "    for again in range(2):\n"
        "        for n in range(60): assert source.read(f't{n}').tolist() == [n] * 4\n"
    )
    subprocess.run([sys.executable, "-c", code, str(index)], check=True, timeout=120)
