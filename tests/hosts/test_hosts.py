"""What hosts load: against the measured coverage of real key lists, and consistent with what is written for them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit.adapter import Adapter
from adaptkit.detect import families, formats
from adaptkit.errors import NoSuchName, NotRepresentable
from adaptkit.formats.contract import Alpha
from adaptkit.hosts import hosts, judge, recipe, usual_format
from adaptkit.hosts._measured import measurement
from adaptkit.hosts._pieces import pieces_as, pieces_of
from adaptkit.hosts.contract import Piece
from adaptkit.keymap import algorithms
from adaptkit.ops import convert
from tests.ops.test_convert import lora
from tests.synth import corpus_listing, write_header_only

YES, NO = True, False
# list -> (ComfyUI, diffusers, InvokeAI): all of it, none of it (NO), how many modules are lost, or None: not measured.
# From ../shared/reference: loader_coverage_*.log and formats.md §8; where newer code of a host does otherwise, from that.
MEASURED: dict[str, tuple[bool | int | None, ...]] = {
    "gen__aitoolkit_z_image_allmodules": (YES, YES, YES),
    "gen__comfynative_anima_allmodules": (YES, YES, YES),
    "gen__comfynative_flux1_dev_allmodules": (YES, NO, YES),
    "gen__comfynative_flux2_klein_4b_allmodules": (YES, 1, 1),
    "gen__comfynative_hunyuan_video_allmodules": (8, 2, NO),
    "gen__comfynative_krea2_allmodules": (YES, YES, YES),
    "gen__comfynative_sd3_medium_allmodules": (YES, NO, NO),
    "gen__comfynative_sdxl_unet_allmodules": (YES, NO, NO),
    "gen__comfynative_z_image_allmodules": (YES, 71, 71),
    "gen__comfynative_chroma1_allmodules": (YES, NO, NO),
    "gen__comfynative_lumina2_allmodules": (YES, NO, NO),
    "gen__comfynative_wan21_t2v_14b_allmodules": (YES, 1, 7),
    "gen__diffusers_peft_auraflow_allmodules": (YES, YES, NO),
    "gen__diffusers_peft_sd35_medium_allmodules": (YES, YES, NO),
    "gen__kohya_anima_lora": (YES, NO, 12),
    "gen__kohya_sd15_locon_conv3x3": (YES, YES, YES),
    "gen__kohya_sd21_lora": (YES, YES, YES),
    "gen__kohya_sdxl_oft": (NO, NO, NO),
    "gen__musubi_flux2_dev_lora": (YES, YES, YES),
    "gen__musubi_flux_kontext_lora": (YES, YES, YES),
    "gen__musubi_wan21_t2v_14b_lora": (YES, YES, YES),
    "gen__musubi_z_image_loha": (120, NO, NO),
    "gen__simpletuner_lycoris_flux1_lokr": (YES, NO, NO),
    "invokeai__anima_lora_kohya_format": (YES, NO, YES),
    "invokeai__anima_lora_peft_format": (YES, YES, YES),
    "invokeai__flux_control_lora_format": (YES, 1, YES),
    "invokeai__flux_lokr_bfl_format": (YES, NO, YES),
    "invokeai__flux_lora_kohya_format": (YES, YES, YES),
    "invokeai__flux_lora_xlabs_format": (NO, YES, YES),
    "gen__diffusers_peft_anima_allmodules": (NO, YES, NO),
    "gen__diffusers_peft_flux1_dev_allmodules": (YES, YES, 1),
    "gen__diffusers_peft_flux2_dev_allmodules": (7, YES, YES),
    "gen__diffusers_peft_flux2_klein_4b_allmodules": (5, YES, YES),
    "gen__diffusers_peft_hunyuan_video_allmodules": (NO, YES, NO),
    "gen__diffusers_peft_hunyuan_video_15_allmodules": (NO, NO, NO),
    "gen__diffusers_peft_ideogram4_allmodules": (NO, YES, NO),
    "gen__diffusers_peft_krea2_allmodules": (YES, YES, YES),
    "gen__diffusers_peft_lumina2_allmodules": (NO, YES, NO),
    "gen__diffusers_peft_qwen_image_allmodules": (YES, YES, YES),
    "gen__diffusers_peft_sd3_medium_allmodules": (YES, YES, NO),
    "gen__diffusers_peft_sdxl_transformers5_te": (633, 560, NO),
    "gen__diffusers_peft_wan21_t2v_14b_allmodules": (NO, YES, 7),
    "gen__diffusers_peft_z_image_allmodules": (YES, YES, YES),
    "gen__kohya_flux1_lora": (YES, YES, YES),
    "gen__kohya_flux_oft": (NO, NO, NO),
    "gen__kohya_hunyuan_image_lora": (160, NO, NO),
    "gen__kohya_lumina2_lora": (YES, NO, NO),
    "gen__kohya_sd15_lora": (YES, YES, YES),
    "gen__kohya_sd3_lora": (YES, NO, NO),
    "gen__kohya_sdxl_lora": (YES, YES, YES),
    "gen__lycoris_wrapper_sdxl_locon": (YES, NO, NO),
    "gen__musubi_flux2_klein_4b_lora": (YES, YES, YES),
    "gen__musubi_flux2_klein_4b_lokr": (YES, NO, NO),
    "gen__musubi_hunyuan_video_lora": (80, NO, NO),
    "gen__musubi_hv15_lora": (648, NO, NO),
    "gen__musubi_ideogram4_lora": (YES, NO, NO),
    "gen__musubi_krea2_lora": (YES, NO, YES),
    "gen__musubi_qwen_image_lora": (YES, YES, YES),
    "gen__musubi_qwen_image_lokr_full": (YES, NO, YES),
    "gen__musubi_wan21_i2v_14b_lora": (YES, YES, 80),
    "gen__musubi_wan21_t2v_1.3b_loha": (YES, NO, NO),
    "gen__musubi_z_image_lora": (120, YES, NO),
    "invokeai__flux_dora_onetrainer_format": (YES, NO, YES),
    "invokeai__flux_lora_aitoolkit_format": (YES, NO, YES),
    "invokeai__flux_lora_diffusers_base_model_format": (NO, NO, YES),
    "invokeai__flux_lora_diffusers_format": (YES, YES, YES),
}


@pytest.mark.parametrize("name", MEASURED)
def test_verdicts_are_the_measured_ones(name: str, corpus: Path, tmp_path: Path) -> None:
    listing = corpus_listing(corpus / "adapters" / f"{name}.json")
    # another project's made-up sizes, which fit no model
    family = "flux" if name == "invokeai__flux_lokr_bfl_format" else None
    path = write_header_only(tmp_path / "a.safetensors", listing)
    with Adapter.open(path, family=family) as adapter:
        found = judge(adapter)
    for host, measured in zip(("comfyui", "diffusers", "invokeai"), MEASURED[name], strict=True):
        verdict = found[host]
        assert verdict.loads == (measured if measured is None else measured is True), (
            host,
            verdict,
        )
        assert bool(verdict.why) == (measured is not True)
        if measured is not True and isinstance(measured, int) and measured:
            each = re.findall(r"(\d+) of \d+ modules", verdict.why)  # one for each reason
            assert sum(map(int, each)) == measured, (host, verdict)


def unmeasured(host: str, family: str) -> bool:
    """Whether a host was never tried with a family, so that nothing is promised of it."""
    # of LTX-2's connectors nobody has told how ComfyUI adapts them
    # and of some families' kin the model that was tried has no layers
    if (host, family) == ("comfyui", "ltx2") or family in hosts()[host].untried:
        return True
    return family not in hosts()[host].unsupported and family not in measurement(host).names


def output_for(host: str, family: str, folder: Path) -> Path:
    """A file, or a folder where PEFT's names are written."""
    return folder / ("b" if hosts()[host].formats(family)[:1] == ("peft",) else "b.safetensors")


