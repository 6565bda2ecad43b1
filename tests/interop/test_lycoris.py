"""LyCORIS reads what `extract` writes, adaptkit reads what LyCORIS writes, and both mean the same ΔW.

ΔW is what LyCORIS' forward pass adds, in float64: `get_diff_weight` applies alpha / rank a second time for LoKr
(LyCORIS 4.1.3), which is why it agrees here only where alpha is the rank.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from adaptkit.algorithms import lokr as ours_lokr
from adaptkit.algorithms.contract import Stated
from adaptkit.keymap import algorithms
from adaptkit.linalg.kron.blocks import factorization
from tests import oracle
from tests.interop.conftest import Sd1, clip_names, close, deltas, lokr, lora, noise, unet_names
from tests.synth import FIXTURES, load_listing

lycoris_modules = pytest.importorskip("lycoris.modules")

pytestmark = pytest.mark.interop

FACTORS = (-1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 32, 64)


def kohya_layers(sd1: Sd1) -> dict[str, nn.Module]:
    """The real layers (float64, copies) by the name kohya's files give them."""
    unet, clip = sd1.unet().double(), sd1.clip().double()
    layers = {f"lora_unet_{name}": module for name, module in unet.named_modules()}
    for name, module in clip.named_modules():
        layers[f"lora_te_text_model.{name.removeprefix('text_model.')}"] = module
    return {name.replace(".", "_"): module for name, module in layers.items()}


