"""What merge makes of a checkpoint is what LyCORIS, PEFT and diffusers compute with the adapter loaded, to one rounding.

The package runs in float64 on the base's own (rounded) weights, so its answer is the exact one: every element that
adaptkit writes, in float32, float16 or bfloat16, must be that number rounded once. Adapters go through files, names and
all, into a real U-Net under its single-file names, or a transformer under diffusers' names.

At a strength other than 1 a kind that is no difference gives W + s (W' − W): peers differ there (gotcha 17).
"""

from __future__ import annotations

import copy
import itertools
import logging
import re
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from adaptkit.ops import merge
from tests.interop import test_family_models as family_models
from tests.interop.conftest import unet_names

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tests.interop.conftest import Sd1, State

diffusers = pytest.importorskip("diffusers")
lycoris = pytest.importorskip("lycoris")
peft = pytest.importorskip("peft")

from lycoris.modules.dylora import DyLoraModule  # noqa: E402

pytestmark = pytest.mark.interop

ROOT = "down_blocks.1"  # both kinds of convolution, a stride of 2, norms, attention, two widths
OTHERS = ("conv_in.", "mid_block.resnets.0.")  # parts of the base that no adapter touches
DTYPES = {
    "fp32": (torch.float32, 1.0),
    "fp16": (torch.float16, 0.6),
    "bf16": (torch.bfloat16, -1.0),
}


@pytest.fixture(params=DTYPES)
def number(request: pytest.FixtureRequest) -> tuple[torch.dtype, float]:
    """(dtype of the base, strength)."""
    return DTYPES[request.param]


@cache
def _block(sd1: Sd1) -> nn.Module:
    block = sd1.unet().get_submodule(ROOT)
    block.attentions, block.resnets = (
        block.attentions[:1],
        block.resnets[:1],
    )  # the others are of the same shapes
    return block  # type: ignore[no-any-return]


class Real:
    """A part of the tiny SD 1 U-Net: as a file to merge into, in any dtype, and as the modules of exactly these weights."""

    def __init__(self, sd1: Sd1, dtype: torch.dtype, folder: Path) -> None:
        whole = unet_names(sd1.base)
        key_of = {
            id(tensor): key for key, tensor in sd1.base.items()
        }  # diffusers' converter moves, and copies nothing
        kept = {f"{ROOT}.{name}" for name in _block(sd1).state_dict()}
        self.named = {
            name: t.to(dtype)
            for name, t in whole.items()
            if name in kept or name.startswith(OTHERS)
        }
        self.keys = {name: key_of[id(whole[name])] for name in self.named}
        self.dtype, self.folder = dtype, folder
        self.path = folder / "base.safetensors"
        save_file(
            {self.keys[name]: t for name, t in self.named.items()},
            self.path,
            metadata={"format": "pt"},
        )

    def block(self, sd1: Sd1) -> nn.Module:
        """The real modules below `ROOT`, in float32."""
        made = copy.deepcopy(_block(sd1))
        made.load_state_dict(
            {n.removeprefix(f"{ROOT}."): t for n, t in self.named.items() if n.startswith(ROOT)}
        )
        return made

    def merged(self, *adapters: tuple[Path, float]) -> State:
        """`adaptkit merge`, under diffusers' names."""
        output = self.folder / "merged.safetensors"
        plan = merge.plan(
            self.path, adapters, merge.Options(output=output, overwrite=True, family="sd1")
        )
        merge.run(plan)
        plan.close()
        found = load_file(output)
        return {name: found[key] for name, key in self.keys.items()}

    def check(self, found: State, expected: Mapping[str, torch.Tensor], strength: float) -> None:
        """Every tensor of `expected` (exact, at strength 1) was written as W + s (W' − W); no other changed."""
        for name, base in self.named.items():
            if name not in expected:
                assert torch.equal(found[name], base), name
                continue
            exact = base.double() + strength * (expected[name].detach().double() - base.double())
            assert_rounded(found[name], exact, name)
            moved = (exact - base.double()).abs().max()
            assert moved > 0.002, f"{name}: nothing to see"
        assert expected.keys() <= self.named.keys()


def assert_rounded(found: torch.Tensor, exact: torch.Tensor, name: str) -> None:
    """Half a unit in the last place of the stored dtype, and what float32 may lose on the way there."""
    allowed = exact.abs() * torch.finfo(
        found.dtype
    ).eps / 2 * 1.01 + 2e-6 * exact.abs().max().clamp(min=1.0)
    error = (found.double().reshape(exact.shape) - exact).abs()
    assert bool((error <= allowed).all()), (
        f"{name}: off by {float((error / allowed).max()):.3g} roundings"
    )


