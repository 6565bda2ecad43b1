"""Krea 2 with fused projections, as SimpleTuner trains it (`fused_qkv_projections`): one LoKr for q, k and v."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit.adapter import Adapter
from adaptkit.errors import NotRepresentable
from adaptkit.ops import convert, inspect, merge

# (rows of q, of k and of v, columns): 4 to 1 to 1 in the blocks, alike in the text fusion
PLACES = {
    "transformer_blocks.0.attn.to_qkv": ("blocks.0.attn.", (64, 16, 16), 32),
    "text_fusion.layerwise_blocks.0.attn.to_qkv": ("txtfusion.layerwise_blocks.0.attn.", (32, 32, 32), 24),
}  # fmt: skip


def files(folder: Path, second: int, *, dora: bool = False) -> tuple[Path, Path]:
    """A LoKr whose second factor has so many rows, and the native checkpoint with q, k and v apart."""
    draw = torch.Generator().manual_seed(1)
    adapter, base = {}, {}
    for name, (native, rows, columns) in PLACES.items():
        stem, total = f"lycoris_{name.replace('.', '_')}", sum(rows)
        adapter[f"{stem}.lokr_w1"] = torch.randn(total // second, 4, generator=draw)
        adapter[f"{stem}.lokr_w2"] = torch.randn(second, columns // 4, generator=draw)
        adapter[f"{stem}.alpha"] = torch.tensor(1.0)
        if dora:
            adapter[f"{stem}.dora_scale"] = torch.rand(total, 1, generator=draw) + 0.5
        for one, height in zip(("wq", "wk", "wv"), rows, strict=True):
            base[f"{native}{one}.weight"] = torch.randn(height, columns, generator=draw)
    save_file(adapter, folder / "a.safetensors")
    save_file(base, folder / "base.safetensors")
    return folder / "a.safetensors", folder / "base.safetensors"


def changed(adapter: Path, base: Path, *, dora: bool) -> dict[str, np.ndarray]:
    """W' of each layer in float64."""
    stored, weights = load_file(adapter), load_file(base)
    found = {}
    for name, (native, rows, _) in PLACES.items():
        stem = f"lycoris_{name.replace('.', '_')}"
        delta = np.kron(*(stored[f"{stem}.lokr_w{n}"].double().numpy() for n in (1, 2)))
        whole = (
            np.concatenate(
                [weights[f"{native}{one}.weight"].double().numpy() for one in ("wq", "wk", "wv")]
            )
            + delta
        )
        if dora:
            whole *= stored[f"{stem}.dora_scale"].double().numpy() / np.linalg.norm(
                whole, axis=1, keepdims=True
            )
        ends = np.cumsum(rows)[:-1]
        for one, part in zip(("wq", "wk", "wv"), np.split(whole, ends), strict=True):
            found[f"{native}{one}.weight"] = part
    return found


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("second", [16, 24])
def test_it_is_read_and_merged(second: int, dora: bool, tmp_path: Path) -> None:
    adapter, base = files(tmp_path, second, dora=dora)
    record = inspect.run(adapter, inspect.Options(family="krea2")).record
    assert (record["family"], record["format"], record["unclaimed"]) == ("krea2", "lycoris", [])
    out = tmp_path / "out.safetensors"
    given = merge.Options(output=out, family="krea2", verify=True)
    merge.run(merge.plan(base, [(adapter, 1.0)], given))
    found = load_file(out)
    for name, exact in changed(adapter, base, dora=dora).items():
        np.testing.assert_allclose(found[name].double().numpy(), exact, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("to", ["comfy", "diffusers", "kohya"])
def test_a_lokr_stays_one_where_its_blocks_divide(to: str, tmp_path: Path) -> None:
    adapter, base = files(tmp_path, 16)
    out = tmp_path / "out.safetensors"
    convert.run(convert.plan(adapter, convert.Options(to=to, family="krea2", output=out)))
    with Adapter.open(out, family="krea2") as written:
        assert written.algorithms() == {"lokr": 6}
    back = tmp_path / "merged.safetensors"
    merge.run(merge.plan(base, [(out, 1.0)], merge.Options(output=back, family="krea2")))
    found = load_file(back)
    for name, exact in changed(adapter, base, dora=False).items():
        np.testing.assert_allclose(found[name].double().numpy(), exact, atol=2e-6, err_msg=name)


def test_where_they_do_not_divide_a_lora_is_exact(tmp_path: Path) -> None:
    adapter, base = files(tmp_path, 24)
    kept = convert.Options(to="comfy", family="krea2", output=tmp_path / "x.safetensors")
    plan = convert.plan(adapter, kept)
    with pytest.raises(NotRepresentable, match="row") as refused:
        convert.run(plan)
    assert "--algo" in (refused.value.hint or "")
    out = tmp_path / "out.safetensors"
    given = convert.Options(to="comfy", family="krea2", algo="lora", output=out, dtype="fp32")
    convert.run(convert.plan(adapter, given))
    back = tmp_path / "merged.safetensors"
    merge.run(merge.plan(base, [(out, 1.0)], merge.Options(output=back, family="krea2")))
    found = load_file(back)
    for name, exact in changed(adapter, base, dora=False).items():
        np.testing.assert_allclose(found[name].double().numpy(), exact, atol=5e-6, err_msg=name)
