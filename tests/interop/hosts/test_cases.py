"""Single files that a verdict was wrong about, each named after what is lost of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from adaptkit.adapter import Adapter
from adaptkit.detect import families
from adaptkit.families.contract import Kind
from adaptkit.hosts import hosts, judge
from adaptkit.hosts.contract import Verdict
from adaptkit.names import Target
from tests.interop.hosts import wan2gp
from tests.interop.hosts.files import make
from tests.interop.hosts.sources import ABSENT
from tests.synth import expand, fill, write_header_only


def verdicts(listing: Mapping[str, tuple[str, tuple[int, ...]]], path: Path) -> dict[str, Verdict]:
    with Adapter.open(write_header_only(path / "a.safetensors", dict(listing))) as adapter:
        return judge(adapter)


def test_a_key_that_adaptkit_does_not_know_says_nothing_about_hosts(tmp_path: Path) -> None:
    file = make("qwen-image", "diffusers", "diffusers", "lora_B", "layers", 2)
    assert file is not None
    known = verdicts(file.listing, tmp_path)
    assert known["diffusers"].loads is True
    strange = {f"transformer.transformer_blocks.0.attn.to_gate.lora_{f}.weight": ("F32", (2, 2)) for f in "AB"}  # fmt: skip
    found = verdicts({**file.listing, **strange}, tmp_path)
    assert found["diffusers"].loads is None
    assert "to_gate" in found["diffusers"].why
    # what is lost for certain stays lost
    assert found["kohya"].loads is False


@pytest.mark.parametrize(
    ("prefix", "host"), [("kohya", "comfyui"), ("comfy", "comfyui"), ("kohya", "diffusers")]
)
def test_kohya_or_comfyui_prefixes_before_diffusers_names(
    prefix: str, host: str, tmp_path: Path
) -> None:
    file = make("flux", prefix, "diffusers", "lora_up, alpha", "layers", 1)
    assert file is not None
    assert verdicts(file.listing, tmp_path)[host].loads is False


def test_comfyui_misreads_a_lokr_of_three_dimensions(tmp_path: Path) -> None:
    for form in ("lokr, conv", "tucker", "loha, tucker"):
        file = make("wan", "comfy", "native", form, "denoiser", 1)
        assert file is not None
        assert verdicts(file.listing, tmp_path)["comfyui"].loads is False, form
    file = make("wan", "comfy", "native", "lokr, factored", "image", 1)
    assert file is not None
    assert verdicts(file.listing, tmp_path)["comfyui"].loads is True


def test_two_spellings_of_the_factors_in_one_file(tmp_path: Path) -> None:
    one = make("sdxl", "diffusers", "diffusers", "lora_B", "denoiser", 1)
    two = make("sdxl", "diffusers", "diffusers", "lora.up", "attention", 1)
    assert one is not None
    assert two is not None
    attention = {part.stem for part in two.parts}
    kept = {k: v for k, v in one.listing.items() if k.rpartition(".lora_")[0] not in attention}
    found = verdicts({**kept, **two.listing}, tmp_path)["diffusers"]
    assert found.loads is False
    assert f"{len(attention)} of" in found.why


@pytest.mark.parametrize("form", ["glora", "ia3", "dora_scale [1, in]"])
def test_kohya_s_tools_have_no_such_algorithm(form: str, tmp_path: Path) -> None:
    file = make("wan", "kohya", "native", form, "layers", 1)
    assert file is not None
    assert verdicts(file.listing, tmp_path)["kohya"].loads is False


def test_invokeai_keeps_the_image_attention_of_wan(tmp_path: Path) -> None:
    file = make("wan", "diffusers", "diffusers", "lora_B", "layers", 1)
    assert file is not None
    # layers that other kinds of Wan have
    other = ("vace", "transformer_2", "face_", "motion_", "pose_", "audio", "cam_", "projector")
    other += ("control_adapter", "frame_packer")
    kept = {k: v for k, v in file.listing.items() if not any(word in k for word in other)}
    assert any("add_k_proj" in key for key in kept)
    assert verdicts(kept, tmp_path)["invokeai"].loads is True


def test_invokeai_does_not_recognise_a_factored_lokr_of_sd1(tmp_path: Path) -> None:
    for form, loads in (("lokr", True), ("lokr, factored", False)):
        file = make("sd1", "kohya", "diffusers", form, "attention")
        assert file is not None
        assert verdicts(file.listing, tmp_path)["invokeai"].loads is loads


def test_invokeai_does_not_recognise_bare_z_image(tmp_path: Path) -> None:
    file = make("z-image", "bare", "diffusers", "lora_B", "layers", 2)
    assert file is not None
    assert verdicts(file.listing, tmp_path)["invokeai"].loads is False


def test_hunyuan_video_as_diffusion_pipe_names_it(tmp_path: Path) -> None:
    file = make("hunyuan-video", "diffusers", "native", "lora_B", "layers", 2)
    assert file is not None
    assert verdicts(file.listing, tmp_path)["comfyui"].loads is True


def test_forge_loads_nothing_of_a_file_with_thirteen_strange_keys(tmp_path: Path) -> None:
    known = make("flux", "kohya", "native", "lora_up, alpha", "layers", 2)
    # kohya's prefix before diffusers' names, three keys each
    strange = make("flux", "kohya", "diffusers", "lora_up, alpha", "layers", 2)
    assert known is not None
    assert strange is not None
    single = {key: value for key, value in known.listing.items() if "single" in key}
    double = [item for item in strange.listing.items() if "single" not in item[0]]
    for modules, told in ((0, ""), (1, "1 of 5 modules are dropped"), (4, "4 of 8"), (5, "more than 12 keys")):  # fmt: skip
        found = verdicts({**single, **dict(double[: 3 * modules])}, tmp_path)["forge"]
        assert found.loads is (not modules)
        assert told in found.why


def test_a1111_needs_all_projections_of_an_attention(tmp_path: Path) -> None:
    file = make("sdxl", "kohya", "diffusers", "lora_up, alpha", "everything", 1)
    assert file is not None
    # those that it does not know
    text = {
        key: value
        for key, value in file.listing.items()
        if not any(
            name in key
            for name in ("text_projection", "add_embedding", "up_blocks_0_upsamplers", "hid_proj")
        )
    }
    assert verdicts(text, tmp_path)["a1111"].loads is True
    cut = {key: value for key, value in text.items() if "lora_te2_text_model_encoder_layers_0_self_attn_q" not in key}  # fmt: skip
    assert len(cut) == len(text) - 3
    found = verdicts(cut, tmp_path)["a1111"]
    assert found.loads is False
    assert "3 of " in found.why
    assert "all four" in found.why


def test_the_layers_that_wan2gp_s_models_have_not_are_said_to_be_untried() -> None:
    if wan2gp.version() == ABSENT:
        pytest.skip("the sources of Wan2GP and mmgp are not here")
    untried, tried = hosts()["wan2gp"].untried, 0
    for family in wan2gp.MODELS:
        for part in families()[family].components:
            for row in part.rows if part.name == "transformer" else ():
                if row.kind is not Kind.MATRIX:
                    continue
                target = Target(part.name, fill(row.target, next(iter(expand(row)))))
                told = re.search(untried.get(family, "$^"), str(target)) is not None
                assert told is not wan2gp.has(family, target), target
                tried += told
    assert tried > 60
