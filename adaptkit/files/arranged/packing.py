"""Write nunchaku's files of FLUX.1: the factors of an adapter behind those of a quantised base.

The inverse of adaptkit.files.arranged.nunchaku, which gives the source of the layout. As nunchaku's
own converter does, q, k and v share their D if theirs are equal, and have ranks of their own
otherwise; the two layers of an MLP have one rank; ranks are filled up to tiles with zeros; and the
base's branch stands alone where the adapter has nothing.
"""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from adaptkit.errors import NotRepresentable, ShapeMismatch
from adaptkit.files.arranged.nunchaku import (
    BASE_RANK,
    COLUMNS,
    FUSED,
    JOINED,
    PARTS,
    TILE,
    factors_of,
    names_of,
)
from adaptkit.files.header import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import Tensor

    from adaptkit.files.source import TensorSource

__all__ = ["PackedTensor", "Packer"]

_BLOCK = re.compile(r"((?:single_)?transformer_blocks\.\d+)\.(.+)")
_DOWN, _UP, _BIAS = ".lora_A.weight", ".lora_B.weight", ".lora_B.bias"
_VALUE = ".set_weight"
PREFIX = "transformer."
# layers of one rank, because a kernel computes the D of the second with the U of the first
MLPS = (("mlp_fc1", "mlp_fc2"), ("mlp_context_fc1", "mlp_context_fc2"))
OF_FUSED = {part: fused for fused, parts in FUSED.items() for part in parts}


class PackedTensor(NamedTuple):
    """A tensor to be written, and what makes it."""

    spec: TensorSpec
    make: Callable[[], Tensor]


