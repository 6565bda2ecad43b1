"""convert on the command line: its report, its refusals, and what inspect says of hosts and traps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.test_cli import adaptkit, refused

KEY = "lora_unet_mid_block_attentions_0_proj_in"


class TestConvert:
    def test_the_report_has_the_contracts_fields(self, tiny: Path, tmp_path: Path) -> None:
        done = adaptkit(
            "convert",
            tiny / "lora-kohya.safetensors",
            "--to",
            "comfy",
            "-o",
            tmp_path / "a.safetensors",
            "--json",
        )
        assert done.returncode == 0, done.stderr
        record = json.loads(done.stdout)
        fields = "adaptkit command output bytes modules parameters relative_error unused seconds details from to changes"
        assert set(fields.split()) <= record.keys()
        assert (record["command"], record["from"], record["to"]) == ("convert", "kohya", "comfy")
        assert (record["modules"], record["relative_error"], record["unused"]) == (104, 0.0, [])
        assert record["bytes"] == (tmp_path / "a.safetensors").stat().st_size
        assert {"module", "algorithm", "rank", "relative_error"} <= record["details"][0].keys()

    def test_the_default_name_says_what_was_done(self, tiny: Path, tmp_path: Path) -> None:
        source = tmp_path / "mein stil.safetensors"
        source.write_bytes((tiny / "lora-kohya.safetensors").read_bytes())
        done = adaptkit("convert", source.name, "--to", "diffusers", cwd=tmp_path)
        assert done.stdout == "mein stil-diffusers.safetensors\n"
        assert "kohya → diffusers" in done.stderr
        again = adaptkit("convert", source.name, "--to", "diffusers", cwd=tmp_path)
        refused(again, "already exists", "--overwrite")
        made = adaptkit("convert", source.name, "--to", "peft", "--only", "unet", cwd=tmp_path)
        assert made.stdout == "mein stil-peft\n"
        assert (tmp_path / "mein stil-peft" / "adapter_config.json").is_file()

    def test_equal_inputs_give_equal_bytes(self, tiny: Path, tmp_path: Path) -> None:
        for name in ("a", "b"):
            adaptkit(
                "convert",
                tiny / "lora-kohya.safetensors",
                "--to",
                "diffusers",
                "-o",
                tmp_path / f"{name}.safetensors",
            )
        assert (tmp_path / "a.safetensors").read_bytes() == (
            tmp_path / "b.safetensors"
        ).read_bytes()

    def test_a_dry_run_writes_nothing(self, tiny: Path, tmp_path: Path) -> None:
        output = tmp_path / "a.safetensors"
        done = adaptkit(
            "convert",
            tiny / "lora-kohya.safetensors",
            "--for",
            "diffusers",
            "-o",
            output,
            "--dry-run",
            "--json",
        )
        plan = json.loads(done.stdout)
        assert plan["dry_run"] is True
        assert (plan["modules"], plan["folded"]) == (104, 104)
        assert plan["peak_memory"] > 0
        assert not list(tmp_path.iterdir())
        assert (
            "would write"
            in adaptkit(
                "convert", tiny / "lora-kohya.safetensors", "--to", "comfy", "-v", "--dry-run"
            ).stdout
        )

    def test_wrong_usage(self, tiny: Path) -> None:
        source = tiny / "lora-kohya.safetensors"
        refused(adaptkit("convert", source), "--to FORMAT or --for HOST", code=2)
        refused(
            adaptkit("convert", source, "--to", "comfy", "--for", "comfyui"),
            "exclude each other",
            code=2,
        )
        refused(adaptkit("convert", source, "--for", "a1112"), "Did you mean a1111?", code=2)
        refused(adaptkit("convert", source, "--to", "komfy"), "unknown format 'komfy'", "comfy")

    def test_refusals_name_the_file_and_what_would_work(self, tiny: Path, tmp_path: Path) -> None:
        lokr = tiny / "lokr-kohya.safetensors"
        refused(
            adaptkit("convert", lokr, "--for", "diffusers", "-o", tmp_path / "a.safetensors"),
            lokr.name,
            "lokr",
            "--algo lora",
        )
        tensors = load_file(tiny / "lora-kohya.safetensors") | {
            "lora_unet_mid_block_atentions_0_proj_in.alpha": torch.ones(())
        }
        save_file(tensors, tmp_path / "b.safetensors")
        done = adaptkit("convert", tmp_path / "b.safetensors", "--to", "comfy")
        refused(
            done,
            "lora_unet_mid_block_atentions_0_proj_in.alpha",
            f"nearest known name is {KEY}.alpha",
            "--allow-unused",
        )
        save_file({"something": torch.ones(2)}, tmp_path / "c.safetensors")
        refused(
            adaptkit("convert", tmp_path / "c.safetensors", "--to", "comfy"),
            "c.safetensors",
            "no known family",
        )
        (tmp_path / "d.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{broken")
        refused(adaptkit("convert", tmp_path / "d.safetensors", "--to", "comfy"), "d.safetensors")
        assert not list(tmp_path.glob("*-comfy*"))


class TestInspect:
    def test_hosts_and_reasons(self, tiny: Path) -> None:
        (record,) = json.loads(
            adaptkit("inspect", tiny / "lokr-kohya.safetensors", "--json").stdout
        )["files"]
        assert record["loads_in"] == {
            "a1111": True,
            "comfyui": True,
            "diffusers": False,
            "forge": True,
            "invokeai": False,  # no cross-attention tells it which Stable Diffusion this is
            "kohya": False,  # sd-scripts has no LoKr of its own
            "mflux": False,
            "sdcpp": False,  # the convolutions
            "sdnext": True,
            "wan2gp": False,
        }
        assert record["measured_with"].keys() == record["loads_in"].keys()
        assert "lokr" in record["why"]["diffusers"]
        shown = adaptkit("inspect", tiny / "lokr-kohya.safetensors").stdout
        assert "a1111, comfyui, forge, sdnext: yes" in shown
        assert "diffusers: no – 25 modules are lokr" in shown

    def test_stats_find_zeros_and_nan(self, tiny: Path, tmp_path: Path) -> None:
        tensors = load_file(tiny / "lora-kohya.safetensors")
        tensors[f"{KEY}.lora_up.weight"] = torch.zeros_like(tensors[f"{KEY}.lora_up.weight"])
        other = KEY.replace("proj_in", "proj_out")
        if f"{other}.lora_up.weight" not in tensors:
            other = next(key.partition(".")[0] for key in tensors if key.startswith("lora_te_"))
        tensors[f"{other}.lora_down.weight"][0, 0] = torch.nan
        save_file(tensors, tmp_path / "a.safetensors")
        (plain,) = json.loads(adaptkit("inspect", tmp_path / "a.safetensors", "--json").stdout)[
            "files"
        ]
        assert plain["problems"] == []
        (record,) = json.loads(
            adaptkit("inspect", tmp_path / "a.safetensors", "--stats", "--json", "--modules").stdout
        )["files"]
        found = {problem["severity"]: problem["what"] for problem in record["problems"]}
        assert "has no effect" in found["warning"]
        assert f"{other}.lora_down.weight holds NaN" in found["error"]
        assert record["norm"] > 0
        assert sum(module["norm"] is None for module in record["module_list"]) == 1

    @pytest.mark.parametrize(
        ("alpha", "words"),
        [(0.0, "disables them"), (-1.0, "inverts them"), (64.0, "times the rank")],
    )
    def test_traps(self, tiny: Path, tmp_path: Path, alpha: float, words: str) -> None:
        tensors = load_file(tiny / "lora-kohya.safetensors") | {f"{KEY}.alpha": torch.tensor(alpha)}
        save_file(tensors, tmp_path / "a.safetensors")
        (record,) = json.loads(adaptkit("inspect", tmp_path / "a.safetensors", "--json").stdout)[
            "files"
        ]
        (problem,) = record["problems"]
        assert problem["severity"] == "warning"
        assert words in problem["what"]

    def test_a_missing_alpha_is_warned_of(self, tiny: Path, tmp_path: Path) -> None:
        tensors = {
            key: t
            for key, t in load_file(tiny / "lora-kohya.safetensors").items()
            if not key.endswith("alpha")
        }
        save_file(tensors, tmp_path / "a.safetensors")
        (record,) = json.loads(adaptkit("inspect", tmp_path / "a.safetensors", "--json").stdout)[
            "files"
        ]
        assert [
            "104 modules have no alpha" in problem["what"] for problem in record["problems"]
        ] == [True]

    def test_an_unknown_family_is_shown_with_its_own_names(self, tmp_path: Path) -> None:
        save_file(
            {
                f"diffusion_model.strange.{i}.lora_{s}.weight": torch.ones(4, 4)
                for i in range(3)
                for s in "AB"
            },
            tmp_path / "a.safetensors",
        )
        (record,) = json.loads(adaptkit("inspect", tmp_path / "a.safetensors", "--json").stdout)[
            "files"
        ]
        assert (record["family"], record["format"], record["algorithms"]) == (
            None,
            "comfy",
            {"lora": 3},
        )
        assert set(record["loads_in"].values()) == {None}
