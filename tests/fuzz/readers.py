"""Every reader on mutated bytes: whatever happens is a verdict of adaptkit."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

from adaptkit.adapter import open_adapter_source
from adaptkit.errors import AdaptkitError, InternalError
from adaptkit.files.header import parse_header
from adaptkit.files.open import open_source
from adaptkit.files.pickled.catalogue import read_catalogue
from adaptkit.files.pickled.imports import imports
from adaptkit.keymap.patterns import Patterns
from adaptkit.ops import inspect
from adaptkit.ops.batch.recipe import load
from tests.fuzz.files import (
    JSONS,
    adapters,
    checkpoint,
    lora,
    mutated,
    scrambled,
    torch_legacy,
    torch_pickle,
    torch_zip,
)

ADAPTERS = [file.bytes() for file in (*adapters().values(), checkpoint())]
PICKLES = [torch_zip(), torch_zip(packed=True), torch_legacy(), torch_pickle()]
INDEX = json.dumps(
    {"metadata": {"note": "x" * 600}, "weight_map": {next(iter(lora().tensors)): "a.safetensors"}}
)
CONFIG = json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 2, "use_rslora": False,
                     "rank_pattern": {"^unet.a": 2}, "alpha_pattern": {"to_q": 4, r".*\.to_k": 2}})  # fmt: skip
RECIPE = """[defaults.convert]
to = "comfy"
[[matrix]]
command = "convert"
adapters = ["a.safetensors", "b.safetensors"]
dtype = ["fp16", "bf16"]
output = "out/{adapter}-{dtype:>5}.safetensors"
[[job]]
command = "resize"
adapter = "a.safetensors"
size = "3MB"
output = "c.safetensors"
"""
PATTERNS = "ab._0^$()[]{}|*+?\\d1,-:"


class Readers:
    """A folder in which readers run one after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        lora().save(folder / "a.safetensors")
        self.peft = folder / "peft"
        self.peft.mkdir(exist_ok=True)
        lora("diffusers").save(self.peft / "adapter_model.safetensors")

    def once(self, name: str, draw: random.Random) -> str:
        """Run a reader once; AdaptkitErrors are verdicts, anything else is raised."""
        try:
            TARGETS[name](self, draw)
        except AdaptkitError as error:
            if isinstance(error, InternalError):
                raise
            return f"refused {type(error).__name__}"
        return "read"

    def header(self, draw: random.Random) -> None:
        raw = draw.choice(ADAPTERS)
        end = 8 + int.from_bytes(raw[:8], "little")
        bad = scrambled(raw[8:end] if draw.random() < 0.8 else raw[:end], draw)
        if draw.random() < 0.8:
            bad = len(bad).to_bytes(8, "little") + bad
        self.header_of(bad, raw[end:])

    def header_of(self, raw: bytes, data: bytes = b"") -> None:
        parse_header(raw + data, len(raw) + len(data), "x")

    def pickle(self, draw: random.Random) -> None:
        raw = draw.choice(PICKLES)
        self.pickle_of(
            torch_zip_of(scrambled(raw, draw)) if raw is PICKLES[3] else scrambled(raw, draw)
        )

    def pickle_of(self, raw: bytes) -> None:
        path = self.folder / "x.ckpt"
        path.write_bytes(raw)
        imports(path)
        read_catalogue(path)

    def index(self, draw: random.Random) -> None:
        self.index_of(scrambled(INDEX.encode(), draw))

    def index_of(self, raw: bytes) -> None:
        path = self.folder / "x.index.json"
        path.write_bytes(raw)
        open_source(path).close()

    def config(self, draw: random.Random) -> None:
        self.config_of(scrambled(CONFIG.encode(), draw))

    def config_of(self, raw: bytes) -> None:
        (self.peft / "adapter_config.json").write_bytes(raw)
        open_adapter_source(self.peft)[0].close()
        inspect.run(self.peft)
        self._told(self.peft)

    def metadata(self, draw: random.Random) -> None:
        text = str(lora("diffusers").metadata["lora_adapter_metadata"])
        self.metadata_of(
            draw.choice((scrambled(text.encode(), draw), *(one.encode() for one in JSONS)))
        )

    def metadata_of(self, raw: bytes) -> None:
        file = lora("diffusers")
        file.metadata = {"lora_adapter_metadata": raw.decode("utf-8", "replace")}
        self._told(file.save(self.folder / "m.safetensors"))

    def names(self, draw: random.Random) -> None:
        self._told(
            mutated(lora(draw.choice(("kohya", "diffusers"))), draw).save(
                self.folder / "n.safetensors"
            )
        )

    def patterns(self, draw: random.Random) -> None:
        texts = [
            "".join(draw.choices(PATTERNS, k=draw.randint(0, 12)))
            for _ in range(draw.randint(1, 3))
        ]
        Patterns(texts).first("".join(draw.choices("ab._01", k=draw.randint(0, 30))))

    def recipe(self, draw: random.Random) -> None:
        self.recipe_of(scrambled(RECIPE.encode(), draw))

    def recipe_of(self, raw: bytes) -> None:
        path = self.folder / "recipe.toml"
        path.write_bytes(raw)
        load(path)

    def _told(self, path: Path) -> None:
        report = inspect.run(path)
        json.dumps(report.to_dict())
        if report.error is not None:
            raise report.error


def torch_zip_of(raw: bytes) -> bytes:
    """An archive around damaged opcodes, whose check sum is right."""
    import io
    import zipfile

    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a/data.pkl", raw)
        for n in range(3):
            archive.writestr(f"a/data/{n}", bytes(64))
    return out.getvalue()


TARGETS: dict[str, Callable[[Readers, random.Random], None]] = {
    name: getattr(Readers, name)
    for name in ("header", "pickle", "index", "config", "metadata", "names", "patterns", "recipe")
}