# the refiner's text encoder has kohya's name for the second one, which Forge has not
NO_FORM = {("invokeai", "flux"), ("diffusers", "chroma"), ("forge", "sdxl-refiner")}
CASES = [(host, family) for host in hosts() for family in families()]


@pytest.mark.share(5)
@pytest.mark.parametrize(("host", "family"), CASES)
def test_what_is_written_for_a_host_loads_there(host: str, family: str, tmp_path: Path) -> None:
    """Every family either loads in what `--for` writes, or is refused; what stays behind is warned of."""
    source = lora(family, "diffusers", tmp_path / "a.safetensors")
    output = output_for(host, family, tmp_path)
    options = convert.Options(host=host, family=family, allow_unused=True, output=output)
    if not hosts()[host].formats(family):
        with pytest.raises(NotRepresentable) as caught:
            convert.plan(source, options)
        assert caught.value.hint
        return
    if unmeasured(host, family):
        with pytest.raises(NotRepresentable, match="not measured") as caught:
            convert.plan(source, options)
        assert "--to" in (caught.value.hint or "")
        return
    if (host, family) in NO_FORM:  # a text encoder makes them refuse every form
        with pytest.raises(NotRepresentable, match="loads no form") as caught:
            convert.plan(source, options)
        assert "--skip" in (caught.value.hint or "")
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
        assert {
            format for written in host.writes.values() for format in written
        } <= formats().keys()
        for loss in (*host.always, *(loss for cell in host.cells for loss in cell.losses)):
            assert loss.what
            assert re.compile(loss.modules)
            assert {*loss.algorithms, *loss.besides} <= algorithms().keys()


