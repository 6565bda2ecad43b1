"""The tables against diffusers' own single-file converters, run here on narrow tensors of random numbers.

Every tensor that a converter writes must be the rows that the family's table says, in the order it says.
"""

from __future__ import annotations

import re

import pytest
import torch

from adaptkit.checkpoint import exchanged
from adaptkit.keymap import Place, compile_checkpoint
from tests.synth import FIXTURES, Listing, load_listing

pytest.importorskip("diffusers")

from diffusers.loaders import single_file_utils

CONVERTERS = {
    "flux": "convert_flux_transformer_checkpoint_to_diffusers",
    "flux2": "convert_flux2_transformer_checkpoint_to_diffusers",
    "auraflow": "convert_auraflow_transformer_checkpoint_to_diffusers",
    "hunyuan-video": "convert_hunyuan_video_transformer_to_diffusers",
    "wan": "convert_wan_transformer_to_diffusers",
    "ltx": "convert_ltx_transformer_checkpoint_to_diffusers",
    "ltx2": "convert_ltx2_transformer_to_diffusers",
    "lumina2": "convert_lumina2_to_diffusers",
    "z-image": "convert_z_image_transformer_checkpoint_to_diffusers",
    "krea2": "convert_krea2_transformer_checkpoint_to_diffusers",
    "ltx-13b": "convert_ltx_transformer_checkpoint_to_diffusers",
    "mochi": "convert_mochi_transformer_checkpoint_to_diffusers",
    "sana": "convert_sana_transformer_to_diffusers",
    "cosmos": "convert_cosmos_transformer_checkpoint_to_diffusers",
    "hidream": "convert_hidream_transformer_to_diffusers",
    "ernie-image": "convert_ernie_image_transformer_checkpoint_to_diffusers",
    "flux3": "convert_flux3_transformer_checkpoint_to_diffusers",
    "minimax-h3": "convert_minimax_h3_transformer_checkpoint_to_diffusers",
    "qwen-image-21": "convert_qwen_image21_transformer_checkpoint_to_diffusers",
    "wan-animate2": "convert_wan_animate_2_transformer_to_diffusers",
}
CONFIGS = {"minimax-h3": {"config": {}}}  # used for another order of rows
PREFIXES = ("model.diffusion_model.", "model.")
NARROW = 4  # columns: the converters cut rows, by the models' real widths


def narrow(listing: Listing) -> dict[str, torch.Tensor]:
    """The header's tensors, rows as they are and columns cut; the blocks that are there numbered from 0."""
    names = list(listing)
    prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in names)), "")
    bare = {name.removeprefix(prefix): shape for name, (_, shape) in listing.items()}
    runs: dict[str, set[int]] = {}
    for name in bare:
        for found in re.finditer(r"(\w*(?:blocks|layers|refiner))\.(\d+)\.", name):
            runs.setdefault(found.group(1), set()).add(int(found.group(2)))
    order = {
        run: {old: new for new, old in enumerate(sorted(numbers))} for run, numbers in runs.items()
    }

    def renumbered(name: str) -> str:
        return re.sub(
            r"(\w*(?:blocks|layers|refiner))\.(\d+)\.",
            lambda m: f"{m[1]}.{order[m[1]][int(m[2])]}.",
            name,
        )

    draw = torch.Generator().manual_seed(0)
    return {
        renumbered(name): torch.randn(
            *(n if axis == 0 else min(n, NARROW) for axis, n in enumerate(shape)), generator=draw
        )
        for name, shape in bare.items()
    }


def whole(family: str) -> dict[str, torch.Tensor]:
    """What the converter of a family is given: some want more than our headers have."""
    native = narrow(load_listing(FIXTURES / "checkpoints" / f"{family}.tsv"))
    if family == "sana":  # constants that it throws away
        native |= {"pos_embed": torch.ones(1), "y_embedder.y_embedding": torch.ones(1)}
    if family == "mochi":  # it goes over 48 blocks, of which ours are the first and the last
        last = {k.replace("blocks.1.", "blocks.47."): t for k, t in native.items()}
        first = [k for k in native if k.startswith("blocks.0.")]
        native = last | {k.replace(".0.", f".{n}.", 1): native[k] for n in range(1, 47) for k in first}  # fmt: skip
    return native


@pytest.mark.parametrize("family", CONVERTERS)
def test_the_table_says_what_the_converter_does(family: str) -> None:
    convert = getattr(single_file_utils, CONVERTERS[family], None)
    if convert is None:
        pytest.skip(f"this diffusers has no {CONVERTERS[family]}")
    native = whole(family)
    keys = compile_checkpoint(family)
    held: dict[object, tuple[Place, torch.Tensor]] = {}
    for name, tensor in native.items():
        place = keys.parse(name)
        if place is not None:
            held[place.slot] = (place, tensor)
    compared = 0
    copies = {name: tensor.clone() for name, tensor in native.items()}
    for name, tensor in convert(copies, **CONFIGS.get(family, {})).items():
        place = keys.parse(f"transformer.{name}")
        assert place is not None, name
        expected = rows(place, held)
        if expected is not None:
            assert torch.equal(tensor.reshape(expected.shape), expected), name
            compared += 1
    assert compared > 0.9 * len(native)


def rows(place: Place, held: dict[object, tuple[Place, torch.Tensor]]) -> torch.Tensor | None:
    """What the table says a diffusers tensor holds, out of the native ones; None where these are in parts."""
    whole = held.get(type(place.slot)(place.slot.target))
    if place.slot in held:
        theirs, tensor = held[place.slot]
    elif whole is not None and place.slot.rows is not None:
        theirs, tensor = whole
        start, stop = place.slot.rows.bounds(len(tensor))  # type: ignore[misc]
        return tensor[start:stop]
    else:
        return None
    return exchanged(tensor) if place.swapped != theirs.swapped else tensor
