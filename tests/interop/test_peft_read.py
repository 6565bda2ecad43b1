"""The rarer kinds of PEFT: what PEFT's own forward pass computes is what adaptkit merges."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from adaptkit.adapter import Adapter
from adaptkit.errors import AdaptkitError, NothingToDo, NotRepresentable, ShapeMismatch
from adaptkit.ops import combine, compare, convert, inspect, merge, resize

peft = pytest.importorskip("peft")

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

IN, OUT, WIDE = 8, 12, 16
BLOCK = "transformer_blocks.0"


class Model(nn.Module):
    """Layers of three sizes under names that several families have."""

    def __init__(self, *, conv: bool, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(1)
        block, attn = nn.Module(), nn.Module()
        attn.to_q = nn.Linear(IN, OUT, bias=bias)
        attn.to_k = nn.Linear(OUT, WIDE, bias=bias)
        if conv:
            attn.to_v = nn.Conv2d(WIDE, 6, 3, padding=1, bias=bias)
        block.attn = attn
        self.transformer_blocks = nn.ModuleList([block])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attn: Any = self.transformer_blocks[0].attn
        found: torch.Tensor = attn.to_k(attn.to_q(x))
        if hasattr(attn, "to_v"):
            found = attn.to_v(found.reshape(1, -1, WIDE).mT.reshape(1, WIDE, 3, -1))
        return found


BOTH = dict(target_modules=["to_q", "to_k"])
ALL = dict(target_modules=["to_q", "to_k", "to_v"])
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "adalora": ("AdaLoraConfig", {**ALL, "init_r": 4, "target_r": 2, "total_step": 9, "lora_alpha": 3}),
    "adalora-cut": ("AdaLoraConfig", {**BOTH, "init_r": 4, "target_r": 2, "total_step": 9}),
    "delora": ("DeloraConfig", {**BOTH, "r": 3, "delora_lambda": 2.5, "rank_pattern": {"to_k": 2}}),
    "hira": ("HiraConfig", {**ALL, "r": 3}),
    "hra": ("HRAConfig", {**ALL, "r": 4}),
    "hra-orthogonal": ("HRAConfig", {**ALL, "r": 4, "apply_GS": True}),
    "miss": ("MissConfig", {**BOTH, "r": 3}),
    "miss-bat": ("MissConfig", {**BOTH, "r": 4, "init_weights": "bat"}),
    "miss-mini": ("MissConfig", {**BOTH, "r": 5, "init_weights": "mini", "mini_r": 4}),
    "fourierft": ("FourierFTConfig", {**BOTH, "n_frequency": 20, "random_loc_seed": 5, "scaling": 7.0}),
    "vera": ("VeraConfig", {**BOTH, "r": 4}),
    "vera-drawn": ("VeraConfig", {**BOTH, "r": 4, "save_projection": False, "projection_prng_key": 3}),
    "glora": ("GloraConfig", {**BOTH, "r": 3}),
    "glora-column": ("GloraConfig", {**BOTH, "config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}),
    "glora-number": ("GloraConfig", {**BOTH, "config_A_B": "constant", "config_C": "none", "config_D_E": "none"}),
    "glora-bias": ("GloraConfig", {**BOTH, "config_A_B": "none", "config_C": "lora", "r": 2}),
    "shira": ("ShiraConfig", {**BOTH, "r": 2, "random_seed": 3}),
    "gralora": ("GraloraConfig", {**BOTH, "r": 4, "gralora_k": 2, "alpha": 3}),
    "gralora-hybrid": ("GraloraConfig", {**BOTH, "r": 4, "gralora_k": 4, "hybrid_r": 3}),
    "randlora": ("RandLoraConfig", {**BOTH, "r": 3, "randlora_alpha": 7}),
    "randlora-drawn": ("RandLoraConfig", {**BOTH, "r": 5, "save_projection": False, "projection_prng_key": 3}),
    "randlora-sparse": ("RandLoraConfig", {**BOTH, "r": 4, "save_projection": False, "sparse": True}),
    "randlora-thin": ("RandLoraConfig", {**BOTH, "r": 4, "save_projection": False, "very_sparse": True}),
    "road": ("RoadConfig", {**BOTH, "group_size": 4}),
    "road-2": ("RoadConfig", {**BOTH, "group_size": 2, "variant": "road_2"}),
    "road-4": ("RoadConfig", {**BOTH, "group_size": 4, "variant": "road_4"}),
    "waveft": ("WaveFTConfig", {**BOTH, "n_frequency": 20, "random_loc_seed": 5, "scaling": 7.0}),
    "waveft-db3": ("WaveFTConfig", {**BOTH, "n_frequency": 30, "wavelet_family": "db3", "n_frequency_pattern": {"to_k": 25}}),
    "waveft-sym4": ("WaveFTConfig", {**BOTH, "n_frequency": 30, "wavelet_family": "sym4", "proportional_parameters": True}),
    "waveft-plain": ("WaveFTConfig", {**BOTH, "n_frequency": 30, "use_idwt": False}),
    "psoft": ("PsoftConfig", {**BOTH, "r": 4}),
    "psoft-lowrank": ("PsoftConfig", {**BOTH, "r": 4, "psoft_svd": "lowrank", "random_seed": 3, "psoft_mag_a": False, "ab_svd_init": "pissa_init"}),
    "psoft-neumann": ("PsoftConfig", {**BOTH, "r": 4, "use_cayley_neumann": True, "num_cayley_neumann_terms": 7, "cayley_neumann_eps": 0.5}),
    "psoft-whole": ("PsoftConfig", {**BOTH, "r": 4, "psoft_orth": False, "psoft_mag_b": False}),
    "c3a": ("C3AConfig", {**BOTH, "block_size": 4, "block_size_pattern": {"to_q": 2}}),
    "osf": ("OSFConfig", {**BOTH, "effective_rank": 5, "rank_pattern": {"to_k": 7}}),
    "deft": ("DeftConfig", {**BOTH, "r": 3, "alpha": 2}),
    "deft-qr": ("DeftConfig", {**BOTH, "r": 3, "decomposition_method": "qr"}),
    "deft-para": ("DeftConfig", {**BOTH, "r": 3, "decomposition_method": "qr", "para": True}),
    "supertuning": ("SupertuningConfig", {**BOTH, "sparsity": 0.8}),
    "supertuning-lora": ("SupertuningConfig", {**BOTH, "sparsity": 0.8, "r": 2, "lora_alpha": 3.0}),
    "pvera": ("PveraConfig", {**BOTH, "r": 4}),
    "pvera-drawn": ("PveraConfig", {**BOTH, "r": 4, "save_projection": False, "projection_prng_key": 3}),
    "vblora": ("VBLoRAConfig", {**BOTH, "r": 3, "num_vectors": 9, "vector_length": 4}),
    "vblora-chosen": ("VBLoRAConfig", {**BOTH, "r": 3, "num_vectors": 9, "vector_length": 4, "topk": 3, "save_only_topk_weights": True}),
    "unilora": ("UniLoraConfig", {**BOTH, "r": 3, "theta_d_length": 40, "save_indices": True}),
    "ia3-output": ("IA3Config", {**ALL, "feedforward_modules": []}),
    "ia3-input": ("IA3Config", {**ALL, "feedforward_modules": ["to_v", "to_k"]}),
    "ia3-pattern": ("IA3Config", {**ALL, "feedforward_modules": r".*to_(v|q)"}),
    "oft": ("OFTConfig", {**BOTH, "r": 0, "oft_block_size": 4}),
    "oft-number": ("OFTConfig", {**BOTH, "r": 2, "oft_block_size": 0}),
    "oft-shared": ("OFTConfig", {**BOTH, "r": 0, "oft_block_size": 4, "block_share": True}),
    "boft": ("BOFTConfig", {**ALL, "boft_block_size": 4}),
    "lora-bias": ("LoraConfig", {**BOTH, "r": 3, "lora_alpha": 5, "lora_bias": True, "init_lora_weights": False}),
}  # fmt: skip
PATTERN = {f"{BLOCK}.attn.to_q.lora_E": [True, False, True, True]}


class Case:
    """One adapter as PEFT saved it, the base it is for, and what PEFT's model computes."""

    def __init__(self, name: str, folder: Path, *, bias: bool = True) -> None:
        kind, options = CASES[name]
        config = getattr(peft, kind)(**options)
        self.conv = "to_v" in options["target_modules"]
        self.bias = bias
        plain = Model(conv=self.conv, bias=bias)
        self.base, self.adapter = folder / "base.safetensors", folder / "adapter"
        self.state = {key: value.clone() for key, value in plain.state_dict().items()}
        save_file(self.state, self.base)
        tuned = peft.get_peft_model(plain, config).eval()
        torch.manual_seed(2)
        prefixes = re.compile(
            r"lora_|hira_|hra_|miss_|oft_|fourierft_|shira_w|gralora_|randlora_[lg]|road_|waveft_|psoft_|c3a_|osf_|deft_|supertuning_|pvera_l|vblora_|unilora_|vera_l|glora_|delora_[AB]"
        )
        with torch.no_grad():
            for key, parameter in tuned.named_parameters():
                if prefixes.search(key) and "ranknum" not in key:
                    parameter.normal_(std=0.3)
                elif "ia3_l" in key:
                    parameter.copy_(torch.rand_like(parameter) + 0.5)
        if name == "adalora-cut":
            tuned.peft_config["default"].rank_pattern = dict(PATTERN)
        tuned.save_pretrained(str(self.adapter))
        # as PEFT reads it again
        loaded = peft.PeftModel.from_pretrained(Model(conv=self.conv, bias=bias), self.adapter)
        self.x = torch.randn(9, IN)
        with torch.no_grad():
            self.expected = loaded.eval()(self.x)
            self.before = Model(conv=self.conv, bias=bias)(self.x)

    def output(self, state: dict[str, torch.Tensor]) -> torch.Tensor:
        model = Model(conv=self.conv, bias=self.bias)
        model.load_state_dict(state)
        with torch.no_grad():
            found: torch.Tensor = model(self.x)
        return found

    def merged(self, adapter: Path, **options: Any) -> dict[str, torch.Tensor]:
        out = self.base.with_name("merged.safetensors")
        given = merge.Options(output=out, overwrite=True, **options)
        merge.run(merge.plan(self.base, [(adapter, 1.0)], given))
        return load_file(out)

    def close(self, state: dict[str, torch.Tensor], tolerance: float = 1e-5) -> bool:
        size = float((self.expected - self.before).norm())
        assert size > 0.05 * float(self.before.norm())
        return float((self.output(state) - self.expected).norm()) < tolerance * size


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    return Case(request.param, tmp_path)


