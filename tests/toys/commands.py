"""Run every command with the toy kinds and print what they report, as one JSON document.

Run by tests/test_growing.py in a process of its own, since registries are read once.
"""

from __future__ import annotations

import importlib
import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PACKAGES = {
    "families": "adaptkit.families",
    "formats": "adaptkit.formats",
    "algorithms": "adaptkit.algorithms",
    "hosts": "adaptkit.hosts",
    "rules": "adaptkit.ops.ranks.rules",
}


def grow() -> None:
    """Let every registry find its toy."""
    for folder, package in PACKAGES.items():
        importlib.import_module(package).__path__.append(str(HERE / folder))


class Session:
    """Commands that work in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found: dict[str, Any] = {}

    def run(self, name: str, *arguments: str) -> None:
        """Keep the JSON report of a command, or all that it prints."""
        from adaptkit.cli import main

        words = [
            str(self.folder / word) if word.endswith("tensors") else word for word in arguments
        ]
        out, err = io.StringIO(), io.StringIO()
        sys.argv = ["adaptkit", *words]
        with redirect_stdout(out), redirect_stderr(err), suppress(SystemExit):
            main()
        try:
            self.found[name] = json.loads(out.getvalue())
        except ValueError:
            self.found[name] = out.getvalue() + err.getvalue()

    def models(self) -> None:
        """A base, and a tuned model: a difference of rank 1 in one layer, of rank 2 in others."""
        import torch
        from safetensors.torch import save_file

        draw = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=draw)

        base, tuned = {}, {}
        for block in range(2):
            for layer, shape in (("attn.q", (24, 16)), ("mlp.fc", (32, 24))):
                name = f"model.diffusion_model.toys.{block}.{layer}.weight"
                rank = 1 if (block, layer) == (0, "attn.q") else 2
                base[name] = normal(*shape)
                change = normal(shape[0], rank) @ normal(rank, shape[1])
                tuned[name] = base[name] + 0.1 * change
        save_file(base, self.folder / "base.safetensors")
        save_file(tuned, self.folder / "tuned.safetensors")


def main(folder: Path) -> None:
    grow()
    session = Session(folder)
    session.models()
    run = session.run
    both = ("base.safetensors", "tuned.safetensors")
    run(
        "extract", "extract", *both, "--algo", "toy", "--to", "toy", "-o", "a.safetensors", "--json"
    )
    run("inspect", "inspect", "a.safetensors", "--json")
    run(
        "extract auto",
        "extract",
        *both,
        "--algo",
        "auto",
        "--error",
        "0.2",
        "-o",
        "b.safetensors",
        "--json",
    )
    run("extract rule", "extract", *both, "--toy", "0.0625", "-o", "c.safetensors", "--json")
    kohya = ("--to", "kohya")
    run("extract lora", "extract", *both, "--rank", "4", *kohya, "-o", "d.safetensors", "--json")
    run("inspect lora", "inspect", "d.safetensors", "--json")
    run("convert", "convert", "a.safetensors", "--to", "kohya", "-o", "e.safetensors", "--json")
    run("convert for", "convert", "e.safetensors", "--for", "toy", "-o", "f.safetensors", "--json")
    run(
        "convert algo", "convert", "d.safetensors", "--algo", "toy", "-o", "g.safetensors", "--json"
    )
    run("convert unmeasured", "convert", "d.safetensors", "--for", "comfyui", "-o", "h.safetensors")
    run("resize", "resize", "a.safetensors", "--rank", "1", "-o", "i.safetensors", "--json")
    run("resize rule", "resize", "d.safetensors", "--toy", "0.5", "-o", "j.safetensors", "--json")
    run("merge", "merge", "base.safetensors", "a.safetensors", "-o", "k.safetensors", "--json")
    run("combine", "combine", "a.safetensors", "d.safetensors", "-o", "l.safetensors", "--json")
    run("compare", "compare", "a.safetensors", "f.safetensors", "--json")
    run("help", "convert", "--help")
    run("help extract", "extract", "--help")
    print(json.dumps(session.found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
