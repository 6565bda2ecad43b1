"""The converter failures of ../shared/reference/failures.md, each as a test that passes here (the ids are that file's)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adaptkit.adapter import Adapter
from adaptkit.errors import AdaptkitError, NonFinite, NotRepresentable, Unclaimed
from adaptkit.ops import convert

Tensors = dict[str, torch.Tensor]
DRAW = torch.Generator().manual_seed(7)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=DRAW)


def save(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    save_file(tensors, path, metadata)
    return path


def run(source: Path, to: str, **options: object) -> tuple[Tensors, convert.Report]:
    output = source.with_name(f"{to}.safetensors")
    plan = convert.plan(source, convert.Options(to=to, output=output, overwrite=True, **options))  # type: ignore[arg-type]
    report = convert.run(plan)
    plan.close()
    return load_file(output), report


def pair(
    stem: str,
    rows: int,
    columns: int,
    rank: int,
    spelled: tuple[str, str] = ("lora_up.weight", "lora_down.weight"),
) -> Tensors:
    return {f"{stem}.{spelled[0]}": randn(rows, rank), f"{stem}.{spelled[1]}": randn(rank, columns)}


PEFT = ("lora_B.weight", "lora_A.weight")
SD = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
SD_DIFFUSERS = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def test_f17_alpha_is_applied_once_and_metadata_is_kept(tmp_path: Path) -> None:
    tensors = pair(SD, 8, 8, 16) | {f"{SD}.alpha": torch.tensor(8.0)}
    source = save(
        tmp_path / "a.safetensors", tensors, {"ss_output_name": "style", "modelspec.title": "Style"}
    )
    written, report = run(source, "diffusers", family="sd1")
    exact = 0.5 * tensors[f"{SD}.lora_up.weight"] @ tensors[f"{SD}.lora_down.weight"]
    torch.testing.assert_close(
        written[f"{SD_DIFFUSERS}.lora_B.weight"] @ written[f"{SD_DIFFUSERS}.lora_A.weight"], exact
    )
    assert report.relative_error == 0.0
    with safe_open(tmp_path / "diffusers.safetensors", "pt") as file:
        assert file.metadata()["ss_output_name"] == "style"
        assert file.metadata()["modelspec.title"] == "Style"


def test_f19_a_dense_fused_qkv_splits_exactly(tmp_path: Path) -> None:
    """Rank 16, as ai-toolkit writes Z-Image; the peer assumed a block diagonal and saved ranks 5 and 6."""
    stem = "diffusion_model.layers.0.attention.qkv"
    source = save(tmp_path / "a.safetensors", pair(stem, 48, 12, 16, PEFT))
    written, _ = run(source, "diffusers", family="z-image")
    whole = load_file(source)
    delta = whole[f"{stem}.lora_B.weight"] @ whole[f"{stem}.lora_A.weight"]
    for n, part in enumerate(("to_q", "to_k", "to_v")):
        name = f"transformer.layers.0.attention.{part}"
        up, down = written[f"{name}.lora_B.weight"], written[f"{name}.lora_A.weight"]
        assert (up.shape, down.shape) == ((16, 16), (16, 12))
        torch.testing.assert_close(up @ down, delta[16 * n : 16 * (n + 1)])


def test_f20_names_with_underscores_of_their_own(tmp_path: Path) -> None:
    modules = ("time_embedding.0", "text_embedding.2", "patch_embedding", "time_projection.1")
    tensors: Tensors = {}
    for module in modules:
        tensors |= pair(f"lora_unet_{module.replace('.', '_')}", 4, 4, 2)
    written, _ = run(save(tmp_path / "a.safetensors", tensors), "comfy", family="wan")
    assert {key.removeprefix("diffusion_model.").rpartition(".lora_")[0] for key in written} == set(
        modules
    )


def test_f21_dora_biases_adapter_names_and_text_encoders(tmp_path: Path) -> None:
    stem, te = (
        "unet.mid_block.attentions.0.proj_in",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
    )
    tensors = {
        f"{stem}.lora_A.default.weight": randn(2, 4),
        f"{stem}.lora_B.default.weight": randn(4, 2),
        f"{stem}.lora_magnitude_vector.default.weight": randn(4).abs(),
        f"{stem}.diff_b": randn(4),
        **pair(te, 4, 4, 2, PEFT),
    }
    written, _ = run(save(tmp_path / "a.safetensors", tensors), "kohya", family="sd1")
    unet = "lora_unet_mid_block_attentions_0_proj_in"
    suffixes = {key.removeprefix(f"{unet}.") for key in written if key.startswith(unet)}
    assert suffixes == {"lora_down.weight", "lora_up.weight", "dora_scale", "diff_b", "alpha"}
    assert written[f"{unet}.dora_scale"].shape == (4, 1)
    assert "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight" in written


def test_f22_a_negative_alpha_stays_a_number(tmp_path: Path) -> None:
    tensors = pair(SD, 8, 8, 4) | {f"{SD}.alpha": torch.tensor(-2.0)}
    written, _ = run(save(tmp_path / "a.safetensors", tensors), "diffusers", family="sd1")
    exact = -0.5 * tensors[f"{SD}.lora_up.weight"] @ tensors[f"{SD}.lora_down.weight"]
    torch.testing.assert_close(
        written[f"{SD_DIFFUSERS}.lora_B.weight"] @ written[f"{SD_DIFFUSERS}.lora_A.weight"], exact
    )


FLUX = "lora_unet_double_blocks_0_img_attn_qkv"


def test_f23_never_an_empty_file(tmp_path: Path) -> None:
    """LoKr is split where its blocks allow and refused where not; a file of another family is that family's."""
    lokr = {
        f"{FLUX}.lokr_w1": randn(3, 2),
        f"{FLUX}.lokr_w2": randn(4, 3),
        f"{FLUX}.alpha": torch.tensor(1.0),
    }
    written, _ = run(save(tmp_path / "a.safetensors", lokr), "diffusers", family="flux")
    delta = torch.kron(lokr[f"{FLUX}.lokr_w1"], lokr[f"{FLUX}.lokr_w2"])
    for n, part in enumerate(("to_q", "to_k", "to_v")):
        name = f"transformer.transformer_blocks.0.attn.{part}"
        mine = torch.kron(written[f"{name}.lokr_w1"], written[f"{name}.lokr_w2"])
        torch.testing.assert_close(mine, delta[4 * n : 4 * (n + 1)])
    (tmp_path / "diffusers.safetensors").unlink()
    uneven = lokr | {f"{FLUX}.lokr_w1": randn(2, 2), f"{FLUX}.lokr_w2": randn(6, 3)}
    with pytest.raises(NotRepresentable, match="Kronecker block"):
        run(save(tmp_path / "a.safetensors", uneven), "diffusers", family="flux")
    only = {
        key: t
        for part in ("to_k", "to_v")
        for key, t in pair(f"transformer.transformer_blocks.0.attn.{part}", 4, 6, 2, PEFT).items()
    }
    written, _ = run(save(tmp_path / "a.safetensors", only), "kohya", family="flux")
    assert written[f"{FLUX}.lora_up.weight"].shape[0] == 12
    with pytest.raises(AdaptkitError):
        run(save(tmp_path / "a.safetensors", pair(SD, 8, 8, 2)), "diffusers", family="flux")
    assert not list(tmp_path.glob("diffusers*"))


