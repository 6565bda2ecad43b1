"""A checkpoint of 500 shards, where a process may have 256 files open."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

SHARDS, OPEN = 500, 256
DOUBLE = {
    "img_attn.proj": (8, 8), "img_attn.qkv": (24, 8), "txt_attn.proj": (8, 8), "txt_attn.qkv": (24, 8),
    "img_mlp.0": (32, 8), "img_mlp.2": (8, 32), "txt_mlp.0": (32, 8), "txt_mlp.2": (8, 32),
    "img_mod.lin": (48, 8), "txt_mod.lin": (48, 8),
}  # fmt: skip
SINGLE = {"linear1": (56, 8), "linear2": (8, 40), "modulation.lin": (24, 8)}
RUN = """
import resource, sys
from adaptkit.__main__ import run
resource.setrlimit(resource.RLIMIT_NOFILE, ({open}, {open}))
sys.argv = ["adaptkit", *sys.argv[1:]]
run()
"""


def shapes() -> dict[str, tuple[int, ...]]:
    """The first 500 weights and biases of a FLUX of width 8."""
    layers = {f"double_blocks.{n}.{key}": s for n in range(19) for key, s in DOUBLE.items()}
    layers |= {f"single_blocks.{n}.{key}": s for n in range(38) for key, s in SINGLE.items()}
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in layers.items():
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return dict(list(found.items())[:SHARDS])


def model(folder: Path, seed: int) -> tuple[Path, dict[str, np.ndarray]]:
    """Every tensor in a shard of its own."""
    folder.mkdir()
    draw = np.random.default_rng(seed)
    tensors = {key: draw.normal(size=s).astype("f4") for key, s in shapes().items()}
    index = {}
    for n, (key, tensor) in enumerate(tensors.items()):
        index[key] = f"flux-{n + 1:05}-of-{SHARDS:05}.safetensors"
        save_file({key: tensor}, folder / index[key])
    path = folder / "flux.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": index}), encoding="utf-8")
    return path, tensors


def run(*given: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUN.format(open=OPEN), *map(str, given)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    return model(tmp_path_factory.mktemp("shards") / "base", 0)


pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on open files to set")


def test_inspect(base: tuple[Path, dict[str, np.ndarray]]) -> None:
    done = run("inspect", base[0], "--json")
    assert done.returncode == 0, done.stderr
    (report,) = json.loads(done.stdout)["files"]
    assert report["family"] == "flux"


def test_merge(base: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    path, tensors = base
    adapter, wanted = {}, dict(tensors)
    for key, tensor in tensors.items():
        if key.endswith(".weight"):
            stem = f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}"
            down, up = np.ones((1, tensor.shape[1]), "f4"), np.ones((tensor.shape[0], 1), "f4")
            adapter |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
            wanted[key] = tensor + np.float32(0.5)
    save_file(adapter, tmp_path / "a.safetensors")
    done = run(
        "merge", path, f"{tmp_path / 'a.safetensors'}:0.5", "-o", tmp_path / "out", "--verify"
    )
    assert done.returncode == 0, done.stderr
    found = {
        k: v for f in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(f).items()
    }
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        np.testing.assert_allclose(found[key], tensor, rtol=0, atol=1e-6)


def test_extract(base: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    tuned, tensors = model(tmp_path / "tuned", 1)
    out = tmp_path / "out.safetensors"
    done = run(
        "extract", base[0], tuned, "--algo", "full", "--dtype", "fp32", "--to", "kohya", "-o", out
    )
    assert done.returncode == 0, done.stderr
    found = load_file(out)
    assert len(found) == SHARDS
    key = "double_blocks.0.img_attn.proj"
    np.testing.assert_array_equal(
        found[f"lora_unet_{key.replace('.', '_')}.diff"],
        tensors[f"{key}.weight"] - base[1][f"{key}.weight"],
    )


def test_other_files_can_still_be_opened(base: tuple[Path, dict[str, np.ndarray]]) -> None:
    """After all shards were read: an import, a spool or a log needs files, too."""
    code = (
        "import resource, sys, torch; from adaptkit.files.open import open_source\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({OPEN}, {OPEN}))\n"
        "with open_source(sys.argv[1]) as source:\n"
        "    for name in source.infos: source.read(name)\n"
        "    others = [open(sys.argv[1]) for _ in range(100)]\n"
        "    for name in source.infos: source.read(name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(base[0])],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
