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
}
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


@pytest.mark.parametrize("family", CONVERTERS)
def test_the_table_says_what_the_converter_does(family: str) -> None:
    convert = getattr(single_file_utils, CONVERTERS[family], None)
    if convert is None:
        pytest.skip(f"this diffusers has no {CONVERTERS[family]}")
    native = narrow(load_listing(FIXTURES / "checkpoints" / f"{family}.tsv"))
    keys = compile_checkpoint(family)
    held: dict[object, tuple[Place, torch.Tensor]] = {}
    for name, tensor in native.items():
        place = keys.parse(name)
        if place is not None:
            held[place.slot] = (place, tensor)
    compared = 0
    for name, tensor in convert({name: tensor.clone() for name, tensor in native.items()}).items():
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
