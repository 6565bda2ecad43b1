"""Refusals that say what to do: swapped arguments, near names, what a format cannot hold, long lists."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from adaptkit import ops
from adaptkit.errors import NoSuchName
from adaptkit.hosts import named
from tests.cli.test_cli import adaptkit, refused

LORA, BASE = "lora-kohya.safetensors", "base.safetensors"


@pytest.mark.parametrize("verb", ["merge", "extract", "advise"])
def test_an_adapter_in_the_place_of_a_checkpoint_is_called_one(tiny: Path, verb: str) -> None:
    refused(adaptkit(verb, tiny / LORA, tiny / BASE), "this is an adapter", "swapped?")
    if verb != "merge":
        refused(adaptkit(verb, tiny / BASE, tiny / LORA), "this is an adapter", "swapped?")


@pytest.mark.parametrize(
    "arguments",
    [("convert", BASE, "--to", "comfy"), ("resize", BASE, "--rank", "1"), ("merge", BASE, BASE)],
)
def test_a_checkpoint_in_the_place_of_an_adapter_is_called_one(
    tiny: Path, arguments: tuple[str, ...]
) -> None:
    done = adaptkit(*arguments, cwd=tiny)
    refused(done, "a checkpoint of Stable Diffusion 1.x", "adaptkit extract BASE TUNED")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("inspct", "inspect"), ("info", "inspect"), ("diff", "compare"), ("Convrt", "convert")],
)
def test_the_nearest_command_is_named(typed: str, meant: str) -> None:
    refused(adaptkit(typed, "x"), f"did you mean {meant}?", code=2)
    refused(adaptkit("frobnicate"), "commands: inspect, convert", code=2)


@pytest.mark.parametrize("name", ["ComfyUI", "comfy", "a1111", "Forge", "INVOKE"])
def test_hosts_have_the_names_that_people_call_them(tiny: Path, tmp_path: Path, name: str) -> None:
    output = tmp_path / "o.safetensors"
    done = adaptkit("convert", tiny / LORA, "--for", name, "--family", "SD1", "-o", output)
    assert done.returncode == 0, done.stderr
    (told,) = (line for line in done.stderr.splitlines() if "loads in" in line)
    assert named(name).name in told
    assert "nothing was to be renamed" in done.stderr
    options = ops.convert.Options(host=name, output=output, overwrite=True)
    with ops.convert.plan(tiny / LORA, options) as plan:
        assert plan.keys.format.name == "kohya"


def test_the_nearest_value_is_named(tiny: Path) -> None:
    refused(adaptkit("convert", tiny / LORA, "--for", "comfiui"), "Did you mean comfyui?", code=2)
    refused(adaptkit("convert", tiny / LORA, "--to", "Khoya"), "did you mean kohya")
    with pytest.raises(NoSuchName, match="unknown host 'comfyu'"):
        named("comfyu")
    # the names of hosts are told apart
    found = [name for host in ("comfyui", "kohya", "invokeai") for name in named(host).also]
    assert len(found) == len(set(found)) > 5


def test_what_a_format_cannot_hold_is_told_with_the_way_out(tiny: Path, tmp_path: Path) -> None:
    done = adaptkit("convert", tiny / LORA, "--to", "peft", "-o", tmp_path / "p")
    refused(done, "72 keys would be lost", "--only unet")
    assert len(done.stderr) < 600
    assert (
        adaptkit(
            "convert", tiny / LORA, "--to", "peft", "--only", "unet", "-o", tmp_path / "p"
        ).returncode
        == 0
    )


def test_a_file_with_hundreds_of_faults_is_told_in_a_few_lines(tiny: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny / LORA)
    broken = {k: v for k, v in tensors.items() if "lora_down" not in k or "lora_te" in k}
    save_file(broken, tmp_path / "b.safetensors")
    done = adaptkit("inspect", tmp_path / "b.safetensors")
    assert done.returncode == 1
    lines = [line for line in done.stdout.splitlines() if "missing" in line]
    assert len(lines) == 1
    assert lines[0].startswith("  error: 80 modules: lora_down.weight is missing: unet.")
    assert lines[0].endswith("and 77 more")


def test_what_a_size_leaves_out_is_told_by_part(tiny: Path, tmp_path: Path) -> None:
    output = tmp_path / "o.safetensors"
    done = adaptkit("resize", tiny / LORA, "--size", "38KB", "-o", output)
    assert "1 of 24 in text_encoder, 41 of 80 in unet" in done.stderr
