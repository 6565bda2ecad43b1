"""What `inspect` says of a file, beside what the loaders do with it. All of it: `pytest -m slow`, or `python -m tests.interop.hosts`."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from adaptkit.adapter import Adapter
from adaptkit.detect import families, formats
from adaptkit.hosts import _judge, hosts, judge

pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("transformers")

from adaptkit.hosts._measured import Measurement, measurement
from tests.interop.hosts import record, verdicts
from tests.interop.hosts.files import FORMS, File, make, namings

pytestmark = pytest.mark.interop

# of all files of a host, one in so many is tried here: the real loader takes longest
SHARE = {
    "a1111": 40,
    "comfyui": 60,
    "forge": 40,
    "invokeai": 40,
    "kohya": 40,
    "diffusers": 120,
    "mflux": 200,
    "sdcpp": 300,
    "sdnext": 400,
    "wan2gp": 400,
}
CASES = [
    (host, family)
    for host in hosts()
    for family in families()
    if family not in hosts()[host].unsupported and family in measurement(host).names
]


def current(host: str) -> None:
    """Skip where another version of a real loader is installed than was measured."""
    if not record.LOADERS[host].there():
        pytest.skip(f"the sources of {host} are not here: see tests/interop/hosts/{host}.py")
    if record.LOADERS[host].version != measurement(host).version:
        pytest.skip(f"{host} was measured in version {measurement(host).version}")


def sample(host: str, family: str) -> Iterator[File]:
    """The same few files of a family in every run, one of them a plain LoRA in a format that the host is written for."""
    best = hosts()[host].formats(family)[:1]
    for format in best:
        for naming in namings(family)[:1]:
            file = make(family, format, naming, record.spellings(format)[0], "layers", 2)
            if file is not None:
                yield file
    for format in formats():
        for naming in namings(family):
            for form in FORMS:
                for choice in record.CHOICES:
                    name = f"{host}|{family}|{format}|{naming}|{form}|{choice}"
                    if zlib.crc32(name.encode()) % SHARE[host]:
                        continue
                    if not verdicts.natural(format, form):
                        continue
                    # names that no tool writes are refused or not with what stands beside them
                    usual = form == record.spellings(format)[0] and naming == namings(family)[0]
                    if choice == "everything" and not usual:
                        continue
                    file = make(family, format, naming, form, choice, 2)
                    if file is not None:
                        yield file


@pytest.mark.share(12)
@pytest.mark.parametrize(("host", "family"), CASES)
def test_a_sample_of_the_verdicts(host: str, family: str, tmp_path: Path) -> None:
    current(host)
    tried = 0
    for file in sample(host, family):
        found = verdicts.cell(host, file, tmp_path)
        if found is not None:
            tried += 1
            assert found.agrees, str(found)
    assert tried


@pytest.mark.slow
@pytest.mark.parametrize(("host", "family"), CASES)
def test_every_verdict(host: str, family: str, tmp_path: Path) -> None:
    current(host)
    wrong = [str(c) for c in verdicts.compare(host, [family], tmp_path) if not c.agrees]
    assert not wrong, "\n".join(wrong[:5])


RECORDED = [
    ("comfyui", "flux"), ("comfyui", "lumina2"), ("invokeai", "flux"), ("invokeai", "wan"), ("kohya", "sd1"), ("kohya", "anima"),
    ("diffusers", "krea2"), ("comfyui", "qwen-image-21"), ("forge", "flux"), ("a1111", "sd2"), ("mflux", "ernie-image"),
    ("sdcpp", "qwen-image"), ("sdnext", "sd3"), ("wan2gp", "qwen-image"),
]  # fmt: skip


@pytest.mark.share(4)
@pytest.mark.parametrize(("host", "family"), RECORDED)
def test_the_table_is_what_the_loader_does(host: str, family: str) -> None:
    current(host)
    assert record.names(host, family) == measurement(host).names[family]


@pytest.mark.parametrize("host", list(hosts()))
def test_every_family_was_measured(host: str) -> None:
    table = measurement(host)
    assert table.version
    assert table.date
    assert table.how in ("run", "described")
    known = set(table.names) | set(hosts()[host].unsupported)
    assert set(families()) - known == record.UNMEASURED.get(host, frozenset())
    assert known <= set(families())


@pytest.mark.parametrize("host", ["comfyui", "diffusers"])
def test_a_planted_wrong_cell_is_found(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table that says the contrary for one name disagrees with the loader."""
    current(host)
    file = make("qwen-image", "diffusers", "diffusers", "lora_B", "layers", 2)
    assert file is not None
    found = verdicts.cell(host, file, tmp_path)
    assert found is not None
    assert found.agrees
    true = measurement(host)
    planted = {"qwen-image": {"diffusers": {"transformer": {"diffusers": [file.parts[0].name]}}}}
    wrong = Measurement(true.version, true.date, true.how, {**true.names, **planted})
    monkeypatch.setattr(_judge, "measurement", lambda _: wrong)
    found = verdicts.cell(host, file, tmp_path)
    assert found is not None
    assert not found.agrees


def test_a_table_without_the_cell_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = make("flux", "kohya", "native", "lora_up, alpha", "layers", 2)
    assert file is not None
    monkeypatch.setattr(_judge, "measurement", lambda _: Measurement("", "", "", {}))
    with Adapter.open(file.write(tmp_path / "a.safetensors")) as adapter:
        told = {
            name: v for name, v in judge(adapter).items() if "flux" not in hosts()[name].unsupported
        }
        assert len(told) > 3
        for verdict in told.values():
            assert verdict.loads is None
            assert "not measured" in verdict.why


def test_judging_is_fast(tmp_path: Path) -> None:
    """A file of some 3,000 keys: a verdict must not cost more than reading the header."""
    file = make("sdxl", "kohya", "native", "lora_up, alpha", "everything")
    assert file is not None
    assert len(file.listing) > 2000
    with Adapter.open(file.write(tmp_path / "a.safetensors")) as adapter:
        judge(adapter)  # tables are read once
        start = time.process_time()
        judge(adapter)
        assert time.process_time() - start < 0.5