def test_refusals(tmp_path: Path) -> None:
    with Adapter.open(lora("sd1", "kohya", tmp_path / "a.safetensors"), family="sd1") as adapter:
        with pytest.raises(NoSuchName, match="unknown host 'comfz'"):
            recipe("comfz", adapter)
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
        assert "alpha that most modules have" in judge(adapter)["diffusers"].why
        assert judge(adapter)["comfyui"].loads is True


def test_alpha_in_metadata_is_lost_on_most(tmp_path: Path) -> None:
    source = lora("qwen-image", "diffusers", tmp_path / "a.safetensors")
    told = '{"transformer.r": 3, "transformer.lora_alpha": 6}'
    save_file(load_file(source), source, {"lora_adapter_metadata": told})
    with Adapter.open(source, family="qwen-image") as adapter:
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


@pytest.mark.share(10)
@pytest.mark.parametrize(("host", "family"), CASES)
@pytest.mark.parametrize("source", ["diffusers", "kohya"])
def test_a_recipe_s_scale_is_the_host_s_too(
    host: str, family: str, source: str, tmp_path: Path
) -> None:
    """alpha = rank / 2: where a host ignores alpha tensors or refuses them, it is folded; the rest loads as written."""
    path = lora(family, source, tmp_path / "a.safetensors", scale=0.5)
    with Adapter.open(path, family=family, format=source) as adapter:
        if not hosts()[host].formats(family) or unmeasured(host, family):
            return  # refused, see above
        if (host, family) in NO_FORM:
            with pytest.raises(NotRepresentable, match="loads no form"):
                recipe(host, adapter)
            return
        made = recipe(host, adapter)
        pieces, _ = pieces_as(adapter, made, None)

    # a fused layer's rank, and with it alpha and, where that may be left out, its key, shows only
    # when its parts are read
    def plain(piece: Piece) -> Piece:
        if made.fold_alpha or formats()[made.format].alpha is Alpha.OPTIONAL:
            piece = replace(piece, told=False, keys=0)
        return replace(piece, alpha=None, rank=0, label="")

    meant = {piece.slot: plain(piece) for piece in pieces}
    with Adapter.open(
        _converted(path, host, family, tmp_path), family=family, format=made.format
    ) as written:
        assert {piece.slot: plain(piece) for piece in pieces_of(written)} == meant
        assert judge(written)[host].loads is (not made.warnings)


