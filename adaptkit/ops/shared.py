"""Helpers of every verb: output names, module selection, the coverage contract, dtypes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from adaptkit.errors import CannotWrite, NoSuchName, Unclaimed, WouldOverwrite, WrongUsage
from adaptkit.files.hub import from_hub, is_address, local
from adaptkit.files.quantized import FLOATS

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from adaptkit.entries import Entry

__all__ = [
    "DTYPES",
    "FLOATS",
    "Brief",
    "Closing",
    "Shared",
    "Unused",
    "biased",
    "check_output",
    "default_output",
    "parse_size",
    "refuse_unused",
    "settle",
    "split_strength",
    "stored_dtype",
]


class Brief:
    """A dataclass whose repr is one line: long fields by their number of items, none that is empty.

    A notebook cell or an error tracker prints objects whole, and a plan has a million of them.
    """

    def __repr__(self) -> str:
        names = [one.name for one in fields(self)]  # type: ignore[arg-type]
        found = ((name, _brief(getattr(self, name))) for name in names)
        where = type(self).__module__.removeprefix("adaptkit.").removeprefix("ops.").split(".")[0]
        shown = ", ".join(f"{name}={text}" for name, text in found if text)
        return f"{where}.{type(self).__name__}({shown})"


_LONG, _FEW = 80, 4  # characters of one value, and items


def _brief(value: object) -> str:
    if value is None or value in ((), {}):
        return ""
    if isinstance(value, Sized) and not isinstance(value, str) and len(value) > _FEW:
        return f"<{len(value)}>"
    shown = repr(str(value)) if isinstance(value, Path) else repr(value)
    short = len(shown) <= _LONG and " object at 0x" not in shown
    return shown if short else f"<{type(value).__name__}>"


class Closing(Brief):
    """Make an object with a `close` method a context manager."""

    def close(self) -> None:
        """Close the files it holds."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# a size of each unit: of 1000 and, with an `i`, of 1024
_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)
SIZES = "500KB, 64MB, 1.5GB or 64MiB"

POOR = 0.3  # a larger relative error of a result is said in a note

DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}


@dataclass(frozen=True)
class Shared:
    """Options of every verb that writes, named as on the command line and in JSON.

    `verify` reads the values of the output back and compares them with what was meant.
    """

    output: Path | None = None
    family: str | None = None
    format: str | None = None
    dtype: str = "keep"
    device: str = "auto"
    memory: int | None = None
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    overwrite: bool = False
    allow_unused: bool = False
    verify: bool = False

    def __post_init__(self) -> None:
        settle(self)


# options by the type of their values, whatever verb they belong to
_INPUTS, _BYTES = ("base", "weigh"), ("memory", "size", "shard_size")
_PATTERNS, _NAMES = ("only", "skip", "blocks"), ("family", "format", "to", "host", "algo")


def settle(options: Any) -> None:
    """Put the options of a verb in their types, whatever a caller wrote.

    A path may be text, a size `48KB`, a device a `torch.device`, and one pattern stand alone: a
    string is no sequence of one-letter patterns. Raises WrongUsage for a size that is none.
    """
    for one in fields(options):
        value = getattr(options, one.name)
        if value is None:
            continue
        if one.name in _INPUTS:
            value = local(value)
        elif one.name == "output":
            value = _target(value)
        elif one.name in _BYTES and isinstance(value, str):
            size = parse_size(value)
            if size is None:
                raise WrongUsage(f"{one.name}: {value!r} is not a size such as {SIZES}")
            value = size
        elif one.name in _PATTERNS:
            value = (value,) if isinstance(value, str) else tuple(value)
        elif one.name == "device":
            value = str(value)
        elif one.name in _NAMES and isinstance(value, str):
            value = value.strip().lower()
        object.__setattr__(options, one.name, value)


def _target(value: Any) -> Path:
    if is_address(value):
        raise WrongUsage("an output is a file on this machine", hint="the hub is only read")
    return Path(value)


class LeftOut(NamedTuple):
    """How many modules `--only` and `--skip` leave out, of how many, and by which options."""

    modules: int
    of: int
    by: str

    def __str__(self) -> str:
        return f"{self.modules} of {self.of} left out by {self.by}"

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON record."""
        return {"left_out": self.modules, "of": self.of, "by": self.by}


def chosen_by(left_out: LeftOut | None) -> dict[str, Any]:
    """The field `selection` of a plan or report, if modules were selected."""
    return {} if left_out is None else {"selection": left_out.to_dict()}


@dataclass(frozen=True, slots=True)
class Unused:
    """An unused key and the reason."""

    key: str
    reason: str

    def to_dict(self) -> dict[str, str]:
        """Return the JSON record."""
        return {"key": self.key, "reason": self.reason}


@dataclass(frozen=True, repr=False, kw_only=True)
class WriterReport(Brief):
    """Fields that the reports of all writers share (the JSON contract).

    `relative_error` is None if only a base weight, which was not given, can measure it. `measured`
    is the one measured on the finished file; None unless that was asked for. `loads_in` and `why`
    are the hosts' verdicts on a written adapter as `inspect` gives them. `selection` says what
    `--only` and `--skip` left out.
    """

    output: Path
    bytes: int
    modules: int
    parameters: int
    relative_error: float | None
    unused: tuple[Unused, ...] = ()
    seconds: float = 0.0
    details: tuple[Mapping[str, Any], ...] = field(default=())
    measured: float | None = None
    loads_in: Mapping[str, bool | None] | None = None
    why: Mapping[str, str] = field(default_factory=dict)
    selection: LeftOut | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON document of the contract."""
        return {
            "output": str(self.output),
            "bytes": self.bytes,
            "modules": self.modules,
            "parameters": self.parameters,
            "relative_error": self.relative_error,
            "unused": [item.to_dict() for item in self.unused],
            "seconds": round(self.seconds, 3),
            "details": [dict(item) for item in self.details],
            **({} if self.measured is None else {"verified": {"relative_error": self.measured}}),
            **({} if self.loads_in is None else {"loads_in": dict(self.loads_in)}),
            **({"why": dict(self.why)} if self.why else {}),
            **chosen_by(self.selection),
        }


