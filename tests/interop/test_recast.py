"""What `convert --algo`, `resize` and `combine` write, in the real packages: every module loaded, with the ΔW that we read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from adaptkit.adapter import Adapter
from adaptkit.hosts import judge
from adaptkit.ops import combine, convert, resize
from tests.interop.conftest import close, deltas, lokr
from tests.interop.test_diffusers import in_layers, load, noisy, wrong

if TYPE_CHECKING:
    from pathlib import Path

    from tests.interop.conftest import Sd1

pytest.importorskip("diffusers")
pytest.importorskip("peft")

pytestmark = pytest.mark.interop

__all__ = ["noisy"]


@pytest.fixture(scope="session")
def kronecker(sd1: Sd1, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoKr of every layer."""
    output = tmp_path_factory.mktemp("lokr") / "lokr.safetensors"
    sd1.extract(sd1.tuned("lokr-4", lokr(4)), output, algo="lokr", factor=4, dtype="fp32")
    return output


def test_a_lokr_as_a_lora_is_loaded_whole(sd1: Sd1, kronecker: Path, tmp_path: Path) -> None:
    output = tmp_path / "lora.safetensors"
    report = convert.run(
        convert.plan(kronecker, convert.Options(to="diffusers", algo="lora", output=output))
    )
    assert report.relative_error < 1e-6
    ours, before, theirs = deltas(output), deltas(kronecker), in_layers(*load(sd1, output))
    assert theirs.keys() == ours.keys() == before.keys()
    assert not wrong(theirs, ours)
    assert all(close(delta, before[name], 1e-5) for name, delta in ours.items())


def test_ranks_that_differ_are_loaded_as_they_are(sd1: Sd1, noisy: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    sd1.extract(noisy, source, to="diffusers", rank=8)
    report = resize.run(resize.plan(source, resize.Options(error=0.5, output=output)))
    assert len({item["rank"] for item in report.details}) > 2
    theirs = in_layers(*load(sd1, output))
    assert len(theirs) == report.modules
    assert not wrong(theirs, deltas(output))


def test_where_ranks_that_differ_are_not_loaded_so_inspect_says_it(
    sd1: Sd1, noisy: Path, tmp_path: Path
) -> None:
    """Of kohya keys diffusers gives attention layers the alpha that most have."""
    source, output = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    sd1.extract(noisy, source, rank=8)
    resize.run(resize.plan(source, resize.Options(error=0.5, output=output)))
    assert wrong(in_layers(*load(sd1, output)), deltas(output))
    with Adapter.open(output) as adapter:
        assert judge(adapter)["diffusers"].loads is False


def test_a_combination_is_loaded_whole(
    sd1: Sd1, kronecker: Path, noisy: Path, tmp_path: Path
) -> None:
    source, output = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    sd1.extract(noisy, source, rank=3)
    inputs = [(source, 0.75), (kronecker, -0.5)]
    combine.run(
        combine.plan(inputs, combine.Options(to="diffusers", algo="lora", rank=64, output=output))
    )
    theirs, first, second = in_layers(*load(sd1, output)), deltas(source), deltas(kronecker)
    for name, delta in theirs.items():
        expected = 0.75 * first[name] - 0.5 * second[name]
        assert close(delta.reshape(expected.shape), expected, 1e-5), name


def test_a_resized_lokr_is_a_lokr_for_lycoris(sd1: Sd1, kronecker: Path, tmp_path: Path) -> None:
    modules = pytest.importorskip("lycoris.modules")
    output = tmp_path / "b.safetensors"
    resize.run(resize.plan(kronecker, resize.Options(rank=1, output=output)))
    tensors, ours = load_file(output), deltas(output)
    names = {key.rsplit(".", 1)[0] for key in tensors}
    found = 0
    for name in names:
        state = {key: t for key, t in tensors.items() if key.startswith(f"{name}.")}
        label = next(
            (n for n in ours if n.replace(".", "_").endswith(name.removeprefix("lora_unet_"))), None
        )
        if label is None or not name.startswith("lora_unet_"):
            continue
        delta = ours[label]
        kind, values = modules.get_module(state, name)
        layer = torch.nn.Linear(delta.shape[1], delta.shape[0])
        if "conv" in name or state.get(f"{name}.lokr_w2", delta).ndim > 2:
            continue
        made = modules.make_module(kind, values, name, layer)
        theirs, _ = made.get_diff_weight(1.0)
        assert close(theirs.reshape(delta.shape), delta, 1e-5), name
        found += 1
    assert found > 20