def test_t5_of_flux_is_called_as_invokeai_calls_it(tmp_path: Path) -> None:
    """The hint of the refusal, followed: what it does not recognise is left out."""
    path = lora("flux", "diffusers", tmp_path / "a.safetensors")
    options = convert.Options(host="invokeai", family="flux", output=tmp_path / "b.safetensors")
    with pytest.raises(NotRepresentable, match="loads no form") as caught:
        convert.plan(path, options)
    assert "--skip" in (caught.value.hint or "")
    outer = ("*_in*", "*embed*", "*norm_out*", "transformer.proj_out")
    convert.run(convert.plan(path, replace(options, skip=outer)))
    stems = {key.partition("_encoder")[0] for key in load_file(tmp_path / "b.safetensors")}
    assert "lora_te2" in stems
    assert "lora_te3" not in stems
    with Adapter.open(tmp_path / "b.safetensors", family="flux") as adapter:
        assert judge(adapter)["invokeai"].loads
        assert {slot.component for slot in adapter.entries} == {
            "transformer", "text_encoder", "text_encoder_2",
        }  # fmt: skip


@pytest.mark.parametrize(("host", "flat"), [("comfyui", True), ("invokeai", True), ("", False)])
def test_a_full_lokr_of_a_window_in_three_dimensions_is_flattened(
    host: str, flat: bool, tmp_path: Path
) -> None:
    """ComfyUI and InvokeAI give w1 the dimensions of w2's window only if there are two."""
    draw = torch.Generator().manual_seed(0)
    stem = "lora_unet_patch_embedding"
    state = {
        f"{stem}.lokr_w1": torch.randn(8, 4, generator=draw),
        f"{stem}.lokr_w2": torch.randn(192, 4, 1, 2, 2, generator=draw),
        f"{stem}.alpha": torch.tensor(1.0),
    }
    block = "lora_unet_blocks_0_self_attn_q"
    state |= {
        f"{block}.lokr_w1": torch.randn(8, 8, generator=draw),
        f"{block}.lokr_w2": torch.randn(192, 192, generator=draw),
        f"{block}.alpha": torch.tensor(1.0),
    }
    save_file(state, tmp_path / "a.safetensors")
    to = {"host": host} if host else {"to": "comfy"}
    output = tmp_path / "b.safetensors"
    options = convert.Options(family="wan", output=output, allow_unused=True, **to)
    plan = convert.plan(tmp_path / "a.safetensors", options)
    assert not [note for note in plan.notes if "five dimensions" in note]
    assert convert.run(plan).relative_error == 0.0
    written = load_file(output)
    (key,) = [key for key in written if "patch_embedding" in key and key.endswith("lokr_w2")]
    assert written[key].shape == ((192, 16) if flat else (192, 4, 1, 2, 2))
    assert torch.equal(written[key].flatten(), state[f"{stem}.lokr_w2"].flatten())
    with Adapter.open(output, family="wan") as adapter:
        comfyui = judge(adapter)["comfyui"]
        (entry,) = [e for s, e in adapter.entries.items() if "patch" in s.target.module]
        delta = adapter.weights(entry).delta()
    assert comfyui.loads is flat, comfyui
    assert flat or "five dimensions" in comfyui.why
    kron = torch.kron(state[f"{stem}.lokr_w1"], state[f"{stem}.lokr_w2"].flatten(1))
    torch.testing.assert_close(delta.float(), kron)


def _converted(path: Path, host: str, family: str, folder: Path) -> Path:
    output = output_for(host, family, folder)
    plan = convert.plan(
        path, convert.Options(host=host, family=family, allow_unused=True, output=output)
    )
    convert.run(plan)
    plan.close()
    return output


