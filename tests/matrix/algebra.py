"""Stored forms of every algorithm: random tensors of a form, and the weight they make of W.
float64.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tests import oracle

Array = np.ndarray
Roles = dict[str, Array]
RANK = 4
# forms whose change depends on the weight
DEPENDENT = ("dora", "glora", "oft", "boft", "ia3", "hira")


@dataclass
class Module:
    """One module as stored: tensors by role, and the number that its alpha says (None: alpha =
    rank).
    """

    roles: Roles
    alpha: float | None = None
    root: bool = False  # alpha / sqrt(r)
    always: bool = False  # PEFT scales a LoKr of whole factors too
    rank: int | None = None  # PEFT divides by the rank that the configuration states
    bias: Array | None = field(default=None)  # as it is added to the layer's bias
    kohya: bool = False  # OFT of sd-scripts: the bound is alpha times the rows


def _ones(kernel: tuple[int, ...]) -> tuple[int, ...]:
    return (1,) * len(kernel)


def _lora(rng: np.random.Generator, shape: tuple[int, ...], rank: int) -> Roles:
    out, ins, *kernel = shape
    ones = _ones(tuple(kernel))
    return {
        "lora_up.weight": rng.normal(0, 0.1, (out, rank, *ones)),
        "lora_down.weight": rng.normal(0, 0.1, (rank, ins, *kernel)),
    }


def _tucker(rng: np.random.Generator, shape: tuple[int, ...], rank: int) -> Roles:
    out, ins, *kernel = shape
    ones = _ones(tuple(kernel))
    return {
        "lora_up.weight": rng.normal(0, 0.1, (out, rank, *ones)),
        "lora_mid.weight": rng.normal(0, 0.5, (rank, rank, *kernel)),
        "lora_down.weight": rng.normal(0, 0.1, (rank, ins, *ones)),
    }


def _loha(rng: np.random.Generator, shape: tuple[int, ...], rank: int, tucker: bool) -> Roles:
    out, ins, *kernel = shape
    roles: Roles = {}
    for n in "12":
        if tucker:
            roles[f"hada_t{n}"] = rng.normal(0, 0.5, (rank, rank, *kernel))
            roles[f"hada_w{n}_a"] = rng.normal(0, 0.3, (rank, out))
            roles[f"hada_w{n}_b"] = rng.normal(0, 0.3, (rank, ins))
        else:
            roles[f"hada_w{n}_a"] = rng.normal(0, 0.3, (out, rank))
            roles[f"hada_w{n}_b"] = rng.normal(0, 0.3, (rank, ins * int(np.prod(kernel))))
    return roles


def _lokr(rng: np.random.Generator, shape: tuple[int, ...], rank: int, form: str) -> Roles:
    """Factors: w1 a × b, w2 c × d; `aligned` keeps c = 16, so that cuts of fused rows fall between
    blocks.
    """
    out, ins, *kernel = shape
    c = 16 if "aligned" in form or out % 24 else 24
    if "peft" in form:  # decompose_factor 4, rank 2: what PEFT makes of it
        c, rank = out // 4, 2
    a, b = out // c, 4
    d = ins // b
    roles: Roles = {}
    if "w1" in form or "both" in form:
        roles["lokr_w1_a"] = rng.normal(0, 0.3, (a, min(rank, 2)))
        roles["lokr_w1_b"] = rng.normal(0, 0.3, (min(rank, 2), b))
    else:
        roles["lokr_w1"] = rng.normal(0, 0.3, (a, b))
    if "tucker" in form:
        roles["lokr_t2"] = rng.normal(0, 0.5, (rank, rank, *kernel))
        roles["lokr_w2_a"] = rng.normal(0, 0.3, (rank, c))
        roles["lokr_w2_b"] = rng.normal(0, 0.3, (rank, d))
    elif "factored" in form or "both" in form or "peft" in form:
        roles["lokr_w2_a"] = rng.normal(0, 0.3, (c, rank))
        roles["lokr_w2_b"] = rng.normal(0, 0.3, (rank, d * int(np.prod(kernel))))
    else:
        roles["lokr_w2"] = rng.normal(0, 0.3, (c, d, *kernel))
    if "both" in form:  # LyCORIS decomposes both at one rank
        roles["lokr_w1_a"] = rng.normal(0, 0.3, (a, rank))
        roles["lokr_w1_b"] = rng.normal(0, 0.3, (rank, b))
    return roles


def make(form: str, shape: tuple[int, ...], rng: np.random.Generator, rank: int = RANK) -> Roles:
    """Random tensors of a form for a weight of this shape."""
    out, ins, *kernel = shape
    ones = _ones(tuple(kernel))
    name, _, more = form.partition("+")
    wide = int(np.prod(kernel)) > 1
    if name in ("lora", "lora-rank1"):
        roles = _lora(rng, shape, 1 if name.endswith("1") else rank)
    elif name == "lora-tucker":
        roles = _tucker(rng, shape, rank) if wide else _lora(rng, shape, rank)
    elif name in ("loha", "loha-tucker"):
        roles = _loha(rng, shape, rank, wide and "tucker" in name)
    elif name.startswith("lokr"):
        flat = "lokr-factored" if name == "lokr-tucker" and not wide else name
        roles = _lokr(rng, shape, rank, flat)
    elif name == "full":
        roles = {"diff": rng.normal(0, 0.05, shape)}
    elif name == "glora":
        roles = {
            "a1.weight": rng.normal(0, 0.1, (ins, rank, *ones)),
            "a2.weight": rng.normal(0, 0.1, (rank, ins, *ones)),
            "b1.weight": rng.normal(0, 0.1, (out, rank, *ones)),
            "b2.weight": rng.normal(0, 0.1, (rank, ins, *kernel)),
        }
    elif name in ("oft", "oft-rescaled"):
        roles = {"oft_blocks": rng.normal(0, 0.1, (out // 8, 8, 8))}
        if "rescaled" in name:
            roles["rescale"] = 1 + rng.normal(0, 0.1, (out, 1, *ones))
    elif name == "boft":
        roles = {"oft_blocks": rng.normal(0, 0.1, (2, out // 4, 4, 4))}
    elif name == "ia3":
        roles = {"weight": rng.normal(0, 0.1, out), "on_input": np.array(0.0)}
    elif name == "ia3-input":
        roles = {"weight": rng.normal(0, 0.1, (ins, *ones)), "on_input": np.array(1.0)}
    elif name == "peft-oft":
        columns = ins * int(np.prod(kernel))
        roles = {"oft_R.weight": rng.normal(0, 0.05, (columns // 8, 28))}
    elif name == "peft-boft":
        roles = {
            "boft_R": rng.normal(0, 0.1, (2, ins * int(np.prod(kernel)) // 4, 4, 4)),
            "boft_s": rng.uniform(0.8, 1.2, (out, 1)),
        }
    elif name == "peft-ia3":
        roles = {"ia3_l": rng.uniform(0.8, 1.2, (out, 1))}
    elif name == "peft-hira":
        down, up = rng.normal(0, 0.3, (rank, ins, *kernel)), rng.normal(0, 0.3, (out, rank, *ones))
        roles = {"hira_A": down, "hira_B": up}
    elif name == "peft-adalora":
        columns = ins * int(np.prod(kernel))
        roles = {
            "lora_A": rng.normal(0, 0.3, (rank, columns)),
            "lora_B": rng.normal(0, 0.3, (out, rank)),
            "lora_E": rng.normal(0, 0.3, (rank, 1)),
        }
    elif name == "kohya-oft":  # four blocks
        roles = {"oft_blocks": rng.normal(0, 0.1, (4, out // 4, out // 4))}
    else:
        raise ValueError(form)
    if more == "dora":
        roles["dora_scale"] = rng.uniform(1, 2, (out, 1, *ones))
    elif more == "dora-input":
        roles["dora_scale"] = rng.uniform(1, 2, (1, ins, *ones))
    return roles


def stored_rank(roles: Roles) -> int | None:
    """What alpha is divided by; None where nothing is factored."""
    for name in ("lora_down.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b", "a2.weight"):
        if name in roles:
            return len(roles[name])
    return None


def _scale(module: Module) -> float:
    rank = stored_rank(module.roles)
    if module.alpha is None or (rank is None and not module.always):
        return 1.0
    below = module.rank or rank or 1
    return module.alpha / (below**0.5 if module.root else below)


def bias_scale(module: Module) -> float:
    return _scale(module)


def _change(module: Module, shape: tuple[int, ...]) -> Array | None:
    """ΔW of the additive algorithms."""
    roles, scale = module.roles, _scale(module)
    kernel = tuple(shape[2:])
    if "lora_up.weight" in roles:
        found = oracle.lora(
            roles["lora_up.weight"],
            roles["lora_down.weight"],
            scale,
            roles.get("lora_mid.weight"),
        )
    elif "hada_w1_a" in roles:
        short = {k.removeprefix("hada_"): v for k, v in roles.items() if k.startswith("hada_")}
        found = scale * oracle.loha(short, None, kernel)
    elif any(role.startswith("lokr_") for role in roles):
        short = {k.removeprefix("lokr_"): v for k, v in roles.items() if k.startswith("lokr_")}
        if "w2" in short and kernel and short["w2"].ndim == 2:
            short["w2"] = short["w2"].reshape(len(short["w2"]), -1, *kernel)
        found = scale * oracle.lokr_stored(short, None, kernel)
    elif "lora_E" in roles:  # alpha over init_r, which PEFT adds a little to
        below = (module.rank or 0) + 1e-5
        found = (
            (module.alpha or 0.0) / below * (roles["lora_B"] * roles["lora_E"].T) @ roles["lora_A"]
        )
    elif "diff" in roles:
        found = roles["diff"]
    else:
        return None
    return found.reshape(shape)


def merged(module: Module, weight: Array) -> Array:
    """The weight that a reader computes with."""
    roles = module.roles
    change = _change(module, weight.shape)
    if change is not None:
        magnitude = roles.get("dora_scale")
        if magnitude is None:
            return weight + change
        wide = [n for n, size in enumerate(magnitude.shape) if size > 1]
        axis = wide[0] if wide else 0
        return oracle.dora(weight, change, magnitude.reshape(-1), axis)
    if "b1.weight" in roles:
        short = {name.removesuffix(".weight"): value for name, value in roles.items()}
        return oracle.glora(weight, short, _scale(module))
    if "set_weight" in roles:
        return roles["set_weight"].reshape(weight.shape)
    if "oft_R.weight" in roles:
        packed = roles["oft_R.weight"]
        size = round((1 + (1 + 8 * packed.shape[1]) ** 0.5) / 2)
        return oracle.peft_oft(weight, packed, size)
    if module.kohya:
        parts = [roles[k] for k in sorted(roles) if k.startswith("oft_blocks")]
        return oracle.kohya_oft(weight, parts, module.alpha or 0.0)
    if "oft_blocks" in roles:
        blocks = roles["oft_blocks"]
        turn = oracle.boft if blocks.ndim == 4 else oracle.oft
        return turn(weight, blocks, 0.0, roles.get("rescale"))
    if "boft_R" in roles:
        return oracle.peft_boft(weight, roles["boft_R"], roles["boft_s"])
    if "ia3_l" in roles:
        return weight * roles["ia3_l"]
    if "hira_A" in roles:
        product = np.tensordot(roles["hira_B"].reshape(len(weight), -1), roles["hira_A"], 1)
        return weight * (1 + product.reshape(weight.shape))
    if "weight" in roles:
        on_input = bool(roles["on_input"])
        return oracle.ia3(weight, roles["weight"].reshape(-1), 1 if on_input else 0)
    raise ValueError(f"no algorithm has {sorted(roles)}")


def dependent(form: str) -> bool:
    return any(name in form for name in DEPENDENT)
