"""28 jobs from the commands of `adaptkit help every-job`: each is run, and NumPy reads what it wrote."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import jobs, oracle
from tests.cli.test_cli import adaptkit
from tests.examples import GUIDE
from tests.jobs import ATTENTION, LINEAR, POINT, TEXT, UP, WINDOW, adapter, apart, deltas

PAGE = GUIDE / "jobs" / "every-job.md"
MARKED = re.compile(r"^<!-- job: ([\w-]+) -->\n```sh\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COMMANDS = dict(MARKED.findall(PAGE.read_text(encoding="utf-8")))
Done = subprocess.CompletedProcess[str]
Job = Callable[[Path, Callable[[], list[Done]]], None]
JOBS: dict[str, Job] = {}


def job(function: Job) -> Job:
    """The walk of one job: makes its files in a folder, runs its commands, looks at what they wrote."""
    JOBS[function.__name__.replace("_", "-")] = function
    return function


def test_the_page_and_the_walks_are_the_same_28_jobs() -> None:
    assert list(COMMANDS) == list(JOBS)
    assert len(JOBS) == 28


@pytest.mark.parametrize("name", JOBS)
def test_a_job_is_done_by_the_command_of_the_guide(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def run() -> list[Done]:
        return [adaptkit(*shlex.split(line)[1:]) for line in COMMANDS[name].splitlines()]

    JOBS[name](tmp_path, run)


def good(done: list[Done]) -> Done:
    """The last of the commands, which all succeeded."""
    for one in done:
        assert one.returncode == 0, one.stderr
    return done[-1]


def base(folder: Path) -> Path:
    path = folder / "base.safetensors"
    shutil.copy(jobs.TINY / "base.safetensors", path)
    return path


# look ------------------------------------------------------------------------------------------------------------


@job
def what_is_it(folder: Path, run: Callable[[], list[Done]]) -> None:
    adapter(folder / "style.safetensors")
    said = good(run()).stdout
    assert re.search(r"family +sd1\b", said)
    assert re.search(r"format +kohya", said)
    assert re.search(r"ranks +4 \(×4\)", said)
    assert re.search(r"loads in .*\bcomfyui\b.*: yes", said)


@job
def list_by_rank(folder: Path, run: Callable[[], list[Done]]) -> None:
    (folder / "loras").mkdir()
    for rank in (3, 12, 5):
        names = (ATTENTION,) if rank == 12 else LINEAR  # not the largest file
        adapter(folder / "loras" / f"r{rank}.safetensors", names=names, rank=rank)
    rows = re.findall(r"r(\d+)\.safetensors", good(run()).stdout)
    assert rows == ["12", "5", "3"]


@job
def find_broken(folder: Path, run: Callable[[], list[Done]]) -> None:
    (folder / "loras").mkdir()
    whole = adapter(folder / "whole", names=(ATTENTION, POINT)).read_bytes()
    for number in range(50):
        (folder / "loras" / f"{number:02}.safetensors").write_bytes(whole)
    (folder / "loras" / "07.safetensors").write_bytes(whole[:-5])
    stored = load_file(folder / "whole")
    half = {key: tensor for key, tensor in stored.items() if key != f"{POINT}.lora_up.weight"}
    save_file(half, folder / "loras" / "19.safetensors")
    stored[f"{ATTENTION}.lora_down.weight"][0, 0] = torch.nan
    save_file(stored, folder / "loras" / "42.safetensors")
    (done,) = run()
    assert done.returncode == 1
    assert sorted(set(re.findall(r"(\d\d)\.safetensors", done.stdout + done.stderr))) == [
        "07",
        "19",
        "42",
    ]


@job
def compare_versions(folder: Path, run: Callable[[], list[Done]]) -> None:
    one, two = (adapter(folder / f"style-v{n}.safetensors", seed=n) for n in (1, 2))
    found = re.search(r"relative error +([\d.]+)", good(run()).stdout)
    assert found
    assert float(found[1]) == pytest.approx(apart(deltas(two), deltas(one)), rel=1e-3)


@job
def compare_checkpoints(folder: Path, run: Callable[[], list[Done]]) -> None:
    jobs.fine_tuned(folder, "wan", "base", "tuned")
    one, two = (jobs.tensors(folder / f"{name}.safetensors") for name in ("tuned", "base"))
    said = good(run()).stdout
    found = re.search(r"relative error +([\d.]+)", said)
    assert found
    assert float(found[1]) == pytest.approx(apart(one, two), rel=1e-3)
    differ = sum(not np.array_equal(one[key], two[key]) for key in two)
    assert differ == 8
    assert f"{differ} of them differ" in said


@job
def model_card(folder: Path, run: Callable[[], list[Done]]) -> None:
    adapter(folder / "style.safetensors")
    good(run())
    card = (folder / "card.md").read_text(encoding="utf-8")
    assert "Stable Diffusion 1" in card
    assert "ComfyUI" in card or "comfyui" in card
    assert re.search(r"\| .* \|", card) or "rank" in card.lower()


# convert ---------------------------------------------------------------------------------------------------------


@job
def load_everywhere(folder: Path, run: Callable[[], list[Done]]) -> None:
    style = adapter(folder / "style.safetensors")
    said = good(run())
    out = folder / "for-diffusers.safetensors"
    assert re.search(r"loads in +.*diffusers", said.stderr)
    assert all(key.endswith(("lora_A.weight", "lora_B.weight")) for key in load_file(out))
    assert apart(deltas(out), deltas(style)) < jobs.NEAR


@job
def there_and_back(folder: Path, run: Callable[[], list[Done]]) -> None:
    style = adapter(folder / "style.safetensors")
    good(run())
    unet = {name: delta for name, delta in deltas(style).items() if not name.startswith("text_")}
    assert apart(deltas(folder / "style-peft"), unet) < jobs.NEAR
    again = jobs.raw(folder / "style-again.safetensors")
    first = jobs.raw(style)
    assert again.items() <= first.items()  # the very bytes
    assert {key.split(".")[0] for key in again} == set(LINEAR) - {TEXT}


@job
def lokr(folder: Path, run: Callable[[], list[Done]]) -> None:
    lokr = adapter(folder / "lokr.safetensors", "lokr")
    good(run())
    theirs = {
        ORIGINAL.sub("", key): data
        for key, data in jobs.raw(folder / "lokr-comfy.safetensors").items()
    }
    ours = {}
    for key, data in jobs.raw(lokr).items():
        stem, _, role = key.partition(".")
        if role != "alpha":  # whole factors take none
            name = jobs.original(stem).removesuffix(".weight")
            ours[f"{ORIGINAL.sub('', name)}.{role}"] = data
    assert theirs == ours
    as_lora = folder / "lokr-as-lora.safetensors"
    assert all("lora_" in key for key in load_file(as_lora))
    assert apart(deltas(as_lora), deltas(lokr)) < 1e-3


# how ComfyUI and CompVis call the parts of a model
ORIGINAL = re.compile(r"^(model\.)?diffusion_model\.|^cond_stage_model\.|^text_encoders\.clip_l\.")


@job
def dora(folder: Path, run: Callable[[], list[Done]]) -> None:
    weights, names = jobs.tensors(base(folder)), (ATTENTION, UP)
    stored = load_file(adapter(folder / "plain", names=names))
    expected, at = {}, {}
    for name in names:
        weight = weights[jobs.original(name)]
        magnitude = np.linalg.norm(weight, axis=1, keepdims=True) * 1.1
        stored[f"{name}.dora_scale"] = torch.tensor(magnitude, dtype=torch.float32)
        delta = deltas(folder / "plain")[jobs.dotted(name)]
        expected[jobs.dotted(name)] = oracle.dora(weight, delta, magnitude, 0) - weight
        # LyCORIS: the strength multiplies ΔW before the norm
        at[jobs.dotted(name)] = weight + 0.7 * expected[jobs.dotted(name)] - weight
    save_file(stored, folder / "dora.safetensors")
    good(run())
    assert apart(deltas(folder / "dora-as-lora.safetensors"), expected) < 1e-3
    jobs.merged_as(folder / "base.safetensors", folder / "with-dora.safetensors", at)


@job
def split_and_fuse(folder: Path, run: Callable[[], list[Done]]) -> None:
    draw, width = torch.Generator().manual_seed(0), 3072
    fused = {f"lora_unet_double_blocks_{n}_img_attn_qkv": 3 * width for n in range(19)}
    fused |= {f"lora_unet_single_blocks_{n}_linear1": 7 * width for n in range(38)}
    stored: dict[str, torch.Tensor] = {}
    for name, rows in fused.items():
        stored[f"{name}.lora_up.weight"] = torch.randn(rows, 1, generator=draw).half()
        stored[f"{name}.lora_down.weight"] = torch.randn(1, width, generator=draw).half()
        stored[f"{name}.alpha"] = torch.tensor(1.0)
    save_file(stored, folder / "flux-style.safetensors")
    good(run())
    split = load_file(folder / "flux-split.safetensors")
    for name in fused:
        number = re.findall(r"_(\d+)_", name)[0]
        single = "single" in name
        home = f"transformer.{'single_' * single}transformer_blocks.{number}."
        ends = ["attn.to_q", "attn.to_k", "attn.to_v", *["proj_mlp"] * single]
        ups = [split.pop(f"{home}{end}.lora_B.weight") for end in ends]
        downs = [split.pop(f"{home}{end}.lora_A.weight") for end in ends]
        assert torch.equal(torch.cat(ups), stored[f"{name}.lora_up.weight"])
        assert all(torch.equal(down, stored[f"{name}.lora_down.weight"]) for down in downs)
    assert split == {}
    again = load_file(folder / "flux-fused.safetensors")
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in stored.items())


@job
def alpha(folder: Path, run: Callable[[], list[Done]]) -> None:
    stored = load_file(adapter(folder / "whole"))
    bare = {key: tensor for key, tensor in stored.items() if not key.endswith("alpha")}
    save_file(bare, folder / "no-alpha.safetensors")
    good(run())
    out = load_file(folder / "with-alpha.safetensors")
    alphas = {key: float(tensor) for key, tensor in out.items() if key.endswith(".alpha")}
    assert alphas == {f"{name}.alpha": 1.0 for name in LINEAR}
    assert all(torch.equal(out[key], tensor) for key, tensor in bare.items())


@job
def remove_text_encoder(folder: Path, run: Callable[[], list[Done]]) -> None:
    style = adapter(folder / "style.safetensors")
    good(run())
    kept = {key: data for key, data in jobs.raw(style).items() if not key.startswith("lora_te")}
    assert jobs.raw(folder / "unet-only.safetensors") == kept


@job
def convert_folder(folder: Path, run: Callable[[], list[Done]]) -> None:
    for name in ("a", "deep/b"):
        path = folder / "loras" / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        stored = load_file(adapter(folder / "one", names=LINEAR, seed=len(name)))
        # a file of kohya's converter, as diffusers writes it
        renamed = {}
        for key, tensor in stored.items():
            stem, _, end = key.partition(".")
            if end != "alpha":
                ours = {"lora_up.weight": "lora_B.weight", "lora_down.weight": "lora_A.weight"}[end]
                renamed[f"{DIFFUSERS[stem]}.{ours}"] = tensor * (0.75 if end[5] == "u" else 1.0)
        save_file(renamed, path)
    good(run())
    for name in ("a", "deep/b"):
        one, two = (folder / home / f"{name}.safetensors" for home in ("loras", "for-comfyui"))
        assert apart(deltas(two), deltas(one)) < jobs.NEAR
    assert sorted(p.name for p in (folder / "for-comfyui").rglob("*.*")) == [
        "a.safetensors",
        "b.safetensors",
    ]


DIFFUSERS = {
    ATTENTION: "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    UP: "unet.up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_v",
    POINT: "unet.down_blocks.0.attentions.1.proj_in",
    TEXT: "text_encoder.text_model.encoder.layers.3.mlp.fc1",
}


@job
def trigger_word(folder: Path, run: Callable[[], list[Done]]) -> None:
    style = adapter(folder / "style.safetensors")
    before, said = jobs.raw(style), jobs.metadata(style)
    good(run())
    after = jobs.metadata(style)
    assert after.pop("modelspec.trigger_phrase") == "in the style of ukiyo-e"
    assert said.items() <= after.items()
    assert jobs.raw(style) == before


# shrink ----------------------------------------------------------------------------------------------------------


@job
def resize(folder: Path, run: Callable[[], list[Done]]) -> None:
    style = adapter(folder / "style.safetensors")
    good(run())
    small, whole = deltas(folder / "small.safetensors"), deltas(style)
    assert small.keys() == whole.keys()
    for name, delta in small.items():
        assert np.linalg.matrix_rank(delta, 1e-5 * np.linalg.norm(delta)) == 1
        least = oracle.best_rank(whole[name], 1)
        assert np.linalg.norm(delta - whole[name]) == pytest.approx(least, rel=1e-4)


@job
def shrink_folder(folder: Path, run: Callable[[], list[Done]]) -> None:
    (folder / "loras").mkdir()
    small = adapter(folder / "loras" / "small.safetensors")
    generator, stored = torch.Generator().manual_seed(0), {}
    rank, falloff = 128, torch.arange(1, 129) ** -1.0
    for block in range(8):
        for layer in (1, 2):
            name = f"lora_unet_input_blocks_{6 + layer}_1_transformer_blocks_{block}_ff_net_0_proj"
            up = torch.randn(10240, rank, generator=generator) * falloff
            stored[f"{name}.lora_up.weight"] = up.half()
            stored[f"{name}.lora_down.weight"] = torch.randn(rank, 1280, generator=generator).half()
            stored[f"{name}.alpha"] = torch.tensor(float(rank))
    more = {f"{key.replace('input_blocks_7', 'output_blocks_0')}": t.clone()
            for key, t in stored.items() if "input_blocks_7" in key}  # fmt: skip
    save_file({**stored, **more}, folder / "loras" / "large.safetensors")
    assert (folder / "loras" / "large.safetensors").stat().st_size > 64_000_000
    good(run())
    out = folder / "small" / "large.safetensors"
    assert 60_000_000 < out.stat().st_size <= 64_000_000
    assert jobs.raw(folder / "small" / "small.safetensors") == jobs.raw(small)
    first = "lora_unet_input_blocks_7_1_transformer_blocks_0_ff_net_0_proj"
    one, two = ({k: v.double().numpy() for k, v in load_file(p).items() if k.startswith(first)}
                for p in (folder / "loras" / "large.safetensors", out))  # fmt: skip
    a, b = (oracle_lora(side, first) for side in (one, two))
    kept = len(two[f"{first}.lora_down.weight"])
    assert 64 < kept < 128
    assert np.linalg.norm(a - b) < 0.2 * np.linalg.norm(a)


def oracle_lora(stored: dict[str, np.ndarray], name: str) -> np.ndarray:
    up, down = (stored[f"{name}.lora_{end}.weight"] for end in ("up", "down"))
    return (up @ down[:, :64]) * float(stored[f"{name}.alpha"]) / len(down)


# combine ---------------------------------------------------------------------------------------------------------


@job
def several_in_one(folder: Path, run: Callable[[], list[Done]]) -> None:
    style = adapter(folder / "style.safetensors")
    detail = adapter(folder / "detail.safetensors", rank=7, seed=1)
    good(run())
    expected = jobs.added((deltas(style), 0.8), (deltas(detail), 0.5))
    assert apart(deltas(folder / "both.safetensors"), expected) < jobs.NEAR


@job
def average(folder: Path, run: Callable[[], list[Done]]) -> None:
    epochs = [adapter(folder / f"epoch-{n}.safetensors", seed=n) for n in (1, 2, 3)]
    good(run())
    expected = jobs.added(*((deltas(epoch), 1 / 3) for epoch in epochs))
    found = deltas(folder / "mean.safetensors")
    assert found.keys() == expected.keys()
    for name, delta in found.items():
        least = oracle.best_rank(expected[name], 4)
        assert np.linalg.matrix_rank(delta, 1e-5 * np.linalg.norm(delta)) == 4
        assert np.linalg.norm(delta - expected[name]) == pytest.approx(least, rel=1e-3)


@job
def subtract(folder: Path, run: Callable[[], list[Done]]) -> None:
    style = adapter(folder / "style.safetensors")
    concept = adapter(folder / "concept.safetensors", seed=1, names=(ATTENTION, UP))
    good(run())
    expected = jobs.added((deltas(style), 1.0), (deltas(concept), -1.0))
    assert apart(deltas(folder / "without.safetensors"), expected) < jobs.NEAR


# merge -----------------------------------------------------------------------------------------------------------


@job
def merge_any(folder: Path, run: Callable[[], list[Done]]) -> None:
    model, names = base(folder), (ATTENTION, WINDOW)
    parts = [
        (deltas(adapter(folder / "loha.safetensors", "loha", names)), 1.0),
        (deltas(adapter(folder / "lokr.safetensors", "lokr", (ATTENTION, POINT), seed=1)), 0.5),
        (deltas(adapter(folder / "locon.safetensors", "tucker", (WINDOW,), seed=2)), -0.3),
    ]
    good(run())
    jobs.merged_as(model, folder / "merged.safetensors", jobs.added(*parts))


@job
def prove(folder: Path, run: Callable[[], list[Done]]) -> None:
    model, style = base(folder), adapter(folder / "style.safetensors")
    said = good(run())
    assert "verified" in said.stderr
    jobs.merged_as(model, folder / "proved.safetensors", jobs.added((deltas(style), 0.8)))


@job
def undo(folder: Path, run: Callable[[], list[Done]]) -> None:
    model, style = base(folder), adapter(folder / "style.safetensors")
    baked, weights = load_file(model), jobs.tensors(model)
    for name, delta in deltas(style).items():
        (key,) = (jobs.original(n) for n in LINEAR if jobs.dotted(n) == name)
        whole = weights[key] + 0.8 * delta.reshape(weights[key].shape)
        baked[key] = torch.from_numpy(whole).to(baked[key].dtype)
    save_file(baked, folder / "baked.safetensors")
    good(run())
    restored = jobs.tensors(folder / "restored.safetensors")
    for key, weight in weights.items():
        # two roundings to float16
        assert (np.abs(restored[key] - weight) <= 2.0**-9 * np.abs(weight).max()).all(), key
    assert apart(restored, weights) < 1e-4


@job
def bake_folder(folder: Path, run: Callable[[], list[Done]]) -> None:
    style, weights = (
        adapter(folder / "style.safetensors"),
        jobs.tensors(jobs.TINY / "base.safetensors"),
    )
    layers = {name: weights[jobs.original(name)] for name in LINEAR}
    for part, prefix in (("unet", "lora_unet_"), ("text_encoder", "lora_te_")):
        (folder / "model" / part).mkdir(parents=True)
        stored = {
            f"{DIFFUSERS[name].removeprefix(f'{part}.')}.weight": torch.from_numpy(w).half()
            for name, w in layers.items()
            if name.startswith(prefix)
        }
        file = "diffusion_pytorch_model" if part == "unet" else "model"
        save_file(_completed(part, stored), folder / "model" / part / f"{file}.safetensors")
        (folder / "model" / part / "config.json").write_text('{"kept": true}')
    (folder / "model" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    good(run())
    out = folder / "model-styled"
    assert json.loads((out / "unet" / "config.json").read_text(encoding="utf-8")) == {"kept": True}
    assert (out / "model_index.json").is_file()
    found = {
        part: jobs.tensors(next((out / part).glob("*.safetensors")))
        for part in ("unet", "text_encoder")
    }
    for name, weight in layers.items():
        part, _, rest = DIFFUSERS[name].partition(".")
        meant = weight + 0.6 * deltas(style)[jobs.dotted(name)].reshape(weight.shape)
        got = found[part][f"{rest}.weight"]
        assert (np.abs(got - meant) <= 2.0**-10 * np.abs(meant) + 2.0**-20).all()


def _completed(part: str, stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names by which a reader knows the model, as a folder of diffusers has them."""
    if part == "unet":
        stored["conv_in.weight"] = torch.zeros(8, 4, 3, 3).half()
        stored["time_embedding.linear_1.weight"] = torch.zeros(32, 8).half()
    else:
        stored["text_model.final_layer_norm.weight"] = torch.zeros(24).half()
    return stored


