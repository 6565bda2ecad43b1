"""On a CPU a file has the same bytes whatever the threads, the bound on memory and thus the stacks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from adaptkit.ops import combine, extract, merge, resize
from tests import made

SHAPES = [(96, 64)] * 6 + [(64, 96)] * 3 + [(40, 24)] * 3
BLOCKS = [f"lora_unet_down_blocks_{n % 3}_attentions_{n % 2}_transformer_blocks_0_attn{n // 6 + 1}_to_q" for n in range(12)]  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pair of an unknown model, an adapter of its layers, and two of SD 1.5 of several kinds."""
    folder, draw = tmp_path_factory.mktemp("same"), np.random.default_rng(0)
    base, tuned, own = {}, {}, {}
    for n, shape in enumerate(SHAPES):
        key, name = f"blocks.{n}.layer.weight", f"transformer.blocks.{n}.layer"
        base[key] = torch.from_numpy(draw.standard_normal(shape) / 8).half()
        delta = draw.standard_normal(shape) @ np.diag(1 / np.arange(1, shape[1] + 1)) * 0.01
        tuned[key] = (base[key].double() + torch.from_numpy(delta)).half()
        kind = ("lora", "lokr", "loha")[n % 3]
        arrays = made.module(kind, name, shape, draw, rank=4)
        own |= {k: torch.tensor(array, dtype=torch.float32) * 0.1 for k, array in arrays.items()}
    states = {"base": base, "tuned": tuned, "own": own}
    for name in ("one", "two"):
        states[name] = {}
        for n, block in enumerate(BLOCKS):
            kind = "lora" if n < 9 else "loha"
            for key, array in made.module(kind, block, (40, 32), draw, rank=6).items():
                states[name][key] = torch.tensor(array, dtype=torch.float32)
    for name, state in states.items():
        save_file(state, folder / f"{name}.safetensors", {"format": "pt"})
    return {name: folder / f"{name}.safetensors" for name in states}


@pytest.fixture
def threads() -> Iterator[Any]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("op", "inputs", "options"),
    [
        (extract, ("base", "tuned"), {"rank": 5}),
        (extract, ("base", "tuned"), {"algo": "lokr", "factor": 4, "size": 20_000}),
        (extract, ("base", "tuned"), {"algo": "auto", "size": 40_000}),
        (merge, ("base", [("own", 0.7)]), {}),
        (resize, ("one",), {"rank": 3}),
        (resize, ("one",), {"size": 20_000}),
        (combine, ([("one", 0.7), ("two", -0.4)],), {"rank": 4}),
    ],
)
def test_the_bytes_do_not_depend_on_threads_or_memory(
    op: Any, inputs: Any, options: Any, files: dict[str, Path], threads: Any, tmp_path: Path
) -> None:
    def paths(given: Any) -> Any:
        if isinstance(given, str):
            return files[given]
        if isinstance(given, tuple):
            return (files[given[0]], given[1])
        return [paths(one) for one in given]

    def made_with(count: int, memory: int | None) -> bytes:
        threads(count)
        output = tmp_path / "made.safetensors"
        given = op.Options(**options, output=output, overwrite=True, memory=memory, device="cpu")
        op.run(op.plan(*map(paths, inputs), given))
        return output.read_bytes()

    plan = op.plan(*map(paths, inputs), op.Options(**options, output=tmp_path / "x.safetensors"))
    least = max(step.bytes for step in (*plan.steps, *getattr(plan, "probing", ())))
    plan.close()
    alone = made_with(1, None)
    for count, memory in ((3, None), (1, least), (3, 3 * least)):
        assert made_with(count, memory) == alone, (count, memory)
