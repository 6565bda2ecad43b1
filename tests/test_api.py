"""The Python API: the same bytes as the command line, from paths, open adapters and state dicts."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import adaptkit as ak
from adaptkit.errors import AdaptkitError, UnknownAdapter, WouldOverwrite
from tests import oracle
from tests.cli.test_cli import adaptkit

LORA = "lora-kohya.safetensors"
NAME = "unet.mid_block.attentions.0.proj_in"


def test_a_file_is_looked_into(tiny: Path) -> None:
    with ak.open(tiny / LORA) as style:
        assert (style.family, style.format, len(style)) == ("sd1", "kohya", 104)
        assert style.loads_in["comfyui"] is True
        module = style.modules[NAME]
        assert (module.algorithm, module.rank, module.scale) == ("lora", 2, 0.5)
        stem = "lora_unet_mid_block_attentions_0_proj_in"
        stored = {k: v.double().numpy() for k, v in load_file(tiny / LORA).items()}
        up, down = stored[f"{stem}.lora_up.weight"], stored[f"{stem}.lora_down.weight"]
        delta = module.delta()
        assert delta.shape == (up.shape[0], down.shape[1], 1, 1)
        expected = oracle.lora(up, down, 0.5).reshape(delta.shape)
        assert torch.allclose(delta.double(), torch.from_numpy(expected), rtol=1e-6)
        assert len(repr(style)) < 200
        assert len(repr(module)) < 200
        assert set(style.state_dict()) == set(load_file(tiny / LORA))


def test_a_state_dict_is_an_adapter_too(tiny: Path, tmp_path: Path) -> None:
    stored = load_file(tiny / LORA)
    style = ak.open(stored)
    assert style.family == "sd1"
    made = style.convert(host="comfyui", skip="te")
    assert len(made) == 80
    assert made.report is not None
    assert made.report.loads_in is not None
    path = made.save(str(tmp_path / "x.safetensors"))
    done = adaptkit(
        "convert", tiny / LORA, "--for", "comfyui", "--skip", "te", "-o", tmp_path / "y.safetensors"
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = load_file(path), load_file(tmp_path / "y.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    with pytest.raises(WouldOverwrite):
        made.save(path)
    made.save(path, overwrite=True)
    small = style.resize(size="30KB")
    assert small.path.stat().st_size <= 30_000
    held = small.path
    small.close()
    assert not held.exists()
    with pytest.raises(UnknownAdapter):
        ak.open({"x": torch.zeros(2)})


def test_peft_is_opened_with_its_configuration(tiny: Path, tmp_path: Path) -> None:
    with ak.open(tiny / LORA) as style:
        style.convert(to="peft", only="unet", output=tmp_path / "p").close()
        again = style.convert("peft", only="unet")
    config = json.loads((tmp_path / "p" / "adapter_config.json").read_text(encoding="utf-8"))
    state = load_file(tmp_path / "p" / "adapter_model.safetensors")
    with ak.open(state, config=config) as peft, ak.open(tmp_path / "p") as folder:
        for one in (peft, folder, again):
            assert {module.scale for module in one.modules.values()} == {0.5}
    again.save(tmp_path / "q")
    assert (tmp_path / "q" / "adapter_config.json").is_file()


def test_merging_state_dicts_keeps_dtype_device_and_the_base(tiny: Path, tmp_path: Path) -> None:
    base = load_file(tiny / "base.safetensors")
    before = {name: tensor.clone() for name, tensor in base.items()}
    seen: list[tuple[str, int, int, str]] = []
    with ak.open(tiny / LORA) as style:
        merged = ak.merge(
            base, [(style, 0.8), (load_file(tiny / LORA), -0.3)], progress=lambda *a: seen.append(a)
        )
    assert list(merged) == list(base)
    output = tmp_path / "m.safetensors"
    done = adaptkit(
        "merge",
        tiny / "base.safetensors",
        f"{tiny / LORA}:0.8",
        f"{tiny / LORA}:-0.3",
        "-o",
        output,
    )
    assert done.returncode == 0, done.stderr
    assert all(torch.equal(merged[k], tensor) for k, tensor in load_file(output).items())
    assert all(merged[k].dtype == base[k].dtype for k in base)
    assert all(torch.equal(base[k], before[k]) for k in base)
    assert seen
    assert [*dict.fromkeys(one[0] for one in seen)] == ["merging", "syncing"]
    assert all(done <= total for _, done, total, _ in seen)
    report = ak.merge(
        str(tiny / "base.safetensors"), [tiny / LORA], output=str(tmp_path / "n.safetensors")
    )
    assert report.tensors_changed == 104


def test_extracting_from_state_dicts(tiny: Path, tmp_path: Path) -> None:
    base = load_file(tiny / "base.safetensors")
    with ak.open(tiny / LORA) as style:
        tuned = ak.merge(base, [style])
    lora = ak.extract(base, tuned, rank=2)
    assert lora.report is not None
    assert lora.report.relative_error < 0.01
    again = ak.merge(base, [lora])
    left = sum(float((again[k].double() - tuned[k].double()).square().sum()) for k in base)
    moved = sum(float((base[k].double() - tuned[k].double()).square().sum()) for k in base)
    assert left < 1e-3 * moved
    both = ak.combine([(lora, 0.5), (lora, 0.5)], rank=2)
    assert both.report is not None
    assert len(both) == len(lora)


def test_a_folder_is_a_list_of_dicts(tiny: Path, tmp_path: Path) -> None:
    save_file(load_file(tiny / LORA), tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"")
    found = ak.inspect(tmp_path)
    assert repr(found) == "Inspected(2 files, 1 broken)"
    assert [record.get("family") for record in found.to_dicts()] == ["sd1", None]
    assert ak.inspect(str(tmp_path / "a.safetensors"))[0].record["modules"] == 104


def test_what_is_done_is_logged(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "adaptkit")
    with ak.open(tiny / LORA) as style:
        style.convert("comfy").close()
    assert "convert: wrote" in caplog.text


def test_an_error_leaves_no_temporary_file(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with ak.open(tiny / LORA) as style, pytest.raises(AdaptkitError):
        style.convert("nothing like this")
    with pytest.raises(AdaptkitError):
        ak.merge({"x": torch.zeros(1)}, [tiny / LORA])
    assert list(tmp_path.iterdir()) == []


def test_several_threads_give_the_same_bytes(tiny: Path) -> None:
    made: list[dict[str, torch.Tensor]] = []

    def work() -> None:
        with ak.open(tiny / LORA) as style, style.resize(error=0.2) as small:
            made.append(small.state_dict())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 4
    assert all(torch.equal(one[k], made[0][k]) for one in made for k in made[0])


def test_importing_the_api_loads_no_torch() -> None:
    code = "import sys, adaptkit as ak; ak.open, ak.merge, ak.inspect; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