@job
def fp8(folder: Path, run: Callable[[], list[Done]]) -> None:
    style = adapter(folder / "style.safetensors", size=0.1)
    stored = load_file(jobs.TINY / "base.safetensors")
    narrow = {
        key: t.to(torch.float8_e4m3fn) if t.is_floating_point() and t.ndim > 1 else t
        for key, t in stored.items()
    }
    save_file(narrow, folder / "base-fp8.safetensors")
    good(run())
    out = load_file(folder / "merged-fp8.safetensors")
    assert {key: t.dtype for key, t in out.items()} == {key: t.dtype for key, t in narrow.items()}
    weights = jobs.tensors(folder / "base-fp8.safetensors")
    for name, delta in deltas(style).items():
        (key,) = (jobs.original(n) for n in LINEAR if jobs.dotted(n) == name)
        meant = torch.from_numpy(weights[key] + delta.reshape(weights[key].shape))
        nearest = meant.float().to(torch.float8_e4m3fn).double()
        assert (out[key].double() - nearest).abs().max() <= 2.0**-3 * meant.abs().max() * 0.5
        assert (out[key].double() == nearest).double().mean() > 0.999
        assert not torch.equal(out[key].double(), torch.from_numpy(weights[key]))


# extract ---------------------------------------------------------------------------------------------------------