def test_merged_weights_compute_what_pefts_model_does(case: Case) -> None:
    assert case.close(case.merged(case.adapter, verify=True))


@pytest.mark.parametrize("name", ["glora", "glora-column", "hira", "ia3-output"])
def test_layers_without_a_bias(name: str, tmp_path: Path) -> None:
    case = Case(name, tmp_path, bias=False)
    assert case.close(case.merged(case.adapter))


ADDITIVE = (
    "adalora",
    "adalora-cut",
    "delora",
    "gralora",
    "gralora-hybrid",
    "lora-bias",
    "c3a",
    "vblora",
    "vblora-chosen",
    "unilora",
)
WRITTEN = (
    "lora-bias",
    "ia3-output",
    "ia3-input",
    "ia3-pattern",
    "oft",
    "oft-number",
    "oft-shared",
    "boft",
)
TURNS = (
    "road",
    "road-2",
    "road-4",
    "hra",
    "hra-orthogonal",
    "oft",
    "oft-number",
    "oft-shared",
    "boft",
)
OWN_BIAS = (
    "road",
    "road-2",
    "road-4",
    "glora",
    "glora-column",
    "glora-bias",
    "ia3-output",
    "ia3-pattern",
)


@pytest.fixture(params=CASES)
def named(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Case]:
    return request.param, Case(request.param, tmp_path)


