"""The jobs that once went wrong without a word, each with its right answer (reports-2026-11/ease.md)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit import Adapter, Checkpoint, ops
from adaptkit.detect import families, formats
from adaptkit.errors import NoSuchName, WrongUsage
from adaptkit.hosts import complete, hosts, usual_format
from adaptkit.ops.shared import Shared
from tests.cli.test_cli import adaptkit, refused
from tests.ops.models import changed, lora_delta, matrices, save, small

LORA = "lora-kohya.safetensors"
TEXT, ALL = 24, 104  # modules of the fixture


@pytest.fixture
def lora(tmp_path: Path, tiny: Path) -> Path:
    return Path(shutil.copy(tiny / LORA, tmp_path))


# --- skip_silent: one matcher for --only, --skip and --blocks ---------------------------------


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("te", TEXT),
        ("text_encoder", TEXT),
        ("te1", TEXT),
        ("BASE", TEXT),
        ("unet", ALL - TEXT),
        ("unet.up_blocks.3", 15),
        ("up_blocks.3", 15),
        ("up.3", 15),
        ("output_blocks.9-11", 15),
        ("OUT09-OUT11", 15),
        ("OUT09", 5),
        ("*.attn2.*", 32),
    ],
)
def test_skip_and_blocks_mean_the_same_modules(lora: Path, pattern: str, left: int) -> None:
    options = ops.convert.Options(to="kohya", skip=(pattern,), output=lora.parent / "o.safetensors")
    with ops.convert.plan(lora, options) as plan:
        assert plan.left_out == (left, ALL, f"--skip {pattern}")
        assert len(plan.tasks) == ALL - left
    base = lora.parent.parent / "never"
    assert not base.exists()


def test_blocks_match_as_many(lora: Path, tiny: Path) -> None:
    for pattern, left in (("te", TEXT), ("unet.up_blocks.3", 15), ("OUT09", 5)):
        merging = ops.merge.Options(blocks=(f"{pattern}=0",), output=lora.parent / "m.safetensors")
        with ops.merge.plan(tiny / "base.safetensors", [(lora, 1.0)], merging) as plan:
            assert plan.rules[0]["modules"] == left


@pytest.mark.parametrize(
    ("verb", "option", "pattern", "near"),
    [
        ("convert", "--skip", "text_encoder_1", "did you mean text_encoder?"),
        ("convert", "--only", "unet.up_block.7", "unet.up_blocks"),
        ("resize", "--skip", "OUT9", "OUT09"),
        ("combine", "--only", "nothing.like.this", "this adapter has the blocks"),
        ("merge", "--skip", "tee", "did you mean te?"),
        ("extract", "--only", "text_encodr", "text_encoder"),
        ("compare", "--skip", "unett", "unet"),
        ("advise", "--only", "midblock", "unet.mid_block"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error_with_the_nearest(
    tiny: Path, tmp_path: Path, verb: str, option: str, pattern: str, near: str
) -> None:
    lora, base, tuned = tiny / LORA, tiny / "base.safetensors", tiny / "tuned.ckpt"
    inputs = {
        "convert": [lora, "--to", "kohya"],
        "resize": [lora, "--rank", "1"],
        "combine": [lora],
        "merge": [base, lora],
        "extract": [base, tuned],
        "advise": [base, tuned],
        "compare": [lora, lora],
    }[verb]
    output = [] if verb in ("compare", "advise") else ["-o", tmp_path / "o.safetensors"]
    refused(adaptkit(verb, *inputs, option, pattern, *output), f"'{pattern}'", near)
    assert not list(tmp_path.iterdir())


def test_the_summary_says_what_was_left_out(lora: Path) -> None:
    done = adaptkit("convert", lora, "--skip", "te")  # no --to: only the selection
    assert done.returncode == 0, done.stderr
    assert "24 of 104 left out by --skip te" in done.stderr
    assert "kohya keys" in done.stderr
    assert "80 unchanged" in done.stderr
    output = lora.with_name("lora-kohya-selected.safetensors")
    assert done.stdout.strip() == str(output)
    before = load_file(lora)
    after = load_file(output)
    assert all(torch.equal(before[key], tensor) for key, tensor in after.items())
    assert before.keys() - after.keys() == {key for key in before if key.startswith("lora_te_")}
    planned = adaptkit("convert", lora, "--skip", "te", "--to", "comfy", "--dry-run", "--json")
    assert json.loads(planned.stdout)["selection"] == {"left_out": 24, "of": 104, "by": "--skip te"}


def test_a_part_that_the_file_has_not_may_be_skipped(lora: Path) -> None:
    assert (
        adaptkit(
            "convert", lora, "--only", "unet", "-o", "u.safetensors", cwd=lora.parent
        ).returncode
        == 0
    )
    done = adaptkit(
        "convert", "u.safetensors", "--skip", "te", "-o", "v.safetensors", cwd=lora.parent
    )
    assert "0 of 80 left out by --skip te" in done.stderr
    refused(adaptkit("convert", "u.safetensors", "--only", "te", cwd=lora.parent), "'te'")


# --- api_repr_skip -----------------------------------------------------------------------------


def test_options_take_what_people_write() -> None:
    found = Shared(skip="text_encoder", only=["unet", "te"], output="x", memory="1.5GB")  # type: ignore[arg-type]
    assert (found.skip, found.only) == (("text_encoder",), ("unet", "te"))
    assert (found.output, found.memory) == (Path("x"), 1_500_000_000)
    device = Shared(device=torch.device("cpu"))  # type: ignore[arg-type]
    assert device.device == "cpu"
    assert ops.resize.Options(size="48KB").size == 48_000  # type: ignore[arg-type]
    assert ops.advise.Options(memory="1GB", skip="te").skip == ("te",)  # type: ignore[arg-type]
    with pytest.raises(WrongUsage, match="48 parsecs"):
        ops.resize.Options(size="48 parsecs")  # type: ignore[arg-type]


def test_paths_may_be_text(lora: Path, tiny: Path) -> None:
    path, base, tuned = str(lora), str(tiny / "base.safetensors"), str(tiny / "tuned.ckpt")
    output = str(lora.parent / "o.safetensors")
    assert ops.inspect.run(path).record["modules"] == ALL
    plans = (
        ops.convert.plan(path, ops.convert.Options(to="comfy", skip="te", output=output)),  # type: ignore[arg-type]
        ops.resize.plan(path, ops.resize.Options(size="48KB", output=output)),  # type: ignore[arg-type]
        ops.combine.plan([(path, 1.0)], ops.combine.Options(output=output)),  # type: ignore[arg-type]
        ops.merge.plan(base, [(path, 1.0)], ops.merge.Options(output=output)),  # type: ignore[arg-type]
        ops.extract.plan(base, tuned, ops.extract.Options(output=output)),  # type: ignore[arg-type]
        ops.advise.plan(base, tuned, ops.advise.Options()),
        ops.compare.plan(path, (path, 0.5), ops.compare.Options()),
    )
    for plan in plans:
        with plan:
            assert len(repr(plan)) < 1000
            assert "\n" not in repr(plan)
    assert len(plans[0].tasks) == ALL - TEXT


def test_reprs_are_short(lora: Path, tiny: Path) -> None:
    with Adapter.open(lora) as adapter, Checkpoint.open(tiny / "base.safetensors") as checkpoint:
        assert repr(adapter) == f"Adapter({str(lora)!r}: sd1, kohya keys, modules: lora 104)"
        assert "sd1" in repr(checkpoint)
        assert len(repr(checkpoint)) < 300
    options = ops.convert.Options(to="comfy", output=lora.parent / "o.safetensors")
    report = ops.convert.run(ops.convert.plan(lora, options))
    assert len(repr(report)) < 1000
    assert "relative_error=0.0" in repr(report)
    assert "104 modules" in repr(ops.inspect.run(lora))
    assert "no such file" in repr(ops.inspect.run("nowhere.safetensors"))


# --- zimage_extract: writers say who loads the file, and write what most hosts load ------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("z-image")
    base = small("z-image", torch.float16, by=64)
    tuned, _ = changed(base, matrices(base, "attention", "feed_forward"), lora_delta(2))
    return save(folder / "b.safetensors", base), save(folder / "t.safetensors", tuned)


def test_extract_writes_what_most_hosts_load_and_says_so(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    output = tmp_path / "x.safetensors"
    done = adaptkit("extract", *pair, "--rank", "2", "-o", output, "--json")
    report = json.loads(done.stdout)
    assert report["format"] == usual_format("z-image") == "diffusers"
    seen = ops.inspect.run(output).record
    assert report["loads_in"] == seen["loads_in"]
    assert report["why"] == seen["why"]
    assert report["loads_in"]["comfyui"] is True
    done = adaptkit("extract", *pair, "--rank", "2", "--to", "kohya", "-o", output, "--overwrite")
    assert "loads in" in done.stderr
    assert "not comfyui – " in done.stderr
    done = adaptkit("extract", *pair, "--rank", "2", "--for", "kohya", "-o", output, "--overwrite")
    assert "loads in  diffusers, kohya" in done.stderr
    refused(adaptkit("extract", *pair, "--to", "kohya", "--for", "comfyui"), "exclude", code=2)


def test_the_usual_format_is_loaded_by_no_fewer_hosts_than_any_other() -> None:
    loaded = {form: [complete(host, form) for host in hosts().values()] for form in formats()}
    del loaded["peft"]  # a folder, which nobody asked for
    for family in families():
        counts = {form: sum(family in one for one in found) for form, found in loaded.items()}
        assert counts[usual_format(family)] == max(counts.values()), family
    assert {usual_format(name) for name in ("sd1", "sd2", "sdxl", "sd3", "nothing known")} == {
        "kohya"
    }


@pytest.mark.parametrize("verb", ["convert", "resize", "combine"])
def test_every_writer_of_adapters_says_what_loads_its_file(lora: Path, verb: str) -> None:
    more = {"convert": ["--to", "comfy"], "resize": ["--rank", "1"], "combine": []}[verb]
    done = adaptkit(verb, lora, *more, "-o", lora.parent / "o.safetensors")
    told = [line.split() for line in done.stderr.splitlines() if "loads in" in line]
    assert [words[:2] for words in told] == [["loads", "in"]]
    assert "comfyui" in [word.rstrip(",") for word in told[0][2:]]


# --- broken_rc ---------------------------------------------------------------------------------


def test_a_broken_file_fails_inspect_and_says_what_is_missing(lora: Path) -> None:
    tensors = load_file(lora)
    gone = next(key for key in tensors if "lora_down" in key)
    save_file({k: v for k, v in tensors.items() if k != gone}, lora.parent / "missing.safetensors")
    done = adaptkit("inspect", lora.parent / "missing.safetensors", lora)
    assert done.returncode == 1
    done = adaptkit("inspect", lora.parent / "missing.safetensors")
    assert done.returncode == 1
    assert "lora_down.weight is missing" in done.stdout


def test_nan_fails_inspect_with_stats_and_is_told_by_convert(lora: Path) -> None:
    tensors = load_file(lora)
    key = next(key for key in tensors if "lora_up" in key)
    for value in (float("nan"), float("-inf")):
        tensors[key][0, 0] = value
        save_file(tensors, lora)
        assert adaptkit("inspect", lora).returncode == 0  # headers only
        assert adaptkit("inspect", lora, "--stats").returncode == 1
        output = lora.parent / "c.safetensors"
        done = adaptkit("convert", lora, "--to", "comfy", "-o", output, "--overwrite")
        assert f"1 tensor holds NaN or infinity, copied as it is: {key}" in done.stderr
    tensors[key][0, 0] = 1.0
    save_file(tensors, lora)
    done = adaptkit("convert", lora, "--to", "comfy", "-o", output, "--overwrite")
    assert "NaN" not in done.stderr


# --- nearest: see tests/test_suggest.py; header_alpha: see tests/test_meaning.py ----------------


def test_the_nearest_name_is_a_known_one(tmp_path: Path) -> None:
    stems = (
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "lora_te_text_model_encoder_layers_3_self_attn_q_proj",
    )
    tensors = {}
    for stem in stems:
        tensors |= {
            f"{stem}.lora_down.weight": torch.zeros(2, 768),
            f"{stem}.alpha": torch.tensor(2.0),
        }
        tensors |= {f"{stem}.lora_up.weight": torch.zeros(768, 2)}
    save_file(tensors, tmp_path / "n.safetensors")
    done = adaptkit("convert", tmp_path / "n.safetensors", "--to", "comfy", "--family", "sdxl")
    refused(done, "lora_te1_text_model_encoder_layers_3_self_attn_q_proj")


# --- peft_alpha, peft_name ----------------------------------------------------------------------


def test_the_weights_file_of_a_peft_folder_keeps_its_alpha(lora: Path) -> None:
    folder = lora.parent / "peftdir"
    assert adaptkit("convert", lora, "--to", "peft", "--only", "unet", "-o", folder).returncode == 0
    for path in (folder, folder / "adapter_model.safetensors"):
        assert ops.inspect.run(path).record["scales"] == {"0.5": 80}
        output = lora.parent / f"{path.name}.f"
        assert adaptkit("convert", path, "--for", "comfyui", "-o", output).returncode == 0
        assert ops.inspect.run(output).record["scales"] == {"0.5": 80}


@pytest.mark.parametrize("verb", ["resize", "convert", "extract"])
def test_a_peft_folder_is_not_named_like_a_file(tiny: Path, tmp_path: Path, verb: str) -> None:
    output = tmp_path / "small.safetensors"
    given = {
        "resize": [tiny / "lora-peft.safetensors", "--rank", "1"],
        "convert": [tiny / LORA, "--to", "peft", "--only", "unet"],
        "extract": [
            tiny / "base.safetensors",
            tiny / "tuned.ckpt",
            "--to",
            "peft",
            "--only",
            "unet",
        ],
    }[verb]
    refused(adaptkit(verb, *given, "-o", output), "written as a folder", "-o small")
    assert not output.exists()


def test_a_name_that_is_no_pattern_is_refused_in_python(lora: Path) -> None:
    options = ops.convert.Options(to="comfy", only=("t",), output=lora.parent / "o.safetensors")
    with pytest.raises(NoSuchName, match="matches no module of this adapter"):
        ops.convert.plan(lora, options)


# --- poor and odd results are said --------------------------------------------------------------


def test_poor_and_odd_results_are_said_in_one_line(lora: Path, tiny: Path) -> None:
    base, output = tiny / "base.safetensors", lora.parent / "o.safetensors"

    def notes(*arguments: object) -> list[str]:
        done = adaptkit(*arguments, "-o", output, "--overwrite")
        assert done.returncode == 0, done.stderr
        return [line for line in done.stderr.splitlines() if line.startswith("note:")]

    assert any("relative error 0.85" in note for note in notes("convert", lora, "--algo", "lokr"))
    assert any("keeps more" in note for note in notes("resize", lora, "--rank", "1"))
    assert notes("convert", lora, "--to", "comfy") == []
    assert any("‖ΔW‖/‖W‖ is 2.8" in note for note in notes("merge", base, f"{lora}:80"))
    assert any("nothing changed" in note for note in notes("merge", base, f"{lora}:0"))
    assert notes("merge", base, lora) == []
    found = notes("extract", base, tiny / "tuned.ckpt", "--rank", "1")
    assert any("adaptkit advise" in note for note in found)