@job
def extract(folder: Path, run: Callable[[], list[Done]]) -> None:
    model, weights = base(folder), load_file(jobs.TINY / "base.safetensors")
    style = adapter(folder / "style", rank=6)
    tuned = dict(weights)
    for name, delta in deltas(style).items():
        (key,) = (jobs.original(n) for n in LINEAR if jobs.dotted(n) == name)
        whole = weights[key].double() + torch.from_numpy(delta).reshape(weights[key].shape)
        tuned[key] = whole.to(weights[key].dtype)
    bias = jobs.original(TEXT).replace(".weight", ".bias")
    tuned[bias] = weights[bias] + 0.01
    save_file(tuned, folder / "tuned.safetensors")
    said = good(run())
    assert "verified" in said.stderr
    before, after = jobs.tensors(model), jobs.tensors(folder / "tuned.safetensors")
    difference = {key: after[key] - before[key] for key in before}
    found = deltas(folder / "tuned-lora.safetensors")
    rest = norm = 0.0
    for key, delta in difference.items():
        names = [jobs.dotted(n) for n in LINEAR if jobs.original(n) == key]
        held = np.zeros(())
        if key == bias:
            stored = load_file(folder / "tuned-lora.safetensors")
            held = stored[f"{TEXT}.diff_b"].double().numpy()
        elif names:
            held = found[names[0]].reshape(delta.shape)
        rest, norm = rest + float(((delta - held) ** 2).sum()), norm + float((delta**2).sum())
    assert (rest / norm) ** 0.5 <= 0.05


