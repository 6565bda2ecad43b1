"""convert --to nunchaku: every tensor of the file as NumPy places it, bit for bit.

nunchaku's own converter wrote the same bytes from the same adapter and base, but for layers of which the
adapter has some of q, k and v: there nunchaku writes a factor of zeros too.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adaptkit.errors import AdaptkitError, NotRepresentable, ShapeMismatch, WrongUsage
from adaptkit.ops import compare, convert
from tests.files.test_arranged import BASE, DOUBLE, LAYERS, SINGLE, W, interleaved, packed

D, S = f"transformer.{DOUBLE}", f"transformer.{SINGLE}"
State = dict[str, np.ndarray]


def drawn(*shape: int, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) / 8).astype(np.float16)


def quantised(path: Path) -> State:
    """The factors of a base's own branches, plain; the file has them packed, beside its weights."""
    plain: State = {}
    stored: dict[str, torch.Tensor] = {}
    for n, (name, (rows, columns, _)) in enumerate(LAYERS.items()):
        stored[f"{name}.qweight"] = torch.zeros(rows * W, columns * W // 2, dtype=torch.int8)
        if not name.endswith(".linear"):
            plain[f"{name}.down"] = drawn(BASE, columns * W, seed=2 * n)
            plain[f"{name}.up"] = drawn(rows * W, BASE, seed=2 * n + 1)
            stored[f"{name}.lora_down"] = torch.from_numpy(packed(plain[f"{name}.down"], down=True))
            stored[f"{name}.lora_up"] = torch.from_numpy(packed(plain[f"{name}.up"], down=False))
    save_file(stored, path)
    return plain


def adapter(path: Path, dtype: torch.dtype = torch.float16) -> State:
    """An adapter whose q, k and v share a D in one block, and do not in the other."""
    sizes = {
        **{f"{D}.attn.{name}": (W, W, 6) for name in ("to_q", "to_k", "to_v", "to_add_out")},
        **{f"{D}.attn.{name}": (W, W, 5) for name in ("add_q_proj", "add_v_proj")},
        f"{D}.ff.net.0.proj": (4 * W, W, 20),
        f"{D}.norm1.linear": (6 * W, W, 7),
        **{f"{S}.attn.{name}": (W, W, 4) for name in ("to_q", "to_k", "to_v")},
        f"{S}.proj_mlp": (4 * W, W, 4),
        f"{S}.proj_out": (W, 5 * W, 9),
        f"{S}.norm.linear": (3 * W, W, 16),
        "transformer.x_embedder": (W, 64, 3),
    }
    made: State = {}
    for n, (name, (rows, columns, rank)) in enumerate(sizes.items()):
        shared = name.startswith(f"{D}.attn.to_") and "add" not in name
        made[f"{name}.lora_A.weight"] = drawn(rank, columns, seed=500 if shared else 100 + n)
        made[f"{name}.lora_B.weight"] = drawn(rows, rank, seed=200 + n)
    made[f"{D}.attn.to_k.lora_B.bias"] = drawn(W, seed=301)
    made[f"{D}.attn.to_out.0.lora_B.bias"] = drawn(W, seed=302)
    made["transformer.x_embedder.lora_B.bias"] = drawn(W, seed=303)
    made[f"{D}.attn.norm_q.set_weight"] = drawn(128, seed=304)
    save_file({key: torch.from_numpy(value).to(dtype) for key, value in made.items()}, path)
    return made


def padded(matrix: np.ndarray, rows: int, columns: int) -> np.ndarray:
    found = np.zeros((rows, columns), matrix.dtype)
    found[: len(matrix), : matrix.shape[1]] = matrix
    return found


def expected(made: State, base: State) -> State:
    found: State = {}

    def layer(name: str, whole: int, down: np.ndarray | None = None, up: np.ndarray | None = None) -> None:  # fmt: skip
        downs = [base[f"{name}.down"], *([] if down is None else [down])]
        ups = [base[f"{name}.up"], *([] if up is None else [up])]
        d, u = np.concatenate(downs), np.concatenate(ups, 1)
        found[f"{name}.lora_down"] = packed(padded(d, whole, d.shape[1]), down=True)
        found[f"{name}.lora_up"] = packed(padded(u, len(u), whole), down=False)

    def factors(name: str) -> tuple[np.ndarray, np.ndarray]:
        return made[f"{name}.lora_A.weight"], made[f"{name}.lora_B.weight"]

    down, first = factors(f"{D}.attn.to_q")
    ups = [first, *(factors(f"{D}.attn.to_{n}")[1] for n in "kv")]
    layer(f"{DOUBLE}.qkv_proj", 48, down, np.concatenate(ups))  # 32 + 6
    (a, b), (c, d) = factors(f"{D}.attn.add_q_proj"), factors(f"{D}.attn.add_v_proj")
    up = np.zeros((3 * W, 10), np.float16)
    up[:W, :5], up[2 * W :, 5:] = b, d
    layer(f"{DOUBLE}.qkv_proj_context", 48, np.concatenate([a, c]), up)
    layer(f"{DOUBLE}.out_proj", 32)  # a bias alone
    layer(f"{DOUBLE}.out_proj_context", 48, *factors(f"{D}.attn.to_add_out"))
    layer(f"{DOUBLE}.mlp_fc1", 64, *factors(f"{D}.ff.net.0.proj"))  # 32 + 20
    layer(f"{DOUBLE}.mlp_fc2", 64)  # of the same rank
    layer(f"{DOUBLE}.mlp_context_fc1", 32)
    layer(f"{DOUBLE}.mlp_context_fc2", 32)
    parts = [factors(f"{S}.attn.to_{n}") for n in "qkv"]
    up = np.zeros((3 * W, 12), np.float16)
    for n, (_, part) in enumerate(parts):
        up[n * W : (n + 1) * W, 4 * n : 4 * n + 4] = part
    layer(f"{SINGLE}.qkv_proj", 48, np.concatenate([down for down, _ in parts]), up)
    layer(f"{SINGLE}.mlp_fc1", 48, *factors(f"{S}.proj_mlp"))
    down, up = factors(f"{S}.proj_out")
    layer(f"{SINGLE}.out_proj", 48, down[:, :W], up)
    layer(f"{SINGLE}.mlp_fc2", 48, down[:, W:], up)
    for name, n in ((f"{DOUBLE}.norm1.linear", 6), (f"{SINGLE}.norm.linear", 3)):
        down, up = factors(f"transformer.{name}")
        found[f"{name}.lora_down"] = padded(down, 16, W)
        found[f"{name}.lora_up"] = interleaved(padded(up, n * W, 16), n)
    found |= {f"x_embedder.lora_{n}.weight": made[f"transformer.x_embedder.lora_{n}.weight"] for n in "AB"}  # fmt: skip
    bias = np.zeros(3 * W, np.float16)
    bias[W : 2 * W] = made[f"{D}.attn.to_k.lora_B.bias"]
    return found | {
        f"{DOUBLE}.attn.to_qkv.bias": bias,
        f"{DOUBLE}.attn.to_out.0.bias": made[f"{D}.attn.to_out.0.lora_B.bias"],
        "x_embedder.bias": made["transformer.x_embedder.lora_B.bias"],
        f"{DOUBLE}.attn.norm_q.weight": made[f"{D}.attn.norm_q.set_weight"],
    }


def run(folder: Path, **options: object) -> convert.Report:
    chosen = {"family": "flux", "to": "nunchaku", "base": folder / "base.safetensors", **options}
    plan = convert.plan(folder / "a.safetensors", convert.Options(output=folder / "out.safetensors", **chosen))  # type: ignore[arg-type]  # fmt: skip
    try:
        return convert.run(plan)
    finally:
        plan.close()


def test_every_tensor_is_where_numpy_puts_it(tmp_path: Path) -> None:
    base, made = quantised(tmp_path / "base.safetensors"), adapter(tmp_path / "a.safetensors")
    report = run(tmp_path)
    found, wanted = load_file(tmp_path / "out.safetensors"), expected(made, base)
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.float16, name
        assert np.array_equal(tensor.numpy(), wanted[name]), name
    assert (report.format, report.relative_error) == ("nunchaku", 0.0)
    assert set(report.changes) == {"packed"}
    assert report.bytes == (tmp_path / "out.safetensors").stat().st_size
    assert not list(tmp_path.glob(".*"))  # the plain file is gone
    with safe_open(tmp_path / "out.safetensors", "np") as file:
        assert file.metadata().keys() == {"adaptkit"}  # nothing of the plain file's ranks


def test_it_comes_back_as_the_same_weights(tmp_path: Path) -> None:
    quantised(tmp_path / "base.safetensors")
    adapter(tmp_path / "a.safetensors")
    run(tmp_path, skip=("*norm_q*",))
    options = compare.Options(family="flux", skip=("*norm_q*",))
    with compare.plan(tmp_path / "a.safetensors", tmp_path / "out.safetensors", options) as plan:
        report = compare.run(plan)
    assert report.relative_error is not None
    assert report.relative_error < 1e-7


def test_numbers_are_rounded_to_the_base_s_and_the_error_is_reported(tmp_path: Path) -> None:
    quantised(tmp_path / "base.safetensors")
    adapter(tmp_path / "a.safetensors", torch.float32)
    tensors = {key: value * 1.001 for key, value in load_file(tmp_path / "a.safetensors").items()}
    save_file(tensors, tmp_path / "a.safetensors")
    report = run(tmp_path, skip=("*norm_q*",))
    assert report.relative_error is not None
    assert 1e-5 < report.relative_error < 1e-3
    assert {t.dtype for t in load_file(tmp_path / "out.safetensors").values()} == {torch.float16}
    with pytest.raises(WrongUsage, match="fp16"):
        run(tmp_path, dtype="bf16")


def test_what_nunchaku_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    quantised(tmp_path / "base.safetensors")
    made = adapter(tmp_path / "a.safetensors")
    with pytest.raises(WrongUsage, match="--base"):
        run(tmp_path, base=None)
    with pytest.raises(NotRepresentable, match="quantised"):
        run(tmp_path, base=tmp_path / "a.safetensors")
    stems = {"model": "text_encoder.text_model.encoder.layers.0.self_attn.q_proj", "block": f"{D}.attn.to_q".replace("blocks.0", "blocks.1")}  # fmt: skip
    for stem in stems.values():
        size = 768 if stem.startswith("text") else W
        more = {**made, f"{stem}.lora_A.weight": drawn(4, size, seed=1), f"{stem}.lora_B.weight": drawn(size, 4, seed=2)}  # fmt: skip
        save_file({k: torch.from_numpy(v) for k, v in more.items()}, tmp_path / "a.safetensors")
        with pytest.raises(NotRepresentable, match="no place for it, or the base no such block"):
            run(tmp_path)
    plain = {k: v for k, v in made.items() if "bias" not in k}
    dora = {**plain, f"{D}.attn.to_q.lora_magnitude_vector": drawn(W, seed=3)}
    save_file({k: torch.from_numpy(v) for k, v in dora.items()}, tmp_path / "a.safetensors")
    with pytest.raises(NotRepresentable, match=r"holds LoRA, not lora\+dora"):
        run(tmp_path)
    wide = {k: np.concatenate([v, v], 1) if k.endswith("to_add_out.lora_A.weight") else v for k, v in made.items()}  # fmt: skip
    save_file({k: torch.from_numpy(v) for k, v in wide.items()}, tmp_path / "a.safetensors")
    with pytest.raises(ShapeMismatch, match=r"96 × 192 here, 96 × 96 in base\.safetensors"):
        run(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["a.safetensors", "base.safetensors"]


def test_other_families_have_no_such_layout(tmp_path: Path) -> None:
    quantised(tmp_path / "base.safetensors")
    stem = "transformer.transformer_blocks.0.attn.to_q"
    save_file({f"{stem}.lora_A.weight": torch.ones(4, 3072), f"{stem}.lora_B.weight": torch.ones(3072, 4)}, tmp_path / "a.safetensors")  # fmt: skip
    with pytest.raises(AdaptkitError, match="FLUX.1 alone, not of Qwen-Image"):
        run(tmp_path, family="qwen-image", dtype="fp16")