def test_f24_there_and_back_keeps_the_rank(tmp_path: Path) -> None:
    single = "lora_unet_single_blocks_0_linear1"
    tensors = pair(FLUX, 24, 8, 16) | pair(single, 56, 8, 16)
    tensors |= {f"{stem}.alpha": torch.tensor(16.0) for stem in (FLUX, single)}
    source = save(tmp_path / "a.safetensors", tensors)
    run(source, "diffusers", family="flux")
    written, _ = run(tmp_path / "diffusers.safetensors", "kohya", family="flux")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[key], tensor) for key, tensor in tensors.items())


def test_f25_flux_and_dora_to_kohya(tmp_path: Path) -> None:
    stem = "transformer.transformer_blocks.0.attn.to_out.0"
    tensors = pair(stem, 4, 6, 4, PEFT)
    told = {
        "transformer.r": 4,
        "transformer.lora_alpha": 8,
        "transformer.target_modules": ["to_out.0"],
    }
    source = save(
        tmp_path / "a.safetensors",
        tensors,
        {"lora_adapter_metadata": json.dumps(told), "author": "me"},
    )
    written, _ = run(source, "kohya", family="flux")
    assert set(written) == {
        f"lora_unet_double_blocks_0_img_attn_proj.{name}"
        for name in ("lora_up.weight", "lora_down.weight", "alpha")
    }
    assert float(written["lora_unet_double_blocks_0_img_attn_proj.alpha"]) == 8.0
    with safe_open(tmp_path / "kohya.safetensors", "pt") as file:
        assert file.metadata()["author"] == "me"
    dora = pair(SD_DIFFUSERS, 8, 8, 2, PEFT) | {
        f"{SD_DIFFUSERS}.lora_magnitude_vector": randn(8).abs()
    }
    written, _ = run(save(tmp_path / "a.safetensors", dora), "kohya", family="sd1")
    assert set(written) == {
        f"{SD}.{name}" for name in ("lora_up.weight", "lora_down.weight", "alpha", "dora_scale")
    }


def test_f26_alpha_tensors_count(tmp_path: Path) -> None:
    tensors = pair(SD, 8, 8, 4) | {f"{SD}.alpha": torch.tensor(1.0)}
    written, _ = run(save(tmp_path / "a.safetensors", tensors), "diffusers", family="sd1")
    up = written[f"{SD_DIFFUSERS}.lora_B.weight"]
    torch.testing.assert_close(up, tensors[f"{SD}.lora_up.weight"] / 4)


