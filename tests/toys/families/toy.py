"""A toy family: two blocks of two layers."""

from __future__ import annotations

from adaptkit.families.contract import ModelFamily, pair, transformer

ROWS = (
    pair("toys.{i:2}.attn.q", "toy_blocks.{i:2}.to_q"),
    pair("toys.{i:2}.mlp.fc", "toy_blocks.{i:2}.ff"),
)

FAMILY = ModelFamily(
    name="toy", title="Toy", components=(transformer("Toy transformer", ROWS),), modelspec="toy"
)