def split_strength(argument: str) -> tuple[Path, float]:
    """Split `style.safetensors:0.8` into path and strength.

    Only a number after the last colon is a strength, so `C:\\x.safetensors` is a path.
    """
    path, colon, number = argument.rpartition(":")
    if colon and path and not Path(argument).exists():
        try:
            strength = float(number)
        except ValueError:
            return local(argument), 1.0
        if math.isfinite(strength):
            return local(path), strength
    return local(argument), 1.0


def parse_size(text: str) -> int | None:
    """Convert `64MB` (powers of 1000) or `64MiB` (of 1024) to bytes; None for anything else."""
    found = _SIZE.fullmatch(text.strip())
    if found is None or (found[3] and not found[2]):
        return None
    return int(float(found[1]) * (1024 if found[3] else 1000) ** _UNITS[found[2].upper()])


def default_output(beside: Path, suffix: str, *, folder: bool = False) -> Path:
    """Return `style-<suffix>.safetensors` (or the folder `style-<suffix>`) next to `style.ckpt`."""
    if from_hub(beside):  # its folder is the cache
        beside = Path(beside.name)
    # the folder `.` has a name only when resolved
    beside = beside if beside.name else beside.resolve()
    stem = (
        beside.name
        if beside.is_dir()
        else beside.name.removesuffix(".index.json").rpartition(".")[0] or beside.name
    )
    return (
        beside.parent
        / f"{stem.removesuffix('.safetensors')}-{suffix}{'' if folder else '.safetensors'}"
    )


def check_output(path: Path, overwrite: bool) -> None:
    """Refuse an existing or impossible output before any work."""
    if path.exists() and not overwrite:
        raise WouldOverwrite(
            "the output already exists",
            hint="pass --overwrite to replace it, or choose another --output",
            file=path,
        )
    if path.is_dir():
        raise WouldOverwrite(
            "the output is a folder", hint="pass a file name such as out.safetensors", file=path
        )
    if not path.parent.is_dir():
        raise CannotWrite(f"no such folder: {path.parent}", hint="create it first", file=path)


def refuse_unused(
    unused: Sequence[Unused], allowed: bool, file: object, hint: str | None = None
) -> None:
    """Enforce the coverage contract: fail if keys would be lost, unless allowed."""
    if not unused or allowed:
        return
    groups = [*by_reason(unused).values()]
    shown = "; ".join(
        f"{items[0].key}{f' and {len(items) - 1} more' if items[1:] else ''} ({items[0].reason})"
        for items in groups[:_REASONS]
    )
    more = f"; and {len(groups) - _REASONS} more reasons" if groups[_REASONS:] else ""
    also = "--allow-unused continues without them; the report then lists them"
    raise Unclaimed(
        f"{'1 key' if len(unused) == 1 else f'{len(unused)} keys'} would be lost: {shown}{more}",
        hint=f"{hint}; {also}" if hint else also,
        file=file,
    )


# reasons that are told, and the names in them, which differ from key to key
_REASONS, _NAME = 5, re.compile(r"\S+[._]\S+[._]\S+")


def by_reason(unused: Sequence[Unused]) -> dict[str, list[Unused]]:
    """Group keys by their reason, whatever module it names."""
    groups: dict[str, list[Unused]] = {}
    for item in unused:
        groups.setdefault(_NAME.sub("…", item.reason), []).append(item)
    return groups


def stored_dtype(option: str, kept: str) -> str:
    """Return the safetensors dtype to write; `keep` keeps the dtype of the input."""
    if option == "keep":
        return kept
    if option not in DTYPES:
        raise NoSuchName.among("dtype", option, ["keep", *DTYPES])
    return DTYPES[option]


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of a safetensors dtype such as `F16`."""
    import torch

    return {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
    }[name]


def biased(entries: Iterable[Entry]) -> list[str]:
    """A note about modules that change the bias beside the weight, if there are any."""
    number = sum(entry.kind.changes_bias(entry.facts) for entry in entries)
    modules = "1 module changes" if number == 1 else f"{number} modules change"
    return [f"{modules} the bias of the layer too, which only merge adds"] if number else []