def test_f27_a_dora_never_becomes_a_plain_lora(tmp_path: Path) -> None:
    tensors = pair(SD, 8, 8, 4) | {
        f"{SD}.alpha": torch.tensor(4.0),
        f"{SD}.dora_scale": randn(8, 1).abs(),
    }
    written, _ = run(save(tmp_path / "a.safetensors", tensors), "diffusers", family="sd1")
    assert written[f"{SD_DIFFUSERS}.lora_magnitude_vector"].shape == (8,)
    wide = tensors | {f"{SD}.dora_scale": randn(1, 8).abs()}
    with pytest.raises(
        NotRepresentable, match="input"
    ):  # the axis OneTrainer uses has no PEFT form
        run(save(tmp_path / "a.safetensors", wide), "diffusers", family="sd1")


def test_c9_missing_alpha_and_missing_parts(tmp_path: Path) -> None:
    tensors = {
        key: t
        for part in "qk"
        for key, t in pair(
            f"transformer.transformer_blocks.0.attn.to_{part}", 4, 6, 2, PEFT
        ).items()
    }
    written, report = run(save(tmp_path / "a.safetensors", tensors), "kohya", family="flux")
    up, down = written[f"{FLUX}.lora_up.weight"], written[f"{FLUX}.lora_down.weight"]
    assert report.changes == {"fused": 1}
    assert float(written[f"{FLUX}.alpha"]) == up.shape[1]
    delta = (up @ down).numpy()
    for n, part in enumerate("qk"):
        name = f"transformer.transformer_blocks.0.attn.to_{part}"
        exact = (tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]).numpy()
        np.testing.assert_allclose(delta[4 * n : 4 * n + 4], exact, rtol=1e-5)
    assert not delta[8:].any()


def test_c19_lokr_and_tucker_in_a_kohya_file(tmp_path: Path) -> None:
    stem = "lora_unet_input_blocks_4_0_in_layers_2"
    tensors = {
        f"{stem}.lora_up.weight": randn(8, 4, 1, 1),
        f"{stem}.lora_mid.weight": randn(4, 4, 3, 3),
        f"{stem}.lora_down.weight": randn(4, 8, 1, 1),
        f"{stem}.alpha": torch.tensor(4.0),
        "lora_unet_input_blocks_4_1_proj_in.lokr_w1": randn(2, 2),
        "lora_unet_input_blocks_4_1_proj_in.lokr_w2": randn(4, 4),
    }
    source = save(tmp_path / "a.safetensors", tensors)
    written, _ = run(source, "comfy", family="sdxl")
    assert torch.equal(
        written["diffusion_model.input_blocks.4.0.in_layers.2.lora_mid.weight"],
        tensors[f"{stem}.lora_mid.weight"],
    )
    assert "diffusion_model.input_blocks.4.1.proj_in.lokr_w1" in written
    with pytest.raises(AdaptkitError, match=r"lokr|tucker|LoKr|mid"):
        convert.plan(
            source,
            convert.Options(host="diffusers", family="sdxl", output=tmp_path / "x.safetensors"),
        )


def test_placeholder_and_infinite_alphas(tmp_path: Path) -> None:
    """ai-toolkit stores 9999999999 beside two full LoKr factors, which is infinite in float16."""
    stem = "diffusion_model.transformer_blocks.0.attn.to_q"
    for alpha in (9999999999.0, float("inf")):
        tensors = {
            f"{stem}.lokr_w1": randn(2, 2),
            f"{stem}.lokr_w2": randn(3, 3),
            f"{stem}.alpha": torch.tensor(alpha),
        }
        written, report = run(
            save(tmp_path / "a.safetensors", tensors), "kohya", family="qwen-image"
        )
        assert float(written["lora_unet_transformer_blocks_0_attn_to_q.alpha"]) == 1.0
        assert report.relative_error == 0.0
    ranked = pair(SD, 8, 8, 4) | {f"{SD}.alpha": torch.tensor(float("nan"))}
    with pytest.raises((Unclaimed, NonFinite), match="alpha is nan"):
        run(save(tmp_path / "a.safetensors", ranked), "comfy", family="sd1")


def test_orphan_halves_are_refused_by_name(tmp_path: Path) -> None:
    tensors = pair(SD, 8, 8, 4)
    other = SD.replace("to_q", "to_k")
    tensors |= {f"{other}.lora_up.weight": randn(8, 4)}
    source = save(tmp_path / "a.safetensors", tensors)
    with Adapter.open(source, family="sd1") as adapter:
        assert [problem.severity for problem in adapter.problems] == ["error"]
    with pytest.raises(Unclaimed, match="attn1_to_k"):
        run(source, "comfy", family="sd1")