def deltas(path: Path) -> dict[str, torch.Tensor]:
    """ΔW by the name of the weight in the base."""
    with Adapter.open(path, family="flux") as adapter:
        return {
            f"{adapter.label(slot).removeprefix('transformer.').removesuffix('.bias')}.{slot.param}":
            adapter.weights(entry).delta().double()
            for slot, entry in adapter.entries.items()
        }  # fmt: skip


def as_lora(case: Case, **options: Any) -> Any:
    out = case.base.with_name("lora.safetensors")
    given = dict(to="diffusers", family="flux", algo="lora", output=out, dtype="fp32", verify=True)
    return convert.run(convert.plan(case.adapter, convert.Options(**given | options)))


def test_a_lora_of_it_changes_the_weights_as_it_does(named: tuple[str, Case]) -> None:
    """With the base, which most of them need; the LoRA is exact up to float32."""
    name, case = named
    after = case.merged(case.adapter)
    report = as_lora(case, base=case.base)
    found = deltas(report.output)
    assert sum(key.endswith(".weight") for key in found) == (3 if case.conv else 2)
    for key, delta in found.items():
        exact = (after[key].double() - case.state[key].double()).reshape(delta.shape)
        assert float((delta - exact).norm()) < 2e-5 * max(float(exact.norm()), 1e-2), key
    lost = [key for key, value in after.items() if not torch.equal(value, case.state[key])]
    lost = [key for key in lost if key not in found]
    if name == "ia3-input":  # its to_q is an output
        assert lost == [f"{BLOCK}.attn.to_q.bias"]
        return
    assert bool(lost) == (name in OWN_BIAS)
    assert any("only merge adds" in note for note in report.notes) == (name in OWN_BIAS)