# --- LyCORIS: the forward pass (its merge is no oracle: gotcha 16) -----------------------------------------------------

WHOLE = {"lora_dim": 3, "conv_lora_dim": 2, "alpha": 2, "conv_alpha": 1, "rs_lora": False}
LYCORIS: dict[str, dict[str, Any]] = {
    "locon": {"network_module": "locon"},
    "locon-scalar": {"network_module": "locon", "use_scalar": True},
    "locon-rank-scaled": {"network_module": "locon", "rs_lora": True},
    "locon-tucker": {"network_module": "locon", "use_tucker": True},
    "locon-norm": {"network_module": "locon", "train_norm": True},
    "dylora": {"network_module": "dylora", "block_size": 1},
    "loha": {"network_module": "loha"},
    "loha-scalar": {"network_module": "loha", "use_scalar": True},
    "loha-tucker": {"network_module": "loha", "use_tucker": True},
    "lokr": {"network_module": "lokr", "factor": 4, "lora_dim": 1, "conv_lora_dim": 1},
    "lokr-scalar": {"network_module": "lokr", "factor": 2, "use_scalar": True},
    "lokr-full": {"network_module": "lokr", "factor": 4, "full_matrix": True},
    "lokr-both": {"network_module": "lokr", "factor": 4, "decompose_both": True, "lora_dim": 1, "conv_lora_dim": 1},
    "lokr-tucker": {"network_module": "lokr", "factor": 2, "use_tucker": True, "lora_dim": 2},
    "lokr-tucker-both": {
        "network_module": "lokr", "factor": 4, "use_tucker": True, "decompose_both": True, "lora_dim": 1, "conv_lora_dim": 1
    },
    "lokr-unbalanced": {"network_module": "lokr", "factor": 4, "unbalanced_factorization": True, "lora_dim": 1},
    "full": {"network_module": "full"},
    "full-norm": {"network_module": "full", "train_norm": True},
    "ia3-output": {"network_module": "ia3"},
    "ia3-input": {"network_module": "ia3", "train_on_input": True},
    "glora": {"network_module": "glora"},
    "diag-oft": {"network_module": "diag-oft", "lora_dim": 4, "conv_lora_dim": 4, "constraint": 0},
    "diag-oft-bounded": {"network_module": "diag-oft", "lora_dim": 4, "conv_lora_dim": 4, "constraint": 0.01},
    "diag-oft-rescaled": {"network_module": "diag-oft", "lora_dim": 4, "conv_lora_dim": 4, "rescaled": True},
    "boft": {"network_module": "boft", "lora_dim": 4, "conv_lora_dim": 4, "constraint": 0},
    "boft-bounded": {
        "network_module": "boft", "lora_dim": 4, "conv_lora_dim": 4, "constraint": 0.01, "rescaled": True
    },
    **{
        f"{name}-dora-{'out' if out else 'in'}": {**options, "weight_decompose": True, "wd_on_out": out}
        for out in (True, False)
        for name, options in {
            "locon": {"network_module": "locon"},
            "locon-tucker": {"network_module": "locon", "use_tucker": True},
            "loha": {"network_module": "loha"},
            "lokr": {"network_module": "lokr", "factor": 4, "lora_dim": 1, "conv_lora_dim": 1},
            "lokr-full": {"network_module": "lokr", "factor": 4, "full_matrix": True},
        }.items()
    },
}  # fmt: skip


@pytest.fixture
def _whole_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer of the block under kohya's names; LyCORIS keeps its presets in the class."""
    kind = lycoris.LycorisNetwork
    modules = ["Linear", "Conv1d", "Conv2d", "Conv3d", "GroupNorm", "LayerNorm"]
    monkeypatch.setattr(logging.getLogger("LyCORIS"), "disabled", True)
    for name, value in {
        "LORA_PREFIX": "lora_unet_" + ROOT.replace(".", "_"),
        "TARGET_REPLACE_MODULE": modules,
        "TARGET_REPLACE_NAME": [],
        "MODULE_ALGO_MAP": {},
        "NAME_ALGO_MAP": {},
        "ENABLE_CONV": True,
    }.items():
        monkeypatch.setattr(kind, name, value)