def test_what_invokeai_s_loaders_make_of_alpha(tmp_path: Path) -> None:
    """Found by running its converters of August 2026: beside lora_A, alpha is ignored, or stops the loader."""
    for family, format, why in (
        ("flux", "comfy", "stop its loader"),
        ("z-image", "diffusers", "ignores"),
        ("anima", "comfy", "ignores"),
        ("krea2", "comfy", ""),
    ):
        path = lora(family, format, tmp_path / "a.safetensors", scale=0.5)
        if format == "diffusers":
            tensors = load_file(path)
            alphas = {
                key.replace("lora_A.weight", "alpha"): torch.tensor(1.0)
                for key in tensors
                if "lora_A" in key
            }
            save_file(tensors | alphas, path)
        with Adapter.open(path, family=family) as adapter:
            verdict = judge(adapter)["invokeai"]
        assert verdict.loads is (not why), family
        assert why in verdict.why


def test_equal_scales_with_unequal_alphas(tmp_path: Path) -> None:
    """Ranks 3 and 2, alpha = rank: diffusers still gives the attention the alpha that most modules have."""
    path = lora("sd1", "kohya", tmp_path / "a.safetensors")
    tensors = load_file(path)
    stem = next(key for key in tensors if "attn1_to_q.alpha" in key).removesuffix(".alpha")
    tensors[f"{stem}.lora_up.weight"] = tensors[f"{stem}.lora_up.weight"][:, :2].contiguous()
    tensors[f"{stem}.lora_down.weight"] = tensors[f"{stem}.lora_down.weight"][:2].contiguous()
    save_file(tensors | {f"{stem}.alpha": torch.tensor(2.0)}, path)
    with Adapter.open(path, family="sd1") as adapter:
        assert re.match(r"1 of \d+ modules get the alpha", judge(adapter)["diffusers"].why)
        assert recipe("diffusers", adapter).format == "diffusers"


@pytest.mark.parametrize(
    ("host", "family", "algorithm", "format"),
    [
        ("comfyui", "flux", "lokr", "comfy"),
        ("comfyui", "sdxl", "loha", "kohya"),
        ("diffusers", "flux2", "lokr", "diffusers"),
        ("diffusers", "z-image", "lokr", "diffusers"),
        ("diffusers", "flux", "lokr", None),
        ("diffusers", "sdxl", "loha", None),
        ("invokeai", "qwen-image", "lokr", "kohya"),
        ("invokeai", "flux2", "lokr", "comfy"),
        ("invokeai", "wan", "loha", None),
        ("invokeai", "wan", "lokr", "kohya"),
        ("invokeai", "z-image", "lokr", None),
        ("invokeai", "krea2", "lokr", None),
        ("comfyui", "flux", "ia3", None),
        ("kohya", "flux", "loha", "kohya"),
    ],
)
def test_algorithms(
    host: str, family: str, algorithm: str, format: str | None, tmp_path: Path
) -> None:
    path = lora(family, "diffusers", tmp_path / "a.safetensors")
    blocks = {
        k: v
        for k, v in load_file(path).items()
        if re.search(r"transformer(?!_2).*(blocks|layers)\.|unet\..*attn", k)
    }
    save_file({k: v for k, v in blocks.items() if not k.startswith("text")}, path)
    with Adapter.open(path, family=family) as adapter:
        if format is None:
            with pytest.raises(NotRepresentable, match=f"loads no {algorithm}") as caught:
                recipe(host, adapter, algorithm)
            assert "--algo lora" in (caught.value.hint or "")
        else:
            assert recipe(host, adapter, algorithm).format == format


def test_layers_of_kin_do_not_decide_how_a_family_is_written() -> None:
    """Kolors' layer in SDXL's table once made `extract` write names of old diffusers."""
    usual = {
        "sd1": "kohya", "sdxl": "kohya", "flux": "comfy", "chroma": "comfy", "z-image": "diffusers",
        "wan": "diffusers", "sd3": "kohya", "flux2": "comfy", "qwen-image": "diffusers",
    }  # fmt: skip
    assert {family: usual_format(family) for family in usual} == usual
    for family in map(families().__getitem__, usual):
        targets = [row.target for row in family.components[0].rows]
        assert all(any(target.startswith(kin) for target in targets) for kin in family.kin)
