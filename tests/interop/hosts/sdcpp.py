"""stable-diffusion.cpp itself: its name conversion, its model classes and its `LoraModel`, driven by `sdcpp.cpp`.

`python -m tests.interop.hosts.sdcpp CHECKOUT DRIVER` compiles the driver out of a checkout of leejet/stable-diffusion.cpp
with its submodule ggml; it needs g++ and cmake. `ADAPTKIT_SDCPP` then names the driver. Without it nothing is compared.
Measured with 97d2990 and ggml 8e800ce.

The base model is the header in `fixtures/checkpoints` with two blocks of each kind, all widths divided by 32; its text
encoders are under the names that its options give them. What is measured is the mode `immediately`, which is that of
weights that are not quantised: the adapter is added to weights of zeros.
"""

from __future__ import annotations

import atexit
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from adaptkit.detect import families
from adaptkit.families.contract import Kind
from adaptkit.keymap import compile_checkpoint
from adaptkit.names import WEIGHT, Target
from tests.interop.hosts.deltas import agree, delta
from tests.interop.hosts.files import File, Part, _shape, is_denoiser
from tests.interop.hosts.loaded import Loaded, Place, RefusedError
from tests.synth import FIXTURES, expand, fill, load_listing, write_header_only

VERSION = "97d2990"
DATE = "2026-12"
VARIABLE = "ADAPTKIT_SDCPP"
NARROW = 32  # what widths are divided by
DENOISER = "model.diffusion_model."
CLIP_L, CLIP_G, T5, LLM = (
    f"text_encoders.{name}."
    for name in ("clip_l.transformer", "clip_g.transformer", "t5xxl.transformer", "llm.model")
)
# what the text encoders are called that are files of their own, in the order of our components
ENCODERS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("sd3", "sd35-large"), (CLIP_L, CLIP_G, T5)),
    "flux": (CLIP_L, T5),
    **dict.fromkeys(("chroma", "wan"), (T5,)),
    **dict.fromkeys(
        (
            "flux2", "qwen-image", "z-image", "anima", "krea2", "ernie-image", "ideogram4", "longcat-image", "ltx2",
            "minimax-h3", "ovis-image", "hunyuan-video-15",
        ),
        (LLM,),
    ),
}  # fmt: skip


def available() -> bool:
    return Path(os.environ.get(VARIABLE, "")).is_file()


def narrow(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A weight's shape with smaller widths; windows and what does not divide stay."""
    return tuple(
        n // NARROW if i < 2 and n % NARROW == 0 and n > NARROW else n for i, n in enumerate(shape)
    )


@dataclass
class Model:
    """What the host calls the tensors of a base model, and which weight of ours each is."""

    version: int
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)


def _base(family: str, blocks: int | None) -> Iterator[tuple[str, tuple[int, ...], Place | None]]:
    """(name in a checkpoint, shape, place): the fixture's tensors, and those of the other text encoders."""
    keys, listing = compile_checkpoint(family), load_listing(FIXTURES / "checkpoints" / f"{family}.tsv")  # fmt: skip
    whole = any(name.startswith((DENOISER, "model.language_model.")) for name in listing)
    known: set[str] = set()
    for found, (_, shape) in listing.items():
        first = re.search(r"(?:blocks?|layers|refiner)\.0\.", found) and len(listing) < 400
        numbers = range(blocks or 64) if first else range(1)
        for number in numbers:
            name = re.sub(r"(blocks?|layers|refiner)\.0\.", rf"\g<1>.{number}.", found, count=1)
            hit = keys.parse(name)
            place = None
            if hit is not None and hit.slot.param == WEIGHT:
                place = Place(hit.slot.target, hit.slot.rows, hit.swapped)
                known.add(hit.slot.target.component)
            yield (name if whole else DENOISER + name), shape, place
    encoders = iter(ENCODERS.get(family, ()))
    for part in families()[family].components:
        prefix = None if is_denoiser(part.name) else next(encoders, None)
        for row in part.rows if prefix and part.name not in known else ():
            for indices in expand(row) if row.kind is Kind.MATRIX else ():
                if blocks is None or all(index < blocks for index in indices.values()):
                    target = Target(part.name, fill(row.target, indices))
                    for name in row.names["diffusers"]:
                        module = fill(name.module, indices)
                        shape = _shape(family, part, row)
                        yield f"{prefix}{module}.weight", shape, Place(target, name.rows)


@cache
def model(family: str, blocks: int | None) -> Model:
    """The base model as the host names it."""
    base = {name: (shape, place) for name, shape, place in _base(family, blocks)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "base.safetensors")
        write_header_only(path, {name: ("F16", shape) for name, (shape, _) in base.items()})
        asked = [os.environ[VARIABLE], "names", str(path)]
        said = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    lines = [line.split() for line in said.splitlines() if line]
    found = Model(next(int(words[1]) for words in lines if words[0] == "version"))
    own = {words[1]: tuple(map(int, words[:1:-1])) for words in lines if words[0] == "tensor"}
    for words in lines:
        if words[0] != "name" or words[1] not in base:
            continue
        shape, place = base[words[1]]
        denoiser = words[1].startswith((DENOISER, "model.language_model."))
        if denoiser and words[2] not in own:
            continue  # its class has no such layer
        found.shapes[words[2]] = narrow(shape)
        if place is not None:
            found.places[words[2]] = place
    return found


# ------------------------------------------------------------------ asking