def network_of(block: nn.Module, options: Mapping[str, Any]) -> Any:
    """LyCORIS' network on a block, with random numbers."""
    torch.manual_seed(7)
    network = lycoris.LycorisNetwork(block, 1.0, **{**WHOLE, **options})
    network.apply_to()  # before, the network has no parameters and saves none
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "dora_scale" in name:
                parameter.copy_(parameter.abs() * (0.75 + 0.5 * torch.rand_like(parameter)) + 0.1)
            elif "rescale" in name:
                parameter.copy_(0.75 + 0.5 * torch.rand_like(parameter))
            elif name.endswith("scalar"):
                parameter.fill_(0.75)
            else:
                nn.init.normal_(parameter, std=0.3)
    for module in network.loras:
        if isinstance(module, DyLoraModule):  # a random number of its ranks otherwise
            module.get_random_rank_weight = partial(module.get_weight, module.lora_dim - 1)
    return network.eval()


@torch.no_grad()
def effective(module: Any, layer: nn.Module) -> State:
    """The exact parameters of the layer that computes what a LyCORIS module does, from its outputs alone."""
    weight = layer.get_parameter("weight")
    if weight.ndim == 1:
        return norm_of(module, layer)
    units = torch.eye(weight[0].numel(), dtype=torch.float64)
    if isinstance(
        layer, nn.Conv2d
    ):  # one pixel at a time, all of which one place of the output sees
        at, size = layer.stride[0] - int(layer.padding[0]), weight.shape[2]
        x = torch.zeros(len(units) + 1, weight.shape[1], 4, 4, dtype=torch.float64)
        x[:-1, :, at : at + size, at : at + size] = units.reshape(-1, *weight.shape[1:])
        out = module(x)[:, :, 1, 1]
    else:
        out = module(torch.cat([units, 0 * units[:1]]))
    found = {"weight": (out[:-1] - out[-1]).T.reshape(weight.shape)}
    return found if layer.bias is None else {**found, "bias": out[-1]}


def norm_of(module: Any, layer: nn.Module) -> State:
    """The same for a norm, which is odd apart from its bias."""
    grouped = isinstance(layer, nn.GroupNorm)
    x = torch.randn(
        2, len(layer.get_parameter("weight")), *([4, 4] if grouped else []), dtype=torch.float64
    )
    plus, minus, plain = module(x), module(-x), layer_of(layer)(x)
    axes = (0, 2, 3) if grouped else (0,)
    weight = ((plus - minus) / 2 * plain).sum(axes) / plain.square().sum(axes)
    return {"weight": weight, "bias": ((plus + minus) / 2).mean(axes)}


def layer_of(norm: nn.Module) -> nn.Module:
    """The norm without weights."""
    if isinstance(norm, nn.GroupNorm):
        return nn.GroupNorm(norm.num_groups, norm.num_channels, norm.eps, affine=False)
    assert isinstance(norm, nn.LayerNorm)
    return nn.LayerNorm(norm.normalized_shape, norm.eps, elementwise_affine=False)