@job
def video(folder: Path, run: Callable[[], list[Done]]) -> None:
    changed = jobs.fine_tuned(folder, "wan", "wan", "wan-tuned")
    good(run())
    before, after = (jobs.tensors(folder / f"{n}.safetensors") for n in ("wan", "wan-tuned"))
    found = deltas(folder / "wan-lora.safetensors")
    assert len(found) == len(changed) == 8
    key = next(key for key in changed if key.endswith("blocks.0.self_attn.q.weight"))
    difference, name = after[key] - before[key], "blocks_0_attn1_to_q"
    assert np.linalg.norm(found[name] - difference) < 0.01 * np.linalg.norm(difference)


@job
def little_memory(folder: Path, run: Callable[[], list[Done]]) -> None:
    changed = jobs.fine_tuned(folder, "wan", "base", "tuned")
    good(run())
    before, after = (jobs.tensors(folder / f"{n}.safetensors") for n in ("base", "tuned"))
    found = deltas(folder / "extracted.safetensors")
    key = next(key for key in changed if key.endswith("blocks.0.self_attn.q.weight"))
    difference, name = after[key] - before[key], "blocks_0_attn1_to_q"
    assert np.linalg.norm(found[name] - difference) < 0.01 * np.linalg.norm(difference)
    # as much memory as it likes gives the same bytes
    files = folder / "base.safetensors", folder / "tuned.safetensors"
    free = adaptkit("extract", *files, "--rank", "4", "-o", folder / "free.safetensors")
    assert free.returncode == 0
    assert jobs.raw(folder / "extracted.safetensors") == jobs.raw(folder / "free.safetensors")
