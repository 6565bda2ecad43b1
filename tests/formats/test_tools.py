"""The guide's table of tools: a file as each of them writes it, and the parameters that it means.

Names and orders are those of the tools' own code, which the guide names; parameters are named as the
model's checkpoint names them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from adaptkit.adapter import Adapter
from adaptkit.detect import formats
from adaptkit.errors import AdaptkitError, NotRepresentable
from adaptkit.files.header import TensorInfo
from adaptkit.keymap import keys_for
from tests.files.test_arranged import diffsynth_file, nunchaku_file
from tests.formats.spelling import slot
from tests.synth import Listing, write_header_only

GUIDE = Path(__file__).parents[2] / "adaptkit" / "guide" / "commands" / "formats.md"
AB, UP_DOWN = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
DEFAULT = ("lora_A.default.weight", "lora_B.default.weight")
F, Z, E, WAN = 3072, 3840, 4096, 5120


@dataclass(frozen=True)
class Line:
    """One line of the table: the names of a tool, and the (parameter, rows, columns) of each."""

    family: str
    stem: str
    modules: Mapping[str, tuple[str, int, int]]
    ends: tuple[str, str] = AB
    beside: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # further ends of a module
    joint: str = "."

    def listing(self) -> Listing:
        found: Listing = {}
        for name, (_, rows, columns) in self.modules.items():
            down, up = (f"{self.stem}{name}{self.joint}{end}" for end in self.ends)
            found |= {down: ("BF16", (4, columns)), up: ("BF16", (rows, 4))}
            for end in self.beside.get("*", ()):
                found[f"{self.stem}{name}.{end}"] = ("F32", ())
        return found


def blocks(modules: Mapping[str, tuple[str, int, int]], *numbers: int) -> dict[str, tuple[str, int, int]]:  # fmt: skip
    return {
        name.format(n): (parameter.format(n), rows, columns)
        for n in numbers
        for name, (parameter, rows, columns) in modules.items()
    }


B, D = "model.diffusion_model.", "transformer."
DIFFSYNTH_FLUX = blocks(
    {
        "blocks.{}.attn.a_to_qkv": (B + "double_blocks.{}.img_attn.qkv", 3 * F, F),
        "blocks.{}.attn.b_to_qkv": (B + "double_blocks.{}.txt_attn.qkv", 3 * F, F),
        "blocks.{}.attn.a_to_out": (B + "double_blocks.{}.img_attn.proj", F, F),
        "blocks.{}.attn.b_to_out": (B + "double_blocks.{}.txt_attn.proj", F, F),
        "blocks.{}.ff_a.0": (B + "double_blocks.{}.img_mlp.0", 4 * F, F),
        "blocks.{}.ff_a.2": (B + "double_blocks.{}.img_mlp.2", F, 4 * F),
        "blocks.{}.ff_b.0": (B + "double_blocks.{}.txt_mlp.0", 4 * F, F),
        "blocks.{}.ff_b.2": (B + "double_blocks.{}.txt_mlp.2", F, 4 * F),
        "blocks.{}.norm1_a.linear": (B + "double_blocks.{}.img_mod.lin", 6 * F, F),
        "blocks.{}.norm1_b.linear": (B + "double_blocks.{}.txt_mod.lin", 6 * F, F),
    },
    0,
    18,
) | blocks(
    {
        "single_blocks.{}.to_qkv_mlp": (B + "single_blocks.{}.linear1", 7 * F, F),
        "single_blocks.{}.proj_out": (B + "single_blocks.{}.linear2", F, 5 * F),
        "single_blocks.{}.norm.linear": (B + "single_blocks.{}.modulation.lin", 3 * F, F),
    },
    37,
)
WAN_NATIVE = blocks(
    {
        **{
            f"blocks.{{}}.{name}": (f"{B}blocks.{{}}.{name}", WAN, WAN)
            for name in ("self_attn.q", "self_attn.k", "cross_attn.o")
        },
        "blocks.{}.ffn.0": (B + "blocks.{}.ffn.0", 13824, WAN),
        "blocks.{}.ffn.2": (B + "blocks.{}.ffn.2", WAN, 13824),
    },
    0,
    39,
)
HUNYUAN = blocks(
    {
        "double_blocks.{}.img_attn_qkv": (D + "transformer_blocks.{}.attn.to_q", 3 * F, F),
        "double_blocks.{}.txt_attn_proj": (D + "transformer_blocks.{}.attn.to_add_out", F, F),
        "double_blocks.{}.img_mlp.fc1": (D + "transformer_blocks.{}.ff.net.0.proj", 4 * F, F),
        "double_blocks.{}.txt_mod.linear": (
            D + "transformer_blocks.{}.norm1_context.linear",
            6 * F,
            F,
        ),
        "single_blocks.{}.linear2": (D + "single_transformer_blocks.{}.proj_out", F, 5 * F),
    },
    0,
    19,
)
FLUX2 = blocks(
    {
        **{
            f"transformer_blocks.{{}}.attn.{name}": (
                f"{D}transformer_blocks.{{}}.attn.{theirs}",
                6144,
                6144,
            )
            for name, theirs in (
                ("to_q", "to_q"),
                ("to_out", "to_out.0"),
                ("to_add_out", "to_add_out"),
            )
        },
        "transformer_blocks.{}.ff.linear_in": (
            D + "transformer_blocks.{}.ff.linear_in",
            36864,
            6144,
        ),
        "single_transformer_blocks.{}.attn.to_out": (
            D + "single_transformer_blocks.{}.attn.to_out",
            6144,
            24576,
        ),
    },
    0,
    7,
)
Z_IMAGE = blocks(
    {
        **{
            f"layers.{{}}.attention.{name}": (f"{D}layers.{{}}.attention.{name}", Z, Z)
            for name in ("to_q", "to_k", "to_v", "to_out.0")
        },
        "layers.{}.feed_forward.w1": (D + "layers.{}.feed_forward.w1", 10240, Z),
    },
    0,
    29,
)
ERNIE = blocks(
    {
        **{
            f"layers.{{}}.self_attention.{name}": (f"{D}layers.{{}}.self_attention.{name}", E, E)
            for name in ("to_q", "to_k", "to_v", "to_out.0")
        },
        "layers.{}.mlp.gate_proj": (D + "layers.{}.mlp.gate_proj", 12288, E),
        "layers.{}.mlp.linear_fc2": (D + "layers.{}.mlp.linear_fc2", E, 12288),
    },
    0,
    35,
) | {"adaln_modulation": (D + "adaLN_modulation.1", 6 * E, E), "text_proj": (D + "text_proj", E, F)}
FORGE = {
    f"{name}.weight": (f"{B}{name}", rows, columns)
    for name, rows, columns in (
        ("input_blocks.4.1.transformer_blocks.0.attn1.to_q", 640, 640),
        ("input_blocks.4.1.transformer_blocks.0.attn2.to_k", 640, 2048),
        ("middle_block.1.transformer_blocks.9.ff.net.2", 1280, 5120),
        ("output_blocks.5.1.transformer_blocks.1.attn1.to_out.0", 640, 640),
    )
}
LINES: dict[str, Line | Callable[[Path], object]] = {
    "diffusion-pipe, most models": Line("wan", "diffusion_model.", WAN_NATIVE),
    "diffusion-pipe, HunyuanVideo": Line("hunyuan-video", "transformer.", HUNYUAN),
    "DiffSynth-Studio, most models": Line("wan", "", WAN_NATIVE, DEFAULT),
    "DiffSynth-Studio, FLUX.1": Line("flux", "", DIFFSYNTH_FLUX, DEFAULT),
    "DiffSynth-Studio, MiniMax-H3": diffsynth_file,
    "mflux, FLUX.2": Line("flux2", "transformer.", FLUX2),
    "mflux, Z-Image": Line("z-image", "diffusion_model.", Z_IMAGE),
    "mflux, ERNIE-Image": Line("ernie-image", "transformer.", ERNIE),
    "nunchaku, FLUX.1": nunchaku_file,
    "Wan2GP": Line("wan", "diffusion_model.", WAN_NATIVE, UP_DOWN),
    "FastVideo": Line("wan", "", WAN_NATIVE, AB, {"*": ("lora_rank", "lora_alpha")}),
    "Forge, layer diffusion": Line(
        "sdxl", "diffusion_model.", FORGE, ("lora::1", "lora::0"), joint="::"
    ),
}
# what the tables say of a file with nothing but names: no database, no names without a tool
UNREAD = {"Draw Things"}


def rows() -> dict[str, tuple[str, str, str]]:
    """The table of the guide: the example, whether it is read, and the format that writes it."""
    text = GUIDE.read_text(encoding="utf-8").partition("## What tools write")[2].partition("\n## ")[0]  # fmt: skip
    lines = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE)
    return {tool: (example.strip("`"), read, to) for tool, example, read, to in lines[2:]}


def test_the_table_has_a_line_for_each_tool_that_is_tested_here() -> None:
    found = rows()
    assert found.keys() == LINES.keys() | UNREAD
    assert {tool for tool, (_, read, _) in found.items() if read == "no"} == UNREAD


@pytest.mark.parametrize("tool", LINES)
def test_what_a_tool_writes_is_read_as_the_parameters_that_it_means(
    tool: str, tmp_path: Path
) -> None:
    line, (example, _, to) = LINES[tool], rows()[tool]
    path = tmp_path / "a.safetensors"
    if not isinstance(line, Line):  # read by tests/files/test_arranged.py
        line(path)
        names = {"nunchaku, FLUX.1": "flux", "DiffSynth-Studio, MiniMax-H3": "minimax-h3"}
        with Adapter.open(path, family=names[tool]) as adapter:
            assert adapter.source.layout
            assert not adapter.unclaimed
        assert example.encode() in path.read_bytes()
        # tests/ops/test_convert_nunchaku.py writes that
        assert to == ("nunchaku" if tool.startswith("nunchaku") else "no")
        return
    listing = line.listing()
    assert example in listing
    with Adapter.open(write_header_only(path, listing), alpha="as-rank") as adapter:
        assert adapter.family.name == line.family
        assert not adapter.unclaimed
        assert not adapter.own
        for name, (parameter, _, _) in line.modules.items():
            meant = slot(line.family, f"{parameter}.weight")
            if name.endswith("_attn_qkv"):  # to_q is the first third of the fused projection
                meant = meant._replace(rows=None)
            key = adapter.entries[meant].keys["down"]
            assert key.startswith(f"{line.stem}{name.removesuffix('.weight')}.lora_"), key
        assert len(adapter.entries) == len(line.modules)
        assert (to or "no") == (writer(adapter, listing) or "no")


def writer(adapter: Adapter, listing: Mapping[str, object]) -> str | None:
    """The format that writes these names, or whose prefix and module names these are."""
    stems = {re.sub(r"(\.weight::|\.)(lora|alpha).*$", "", key) for key in listing}
    for name, format in formats().items():
        if format.private or format.owns:
            continue
        keys = keys_for(adapter.family, format)
        try:
            if {keys.stem(found) for found in adapter.entries} == stems:
                return name
        except NotRepresentable:
            continue
    return None


def test_draw_things_stores_a_database(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(b"SQLite format 3\0" + bytes(4096))
    with pytest.raises(AdaptkitError, match="Draw Things") as refused:
        Adapter.open(path)
    assert "export" in (refused.value.hint or "")


KINDS: dict[str, tuple[tuple[str, tuple[int, ...]], ...]] = {
    "lora": (("lora::0", (640, 4)), ("lora::1", (4, 640)), ("lora::2", ())),
    "lora+dora": (("lora::0", (640, 4)), ("lora::1", (4, 640)), ("lora::4", (1, 640))),
    "loha": (
        ("loha::0", (640, 4)),
        ("loha::1", (4, 640)),
        ("loha::2", ()),
        ("loha::3", (640, 4)),
        ("loha::4", (4, 640)),
    ),
    "lokr": (("lokr::0", (8, 8)), ("lokr::2", ()), ("lokr::5", (80, 4)), ("lokr::6", (4, 80))),
    "full": (("diff::0", (640, 640)),),
    "set": (("set::0", (640, 640)),),
}


def test_forge_s_patches_of_every_kind(tmp_path: Path) -> None:
    """Places are those of ComfyUI's tuples; one beyond them is not guessed."""
    for kind, tensors in KINDS.items():
        listing: Listing = {}
        for name in FORGE:
            if "attn1" in name:
                listing |= {f"diffusion_model.{name}::{end}": ("F16", shape) for end, shape in tensors}  # fmt: skip
        listing["diffusion_model.input_blocks.4.1.proj_in.bias::diff::0"] = ("F16", (640,))
        with Adapter.open(write_header_only(tmp_path / f"{kind}.safetensors", listing), alpha="as-rank") as adapter:  # fmt: skip
            assert (adapter.family.name, adapter.format.name, adapter.source.layout) == ("sdxl", "comfy", "forge")  # fmt: skip
            assert not adapter.unclaimed
            counts = adapter.algorithms()
            assert counts.pop("full", 0) == (3 if kind == "full" else 1)
            assert counts == ({} if kind == "full" else {kind: 2})
        odd = {**listing, "diffusion_model.input_blocks.4.1.proj_in.weight::lora::9": ("F16", (4, 4))}  # fmt: skip
        with Adapter.open(write_header_only(tmp_path / "odd.safetensors", odd), alpha="as-rank") as adapter:  # fmt: skip
            assert set(adapter.unclaimed) == odd.keys() - listing.keys()


def test_forge_s_patches_are_added_as_forge_adds_them(tmp_path: Path) -> None:
    """ΔW = alpha / rank · mat1 · mat2."""
    draw = torch.Generator().manual_seed(0)
    stem = "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"
    up, down = torch.randn(640, 4, generator=draw), torch.randn(4, 640, generator=draw)
    tensors = {f"{stem}::lora::0": up, f"{stem}::lora::1": down, f"{stem}::lora::2": torch.tensor(2.0)}  # fmt: skip
    save_file(tensors, tmp_path / "a.safetensors")
    with Adapter.open(tmp_path / "a.safetensors", family="sdxl") as adapter:
        (entry,) = adapter.entries.values()
        found = adapter.weights(entry).delta()
        info = next(iter(adapter.source.infos.values()))
        assert isinstance(info, TensorInfo)
        assert adapter.source.span(info.name) is not None  # stored as it is read
    assert torch.allclose(found, 0.5 * up @ down, rtol=1e-5, atol=1e-6)