def test_every_verb_works_or_names_what_would(named: tuple[str, Case], tmp_path: Path) -> None:
    name, case = named
    record = inspect.run(case.adapter, inspect.Options(stats=True)).record
    assert not [p for p in record["problems"] if p["severity"] == "error"]
    assert record["modules"] == len(CASES[name][1]["target_modules"]) * (1 + (name == "lora-bias"))
    pair = (case.adapter, 1.0), (case.adapter, 0.5)
    based = compare.Options(base=case.base, family="flux")
    report = compare.run(compare.plan(*pair, based))
    assert report.relative_error == pytest.approx(0.0 if name == "glora-bias" else 1.0)
    both = tmp_path / "both.safetensors"
    mixed = combine.Options(
        base=case.base, to="diffusers", family="flux", output=both, dtype="fp32"
    )
    combine.run(combine.plan(pair, mixed))
    after = case.merged(case.adapter)
    for key, delta in deltas(both).items():
        exact = 1.5 * (after[key].double() - case.state[key].double()).reshape(delta.shape)
        if name not in TURNS:  # a part of a turn: linear in the strength
            assert float((delta - exact).norm()) < 2e-5 * max(float(exact.norm()), 1e-2), key
    if name not in ADDITIVE:
        with pytest.raises(NotRepresentable, match="depends on the weight") as refused:
            as_lora(case)
        assert "--base" in (refused.value.hint or "")
    if name in WRITTEN:
        return
    small = resize.Options(rank=2, output=tmp_path / "small", family="flux")
    if name in ADDITIVE:
        assert {one["rank"] for one in resize.run(resize.plan(case.adapter, small)).details} == {2}
    else:
        with pytest.raises(NothingToDo, match="no(ne of its modules has a)? rank") as refused:
            resize.plan(case.adapter, small)
        assert "--algo lora" in (refused.value.hint or "")
    for to in ("bare", "comfy"):  # the latter has q, k and v in one layer
        with pytest.raises(
            NotRepresentable, match="folder of PEFT alone|split or fused"
        ) as refused:
            convert.plan(case.adapter, convert.Options(to=to, family="flux"))
        assert "--algo lora" in (refused.value.hint or "")


NAMED = ("vera-drawn", "pvera-drawn", "vblora", "supertuning-lora")
SETTLED = ("adalora", "hra", "fourierft", "gralora", "randlora", "road", "waveft", "psoft", "deft")
SILENT = ("delora", "hira", "miss", "miss-bat", "miss-mini", "vera", "glora", "ia3-output-linear")


