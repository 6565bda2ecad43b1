from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from adaptkit.errors import NotRepresentable
from adaptkit.ops import extract
from tests.ops.models import changed, lora_delta, matrices, noise_delta, save, tiny_base

LAYERS = ("attn1.to_q", "attn2.to_v", "proj_in", "self_attn.q_proj")


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    base = tiny_base()
    tuned, _ = changed(base, matrices(base, *LAYERS), noise_delta())
    return save(tmp_path / "base.safetensors", base), save(tmp_path / "tuned.safetensors", tuned)


def written(
    pair: tuple[Path, Path], **options: Any
) -> tuple[extract.Report, dict[str, str], list[str]]:
    output = pair[0].with_name("out.safetensors")
    chosen = extract.Options(output=output, overwrite=True, **options)
    report = extract.run(extract.plan(*pair, chosen))
    with safe_open(output, "np") as file:
        return report, dict(file.metadata()), list(file.keys())


def modules(keys: list[str]) -> set[str]:
    return {key.partition(".")[0] for key in keys}


@pytest.mark.parametrize(
    ("options", "dim", "alpha"),
    [
        ({"rank": 4}, "4", "4"),
        ({"rank": 4, "alpha": 1.5}, "4", "1.5"),
        ({"rank": 4, "alpha": 8.0}, "4", "8"),
        ({"rank": 4, "conv_rank": 2}, "Dynamic", "Dynamic"),
    ],
)
def test_the_metadata_states_the_rank_and_alpha_that_are_stored(
    tmp_path: Path, options: dict[str, Any], dim: str, alpha: str
) -> None:
    base = tiny_base()
    names = matrices(base, "attn1.to_q", *(["in_layers.2"] if "conv_rank" in options else []))
    tuned, _ = changed(base, names, noise_delta())
    pair = save(tmp_path / "base.safetensors", base), save(tmp_path / "tuned.safetensors", tuned)
    _, metadata, keys = written(pair, **options)
    assert metadata["ss_network_dim"] == dim
    assert metadata["ss_network_alpha"] == alpha
    with safe_open(tmp_path / "out.safetensors", "np") as file:
        stored = {float(file.get_tensor(key)) for key in keys if key.endswith(".alpha")}
        ranks = {file.get_tensor(key).shape[0] for key in keys if key.endswith("down.weight")}
    if dim != "Dynamic":
        assert stored == {float(alpha)}
        assert ranks == {int(dim)}
    else:
        assert len(ranks) > 1


def test_the_modules_reported_are_those_in_the_file(pair: tuple[Path, Path]) -> None:
    report, metadata, keys = written(pair, rank=2)
    assert report.left_out == 0
    assert report.modules == len(modules(keys)) == json.loads(metadata["adaptkit"])[-1]["modules"]


def test_layers_left_out_are_not_counted_as_modules(pair: tuple[Path, Path]) -> None:
    whole, _, _ = written(pair, rank=1)
    report, metadata, keys = written(pair, size=whole.bytes * 6 // 10)
    assert report.left_out > 0
    assert report.modules == len(modules(keys)) == json.loads(metadata["adaptkit"])[-1]["modules"]
    assert report.modules + report.left_out == whole.modules
    assert report.bytes == pair[0].with_name("out.safetensors").stat().st_size


def test_a_size_is_used_and_never_exceeded(pair: tuple[Path, Path]) -> None:
    for share in (0.5, 0.75, 1.5):
        whole, _, _ = written(pair, rank=4)
        limit = int(whole.bytes * share)
        report, _, _ = written(pair, size=limit)
        assert limit * 0.9 <= report.bytes <= limit


def test_a_merged_lora_comes_back_at_its_own_rank(tmp_path: Path) -> None:
    base = tiny_base()
    tuned, _ = changed(base, matrices(base, *LAYERS), lora_delta(3))
    pair = save(tmp_path / "base.safetensors", base), save(tmp_path / "tuned.safetensors", tuned)
    report, metadata, _ = written(pair, error=1e-4)
    assert {item["rank"] for item in report.details} == {3}
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("3", "3")


def test_what_peft_cannot_hold_beside_a_lora_is_listed_before_anything_is_computed(
    tmp_path: Path,
) -> None:
    """Norms have no place there, biases only beside a LoRA; of a whole adapter of those, nothing is made."""
    base = tiny_base()
    block = "middle_block.1.transformer_blocks.0."
    norms = [key for key in base if f"{block}norm1." in key]
    biases = [key for key in base if key.endswith(f"{block}attn1.to_out.0.bias")]
    weights = matrices(base, f"{block}attn1.to_q")
    tuned, _ = changed(base, [*norms, *biases, *weights], noise_delta())
    pair = save(tmp_path / "base.safetensors", base), save(tmp_path / "tuned.safetensors", tuned)
    only = ("unet*",)
    for number, (algo, lost) in enumerate((("lora", norms), ("lokr", [*norms, *biases]))):
        options = extract.Options(
            algo=algo, rank=2, vectors=True, to="peft", only=only, output=tmp_path / str(number)
        )
        plan = extract.plan(*pair, options)
        said = [job for job in plan.jobs if "PEFT holds no norms" in job.why]
        assert not any(job.algorithm for job in said)
        report = extract.run(plan)
        assert sum("PEFT holds" in item.reason for item in report.unused) == len(lost) > 0
        assert report.relative_error > 0
    for algo in ("full", "auto"):
        rule = {"size": 10_000} if algo == "auto" else {}
        options = extract.Options(algo=algo, to="peft", output=tmp_path / algo, **rule)
        with pytest.raises(NotRepresentable, match="PEFT cannot hold full") as caught:
            extract.plan(*pair, options)
        assert "--algo lora" in (caught.value.hint or "")