@pytest.mark.share(4)
@pytest.mark.usefixtures("_whole_block")
@pytest.mark.parametrize("case", LYCORIS)
def test_a_merge_is_the_forward_pass_of_lycoris(
    sd1: Sd1,
    tmp_path: Path,
    case: str,
    number: tuple[torch.dtype, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dtype, strength = number
    real = Real(sd1, dtype, tmp_path)
    block, plain = real.block(sd1), real.block(sd1).double()
    names = {layer: name for name, layer in block.named_modules()}
    network = network_of(block, LYCORIS[case])
    network.save_weights(str(tmp_path / "a.safetensors"), torch.float32, {})
    network.double()
    block.double()
    exact = {}
    for module in network.loras:
        name = names[module.org_module[0]]
        with monkeypatch.context() as patch:  # LyCORIS inverts in float32
            patch.setattr(torch.Tensor, "float", lambda t: t)
            values = effective(module, plain.get_submodule(name))
        for parameter, value in values.items():
            before = plain.get_parameter(f"{name}.{parameter}")
            if parameter == "weight" or not torch.allclose(value, before, atol=1e-9):
                exact[f"{ROOT}.{name}.{parameter}"] = value
    assert len(network.loras) > 15
    assert any(name.endswith("bias") for name in exact) == (
        case.startswith("full") or case.endswith("norm")
    )
    real.check(real.merged((tmp_path / "a.safetensors", strength)), exact, strength)


# --- PEFT: merge_and_unload of what save_pretrained wrote --------------------------------------------------------------

LINEAR = r".*(to_q|to_k|to_out\.0|ff\.net\.2|time_emb_proj)"
CONV = r".*(conv1|conv_shortcut|proj_in|downsamplers\.0\.conv)"
BOTH = rf"{LINEAR}|{CONV}"
PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("Lora", {"r": 3, "lora_alpha": 2, "target_modules": BOTH}),
    "rslora": ("Lora", {"r": 3, "lora_alpha": 2, "use_rslora": True, "target_modules": BOTH}),
    "lora-bias": ("Lora", {"r": 3, "lora_alpha": 3, "lora_bias": True, "target_modules": r".*(ff\.net\.2|conv1)"}),
    "dora": ("Lora", {"r": 3, "lora_alpha": 2, "use_dora": True, "target_modules": BOTH}),
    "loha": ("LoHa", {"r": 2, "alpha": 3, "target_modules": BOTH}),
    "loha-tucker": ("LoHa", {"r": 2, "alpha": 3, "use_effective_conv2d": True, "target_modules": BOTH}),
    "lokr": ("LoKr", {"r": 2, "alpha": 3, "target_modules": BOTH}),
    "lokr-full": ("LoKr", {"r": 64, "alpha": 48, "target_modules": BOTH}),
    "lokr-both": ("LoKr", {"r": 1, "alpha": 2, "decompose_both": True, "target_modules": BOTH}),
    "lokr-tucker": ("LoKr", {"r": 2, "alpha": 3, "use_effective_conv2d": True, "target_modules": BOTH}),
    "oft": ("OFT", {"oft_block_size": 4, "target_modules": LINEAR}),
    "oft-conv": ("OFT", {"oft_block_size": 4, "target_modules": r".*(conv1|downsamplers\.0\.conv)"}),
    "oft-shared": ("OFT", {"oft_block_size": 4, "block_share": True, "target_modules": LINEAR}),
    "boft": ("BOFT", {"boft_block_size": 4, "target_modules": BOTH}),
    "ia3-output": ("IA3", {"feedforward_modules": [], "target_modules": r".*(to_q|to_k)"}),
    "ia3-input": ("IA3", {"feedforward_modules": r".*(to_q|net\.2)", "target_modules": r".*(to_q|net\.2)"}),
}  # fmt: skip


def named(block: nn.Module) -> nn.Module:
    """A model in which the block has its real name."""
    model = nn.Module()
    parent, _, name = ROOT.partition(".")
    model.add_module(parent, nn.ModuleDict({name: block}))
    return model


def trained(model: nn.Module, config: Any) -> Any:
    """A PEFT model with random numbers in its adapter."""
    torch.manual_seed(11)
    made = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if re.search(r"lora_[AB]|hada_|lokr_|oft_R|boft_R", name):
                parameter.normal_(std=0.5 if "hada_" in name or "lokr_" in name else 0.25)
            elif re.search(r"magnitude|ia3_l|boft_s", name):
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    return made


@pytest.mark.share(3)
@pytest.mark.parametrize("case", PEFT)
def test_a_merge_is_what_peft_merges(
    sd1: Sd1,
    tmp_path: Path,
    case: str,
    number: tuple[torch.dtype, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peft.tuners.boft import layer

    monkeypatch.setattr(
        layer, "get_fbd_cuda", lambda: None
    )  # PEFT would compile BOFT's CUDA extension
    dtype, strength = number
    real = Real(sd1, dtype, tmp_path)
    kind, options = PEFT[case]
    model = trained(named(real.block(sd1)), getattr(peft, f"{kind}Config")(**options))
    model.save_pretrained(str(tmp_path / "adapter"))
    before = {n.removeprefix("base_model.model."): t for n, t in real.named.items()}
    after = model.double().merge_and_unload().state_dict()
    changed = {
        n: t for n, t in after.items() if not torch.allclose(t, before[n].double(), atol=1e-9)
    }
    assert len(changed) >= 2
    assert any(name.endswith("bias") for name in changed) == (case == "lora-bias")
    real.check(real.merged((tmp_path / "adapter", strength)), changed, strength)


# --- diffusers: fuse_lora ----------------------------------------------------------------------------------------------

STRENGTHS = (1.0, 0.6, -1.0)


@pytest.mark.share(3)
@pytest.mark.parametrize(
    ("family", "strength"),
    [
        *(("flux", strength) for strength in STRENGTHS),
        *zip(
            sorted(family_models.MODELS.keys() - {"flux"}), itertools.cycle(STRENGTHS), strict=False
        ),
    ],
)
def test_a_merge_is_what_diffusers_fuses(family: str, strength: float, tmp_path: Path) -> None:
    """Every transformer, saved by diffusers in bfloat16 and loaded in float64, with a LoRA of every layer.

    But HunyuanVideo's Conv3d of one place: PEFT 0.21 takes it for a Conv2d when it merges, and raises.
    """
    first = family_models.FIRST.get(family, "kohya")
    source = family_models.source(family, tmp_path / "a.safetensors")
    save_file(
        {k: t for k, t in load_file(source).items() if not k.startswith("lora_unet_img_in_proj.")},
        source,
    )
    family_models.converted(source, tmp_path / "b.safetensors", family, "diffusers", first)
    model = family_models.model(family).bfloat16()
    model.save_pretrained(tmp_path / "transformer")
    base = model.state_dict()
    fused = fresh_fused(family, base, [(tmp_path / "b.safetensors", strength)])
    for adapter in (tmp_path / "b.safetensors", source):  # and as the trainer wrote it
        found = merged_transformer(
            family, tmp_path, [(adapter, strength)], first if adapter is source else "diffusers"
        )
        compare(base, fused, found)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_a_merge_of_kohyas_flux_is_what_diffusers_own_converter_makes_of_it(
    strength: float, tmp_path: Path
) -> None:
    """One LoRA of q, k and v together becomes three.

    Of the layers outside the blocks diffusers drops all (gotcha 2), and of `linear1` it knows the real model's sizes only.
    """
    source = family_models.source("flux", tmp_path / "a.safetensors")
    state = {
        key: t for key, t in load_file(source).items() if "_blocks_" in key and "linear1" not in key
    }
    save_file(state, source)
    model = family_models.model("flux").bfloat16()
    model.save_pretrained(tmp_path / "transformer")
    state, alphas = diffusers.FluxPipeline.lora_state_dict(str(source), return_alphas=True)
    fused = family_models.model("flux").double()
    fused.load_state_dict({name: t.double() for name, t in model.state_dict().items()})
    diffusers.FluxPipeline.load_lora_into_transformer(state, alphas, fused)
    fused.fuse_lora(lora_scale=strength)
    fused.unload_lora()
    found = merged_transformer("flux", tmp_path, [(source, strength)], "kohya")
    compare(model.state_dict(), dict(fused.state_dict()), found)


@pytest.mark.parametrize("family", ["flux", "wan"])
def test_a_merge_of_two_is_what_diffusers_fuses(family: str, tmp_path: Path) -> None:
    paths = []
    for n in range(2):
        source = family_models.source(family, tmp_path / "a.safetensors")
        if n:
            save_file(
                {k: t if "alpha" in k else t.flip(0) for k, t in load_file(source).items()}, source
            )
        paths.append(tmp_path / f"{n}.safetensors")
        family_models.converted(source, paths[-1], family, "diffusers", "kohya")
    model = family_models.model(family).bfloat16()
    model.save_pretrained(tmp_path / "transformer")
    adapters = list(zip(paths, (0.7, -0.4), strict=True))
    fused = fresh_fused(family, model.state_dict(), adapters)
    compare(model.state_dict(), fused, merged_transformer(family, tmp_path, adapters, "diffusers"))


def fresh_fused(family: str, base: State, adapters: list[tuple[Path, float]]) -> State:
    """The transformer in float64 with the adapters fused: several by their weights, one by `lora_scale`."""
    model = family_models.model(family).double()
    model.load_state_dict({name: t.double() for name, t in base.items()})
    for n, (path, _) in enumerate(adapters):
        model.load_lora_adapter(load_file(path), prefix="transformer", adapter_name=str(n))
    if len(adapters) > 1:
        model.set_adapters(
            [str(n) for n in range(len(adapters))], [strength for _, strength in adapters]
        )
        model.fuse_lora()
    else:
        model.fuse_lora(lora_scale=adapters[0][1])
    model.unload_lora()
    return dict(model.state_dict())


def merged_transformer(
    family: str, folder: Path, adapters: list[tuple[Path, float]], format: str
) -> State:
    options = merge.Options(
        output=folder / "m.safetensors", overwrite=True, family=family, format=format
    )
    (base,) = (folder / "transformer").glob("*.safetensors")
    plan = merge.plan(base, adapters, options)
    merge.run(plan)
    plan.close()
    return load_file(folder / "m.safetensors")


def compare(base: State, exact: State, found: State) -> None:
    assert found.keys() == exact.keys() == base.keys()
    changed = 0
    for name, tensor in found.items():
        assert tensor.dtype == base[name].dtype == torch.bfloat16
        if torch.equal(base[name].double(), exact[name]):
            assert torch.equal(tensor, base[name]), name
        else:
            assert_rounded(tensor, exact[name], name)
            changed += 1
    assert changed > 10