@pytest.mark.parametrize("name", [name for name in CASES if name not in WRITTEN])
def test_tensors_without_their_configuration(name: str, tmp_path: Path) -> None:
    """What says all in its tensors is read; the others are refused by what is missing."""
    case = Case(name, tmp_path)
    alone = tmp_path / "renamed.safetensors"
    alone.write_bytes((case.adapter / "adapter_model.safetensors").read_bytes())
    if name.split("-")[0] in SETTLED or name in NAMED:
        with pytest.raises(NotRepresentable, match=r"adapter_config\.json") as refused:
            merge.plan(case.base, [(alone, 1.0)], merge.Options(output=tmp_path / "o.safetensors"))
        assert "name the folder" in (refused.value.hint or "")
        problems = inspect.run(alone).record["problems"]
        assert any("adapter_config.json" in p["what"] for p in problems)
    else:
        assert case.close(case.merged(alone))


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("adalora", {"init_r": 5}),
        ("adalora", {"lora_alpha": 4}),
        ("hra", {"apply_GS": True}),
        ("fourierft", {"random_loc_seed": 6}),
        ("fourierft", {"scaling": 7.1}),
        ("vera-drawn", {"projection_prng_key": 4}),
    ],
)
def test_the_configuration_matters(name: str, changed: dict[str, Any], tmp_path: Path) -> None:
    """The comparisons above can fail: another setting is another weight."""
    case = Case(name, tmp_path)
    path = case.adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    assert not case.close(case.merged(case.adapter))


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("adalora", {"init_r": "four"}),
        ("fourierft", {"random_loc_seed": 1.5}),
        ("fourierft", {"scaling": None}),
        ("vera-drawn", {"projection_prng_key": None}),
        ("psoft-lowrank", {"psoft_svd_lowrank_niter": 10**9}),
        ("psoft-neumann", {"num_cayley_neumann_terms": 10**9}),
        ("psoft-neumann", {"num_cayley_neumann_terms": float("inf")}),
        ("randlora", {"randlora_alpha": 10**350}),
    ],
)
def test_a_setting_that_is_no_number_is_refused(
    name: str, changed: dict[str, Any], tmp_path: Path
) -> None:
    case = Case(name, tmp_path)
    path = case.adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(AdaptkitError, match=next(iter(changed))):
        case.merged(case.adapter)


def test_the_side_of_an_ia3_of_a_convolution_is_in_the_configuration(tmp_path: Path) -> None:
    case = Case("ia3-pattern", tmp_path)
    path = case.adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"feedforward_modules": ["to_q"]}))
    with pytest.raises(ShapeMismatch, match=r"to_v is 6 × 144 .*, 16 × \? in this adapter"):
        case.merged(case.adapter)
    path.unlink()
    with pytest.raises(NotRepresentable, match="feedforward_modules"):
        case.merged(case.adapter)


