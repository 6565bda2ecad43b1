"""What no file of `files` shows of mflux and stable-diffusion.cpp: ranks, and parts of fused layers that are missing.

The verdicts are checked always; beside the loaders, where these are on this machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from adaptkit.adapter import Adapter
from adaptkit.hosts import judge
from tests.interop.hosts import mflux, sdcpp, verdicts
from tests.interop.hosts.files import FORMS, File, Form, Part, make

pytest.importorskip("diffusers")
pytest.importorskip("peft")


def ranked(form: str, rank: int, alpha: float | None = 0.5) -> Form:
    """A form of factors in another rank than 2."""
    plain = FORMS[form]
    return replace(
        plain,
        name=f"{form}, rank {rank}",
        alpha=alpha,
        tensors=lambda shape: {
            key: tuple(rank if number == 2 else number for number in size)
            for key, size in plain.tensors(shape).items()
        },
    )


def chosen(family: str, format: str, naming: str, form: Form, keep: Callable[[Part], bool]) -> File:
    spelling = "lora_B" if form.peft else "lora_up, alpha"
    file = make(family, format, naming, spelling, "layers", 2)
    assert file is not None
    return replace(file, form=form, parts=tuple(filter(keep, file.parts)))


def every(part: Part) -> bool:
    return True


def without(*names: str) -> Callable[[Part], bool]:
    return lambda part: not part.stem.endswith(names)


KOHYA, PEFT = "lora_up, alpha", "lora_B"
CASES = [
    # host, file, how many modules are lost, what of the reason
    ("mflux", ("flux", "kohya", "native", ranked(KOHYA, 2), every), 0, ""),
    ("mflux", ("flux", "kohya", "native", ranked(KOHYA, 9), every), "all", "that 3 divides"),
    ("mflux", ("flux", "kohya", "native", ranked(KOHYA, 16), every), "all", "that 4 divides"),
    ("mflux", ("flux", "kohya", "native", ranked(KOHYA, 16), without("linear1")), 0, ""),
    ("mflux", ("flux", "diffusers", "diffusers", ranked(PEFT, 12, None), every), 0, ""),
    ("mflux", ("flux2", "comfy", "native", ranked(PEFT, 6, None), every), "all", "that 3 divides"),
    ("sdcpp", ("flux", "comfy", "native", ranked(KOHYA, 1), every), "all", "rank 1"),
    ("sdcpp", ("flux", "comfy", "native", ranked(KOHYA, 1, None), every), 0, ""),
    ("sdcpp", ("qwen-image", "comfy", "diffusers", ranked("loha", 1), every), "all", "rank 1"),
    ("sdcpp", ("flux", "comfy", "diffusers", FORMS[PEFT], every), 0, ""),
    ("sdcpp", ("flux", "comfy", "diffusers", FORMS[PEFT], without("to_v", "proj_mlp")), 0, ""),
    ("sdcpp", ("flux", "comfy", "diffusers", FORMS[PEFT], without("blocks.0.attn.to_k")), 3, "first"),
    ("sdcpp", ("flux", "comfy", "diffusers", FORMS[PEFT], without("blocks.1.attn.to_q")), 5, "first"),
    ("sdcpp", ("flux", "comfy", "diffusers", FORMS["full"], without("blocks.1.attn.to_q")), 5, "first"),
    ("sdcpp", ("z-image", "comfy", "diffusers", FORMS[PEFT], without("layers.0.attention.to_q")), 2, "first"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(CASES)))
def test_ranks_and_missing_parts(number: int, tmp_path: Path) -> None:
    host, parts, lost, why = CASES[number]
    file = chosen(*parts)
    if parts[0] == "z-image":
        file = replace(file, parts=tuple(p for p in file.parts if "siglip" not in p.stem))
    with Adapter.open(file.write(tmp_path / "a.safetensors"), family=file.family) as adapter:
        verdict = judge(adapter)[host]
    assert verdict.loads is (lost == 0), verdict
    assert why in verdict.why
    if isinstance(lost, int) and lost:
        assert verdict.why.startswith(f"{lost} of {len(file.parts)} modules"), verdict
    if (mflux if host == "mflux" else sdcpp).available():
        found = verdicts.cell(host, file, tmp_path)
        assert found is not None
        assert found.agrees, str(found)
        assert len(found.lost) == (len(file.parts) if lost == "all" else lost)


@pytest.mark.parametrize("host", ["mflux", "sdcpp"])
def test_alpha_in_metadata_is_not_read(host: str, tmp_path: Path) -> None:
    """Neither loader asks for metadata: such a file is to both what it is without them."""
    told = '{"transformer.r": 2, "transformer.lora_alpha": 1}'
    file = chosen("flux", "diffusers", "diffusers", FORMS[PEFT], every)
    file = replace(file, metadata={"lora_adapter_metadata": told})
    with Adapter.open(file.write(tmp_path / "a.safetensors"), family="flux") as adapter:
        verdict = judge(adapter)[host]
    assert verdict.loads is False
    assert "metadata" in verdict.why
