"""Read GGUF files: the catalogue of tensors, and their numbers, by the `gguf` package.

Block-quantised tensors come as float32, computed by that package. Writing them back is not
supported: a merge writes plain numbers. Names and shapes are those of the original model, as
ComfyUI-GGUF and stable-diffusion.cpp store them; `comfy.gguf.orig_shape.<name>` restores shapes
with more than four dimensions.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from adaptkit.errors import CorruptFile, NotRepresentable, UnreadableFile
from adaptkit.files.header import GGML, Header, TensorInfo

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np

__all__ = ["LONGEST_BLOCK", "catalogue", "dequantised"]

LONGEST_BLOCK = 256  # numbers; the other length, 32, divides it
# the plain types, by their names in safetensors
PLAIN: Mapping[str, str] = MappingProxyType(
    {"F64": "F64", "F32": "F32", "F16": "F16", "BF16": "BF16"}
    | {f"I{bits}": f"I{bits}" for bits in (8, 16, 32, 64)}
)
_SHAPE = "comfy.gguf.orig_shape."


def catalogue(path: Path) -> Header:
    """The tensors and the texts of a GGUF file. Raises `CorruptFile` if it cannot be understood."""
    gguf = _library(path)
    try:
        reader = gguf.GGUFReader(path)
        infos = {t.name: _info(t, reader) for t in reader.tensors}
        texts = {
            name: str(field.contents())
            for name, field in reader.fields.items()
            if field.types and field.types[0] == gguf.GGUFValueType.STRING
        }
    except UnreadableFile:
        raise
    except Exception as error:  # a damaged file can make the library raise anything
        reason = f"{type(error).__name__}: {error}"[:200]
        raise CorruptFile(f"not a readable GGUF file ({reason})", file=path) from error
    return Header(infos, texts, path.stat().st_size)


def _library(path: Path) -> Any:
    try:
        import gguf
    except ImportError:
        raise UnreadableFile(
            "GGUF files are read with the gguf package, which is not installed",
            hint="pip install 'adaptkit[gguf]'",
            file=path,
        ) from None
    return gguf


def _info(tensor: Any, reader: Any) -> TensorInfo:
    kind = tensor.tensor_type.name
    dtype = PLAIN.get(kind, kind)
    if dtype not in GGML and kind not in PLAIN:
        raise NotRepresentable(f"tensors of the type {kind} cannot be read", tensor=tensor.name)
    # dimensions are stored from the innermost to the outermost
    shape = tuple(int(n) for n in reversed(tensor.shape.tolist()))
    stored = reader.get_field(f"{_SHAPE}{tensor.name}")
    if stored is not None:
        shape = tuple(int(n) for n in stored.contents())
    start = int(tensor.data_offset)
    return TensorInfo(tensor.name, dtype, shape, start, start + int(tensor.n_bytes))


def dequantised(raw: memoryview, dtype: str) -> np.ndarray:
    """The numbers of blocks of a quantised type, in float32, as a vector."""
    import gguf
    import numpy as np
    from gguf import quants

    blocks = np.frombuffer(raw, np.uint8)
    found: np.ndarray = quants.dequantize(blocks, gguf.GGMLQuantizationType[dtype])
    return found.reshape(-1)
