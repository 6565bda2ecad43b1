"""Each hostile file of a stranger ends in one clear verdict: the cases of `shared/cases/reliability`."""

from __future__ import annotations

import importlib
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit.errors import AdaptkitError, InternalError, NonFinite, OverLimit, UnsafePickle
from adaptkit.files import limits
from adaptkit.keymap.patterns import Patterns
from adaptkit.ops import convert, extract, inspect, merge, resize
from tests.fuzz.files import (
    DIFFUSERS,
    SINGLE,
    STEM,
    File,
    checkpoint,
    lora,
    text,
    torch_legacy,
    torch_pickle,
    torch_zip,
)
from tests.fuzz.hostile import HEADERS, PICKLES

LAUGH = b"K\x01" + b"2\x86" * 60  # sixty tuples, each of the one before, twice


def zipped(path: Path, raw: bytes, *, packed: bool = True, data: bytes = b"") -> Path:
    kind = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as archive:
        archive.writestr("a/data.pkl", raw)
        if data:
            archive.writestr("a/data/0", data)
    return path


def stored(name: str) -> bytes:
    """A state dict of one tensor of 4 GiB / 8, all in one storage."""
    storage = text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu")
    return (
        b"\x80\x02}("
        + text(name)
        + b"ctorch._utils\n_rebuild_tensor_v2\n(("
        + storage
        + b"J\x00\x00\x00\x08tQK\x00J\x00\x00\x00\x08\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtRu."
    )


def _with_config(path: Path, config: object) -> Path:
    file = lora("diffusers")
    text = config if isinstance(config, str) else json.dumps(config)
    file.metadata = {"lora_adapter_metadata": text}
    return file.save(path)


def _collide(path: Path) -> Path:
    numbers = (((1 << 61) - 1) * (k + 1) for k in range(500))
    raw = b"".join(b"\x8a\x0c" + n.to_bytes(12, "little") + b"K\x01" for n in numbers)
    return zipped(path, b"\x80\x02}(" + raw + b"u.")


def _legacy(path: Path) -> Path:
    magic = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
    path.write_bytes(magic + b"\x80\x02" + LAUGH + b"." + b"\x80\x02}." * 2 + b"\x80\x02].")
    return path


HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "regex": (
        lambda p: _with_config(p, {"unet.lora_alpha": 4, "unet.alpha_pattern": {"([a-z_]+|[a-z0-9_.]+)*!": 4}}),
        "",
    ),
    "bad-pattern": (
        lambda p: _with_config(p, {"unet.alpha_pattern": {"((": 4}, "unet.lora_alpha": 4}),
        "alpha_pattern: the pattern '((' cannot be matched: missing )",
    ),
    "large-pattern": (
        lambda p: _with_config(p, {"unet.alpha_pattern": {"((a{900}){900}){900}": 4}}),
        "more than the limit 'pattern steps'",
    ),
    "deep-metadata": (lambda p: _with_config(p, "[" * 2000), "more than the limit 'JSON depth'"),
    "long-number": (
        lambda p: _with_config(p, '{"unet.lora_alpha": ' + "9" * 5000 + "}"),
        "more than the limit 'digits'",
    ),
    "shared-key": (lambda p: zipped(p, b"\x80\x02}(" + LAUGH + b"K\x01u."), "a name in a table"),
    "shared-protocol": (_legacy, "unknown version ? of torch's legacy format"),
    "packed-nones": (lambda p: zipped(p, b"\x80\x02(" + b"N" * 5_000_000 + b"l."), "the limit 'packed pickle'"),
    **{
        name: (lambda p, raw=raw: zipped(p, raw()), "the limit 'packed pickle'")
        for name, raw in {
            "packed-over": lambda: b"\x80\x02(" + b"N" * (40 << 20) + b"l.",
            "packed-dicts": lambda: b"\x80\x02(" + b"}" * 5_000_000 + b"l.",
            "packed-memo": lambda: b"\x80\x02(" + b"}\x94" * 2_500_000 + b"l.",
            "packed-copies": lambda: b"\x80\x02]" + b"(2" * 2_500_000 + b".",
            "packed-integer": lambda: b"\x80\x02\x8b" + struct.pack("<i", 5 << 20) + b"\x7f" * (5 << 20) + b".",
            "packed-decimal": lambda: b"I" + b"9" * (4 << 20) + b"\n.",
            "packed-long-decimal": lambda: b"\x80\x02L" + b"9" * (4 << 20) + b"L\n.",
        }.items()
    },
    "long-decimal": (lambda p: zipped(p, b"\x80\x02L" + b"9" * 500_000 + b"L\n."), "the limit 'digits'"),
    "decimal": (lambda p: zipped(p, b"I" + b"9" * 500_000 + b"\n."), "the limit 'digits'"),
    "stored-nones": (
        lambda p: zipped(p, b"\x80\x02(" + b"N" * 300_000 + b"l.", packed=False),
        "the limit 'pickle steps'",
    ),
    "packed-weights": (
        lambda p: zipped(p, stored(DIFFUSERS + "q.lora_A.weight"), data=bytes(40 << 20)),
        "the limit 'packed weights'",
    ),
    "colliding-keys": (_collide, "a name in a table"),
    "dots": (
        lambda p: File().add("a." * 50_000 + "lora_A.weight", 1, 4).save(p),
        "the limit 'key length'",
    ),
    "digits": (
        lambda p: File().add("lora_unet_" + "9" * 5000 + ".lora_down.weight", 1, 4).save(p),
        "the limit 'key length'",
    ),
    "one-skeleton": (
        lambda p: _many(p, (f"lora_unet_{'x' * (i % 9)}q{i:x}z.lora_down.weight" for i in range(300))),
        "",
    ),
    "hash-in-key": (lambda p: _many(p, ("lora_unet_#_#.lora_down.weight", "lora_unet_1_#.lora_up.weight")), ""),
    "dimensions": (lambda p: File().add(STEM + "q.lora_down.weight", *(1,) * 70).save(p), "the limit 'dimensions'"),
}  # fmt: skip


