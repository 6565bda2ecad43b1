"""Cells where adaptkit is wrong today. An entry goes as soon as its example passes: the strict
xfail turns red.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Fault(NamedTuple):
    """What is known of a fault: why, how its problems read, and one cell that shows it."""

    reason: str
    problem: str  # a regular expression over the problems of a cell
    example: str  # the id of a cell


LOST = "^what is lost is not counted"
NAMELESS = "^the message names no file or tensor: "
USELESS = "^the hint (does not help|names what was given): "

# pattern over the ids of cells -> what is wrong there
KNOWN: dict[str, Fault] = {
    r"^(convert|combine)/": Fault(
        "with --allow-unused, relative_error leaves out what is lost (`over everything`)",
        LOST,
        "convert/sd1/kohya>lycoris/lora-all-fp32-alpha_tensor-bias_none",
    ),
    r"^resize/.*\+dora.*(/base|/error)": Fault(
        "resize of a DoRA with --base: every module's error is right, the total is not",
        r"^[\d.e-]+ reported, [\d.e-]+ measured",
        "resize/flux/lycoris/lora+dora-all-fp32-alpha_tensor-bias_none/rank2/base",
    ),
    r"^(convert|combine|extract|resize)/[^/]*/[^/]*peft/": Fault(
        "a refusal of the PEFT folder names no file",
        NAMELESS + "(PEFT cannot hold|these LoKr)",
        "convert/wan/bare>peft/lora-all-fp32-alpha_none-bias_diff",
    ),
    r"^(convert|combine|resize|extract)/[^/]*/[^/]*peft/.*(?#biases)": Fault(
        "a bias cannot go into a PEFT folder, and the hint (--algo lora) leads in a circle",
        USELESS + "PEFT cannot hold full and lora",
        "convert/wan/bare>peft/lora-all-fp32-alpha_none-bias_diff",
    ),
    r"^(convert|combine)/.*lokr": Fault(
        "q, k, v of LoKr are fused before --algo acts: the hints --algo lora and full do not help",
        USELESS + ".*LoKr with different second factors",
        "convert/sd3/lycoris>comfy/lokr-fused-fp32-alpha_tensor-bias_none",
    ),
    r"^merge/.*/folder-": Fault(
        "merge into a diffusers folder: the refusal of a cut names no file or tensor",
        NAMELESS + r"(rows \d|a DoRA with magnitudes)",
        "merge/flux/bare/lokr-all-fp8-alpha_tensor-bias_none/folder-bf16",
    ),
    r"^extract/": Fault(
        "extract to a format without a place for any layer: `no layer is selected`, see --only",
        NAMELESS + "no layer of these checkpoints",
        "extract/sd3/kohya>omi/lora-all-fp32-alpha_tensor-bias_none/folder-fp32/rank2",
    ),
    r"^extract/.*error": Fault(
        "extract --error that biases make impossible: its hints --algo auto and full fail",
        "no ranks reach|a full difference has no rank",
        "extract/sd3/kohya>kohya/full-all-fp32-alpha_tensor-bias_diff/single-fp16/error0.3",
    ),
    r"^convert/.*lora-tucker": Fault(
        "hint: resize --energy 1; the same option of convert leads to the same refusal",
        USELESS + ".*read no lora_mid",
        "convert/sd1/lycoris>peft/lora-tucker-conv-fp32-alpha_tensor-bias_none",
    ),
    r"^convert/.*(lora-tucker|dora-input).*/fordiffusers": Fault(
        "--for diffusers: the hint --algo lora leads to the same refusal (Tucker; DoRA of inputs)",
        USELESS + ".*diffusers loads no form",
        "convert/sd1/kohya/lora+dora-input-all-fp32-alpha_tensor-bias_none/fordiffusers",
    ),
    r"/kohya-oft>": Fault(
        "the refusal of a format that has no names for an algorithm names no file",
        NAMELESS + "the .* format has no names for",
        "convert/sdxl/kohya-oft>kohya/kohya-oft-plain-fp32-alpha_tensor-bias_none",
    ),
}


def explained(cell: str, problem: str) -> Fault | None:
    """The known fault that a problem of a cell is."""
    for pattern, fault in KNOWN.items():
        if re.search(pattern, cell) and re.search(fault.problem, problem):
            return fault
    return None
