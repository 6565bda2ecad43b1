"""What a case is, and adapters made from the names and sizes of modules.

No table of ours is asked. All numbers are small integers and all scales multiples of 1/4: every product is exact, so that
results are compared bit for bit.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

State = dict[str, torch.Tensor]
Shapes = dict[str, tuple[int, ...]]

KOHYA = ("lora_down.weight", "lora_up.weight")
PEFT = ("lora_A.weight", "lora_B.weight")
OLD = ("down.weight", "up.weight")
DOTTED = ("lora.down.weight", "lora.up.weight")
RANK = 4
ALPHAS = (4.0, 2.0, 3.0)  # scales of 1, 1/2 and 3/4


@dataclass(frozen=True)
class Case:
    """A format that a converter reads.

    `loader` is diffusers' mixin that calls it, `to` adaptkit's name of the format, `made` an adapter in it. In a file of
    ours `prefix` is replaced, if other tools write another one.

    The differences, each with its reason, by a pattern of the modules' names in diffusers: `lost`, left out by the
    converter; `wrong`, not what the file means; `unscaled`, without their alpha; `nameless`, without a component, so
    that the loader passes them by; `stray`, named as no module is. `later`: what goes wrong after the converter. `unwritten`: why it reads no file of ours.
    """

    loader: str
    family: str
    to: str
    made: Callable[[], State]
    prefix: tuple[str, str] = ("", "")
    lost: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    unscaled: dict[str, str] = field(default_factory=dict)
    nameless: dict[str, str] = field(default_factory=dict)
    stray: dict[str, str] = field(default_factory=dict)
    later: str = ""
    unwritten: str = ""
    options: dict[str, Any] = field(default_factory=dict)


def expand(text: str) -> list[str]:
    """`a.{0,1}.{q,k}` as four names; `{0..3}` is a range."""
    pieces = re.split(r"\{([^}]*)\}", text)
    choices = [_choice(piece) if n % 2 else [piece] for n, piece in enumerate(pieces)]
    return ["".join(found) for found in itertools.product(*choices)]


def _choice(text: str) -> list[str]:
    first, dots, last = text.partition("..")
    return [str(n) for n in range(int(first), int(last) + 1)] if dots else text.split(",")


def shapes(*texts: str) -> Shapes:
    """A module and its size (`rows x columns`) in each line, names with braces."""
    found: Shapes = {}
    for line in "\n".join(texts).split("\n"):
        if line.strip():
            names, size = line.split()
            found |= dict.fromkeys(expand(names), tuple(map(int, size.split("x"))))
    return found


class Numbers:
    """Small integers, other ones in each tensor."""

    def __init__(self, seed: int = 0) -> None:
        self.draw = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randint(-8, 9, shape, generator=self.draw, dtype=torch.int8).float()


def lora(
    found: Shapes,
    prefix: str = "",
    joiner: str = ".",
    roles: tuple[str, str] = PEFT,
    *,
    rank: int = RANK,
    alpha: Iterable[float] | None = None,
    bias: str = "",
    dora: str = "",
) -> State:
    """A LoRA of these modules.

    `alpha`: as tensors, these in turn. `bias`, `dora`: the suffixes of differences of biases and of magnitudes.
    """
    numbers, state = Numbers(), State()
    alphas = None if alpha is None else itertools.cycle(alpha)
    for module, (rows, columns, *kernel) in found.items():
        stem = prefix + module.replace(".", joiner)
        state[f"{stem}.{roles[0]}"] = numbers(rank, columns, *kernel)
        state[f"{stem}.{roles[1]}"] = numbers(rows, rank, *(1 for _ in kernel))
        if alphas is not None:
            state[f"{stem}.alpha"] = torch.tensor(next(alphas))
        if bias:
            state[f"{stem}.{bias}"] = numbers(rows)
        if dora:
            state[f"{stem}.{dora}"] = numbers(rows, 1, *(1 for _ in kernel))
    return state


def kohya(found: Shapes, prefix: str = "lora_unet_", **options: Any) -> State:
    """A LoRA as kohya's trainers spell it."""
    return lora(found, prefix, "_", KOHYA, **{"alpha": ALPHAS, **options})


def lokr(found: Shapes, prefix: str, joiner: str = ".", *, factor: int = 6) -> State:
    """A LoKr, the larger factor as a product, where alpha counts; that of every second small module as it is."""
    numbers, state = Numbers(), State()
    for n, (module, (rows, columns)) in enumerate(found.items()):
        stem = prefix + module.replace(".", joiner)
        tall = factor if rows % factor == 0 else 4
        large = rows // tall, columns // 4
        state[f"{stem}.lokr_w1"] = numbers(tall, 4)
        if n % 2 and rows * columns < 1 << 25:
            state[f"{stem}.lokr_w2"] = numbers(*large)
        else:
            state[f"{stem}.lokr_w2_a"] = numbers(large[0], RANK)
            state[f"{stem}.lokr_w2_b"] = numbers(RANK, large[1])
        state[f"{stem}.alpha"] = torch.tensor(ALPHAS[n % 3])
    return state