class Packer:
    """Packs an adapter of diffusers' names for a base that nunchaku quantised.

    `NotRepresentable` if the base is not one.
    """

    def __init__(self, base: TensorSource) -> None:
        self.base = base
        self.layers: dict[str, tuple[int, int]] = {}  # (rows, columns) of the quantised layers
        for key, info in base.infos.items():
            stem = key.removesuffix(".lora_down")
            if stem == key or f"{stem}.qweight" not in base.infos:
                continue
            up = base.infos.get(f"{stem}.lora_up")
            if not self._names(stem) or up is None:
                continue
            if info.shape[1:] != (BASE_RANK,) or up.shape[1:] != (BASE_RANK,):
                raise NotRepresentable(
                    f"its own branch has rank {info.shape[-1]}, not {BASE_RANK}",
                    file=base.path,
                    tensor=stem,
                )
            self.layers[stem] = up.shape[0], info.shape[0]
            self.dtype = info.dtype
        if not self.layers:
            raise NotRepresentable(
                "this is no FLUX.1 that nunchaku quantised: no layer has qweight, lora_down and "
                "lora_up",
                hint="--base takes the quantised model that the adapter is for",
                file=base.path,
            )

    def check(self, modules: Iterable[str]) -> None:
        """NotRepresentable for a module, by diffusers' name, that the base has no place for."""
        blocks = {stem.rpartition(".")[0] for stem in self.layers}
        for name in modules:
            plain = name.removeprefix(PREFIX)
            match = _BLOCK.match(plain)
            if plain == name or (match is not None and match[1] not in blocks):
                raise NotRepresentable(
                    "nunchaku's format has no place for it, or the base no such block",
                    hint="--only transformer leaves text encoders out",
                    tensor=name,
                )

    def pack(self, source: TensorSource) -> Iterator[PackedTensor]:
        """Every tensor of the packed file; `ShapeMismatch` if a module is of another size."""
        used: set[str] = set()
        ranks = self._ranks(source)
        for stem, size in self.layers.items():
            modules = [f"{PREFIX}{stem.rpartition('.')[0]}.{name}" for name in self._names(stem)]
            used.update(module + end for module in modules for end in (_DOWN, _UP))
            self._check(source, stem, modules)
            whole = -(-(BASE_RANK + ranks[stem]) // TILE) * TILE
            for end, channels, make in (
                ("down", size[1], partial(self._down, source, stem, whole)),
                ("up", size[0], partial(self._up, source, stem, whole)),
            ):
                spec = TensorSpec(f"{stem}.lora_{end}", self.dtype, (channels, whole))
                yield PackedTensor(spec, make)
        left = [name for name in source.infos if name not in used]
        yield from _others(source, left)

    def _names(self, stem: str) -> tuple[str, ...]:
        block, _, local = stem.rpartition(".")
        return names_of(block, local)

    def _check(self, source: TensorSource, stem: str, modules: list[str]) -> None:
        rows, columns = self.layers[stem]
        if modules[0].endswith(JOINED):
            block = stem.rpartition(".")[0]
            columns = sum(self.layers[f"{block}.{local}"][1] for local in COLUMNS)
        for module in modules:
            down, up = source.infos.get(module + _DOWN), source.infos.get(module + _UP)
            if down is None or up is None:
                continue
            if down.shape[1:] != (columns,) or up.shape[:1] != (rows // len(modules),):
                raise ShapeMismatch(
                    f"{up.shape[0]} × {down.shape[1]} here, "
                    f"{rows // len(modules)} × {columns} in {self.base.path.name}",
                    tensor=module,
                )

    def _ranks(self, source: TensorSource) -> dict[str, int]:
        """The rank that the adapter adds to each layer."""
        found = {}
        for stem in self.layers:
            down = self._plain(source, stem)[0]
            found[stem] = 0 if down is None else len(down)
        for stem in list(found):
            for pair in MLPS:
                if stem.endswith(f".{pair[0]}"):
                    other = stem.removesuffix(pair[0]) + pair[1]
                    found[stem] = found[other] = max(found[stem], found.get(other, 0))
        return found

    def _plain(self, source: TensorSource, stem: str) -> tuple[Tensor | None, Tensor | None]:
        """D and U of the adapter for a quantised layer; None if it has none there."""
        import torch

        block, _, local = stem.rpartition(".")
        modules = [f"{PREFIX}{block}.{name}" for name in self._names(stem)]
        held = [module if module + _DOWN in source.infos else None for module in modules]
        downs = [None if module is None else source.read(module + _DOWN) for module in held]
        known = [down for down in downs if down is not None]
        if not known:
            return None, None
        ups = [None if module is None else source.read(module + _UP) for module in held]
        if local in COLUMNS and block.startswith("single_"):
            first = self.layers[f"{block}.{COLUMNS[0]}"][1]
            cut = slice(None, first) if local == COLUMNS[0] else slice(first, None)
            return known[0][:, cut], ups[0]
        height = self.layers[stem][0] // len(modules)
        if all(torch.equal(known[0], down) for down in known):
            blank = known[0].new_zeros(height, len(known[0]))
            return known[0], torch.cat([blank if up is None else up for up in ups])
        found, at = known[0].new_zeros(height * len(modules), sum(map(len, known))), 0
        for n, up in enumerate(ups):
            if up is not None:
                found[n * height : (n + 1) * height, at : at + up.shape[1]] = up
                at += up.shape[1]
        return torch.cat(known), found

    def _down(self, source: TensorSource, stem: str, whole: int) -> Tensor:
        own = factors_of(self.base.read(f"{stem}.lora_down"), down=True)
        found = own.new_zeros(whole, own.shape[1])
        found[:BASE_RANK] = own
        down = self._plain(source, stem)[0]
        if down is not None:
            found[BASE_RANK : BASE_RANK + len(down)] = down
        return _packed(found, down=True)

    def _up(self, source: TensorSource, stem: str, whole: int) -> Tensor:
        own = factors_of(self.base.read(f"{stem}.lora_up"), down=False)
        found = own.new_zeros(len(own), whole)
        found[:, :BASE_RANK] = own
        up = self._plain(source, stem)[1]
        if up is not None:
            found[:, BASE_RANK : BASE_RANK + up.shape[1]] = up
        return _packed(found, down=False)


def _others(source: TensorSource, names: Iterable[str]) -> Iterator[PackedTensor]:
    """Modulations, layers outside of blocks, biases and norms."""
    fused: dict[str, dict[str, str]] = {}
    for name in names:
        info, (stem, end) = source.infos[name], _split(name.removeprefix(PREFIX))
        match = _BLOCK.fullmatch(stem)
        local = "" if match is None else match[2]
        if end == _BIAS and match is not None and local in OF_FUSED:
            fused.setdefault(f"{match[1]}.{OF_FUSED[local]}", {})[local] = name
        elif end == _DOWN and local in PARTS:
            made = -(-info.shape[0] // TILE) * TILE, info.shape[1]
            make = partial(_modulation, source, name, made, 0)
            yield PackedTensor(TensorSpec(f"{stem}.lora_down", info.dtype, made), make)
        elif end == _UP and local in PARTS:
            made = info.shape[0], -(-info.shape[1] // TILE) * TILE
            make = partial(_modulation, source, name, made, PARTS[local])
            yield PackedTensor(TensorSpec(f"{stem}.lora_up", info.dtype, made), make)
        else:
            key = stem + {_BIAS: ".bias", _VALUE: ".weight"}.get(end, end)
            yield PackedTensor(TensorSpec(key, info.dtype, info.shape), partial(source.read, name))
    for stem, parts in fused.items():
        first = source.infos[next(iter(parts.values()))]
        order = [parts.get(part) for part, of in OF_FUSED.items() if stem.endswith(f".{of}")]
        shape = (len(order) * first.shape[0],)
        make = partial(_fused, source, order, first.shape[0])
        yield PackedTensor(TensorSpec(f"{stem}.bias", first.dtype, shape), make)


def _split(name: str) -> tuple[str, str]:
    """A module and the end of its tensor's name."""
    end = next((end for end in (_DOWN, _UP, _BIAS, _VALUE) if name.endswith(end)), "")
    return name.removesuffix(end), end


def _modulation(source: TensorSource, name: str, shape: tuple[int, int], parts: int) -> Tensor:
    """A factor of a modulation, filled up with zeros; rows (parts, width) as (width, parts)."""
    stored = source.read(name)
    found = stored.new_zeros(shape)
    found[: stored.shape[0], : stored.shape[1]] = stored
    if parts:
        found = found.reshape(parts, -1, shape[1]).transpose(0, 1).reshape(shape)
    return found


def _fused(source: TensorSource, names: list[str | None], height: int) -> Tensor:
    import torch

    known = {name: source.read(name) for name in names if name is not None}
    blank = torch.zeros(height, dtype=next(iter(known.values())).dtype)
    return torch.cat([blank if name is None else known[name] for name in names])


def _packed(factor: Tensor, *, down: bool) -> Tensor:
    """A factor in tiles, see `adaptkit.files.arranged.nunchaku.factors_of`."""
    ranks, channels = factor.shape if down else (factor.shape[1], factor.shape[0])
    tiles = factor.reshape(factor.shape[0] // TILE, TILE, factor.shape[1] // TILE, TILE)
    tiles = tiles.permute(2, 0, 1, 3) if down else tiles.permute(0, 2, 1, 3)
    lanes = tiles.reshape(channels // TILE, ranks // TILE, 2, 8, 2, 4, 2)
    return lanes.permute(0, 1, 3, 5, 2, 4, 6).reshape(channels, ranks)