def _many(path: Path, names: object) -> Path:
    file = File()
    for name in names:
        file.add(name, 1)
    return file.save(path)


@pytest.mark.parametrize("name", HOSTILE)
def test_one_hostile_file_one_line(name: str, tmp_path: Path) -> None:
    make, what = HOSTILE[name]
    report = inspect.run(make(tmp_path / "x.ckpt"))
    json.dumps(report.to_dict())
    assert not isinstance(report.error, InternalError), report.error
    if what:
        assert what in str(report.error)
    else:
        assert report.error is None
    if isinstance(report.error, OverLimit):
        assert "--no-limits" in (report.error.hint or "")


def test_the_owner_of_an_odd_file_lifts_the_limits(tmp_path: Path) -> None:
    path = HOSTILE["digits"][0](tmp_path / "x.safetensors")
    assert isinstance(inspect.run(path).error, OverLimit)
    with limits.allow():
        assert inspect.run(path).error is None
    assert isinstance(inspect.run(path).error, OverLimit)


def test_every_limit_says_its_name() -> None:
    for name, limit in limits.LIMITS.items():
        limits.within(name, limit.most)
        with pytest.raises(OverLimit, match=f"limit '{name}'"):
            limits.within(name, limit.most + 1)


def test_work_of_patterns_grows_with_the_names_only() -> None:
    """Counted, not timed: a pattern that keeps `re` busy for ever takes a step per letter."""
    for length in (100, 800):
        patterns = Patterns(["([a-z_]+|[a-z0-9_.]+)*!", "(a|a)*b", "(.*)*c"])
        assert patterns.first("ab" * (length // 2) + ".to_q") is None
        assert patterns._steps < 3000


def test_the_others_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever happens in one file, every other has its report."""
    from click.testing import CliRunner

    from adaptkit.cli import cli

    module = importlib.import_module("adaptkit.ops.inspect.run")

    good = [lora().save(tmp_path / f"g{n}.safetensors") for n in range(2)]
    bad = lora().save(tmp_path / "bad.safetensors")
    understand = module.Adapter.understand

    for error in (RecursionError("deep"), MemoryError(), KeyError("x"), ZeroDivisionError("0"),
                  UnicodeDecodeError("utf-8", b"x", 0, 1, "y"), OSError(5, "input/output error")):  # fmt: skip

        def broken(source, *rest, _error=error, **more):
            if source.path == bad:
                raise _error
            return understand(source, *rest, **more)

        monkeypatch.setattr(module.Adapter, "understand", broken)
        given = ["inspect", str(good[0]), str(bad), str(good[1]), "--json"]
        found = CliRunner().invoke(cli, given, standalone_mode=False)
        assert found.return_value == 1
        files = json.loads(found.stdout)["files"]
        assert [bool(file.get("error")) for file in files] == [False, True, False]
        assert str(bad) in files[1]["error"]
        assert found.stderr.count("error:") == 1


@pytest.mark.parametrize("make", [torch_zip, torch_pickle, torch_legacy])
def test_a_pickle_cut_anywhere_is_refused(make: Callable[[], bytes], tmp_path: Path) -> None:
    raw, path = make(), tmp_path / "x.ckpt"
    for length in range(0, len(raw) - 1, 9):
        path.write_bytes(raw[:length])
        error = inspect.run(path).error
        assert error is not None, length
        assert not isinstance(error, InternalError), error


def test_a_link_in_a_zip_is_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    path.write_bytes(torch_zip())
    (tmp_path / "secret").write_bytes(bytes(64))
    link = zipfile.ZipInfo("archive/link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, str(tmp_path / "secret"))
    assert inspect.run(path).error is None
    assert sorted(one.name for one in tmp_path.iterdir()) == ["secret", "x.ckpt"]


# numbers ------------------------------------------------------------------------------------


def _resize(path: Path, out: Path, **rule: object) -> None:
    with resize.plan(
        path, resize.Options(output=out, overwrite=True, family="sd1", **rule)
    ) as plan:
        resize.run(plan)


@pytest.mark.parametrize("rule", [{"rank": 1}, {"energy": 0.9}, {"size": 3000}])
@pytest.mark.parametrize("where", ["down", "up"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_nan_keeps_the_old_output(tmp_path: Path, rule: dict, where: str, value: float) -> None:
    """In every shape: what LAPACK makes of a NaN differs from shape to shape."""
    source, out = tmp_path / "a.safetensors", tmp_path / "out.safetensors"
    for rank, width in ((2, 8), (4, 40)):
        draw = torch.Generator().manual_seed(0)
        tensors = {}
        for module in "qkv":
            tensors[f"{STEM}{module}.lora_down.weight"] = torch.randn(rank, width, generator=draw)
            tensors[f"{STEM}{module}.lora_up.weight"] = torch.randn(width, rank, generator=draw)
        tensors[f"{STEM}k.lora_{where}.weight"].view(-1)[3] = value
        save_file(tensors, source)
        out.write_bytes(b"old")
        with pytest.raises(NonFinite, match=f"lora_{where}.weight"):
            _resize(source, out, **rule)
        assert out.read_bytes() == b"old"
        assert sorted(item.name for item in tmp_path.iterdir()) == [
            "a.safetensors",
            "out.safetensors",
        ]


@pytest.mark.parametrize("value", [1e-45, 1e-42, 1e-40, 1e-38])
def test_denormals_become_no_nan(tmp_path: Path, value: float) -> None:
    source, out = tmp_path / "a.safetensors", tmp_path / "out.safetensors"
    tensors = {}
    for module, number in (("q", value), ("k", 0.01)):
        tensors[f"{STEM}{module}.lora_down.weight"] = torch.full((4, 320), number)
        tensors[f"{STEM}{module}.lora_up.weight"] = torch.ones(320, 4)
    save_file(tensors, source)
    out.write_bytes(b"old")
    failed = None
    try:
        _resize(source, out, rank=1)
    except AdaptkitError as error:
        failed = error
    if failed is not None:
        assert failed.file in (str(source), str(out))
        assert out.read_bytes() == b"old"
    else:
        assert all(bool(torch.isfinite(tensor).all()) for tensor in load_file(out).values())


@pytest.mark.parametrize(
    "dtype", ["I8", "I64", "U8", "BOOL", "C64", "F4", "F8_E8M0", "F8_E4M3FNUZ"]
)
def test_numbers_that_are_no_floats_are_refused_by_name(tmp_path: Path, dtype: str) -> None:
    file = lora()
    file.add(f"{STEM}q.lora_down.weight", 4, 8, dtype=dtype).add(f"{STEM}q.lora_up.weight", 8, 4)
    path = file.save(tmp_path / "a.safetensors")
    for run in (
        lambda: convert.plan(path, convert.Options(to="diffusers", algo="full", family="sd1")),
        lambda: resize.plan(path, resize.Options(rank=1, family="sd1")),
        lambda: merge.plan(checkpoint().save(tmp_path / "b.safetensors"), [(path, 1.0)], merge.Options(family="sd1")),
    ):  # fmt: skip
        with pytest.raises(AdaptkitError, match=f"{STEM}q.lora_down.weight is stored as {dtype}"):
            run()


@pytest.mark.parametrize("shape", [(), (0, 8), (3, 0)])
def test_shapes_without_numbers_are_refused_by_name(tmp_path: Path, shape: tuple[int, ...]) -> None:
    file = lora()
    file.add(f"{STEM}q.lora_down.weight", *shape)
    path = file.save(tmp_path / "a.safetensors")
    with pytest.raises(AdaptkitError, match="lora_down.weight has the shape"):
        resize.plan(path, resize.Options(rank=1, family="sd1"))


@pytest.mark.parametrize("alpha", [1e308, float("nan"), float("inf"), -1e308])
def test_an_alpha_that_nothing_can_hold(tmp_path: Path, alpha: float) -> None:
    tensors = {
        f"{STEM}q.lora_down.weight": torch.ones(2, 8),
        f"{STEM}q.lora_up.weight": torch.ones(8, 2),
    }
    tensors[f"{STEM}q.alpha"] = torch.tensor(alpha, dtype=torch.float64)
    path, out = tmp_path / "a.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, path)
    options = convert.Options(to="diffusers", output=out, family="sd1", dtype="fp32")
    with pytest.raises(AdaptkitError), convert.plan(path, options) as plan:
        convert.run(plan)
    assert not out.exists()


def test_a_number_at_the_end_of_its_range(tmp_path: Path) -> None:
    base = checkpoint().save(tmp_path / "a.safetensors")
    tuned = checkpoint()
    tuned.tensors[f"{SINGLE}q.weight"].data = struct.pack("<64f", *[3e38, -3e38] * 32)
    tuned.save(tmp_path / "b.safetensors")
    out = tmp_path / "out.safetensors"
    options = extract.Options(output=out, algo="lora", rank=2, family="sd1")
    with pytest.raises(NonFinite), extract.plan(base, tmp_path / "b.safetensors", options) as plan:
        extract.run(plan)
    assert not out.exists()


def test_a_single_number_in_a_checkpoint_is_no_weight(tmp_path: Path) -> None:
    file = checkpoint()
    file.add(f"{SINGLE}q.weight")
    path = file.save(tmp_path / "a.safetensors")
    adapter = File().add(f"{STEM}k.diff", 8, 8).save(tmp_path / "b.safetensors")
    assert inspect.run(path).error is None
    with merge.plan(
        path, [(adapter, 1.0)], merge.Options(output=tmp_path / "c.safetensors", family="sd1")
    ) as plan:
        merge.run(plan)


# the corpus that `python -m tests.benchmarks hostile` measures ---------------------------------

RUNS = ("call", "inst", "stacked.", "getattr", "dotted", "raw-", "reduce-", "globals")
WHOLE = ("build", "build-call", "geometry-zero", "tensors", "entries", "slips",
         "short", "lora", "peft", "lokr", "unknown", "checkpoint", "hash", "digit-", "dotted-keys",
         "underscores", "escapes", "prefixes", "dimensions", "metadata", "long-metadata",
         "slow-pattern")  # fmt: skip
# which take a second to make or to read
LARGE = ("packed-", "hash-keys", "deep-metadata", "long-patterns", "large-pattern", "names-", "colliding", "many-patterns", "peft-keys", "lora-keys", "lokr-keys",
         "unknown-", "checkpoint-keys", "tensors", "short-keys", "globals")  # fmt: skip


@pytest.mark.parametrize(
    "name", [one for one in {**PICKLES, **HEADERS} if not one.startswith(LARGE)]
)
def test_each_file_of_the_corpus_ends_in_one_verdict(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"x.{'ckpt' if name in PICKLES else 'safetensors'}"
    path.write_bytes({**PICKLES, **HEADERS}[name]())
    report = inspect.run(path)
    json.dumps(report.to_dict())
    assert not isinstance(report.error, InternalError), report.error
    if f"{name}.".startswith(RUNS) and name in PICKLES and name not in ("raw-0", "raw-1"):
        assert isinstance(report.error, UnsafePickle)
    if report.error is not None:
        assert "\n" not in str(report.error)
        assert len(str(report.error)) < 1000
    else:
        assert name.startswith(WHOLE), "an odd file is read"
    assert not (tmp_path / "PWNED").exists()
