"""What hosts load: against the measured coverage of real key lists, and consistent with what is written for them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit.adapter import Adapter
from adaptkit.detect import families, formats
from adaptkit.errors import NoSuchName, NotRepresentable
from adaptkit.hosts import hosts, judge, recipe
from adaptkit.ops import convert
from tests.ops.test_convert import lora
from tests.synth import corpus_listing, write_header_only

YES, NO = True, False
# list -> (ComfyUI, diffusers, InvokeAI): all of it, none of it (NO), how many modules are lost, or None: not measured.
# From ../shared/reference: loader_coverage_*.log and formats.md §8.
MEASURED: dict[str, tuple[bool | int | None, ...]] = {
    "gen__aitoolkit_z_image_allmodules": (YES, YES, YES),
    "gen__comfynative_anima_allmodules": (YES, YES, YES),
    "gen__comfynative_flux1_dev_allmodules": (YES, NO, YES),
    "gen__comfynative_flux2_klein_4b_allmodules": (YES, 1, 1),
    "gen__comfynative_hunyuan_video_allmodules": (8, 1, NO),
    "gen__comfynative_krea2_allmodules": (YES, YES, YES),
    "gen__comfynative_sd3_medium_allmodules": (YES, NO, NO),
    "gen__comfynative_sdxl_unet_allmodules": (YES, NO, NO),
    "gen__comfynative_z_image_allmodules": (YES, 71, 71),
    "gen__diffusers_peft_anima_allmodules": (NO, YES, NO),
    "gen__diffusers_peft_flux1_dev_allmodules": (YES, YES, 1),
    "gen__diffusers_peft_flux2_dev_allmodules": (7, YES, YES),
    "gen__diffusers_peft_flux2_klein_4b_allmodules": (5, YES, YES),
    "gen__diffusers_peft_hunyuan_video_allmodules": (NO, YES, NO),
    "gen__diffusers_peft_hunyuan_video_15_allmodules": (NO, NO, NO),
    "gen__diffusers_peft_ideogram4_allmodules": (NO, YES, NO),
    "gen__diffusers_peft_krea2_allmodules": (NO, YES, YES),
    "gen__diffusers_peft_lumina2_allmodules": (NO, YES, NO),
    "gen__diffusers_peft_qwen_image_allmodules": (YES, YES, YES),
    "gen__diffusers_peft_sd3_medium_allmodules": (YES, YES, NO),
    "gen__diffusers_peft_sdxl_transformers5_te": (560, YES, NO),
    "gen__diffusers_peft_wan21_t2v_14b_allmodules": (NO, YES, 7),
    "gen__diffusers_peft_z_image_allmodules": (YES, YES, YES),
    "gen__kohya_flux1_lora": (YES, YES, YES),
    "gen__kohya_flux_oft": (NO, NO, NO),
    "gen__kohya_hunyuan_image_lora": (160, NO, NO),
    "gen__kohya_lumina2_lora": (182, NO, NO),
    "gen__kohya_sd15_lora": (YES, YES, YES),
    "gen__kohya_sd3_lora": (YES, NO, NO),
    "gen__kohya_sdxl_lora": (YES, YES, YES),
    "gen__lycoris_wrapper_sdxl_locon": (YES, NO, NO),
    "gen__musubi_flux2_klein_4b_lora": (YES, YES, YES),
    "gen__musubi_flux2_klein_4b_lokr": (YES, YES, 30),
    "gen__musubi_hunyuan_video_lora": (80, NO, NO),
    "gen__musubi_hv15_lora": (648, NO, NO),
    "gen__musubi_ideogram4_lora": (YES, NO, NO),
    "gen__musubi_krea2_lora": (YES, NO, YES),
    "gen__musubi_qwen_image_lora": (YES, YES, YES),
    "gen__musubi_qwen_image_lokr_full": (YES, NO, YES),
    "gen__musubi_wan21_i2v_14b_lora": (YES, None, 80),
    "gen__musubi_wan21_t2v_1.3b_loha": (YES, NO, YES),
    "gen__musubi_z_image_lora": (120, NO, NO),
    "invokeai__flux_dora_onetrainer_format": (YES, NO, YES),
    "invokeai__flux_lora_aitoolkit_format": (YES, NO, YES),
    "invokeai__flux_lora_diffusers_base_model_format": (NO, NO, YES),
    "invokeai__flux_lora_diffusers_format": (YES, YES, YES),
}


@pytest.mark.parametrize("name", MEASURED)
def test_verdicts_are_the_measured_ones(name: str, corpus: Path, tmp_path: Path) -> None:
    listing = corpus_listing(corpus / "adapters" / f"{name}.json")
    with Adapter.open(write_header_only(tmp_path / "a.safetensors", listing)) as adapter:
        found = judge(adapter)
    for host, measured in zip(("comfyui", "diffusers", "invokeai"), MEASURED[name], strict=True):
        verdict = found[host]
        assert verdict.loads == (measured if measured is None else measured is True), (host, verdict)
        assert bool(verdict.why) == (measured is not True)
        if measured is not True and isinstance(measured, int) and measured:
            assert re.match(rf"{measured} of \d+ modules", verdict.why), (host, verdict)


CASES = [(host, family) for host in hosts() for family in families()]


@pytest.mark.parametrize(("host", "family"), CASES)
def test_what_is_written_for_a_host_loads_there(host: str, family: str, tmp_path: Path) -> None:
    """Every family either loads in what `--for` writes, or is refused; what stays behind is warned of."""
    source = lora(family, "diffusers", tmp_path / "a.safetensors")
    output = tmp_path / "b.safetensors"
    options = convert.Options(host=host, family=family, allow_unused=True, output=output)
    if family in hosts()[host].unsupported or not hosts()[host].writes.get(family, hosts()[host].writes.get("")):
        with pytest.raises(NotRepresentable) as caught:
            convert.plan(source, options)
        assert caught.value.hint
        return
    plan = convert.plan(source, options)
    convert.run(plan)
    plan.close()
    with Adapter.open(output, family=family, format=plan.keys.format.name) as adapter:
        verdict = judge(adapter)[host]
    assert verdict.loads is not False or plan.notes, verdict
    if verdict.loads is False:
        assert "modules" in plan.notes[0]


def test_the_tables_name_what_exists() -> None:
    for host in hosts().values():
        known = {family for cell in host.cells for family in cell.families} | set(host.unsupported)
        assert known <= families().keys()
        assert {cell.format for cell in host.cells} <= formats().keys()
        assert set(host.writes.values()) <= formats().keys()
        for cell in host.cells:
            assert not cell.lost or cell.note
            assert all(re.compile(pattern) for pattern in cell.lost)


def test_refusals(tmp_path: Path) -> None:
    with Adapter.open(lora("sd1", "kohya", tmp_path / "a.safetensors"), family="sd1") as adapter:
        with pytest.raises(NoSuchName, match="unknown host 'comfy'"):
            recipe("comfy", adapter)
        assert recipe("comfyui", adapter).format == "kohya"
        assert recipe("diffusers", adapter).format == "diffusers"
        with pytest.raises(NotRepresentable, match="loads no loha"):
            recipe("diffusers", adapter, "loha")


def test_one_alpha_for_all_attention(tmp_path: Path) -> None:
    """diffusers applies one alpha to the attention layers of kohya files with several (measured: x0.5 and x2)."""
    source = lora("sd1", "kohya", tmp_path / "a.safetensors")
    with Adapter.open(source, family="sd1") as adapter:
        assert judge(adapter)["diffusers"].loads is True
    tensors = load_file(source)
    first = next(key for key in tensors if key.endswith("alpha"))
    save_file(tensors | {first: torch.tensor(1.5)}, source)
    with Adapter.open(source, family="sd1") as adapter:
        assert judge(adapter)["diffusers"].loads is False
        assert "one alpha" in judge(adapter)["diffusers"].why
        assert judge(adapter)["comfyui"].loads is True


def test_alpha_in_metadata_is_lost_on_most(tmp_path: Path) -> None:
    source = lora("flux", "diffusers", tmp_path / "a.safetensors")
    told = '{"transformer.r": 3, "transformer.lora_alpha": 6}'
    save_file(load_file(source), source, {"lora_adapter_metadata": told})
    with Adapter.open(source, family="flux") as adapter:
        found = judge(adapter)
    assert found["diffusers"].loads is True
    assert "metadata" in found["comfyui"].why


def test_dora_axes(tmp_path: Path) -> None:
    """ComfyUI and InvokeAI are right on the input axis only (failures F11)."""
    source = lora("sd1", "kohya", tmp_path / "a.safetensors")
    tensors = load_file(source)
    stems = {key.partition(".")[0] for key in tensors}
    for shape, loads in (((8, 1), False), ((1, 6), True)):
        scales = {f"{stem}.dora_scale": torch.ones(shape) for stem in stems}
        save_file(tensors | scales, tmp_path / "b.safetensors")
        with Adapter.open(tmp_path / "b.safetensors", family="sd1") as adapter:
            assert judge(adapter)["comfyui"].loads is loads
            assert judge(adapter)["invokeai"].loads is loads