class Driver:
    """The driver, waiting for adapters of one family."""

    def __init__(self, family: str, blocks: int | None) -> None:
        self.model = model(family, blocks)
        self.folder = tempfile.TemporaryDirectory()
        listing = Path(self.folder.name, "model.txt")
        rows = []
        for name, shape in self.model.shapes.items():
            # five dimensions are four in ggml, inputs and outputs together
            four = (shape[0] * shape[1], *shape[2:]) if len(shape) == 5 else shape
            rows.append(" ".join(map(str, (name, *reversed(four), *(1,) * (4 - len(four))))))
        listing.write_text("\n".join(rows), encoding="utf-8")
        self.process = subprocess.Popen(
            [os.environ[VARIABLE], "apply", str(self.model.version), str(listing)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"GGML_NO_BACKTRACE": "1"},  # a debugger would take seconds
        )
        self._line("ready")
        atexit.register(self.process.kill)

    def _line(self, wanted: str = "") -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:  # its log goes there too
            if line.strip() == wanted or (not wanted and re.fullmatch(r"-?\d+\n", line)):
                return line.strip()
        raise AssertionError("the driver ended")

    def ask(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        """What an adapter adds to each weight that it changes; refused if the host stops."""
        adapter, output = (Path(self.folder.name, name) for name in ("a.safetensors", "added"))
        save_file({key: t.contiguous() for key, t in tensors.items()}, adapter)
        assert self.process.stdin is not None
        self.process.stdin.write(f"{adapter} {output}\n")
        self.process.stdin.flush()
        status = self._line()
        if status != "0":
            raise RefusedError(f"it ends with {status}")
        found: dict[str, np.ndarray] = {}
        with output.open("rb") as file:
            while line := file.readline():
                name, count = line.decode().rsplit(" ", 1)
                found[name] = np.frombuffer(file.read(4 * int(count)), np.float32)
        return found


@cache
def driver(family: str, blocks: int | None) -> Driver:
    return Driver(family, blocks)


def narrowed(file: File) -> File:
    return replace(
        file, parts=tuple(part._replace(shape=narrow(part.shape)) for part in file.parts)
    )


def load(file: File, blocks: int | None) -> Loaded:
    """The modules that stable-diffusion.cpp adds right."""
    file = narrowed(file)
    asked, tensors = driver(file.family, blocks), file.tensors()
    added: dict[Target, list[tuple[Place, torch.Tensor]]] = {}
    for name, numbers in asked.ask(tensors).items():
        place = asked.model.places.get(name)
        if place is not None:
            shape = asked.model.shapes[name]
            whole = torch.from_numpy(numbers.copy()).reshape(shape[0], -1).double()
            added.setdefault(place.target, []).append((place, whole))
    return Loaded(frozenset(part.stem for part in file.parts if _right(file, part, tensors, added)))


def _right(
    file: File,
    part: Part,
    tensors: Mapping[str, torch.Tensor],
    added: Mapping[Target, list[tuple[Place, torch.Tensor]]],
) -> bool:
    expected = delta(file, part, tensors)
    return expected is not None and agree(part, expected, added.get(part.slot.target, ()))


def build(checkout: Path, output: Path) -> None:
    """Compile ggml, what of the host is needed, and the driver."""
    here, options = Path(__file__).with_name("sdcpp.cpp"), ["-DGGML_MAX_NAME=160"]
    with tempfile.TemporaryDirectory() as folder:
        for command in (
            ["cmake", "-S", checkout / "ggml", "-B", folder, "-DBUILD_SHARED_LIBS=OFF", "-DGGML_OPENMP=OFF",
             "-DGGML_BUILD_TESTS=OFF", "-DGGML_BUILD_EXAMPLES=OFF", "-DCMAKE_BUILD_TYPE=Release",
             "-DCMAKE_C_FLAGS=-DGGML_MAX_NAME=160", "-DCMAKE_CXX_FLAGS=-DGGML_MAX_NAME=160"],
            ["cmake", "--build", folder, "-j"],
        ):  # fmt: skip
            subprocess.run(command, check=True)
        objects: list[Path] = []
        source = checkout / "src"
        include = [f"-I{checkout / name}" for name in (".", "src", "include", "ggml/include", "thirdparty")]  # fmt: skip
        wanted = [*map(source.joinpath, ("model_loader.cpp", "model_manager.cpp", "name_conversion.cpp", "runtime/imatrix.cpp"))]  # fmt: skip
        for room in ("core", "model_io", "tokenizers"):
            wanted += sorted((source / room).glob("*.cpp"))
        for path in (*wanted, checkout / "thirdparty" / "zip.c", here):
            objects.append(Path(folder, f"{path.name}.o"))
            compiler = ["gcc"] if path.suffix == ".c" else ["g++", "-std=c++17"]
            subprocess.run([*compiler, "-O1", "-w", *options, *include, "-c", path, "-o", objects[-1]], check=True)  # fmt: skip
        archive = Path(folder, "libsd.a")
        subprocess.run(["ar", "rcs", archive, *objects[:-1]], check=True)
        ggml = [Path(folder, "src", f"lib{name}.a") for name in ("ggml", "ggml-cpu", "ggml-base")]
        subprocess.run(["g++", objects[-1], archive, *ggml, "-lpthread", "-ldl", "-o", output], check=True)  # fmt: skip


if __name__ == "__main__":
    build(Path(sys.argv[1]), Path(sys.argv[2]))
