"""Alpha and its source, settings that are not supported, and tensors as their reader finds them."""

from __future__ import annotations

import json

import pytest
import torch

from adaptkit.algorithms.contract import Stated
from adaptkit.algorithms.lora import Lora
from adaptkit.errors import ShapeMismatch
from adaptkit.meaning import Meaning, as_read

CONFIG = {
    "lora_alpha": 8,
    "r": 4,
    "alpha_pattern": {"^proj_out": 2, "attn.to_q": 3.5},
    "rank_pattern": {"attn.to_q": 16},
    "use_rslora": True,
}


def test_a_tensor_counts_before_the_configuration() -> None:
    meaning = Meaning.of({}, CONFIG)
    assert meaning.alpha("unet", "mid.ff", 5.0) == (Stated(5.0), "tensor")
    assert meaning.alpha("unet", "mid.ff", None) == (Stated(8.0, 4, True), "metadata")
    assert Meaning.of({}, None).alpha("unet", "mid.ff", None) == (None, "none")


def test_patterns_match_the_ends_of_names() -> None:
    meaning = Meaning.of({}, CONFIG)
    assert meaning.alpha("unet", "down.0.attn.to_q", None)[0] == Stated(3.5, 16, True)
    assert meaning.alpha("unet", "proj_out", None)[0] == Stated(2.0, 4, True)
    # `^` in a pattern that follows a prefix never matches
    assert meaning.alpha("unet", "down.proj_out", None)[0] == Stated(8.0, 4, True)


def test_diffusers_keeps_a_configuration_for_each_component() -> None:
    stored = {"transformer.lora_alpha": 6, "transformer.r": 3, "text_encoder.lora_alpha": 1}
    meaning = Meaning.of({"lora_adapter_metadata": json.dumps(stored)}, None)
    assert meaning.alpha("transformer", "any", None)[0] == Stated(6.0, 3)
    assert meaning.alpha("text_encoder", "any", None)[0] == Stated(1.0)
    assert meaning.alpha("vae", "any", None) == (None, "none")
    assert Meaning.of({"lora_adapter_metadata": "{broken"}, None).configs == {}
    assert Meaning.of({"lora_adapter_metadata": "[1]"}, None).configs == {}


def test_settings_that_are_not_supported_are_named() -> None:
    assert Meaning.of({}, {"peft_type": "OFT", "coft": False}).unsupported() == []
    (what,) = Meaning.of({}, {"peft_type": "OFT", "coft": True}).unsupported()
    assert what == "coft = True: this kind of OFT is not supported"
    assert Meaning.of({}, {"peft_type": "LORA", "coft": True}).unsupported() == []


@pytest.mark.parametrize("batch", [(), (3,)])
def test_what_is_written_is_read_back(batch: tuple[int, ...]) -> None:
    up, down = torch.randn(*batch, 6, 2), torch.randn(*batch, 2, 5)
    stored = {"up": up, "down": down} | ({} if batch else {"alpha": torch.tensor(1.0)})
    found = as_read(Lora, stored, batch=len(batch))
    assert found.shapes == {"up": (6, 2), "down": (2, 5)}
    assert (found.facts.rank, found.alpha) == (2, None if batch else 1.0)
    scale = 1.0 if batch else 0.5
    torch.testing.assert_close(found.weights.delta(), scale * (up @ down))


def test_tensors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ShapeMismatch):
        as_read(Lora, {"up": torch.zeros(6, 2), "down": torch.zeros(3, 5)})