@pytest.mark.parametrize("name", ["fourierft", "shira", "miss", "c3a", "road-4", "randlora"])
def test_a_layer_whose_halves_are_exchanged_in_other_names(name: str, tmp_path: Path) -> None:
    """The last modulation of FLUX.1: merged into either layout, and converted with the base."""

    class Modulated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.norm_out = nn.Module()
            self.norm_out.linear = nn.Linear(IN, WIDE)

    kind, options = CASES[name]
    model = Modulated()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    save_file(state, tmp_path / "base.safetensors")
    turned = {key: value.roll(WIDE // 2, 0).contiguous() for key, value in state.items()}
    names = {key: key.replace("norm_out.linear", "final_layer.adaLN_modulation.1") for key in state}
    save_file({names[key]: turned[key] for key in state}, tmp_path / "turned.safetensors")
    config = getattr(peft, kind)(**{**options, "target_modules": ["linear"]})
    tuned = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    tuned.save_pretrained(tmp_path / "a")
    exact = tuned.merge_and_unload().state_dict()
    out = tmp_path / "o.safetensors"
    for base in ("base", "turned"):
        given = merge.Options(output=out, overwrite=True, family="flux", verify=True)
        merge.run(merge.plan(tmp_path / f"{base}.safetensors", [(tmp_path / "a", 1.0)], given))
        after = load_file(out)
        for key, value in exact.items():
            found = after[key] if base == "base" else after[names[key]].roll(WIDE // 2, 0)
            torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)
    lora = convert.Options(
        to="comfy", family="flux", algo="lora", base=tmp_path / "base.safetensors", output=out,
        overwrite=True, dtype="fp32", verify=True,
    )  # fmt: skip
    convert.run(convert.plan(tmp_path / "a", lora))
    change = exact["norm_out.linear.weight"] - state["norm_out.linear.weight"]
    with Adapter.open(out, family="flux") as adapter:
        (entry,) = adapter.entries.values()
        delta = adapter.weights(entry).delta()
    assert float((delta - change.roll(WIDE // 2, 0)).norm()) < 1e-5 * float(change.norm())


def test_modules_without_a_rank_left_change_nothing(tmp_path: Path) -> None:
    """AdaLoRA may take all ranks from a module, and saves empty tensors of it."""
    case = Case("adalora-cut", tmp_path)
    path = case.adapter / "adapter_model.safetensors"
    tensors, config = load_file(path), case.adapter / "adapter_config.json"
    for key in [key for key in tensors if "to_k" in key]:
        tensors[key] = tensors[key][:, :0] if "lora_B" in key else tensors[key][:0]
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    said = json.loads(config.read_text())
    pattern = dict(PATTERN) | {f"{BLOCK}.attn.to_k.lora_E": [False] * 4}
    config.write_text(json.dumps(said | {"rank_pattern": pattern}))
    loaded = peft.PeftModel.from_pretrained(Model(conv=False), case.adapter).eval()
    with torch.no_grad():
        case.expected = loaded(case.x)
    assert case.close(case.merged(case.adapter))
    problems = inspect.run(case.adapter).record["problems"]
    assert [p["severity"] for p in problems] == ["warning"]
    assert "rank 0" in problems[0]["what"]
    out = tmp_path / "again"
    convert.run(convert.plan(case.adapter, convert.Options(to="peft", family="flux", output=out)))
    loaded = peft.PeftModel.from_pretrained(Model(conv=False), out).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(case.x), case.expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["hra", "fourierft", "vera-drawn", "hira", "adalora", "glora-number"]
)
def test_parts_of_a_fused_layer(name: str, tmp_path: Path) -> None:
    """FLUX.1 has q, k and v in one layer in ComfyUI's names: with the base they are fused."""

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            block, attn = nn.Module(), nn.Module()
            torch.manual_seed(1)
            for one in "qkv":
                setattr(attn, f"to_{one}", nn.Linear(WIDE, WIDE, bias=False))
            block.attn = attn
            self.transformer_blocks = nn.ModuleList([block])

    kind, options = CASES[name]
    model = Fused()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    save_file(state, tmp_path / "base.safetensors")
    qkv = torch.cat([state[f"{BLOCK}.attn.to_{one}.weight"] for one in "qkv"])
    save_file({"double_blocks.0.img_attn.qkv.weight": qkv}, tmp_path / "fused.safetensors")
    tuned = peft.get_peft_model(
        model, getattr(peft, kind)(**{**options, "target_modules": ["to_q", "to_v"]})
    )
    with torch.no_grad():
        for _, parameter in tuned.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    tuned.save_pretrained(tmp_path / "a")
    merged = tuned.merge_and_unload().state_dict()
    exact = torch.cat([merged[f"{BLOCK}.attn.to_{one}.weight"] for one in "qkv"]) - qkv
    out = tmp_path / "o.safetensors"
    for base in ("base", "fused"):
        given = merge.Options(output=out, overwrite=True, family="flux", verify=True)
        source = tmp_path / f"{base}.safetensors"
        merge.run(merge.plan(source, [(tmp_path / "a", 1.0)], given))
        after = load_file(out)
        found = (
            torch.cat([after[f"{BLOCK}.attn.to_{one}.weight"] for one in "qkv"])
            if base == "base"
            else after["double_blocks.0.img_attn.qkv.weight"]
        )
        assert float((found - qkv - exact).norm()) < 1e-5 * float(exact.norm())
    lora = convert.Options(
        to="comfy",
        family="flux",
        algo="lora",
        base=tmp_path / "fused.safetensors",
        output=out,
        overwrite=True,
        dtype="fp32",
    )
    convert.run(convert.plan(tmp_path / "a", lora))
    with Adapter.open(out, family="flux") as adapter:
        (entry,) = adapter.entries.values()
        delta = adapter.weights(entry).delta()
    assert float((delta - exact).norm()) < 1e-5 * float(exact.norm())