def labelled(by_label: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Labels (`unet.a.b`, `text_encoder.a.b`) to kohya's names."""
    return {
        f"lora_{name.replace('text_encoder', 'te', 1) if name.startswith('text') else name}".replace(
            ".", "_"
        ): delta
        for name, delta in by_label.items()
    }


def added(module: Any, layer: nn.Module, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(what LyCORIS' forward adds, what `delta` would) on enough random inputs that equal outputs mean equal ΔW."""
    generator = torch.Generator().manual_seed(5)
    if isinstance(layer, nn.Linear):
        x = torch.randn(
            layer.in_features + 3, layer.in_features, generator=generator, dtype=torch.float64
        )
        return module(x) - layer(x), nn.functional.linear(x, delta.reshape(layer.weight.shape))
    spatial = len(layer.kernel_size)
    samples = 1 + layer.weight[0].numel() // 3**spatial  # a stride of 2 leaves 3 places a side
    x = torch.randn(
        samples, layer.in_channels, *([6] * spatial), generator=generator, dtype=torch.float64
    )
    op = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[spatial - 1]
    geometry = {
        "stride": layer.stride,
        "padding": layer.padding,
        "dilation": layer.dilation,
        "groups": layer.groups,
    }
    return module(x) - layer(x), op(x, delta.reshape(layer.weight.shape), None, **geometry)


def loaded(
    state: Mapping[str, torch.Tensor], layers: Mapping[str, nn.Module]
) -> Iterator[tuple[str, Any, nn.Module]]:
    """Every module of a file as LyCORIS makes it."""
    for name in dict.fromkeys(key.split(".")[0] for key in state):
        kind, params = lycoris_modules.get_module(state, name)
        module = lycoris_modules.make_module(kind, params, name, layers[name])
        yield name, module.double().eval(), layers[name]


@pytest.fixture(scope="session")
def layers(sd1: Sd1) -> dict[str, nn.Module]:
    return kohya_layers(sd1)


# in the tiny U-Net `conv_in` and `conv_out` have 4 channels on one side; LyCORIS guesses the factor from shapes, and
# cannot where 4 is cut as 2 × 2 and the other side as 1 × 8: see test_lycoris_guesses_the_factor for the real widths
NARROW = ("*conv_in", "*conv_out")

CASES: dict[str, tuple[Any, dict[str, Any], type[Any]]] = {
    "lokr-factor-8": (
        lokr(8),
        {"algo": "lokr", "factor": 8, "skip": NARROW},
        lycoris_modules.LokrModule,
    ),
    "lokr-factor-4": (lokr(4), {"algo": "lokr", "factor": 4}, lycoris_modules.LokrModule),
    "lokr-low-rank": (
        lokr(4, 2),
        {"algo": "lokr", "factor": 4, "rank": 2},
        lycoris_modules.LokrModule,
    ),
    "lokr-of-a-finetune": (
        noise,
        {"algo": "lokr", "factor": 2, "rank": 3},
        lycoris_modules.LokrModule,
    ),
    "lora": (lora(3), {"rank": 3}, lycoris_modules.LoConModule),
    "locon-of-a-finetune": (noise, {"rank": 6, "conv_rank": 2}, lycoris_modules.LoConModule),
}


@pytest.mark.share(3)
@pytest.mark.parametrize("case", CASES)
def test_lycoris_loads_what_extract_writes(
    sd1: Sd1, layers: dict[str, nn.Module], tmp_path: Path, case: str
) -> None:
    delta, options, kind = CASES[case]
    output = tmp_path / f"{case}.safetensors"
    report = sd1.extract(sd1.tuned(case, delta), output, **options)
    state, ours = load_file(output), labelled(deltas(output))
    merged = kohya_named(sd1.merge(output, tmp_path / "merged.safetensors"))
    assert report.modules == len(ours) >= 350
    low = 0
    for name, module, layer in loaded(state, layers):
        assert type(module) is kind, name
        theirs, mine = added(module, layer, ours.pop(name))
        assert close(theirs, mine, 1e-9), name
        # and the way a host merges: alpha is the rank, so the scale that LyCORIS applies twice to a LoKr is 1
        # (without a shape it cannot merge a convolution of low rank: LyCORIS 4.1.3)
        weight = module.get_merged_weight(shape=layer.weight.shape)[0]
        assert close(merged[name], weight, 2e-7), name
        low += kind is lycoris_modules.LokrModule and not module.use_w2
    assert not ours
    assert (low > 100) == ("rank" in options and kind is lycoris_modules.LokrModule)
    if delta is not noise:
        assert report.relative_error < 1e-5


def kohya_named(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of a checkpoint by kohya's module names, through diffusers' converter."""
    found = {f"lora_unet_{n}": t for n, t in unet_names(dict(state)).items()}
    found |= {f"lora_te_{n}": t for n, t in clip_names(dict(state)).items()}
    return {
        n.removesuffix(".weight").replace(".", "_"): t
        for n, t in found.items()
        if n.endswith(".weight")
    }


@pytest.mark.share(3)
@pytest.mark.parametrize("algo", ["lora", "lokr", "full"])
def test_create_lycoris_from_weights_on_a_whole_unet(sd1: Sd1, tmp_path: Path, algo: str) -> None:
    from lycoris import create_lycoris_from_weights

    output = tmp_path / "out.safetensors"
    tuned = sd1.tuned("noise", noise)
    options = {"rank": 4} if algo == "lora" else {"factor": 4} if algo == "lokr" else {}
    report = sd1.extract(tuned, output, algo=algo, to="lycoris", only=("unet",), **options)
    unet = sd1.unet()
    network, _ = create_lycoris_from_weights(1.0, str(output), unet)
    assert len(network.loras) == report.modules == 282
    network.merge_to(1.0)
    expected = unet_names(sd1.merge(output, tmp_path / "merged.safetensors"))
    before = unet_names(sd1.base)
    merged = unet.state_dict()
    for name, tensor in expected.items():
        assert close(merged[name], tensor, 5e-7), name
    changed = [name for name in expected if not torch.equal(before[name], expected[name])]
    assert len(changed) == report.modules


def test_lycoris_applies_vectors_only_beside_their_own_weight(
    sd1: Sd1, layers: dict[str, nn.Module], tmp_path: Path
) -> None:
    """What hosts on LyCORIS make of `diff_b`, `w_norm` and `b_norm`: why `extract` leaves them out unless --vectors."""
    output = tmp_path / "out.safetensors"
    sd1.extract(
        sd1.tuned("noise-vectors", noise, vectors=True),
        output,
        rank=4,
        only=("unet.mid_block.*",),
        vectors=True,
    )
    state, ours = load_file(output), labelled(deltas(output))
    norm = "lora_unet_mid_block_resnets_0_norm1"
    kind, params = lycoris_modules.get_module(state, norm)
    module = lycoris_modules.make_module(kind, params, norm, layers[norm])
    assert type(module) is lycoris_modules.NormModule
    assert torch.equal(module.w_norm, state[f"{norm}.w_norm"])
    assert torch.equal(module.b_norm, state[f"{norm}.b_norm"])
    # a bias beside a LoRA: LyCORIS takes the LoRA and leaves `diff_b` where it is
    conv = "lora_unet_mid_block_resnets_0_conv1"
    assert f"{conv}.diff_b" in state
    kind, params = lycoris_modules.get_module(state, conv)
    assert kind is lycoris_modules.LoConModule
    assert not any(t is state[f"{conv}.diff_b"] for t in params if t is not None)
    # a norm whose bias alone changed, or a bias without a weight: unknown to it
    assert lycoris_modules.get_module({f"{norm}.b_norm": state[f"{norm}.b_norm"]}, norm) == (
        None,
        None,
    )
    assert lycoris_modules.get_module({f"{conv}.diff_b": state[f"{conv}.diff_b"]}, conv) == (
        None,
        None,
    )
    assert ours


# --- reading what LyCORIS writes -------------------------------------------------------------------------------------


def linear(out: int, inputs: int) -> nn.Module:
    return nn.Linear(inputs, out)


def conv(out: int, inputs: int, *kernel: int) -> nn.Module:
    return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(kernel) - 1](inputs, out, kernel, padding=1)


HADAMARD = {"w1_a", "w1_b", "w2_a", "w2_b"}
SAVED: dict[str, tuple[nn.Module, str, dict[str, Any], set[str]]] = {
    "both-full": (linear(32, 24), "lokr", {"full_matrix": True, "factor": 8}, {"w1", "w2"}),
    "both-full-conv": (
        conv(16, 12, 3, 3),
        "lokr",
        {"full_matrix": True, "factor": 4},
        {"w1", "w2"},
    ),
    "factor-4": (
        linear(32, 24),
        "lokr",
        {"factor": 4, "lora_dim": 2, "alpha": 1},
        {"w1", "w2_a", "w2_b"},
    ),
    "low-rank": (
        linear(40, 24),
        "lokr",
        {"factor": -1, "lora_dim": 2, "alpha": 5},
        {"w1", "w2_a", "w2_b"},
    ),
    "both-low-rank": (
        linear(640, 96),
        "lokr",
        {"factor": 16, "lora_dim": 3, "alpha": 1, "decompose_both": True},
        {"w1_a", "w1_b", "w2_a", "w2_b"},
    ),
    "first-low-rank": (  # factor 24 of 24 × 24: w1 is the larger
        linear(576, 576),
        "lokr",
        {"factor": 24, "lora_dim": 11, "alpha": 1, "decompose_both": True},
        {"w1_a", "w1_b", "w2_a", "w2_b"},
    ),
    "low-rank-conv": (
        conv(32, 24, 3, 3),
        "lokr",
        {"factor": 4, "lora_dim": 2, "alpha": 1},
        {"w1", "w2_a", "w2_b"},
    ),
    "both-low-rank-conv": (
        conv(64, 64, 3, 3),
        "lokr",
        {"factor": 8, "lora_dim": 2, "alpha": 1, "decompose_both": True},
        {"w1_a", "w1_b", "w2_a", "w2_b"},
    ),
    "tucker": (
        conv(32, 24, 3, 3),
        "lokr",
        {"factor": 4, "lora_dim": 3, "alpha": 1, "use_tucker": True},
        {"w1", "t2", "w2_a", "w2_b"},
    ),
    "tucker-both": (
        conv(64, 48, 3, 3),
        "lokr",
        {"factor": 8, "lora_dim": 2, "alpha": 1, "use_tucker": True, "decompose_both": True},
        {"w1_a", "w1_b", "t2", "w2_a", "w2_b"},
    ),
    "tucker-conv3d": (
        conv(32, 24, 3, 1, 3),
        "lokr",
        {"factor": 4, "lora_dim": 3, "alpha": 1, "use_tucker": True},
        {"w1", "t2", "w2_a", "w2_b"},
    ),
    "conv1d": (
        conv(32, 24, 3),
        "lokr",
        {"factor": 4, "lora_dim": 2, "alpha": 1},
        {"w1", "w2_a", "w2_b"},
    ),
    "conv1d-full": (conv(32, 24, 3), "lokr", {"factor": 4, "full_matrix": True}, {"w1", "w2"}),
    "conv3d": (
        conv(16, 24, 3, 3, 3),
        "lokr",
        {"factor": 4, "lora_dim": 1, "alpha": 2},
        {"w1", "w2_a", "w2_b"},
    ),
    "conv3d-full": (
        conv(16, 24, 1, 3, 3),
        "lokr",
        {"factor": 4, "full_matrix": True},
        {"w1", "w2"},
    ),
    "unbalanced": (
        linear(32, 24),
        "lokr",
        {"factor": 4, "lora_dim": 2, "alpha": 1, "unbalanced_factorization": True},
        {"w1", "w2_a", "w2_b"},
    ),
    "rank-scaled": (
        linear(32, 24),
        "lokr",
        {"factor": 4, "lora_dim": 2, "alpha": 3, "rs_lora": True},
        {"w1", "w2_a", "w2_b"},
    ),
    "prime": (linear(31, 24), "lokr", {"factor": 8, "full_matrix": True}, {"w1", "w2"}),
    "lora": (linear(32, 24), "lora", {"lora_dim": 4, "alpha": 1}, {"up", "down"}),
    "lora-rank-scaled": (
        linear(32, 24),
        "lora",
        {"lora_dim": 4, "alpha": 3, "rs_lora": True},
        {"up", "down"},
    ),
    "locon": (conv(32, 24, 3, 3), "lora", {"lora_dim": 4, "alpha": 2}, {"up", "down"}),
    "locon-1x1": (conv(32, 24, 1, 1), "lora", {"lora_dim": 4, "alpha": 2}, {"up", "down"}),
    "locon-tucker": (
        conv(32, 24, 3, 3),
        "lora",
        {"lora_dim": 4, "alpha": 2, "use_tucker": True},
        {"up", "mid", "down"},
    ),
    "locon-conv1d": (conv(32, 24, 3), "lora", {"lora_dim": 4, "alpha": 2}, {"up", "down"}),
    "locon-conv3d": (conv(32, 24, 3, 3, 3), "lora", {"lora_dim": 4, "alpha": 2}, {"up", "down"}),
    "locon-tucker-conv3d": (
        conv(32, 24, 3, 3, 3),
        "lora",
        {"lora_dim": 4, "alpha": 2, "use_tucker": True},
        {"up", "mid", "down"},
    ),
    "loha": (linear(32, 24), "loha", {"lora_dim": 3, "alpha": 2}, HADAMARD),
    "loha-rank-scaled": (
        linear(32, 24),
        "loha",
        {"lora_dim": 4, "alpha": 3, "rs_lora": True},
        HADAMARD,
    ),
    "loha-conv": (conv(32, 24, 3, 3), "loha", {"lora_dim": 3, "alpha": 1}, HADAMARD),
    "loha-conv1d": (conv(32, 24, 3), "loha", {"lora_dim": 3, "alpha": 1}, HADAMARD),
    "loha-tucker": (
        conv(32, 24, 3, 3),
        "loha",
        {"lora_dim": 3, "alpha": 1, "use_tucker": True},
        HADAMARD | {"t1", "t2"},
    ),
    "loha-tucker-conv3d": (
        conv(16, 24, 1, 3, 3),
        "loha",
        {"lora_dim": 3, "alpha": 1, "use_tucker": True},
        HADAMARD | {"t1", "t2"},
    ),
}


def randomised(kind: type[Any], layer: nn.Module, options: Mapping[str, Any]) -> Any:
    torch.manual_seed(3)
    module = kind("name", layer, 1.0, **{"lora_dim": 4, "alpha": 1, **options})
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.eval()


@pytest.mark.parametrize("case", SAVED)
def test_adaptkit_reads_what_lycoris_writes(case: str) -> None:
    layer, algo, options, roles = SAVED[case]
    theirs = {
        "lokr": lycoris_modules.LokrModule,
        "lora": lycoris_modules.LoConModule,
        "loha": lycoris_modules.LohaModule,
    }[algo]
    ours = algorithms()[algo]
    module = randomised(theirs, layer, options)
    stored = {key: tensor.detach().clone() for key, tensor in module.state_dict().items()}
    spelled = {role.spelling: name for name, role in ours.roles.items()}
    named = {spelled[key]: tensor for key, tensor in stored.items()}
    alpha = float(named.pop("alpha"))
    assert set(named) == roles
    facts = ours.facts(
        {role: tuple(t.shape) for role, t in named.items()},
        None if alpha is None else Stated(alpha),
    )
    delta = ours.decode({role: t.double() for role, t in named.items()}, facts).delta()
    out, result = added(module.double(), layer.double(), delta)
    assert close(
        result, out, 1e-7 if "rs_lora" in options else 1e-9
    )  # LyCORIS stores alpha·√rank, in float32
    assert facts.rows * facts.columns == layer.weight.numel()
    if algo == "lokr":
        kernel = tuple(layer.weight.shape[2:])
        exact = oracle.lokr_stored({role: t.numpy() for role, t in named.items()}, alpha, kernel)
        assert close(delta.reshape(layer.weight.shape), torch.from_numpy(exact), 1e-12)


@pytest.mark.parametrize("prefix", ["lora_unet", "lycoris"])
def test_a_file_that_lycoris_saves_is_opened_whole(sd1: Sd1, tmp_path: Path, prefix: str) -> None:
    """A LoKr of the U-Net as LyCORIS' own network saves it; alpha is not the rank."""
    from lycoris import LycorisNetwork, create_lycoris

    unet = sd1.unet()
    LycorisNetwork.apply_preset(
        {"target_module": ["Transformer2DModel", "ResnetBlock2D"], "lora_prefix": prefix}
    )
    try:
        torch.manual_seed(2)
        network = create_lycoris(
            unet, 1.0, linear_dim=2, linear_alpha=1, conv_dim=2, conv_alpha=1, algo="lokr", factor=4
        )
    finally:
        LycorisNetwork.apply_preset({"lora_prefix": "lycoris"})
    path = tmp_path / "lycoris.safetensors"
    network.apply_to()  # before, the network has no parameters and saves none
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    network.save_weights(str(path), torch.float32, {"who": "LyCORIS"})
    ours = deltas(path)
    assert len(network.loras) == len(ours) > 250
    assert {module.scale for module in network.loras} == {0.5, 1.0}
    merged = unet_names(sd1.merge(path, tmp_path / "merged.safetensors"))
    for module in network.loras:
        module.restore()
    labels = {name.replace(".", "_"): name for name in ours}
    for module in network.loras:
        name = labels["unet_" + module.lora_name.removeprefix(f"{prefix}_")]
        host = module.org_module[0].double()
        theirs, mine = added(module.double().eval(), host, ours[name])
        assert close(theirs, mine, 1e-9), name
        expected = host.weight + ours[name].reshape(host.weight.shape)
        assert close(merged[f"{name.removeprefix('unet.')}.weight"], expected, 2e-7)


def test_get_diff_weight_of_a_lokr_scales_twice() -> None:
    """Why LyCORIS' own merge is no oracle for LoKr: when this fails, LyCORIS has been mended; drop the remark above."""
    layer, _, options, _ = SAVED["factor-4"]
    module = randomised(lycoris_modules.LokrModule, layer, options).double()
    x = torch.eye(24, dtype=torch.float64)
    forward = (module(x) - layer.double()(x)).T
    assert close(module.get_diff_weight()[0], forward * module.scale, 1e-9)
    assert module.scale == 0.5


# --- the shapes that loaders guess the factor from -------------------------------------------------------------------


def test_factorization_is_lycoris_factorization() -> None:
    from lycoris.functional.general import factorization as theirs

    for dim in range(1, 1501):
        for factor in FACTORS:
            expected = theirs(dim, factor)
            assert factorization(dim, factor) == expected, (dim, factor)
            if factor > 0:
                assert oracle.factorization(dim, factor) == expected, (dim, factor)


def real_shapes(family: str) -> list[tuple[int, ...]]:
    found = load_listing(FIXTURES / "checkpoints" / f"{family}.tsv")
    parts = ("model.diffusion_model.", "cond_stage_model.", "conditioner.")
    keys = [k for k in found if k.startswith(parts) and "embedding" not in k and "in_proj" not in k]
    return sorted({found[k][1] for k in keys if len(found[k][1]) > 1})


class Guess(lycoris_modules.LokrModule):
    """What `make_module_from_state_dict` hands to the constructor."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise Guessed(args[3], kwargs["factor"], kwargs["full_matrix"])


class Guessed(Exception):
    pass


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("factor", [2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 31])
def test_lycoris_guesses_the_factor(family: str, factor: int) -> None:
    """LyCORIS guesses the factor back from the shapes; it must for every layer of the real models."""
    assert not misread(family, factor)


def test_lycoris_misreads_some_shapes_of_large_factors() -> None:
    """From 32 on it does not: 320 × 640 is cut as (10 · 32) × (20 · 32), which it takes for a factor of 20."""
    assert sorted({shape[:2] for shape in misread("sd1", 32)}) == [
        (320, 640),
        (320, 960),
        (640, 320),
    ]
    assert (2560, 320, None, 32) in misread("sd1", 33)


def misread(family: str, factor: int) -> list[tuple[Any, ...]]:
    failed = []
    for (out, inputs, *kernel), rank in itertools.product(real_shapes(family), (None, 4)):
        (a, c), (b, d) = factorization(out, factor), factorization(inputs, factor)
        wide = d * math.prod(kernel)
        w2 = {"w2": (c, d, *kernel)}
        if rank is not None and rank < max(c, d) / 2 and rank < min(c, wide):  # as Lokr.fit chooses
            w2 = {"w2_a": (c, rank), "w2_b": (rank, wide)}
        shapes = {"w1": (a, b), **w2}
        roles = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "", "t2")
        tensors = [
            torch.empty(shapes[role], device="meta") if role in shapes else None for role in roles
        ]
        with pytest.raises(Guessed) as found:
            Guess.make_module_from_state_dict("m", None, *tensors, torch.tensor(1.0), None)
        dim, guess, full = found.value.args
        as_stored = full == ("w2" in shapes) and (full or dim == rank)
        if (
            not as_stored
            or factorization(out, guess) != (a, c)
            or factorization(inputs, guess) != (b, d)
        ):
            failed.append((out, inputs, *kernel, rank, guess))
    return failed


def test_the_file_is_read_from_disk_as_lycoris_does(tmp_path: Path) -> None:
    """A planted wrong scale is seen: the comparisons above can fail."""
    layer, _, options, _ = SAVED["factor-4"]
    module = randomised(lycoris_modules.LokrModule, layer, options)
    save_file(
        {k: t.detach().contiguous() for k, t in module.state_dict().items()},
        tmp_path / "m.safetensors",
    )
    stored = load_file(tmp_path / "m.safetensors")
    named = {key.removeprefix("lokr_"): t.double() for key, t in stored.items() if key != "alpha"}
    wrong = ours_lokr.Lokr.facts(
        {k: tuple(t.shape) for k, t in named.items()}, Stated(2 * float(stored["alpha"]))
    )
    out, result = added(
        module.double(), layer.double(), ours_lokr.Lokr.decode(named, wrong).delta()
    )
    assert not close(result, out, 0.5)
