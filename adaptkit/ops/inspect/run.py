"""inspect: identify a file from its header, without torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptkit.adapter import Adapter, open_adapter_source
from adaptkit.checkpoint import Checkpoint
from adaptkit.detect import Detection, detect_checkpoint, foreign, is_adapter
from adaptkit.errors import AdaptkitError, InternalError, UnknownAdapter
from adaptkit.files.limits import watched
from adaptkit.files.packed import unpacked
from adaptkit.files.provenance import file_hashes, sha256
from adaptkit.formats.contract import Alpha
from adaptkit.meaning import Problem
from adaptkit.ops.adapter_file.verdict import verdicts
from adaptkit.ops.shared import biased, settle
from adaptkit.suggest import MISSPELT
from adaptkit.unknown import own_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from os import PathLike

    from adaptkit.files.header import TensorInfo
    from adaptkit.files.source import TensorSource
    from adaptkit.ops.stages import Progress

__all__ = ["Options", "Report", "failed", "run"]

_STRANGER = "an adapter of an unknown model family, key format or algorithm"
# a larger alpha / rank is rarely intended
STRONG = 4.0


@dataclass(frozen=True)
class Options:
    """Options of inspect.

    `safety` adds what loading the file elsewhere could do, see `adaptkit.ops.inspect.safety`.
    `overview` leaves out hosts, keys and modules, which a table of files does not show.
    """

    family: str | None = None
    format: str | None = None
    alpha_in: str | None = None
    hash: bool = False
    stats: bool = False
    overview: bool = False
    safety: bool = False

    def __post_init__(self) -> None:
        settle(self)


@dataclass(frozen=True, repr=False)
class Report:
    """The JSON record of one file, with its lists for `--keys` and `--modules`.

    `spectra` holds the descending singular values of every module's ΔW, empty for a module
    without a ΔW of its own. Without the option `stats` there are no spectra.
    """

    record: Mapping[str, Any]
    keys: tuple[Mapping[str, Any], ...] = ()
    modules: tuple[Mapping[str, Any], ...] = ()
    error: AdaptkitError | None = None
    spectra: tuple[Sequence[float], ...] = ()

    def __repr__(self) -> str:
        record = self.record
        if self.error is not None:
            return f"inspect.Report({record['path']!r}: {self.error.message})"
        names = [record[name] for name in ("kind", "family", "format") if record[name]]
        what = f"{', '.join(names)}, {record['modules']} modules"
        return f"inspect.Report({record['path']!r}: {what}, {len(record['problems'])} problems)"

    @property
    def broken(self) -> bool:
        """Whether the file cannot be read, or has a problem of severity `error`."""
        problems = self.record.get("problems", ())
        return self.error is not None or any(p["severity"] == "error" for p in problems)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON record of the contract."""
        return dict(self.record)


def run(
    path: str | PathLike[str], options: Options | None = None, progress: Progress | None = None
) -> Report:
    """Inspect one file; an unreadable or unknown file gives a report with an error.

    `progress` counts the modules read if `options.stats` is set.
    """
    options, path = options or Options(), Path(path)
    if not options.safety:
        return _told(path, options, progress)
    from adaptkit.ops.inspect.safety import non_finite_problem, safety

    with watched() as asked:
        report = _told(path, options, progress)
    found = safety(path, asked)
    added: dict[str, Any] = {"safety": found}
    if report.error is None and not options.stats:
        added["problems"] = [*report.record["problems"], *non_finite_problem(found)]
    return replace(report, record={**report.record, **added})


def _hashes(path: Path, source: TensorSource) -> dict[str, str]:
    """The hashes of a file; those of its tensors only if it is a safetensors file."""
    if path.suffix.lower() not in (".safetensors", ".sft"):
        found = sha256(path)
        return {"sha256": found, "autov2": found[:10].upper()}
    return file_hashes(path, map(source.raw, sorted(source.infos, key=source.order)))


def _told(path: Path, options: Options, progress: Progress | None) -> Report:
    try:
        source, config = open_adapter_source(path)
        with source:
            report = (
                _adapter(source, config, options, progress)
                if config is not None or is_adapter(source.infos)
                else _checkpoint(source, options)
            )
            hashed = _hashes(path, source) if options.hash and path.is_file() else {}
    except Exception as error:
        # whatever happens in one file is that file's report: the others follow
        return failed(path, InternalError.of(error))
    return replace(report, record={"path": str(path), **report.record, **hashed})


def failed(path: Path, error: AdaptkitError) -> Report:
    """The report of a file that could not be read."""
    record = {"path": str(path), "error": str(error.at(file=path)), "hint": error.hint}
    return Report(record, error=error)


def _evidence(found: Detection) -> dict[str, Any]:
    other = found.runner_up
    return {
        "claimed": found.claimed,
        "total": found.total,
        "runner_up": other and {"family": other[0], "format": other[1], "claimed": other[2]},
        "alternatives": list(found.alternatives),
        "nearest": found.nearest and found.nearest._asdict(),
    }


def _dtypes(infos: Iterable[TensorInfo]) -> dict[str, int]:
    return dict(Counter(info.dtype for info in infos).most_common())


def _keys(source: TensorSource, reasons: Mapping[str, str]) -> tuple[Mapping[str, Any], ...]:
    return tuple(
        {
            "key": info.name,
            "dtype": info.dtype,
            "shape": list(info.shape),
            "note": reasons.get(info.name),
        }
        for info in source.infos.values()
    )


def _adapter(
    source: TensorSource,
    config: Mapping[str, object] | None,
    options: Options,
    progress: Progress | None,
) -> Report:
    try:
        adapter = Adapter.understand(
            source,
            config,
            family=options.family,
            format=options.format,
            alpha=options.alpha_in,
        )
    except UnknownAdapter:
        if options.family or options.format or foreign(source.infos, config) is not None:
            raise
        return _stranger(source)
    source, entries = adapter.source, adapter.entries.values()
    record = {
        "bytes": source.size,
        "kind": "adapter",
        "family": adapter.family.name if adapter.known else None,
        "format": adapter.format.name,
        **({"layout": source.layout} if source.layout else {}),
        "evidence": _evidence(adapter.detection),
        "algorithms": adapter.algorithms(),
        "components": dict(Counter(entry.slot.component for entry in entries).most_common()),
        "modules": len(entries),
        "parameters": sum(
            source.infos[key].numel for entry in entries for _, key in entry.tensors()
        ),
        "dtypes": _dtypes(source.infos.values()),
        "ranks": _counted(
            str(entry.facts.rank) for entry in entries if entry.facts.rank is not None
        ),
        "scales": _counted(f"{entry.facts.scale:g}" for entry in entries if not entry.kind.bounded),
        "alpha_source": adapter.alpha_source,
        "unclaimed": list(adapter.unclaimed),
        "own_names": [adapter.label(slot) for slot in adapter.own],
        "problems": [_problem(problem) for problem in (*_problems(adapter), *_traps(adapter))],
        **({"loads_in": None} if options.overview else _loads_in(adapter)),
        "metadata": dict(source.metadata),
    }
    if options.overview and not options.stats:
        return Report(record)
    report = Report(record, _keys(source, adapter.unclaimed), tuple(_modules(adapter)))
    return _with_stats(adapter, report, progress) if options.stats else report


def _loads_in(adapter: Adapter) -> dict[str, Any]:
    """Return whether each host loads the file (None: not measured), and why not."""
    from adaptkit.hosts import measured_with

    found = verdicts(adapter)
    return {**found, "measured_with": {name: measured_with(name) for name in found["loads_in"]}}


def _traps(adapter: Adapter) -> Iterator[Problem]:
    """Yield problems of files that load, but may not work as intended."""
    ranked = [entry for entry in adapter.entries.values() if entry.facts.rank is not None]
    silent = [entry for entry in ranked if entry.alpha is None]
    if silent and adapter.format.alpha is Alpha.TENSOR:
        yield Problem(
            "warning", None, f"{len(silent)} modules have no alpha; hosts assume alpha = rank"
        )
    yield from map(_note, biased(adapter.entries.values()))
    for what, found in (
        ("alpha is 0, which disables them", [e for e in ranked if e.facts.scale == 0]),
        ("alpha is negative, which inverts them", [e for e in ranked if e.facts.scale < 0]),
        (
            f"alpha is more than {STRONG:g} times the rank",
            [e for e in ranked if e.facts.scale > STRONG],
        ),
    ):
        if found:
            yield Problem("warning", adapter.label(found[0].slot), f"{len(found)} modules: {what}")


def _note(what: str) -> Problem:
    return Problem("warning", None, what)


def _with_stats(adapter: Adapter, report: Report, progress: Progress | None) -> Report:
    """Read every tensor; add statistics of modules and blocks, and their problems."""
    from adaptkit.ops.inspect import stats
    from adaptkit.ops.inspect.outliers import outliers

    found = stats.measure(adapter, progress)
    added = {
        "problems": [*report.record["problems"], *map(_problem, stats.problems(found))],
        "norm": stats.total_norm(found),
        "outliers": [one._asdict() for one in outliers(found)],
        "blocks": stats.rolled_up(found, [part.name for part in adapter.family.components]),
    }
    modules = tuple(
        {**module, **one.to_dict()} for module, one in zip(report.modules, found, strict=True)
    )
    return replace(
        report,
        record={**report.record, **added},
        modules=modules,
        spectra=tuple(one.sigma for one in found),
    )


def _counted(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _problem(problem: Problem) -> dict[str, Any]:
    return {"severity": problem.severity, "module": problem.module, "what": problem.what}


def _problems(adapter: Adapter) -> Iterator[Problem]:
    yield from adapter.problems
    foreign = [key for key, reason in adapter.unclaimed.items() if reason.startswith("no such")]
    if foreign:
        what = adapter.unclaimed[foreign[0]]
        yield Problem("error", None, f"{foreign[0]}{_more(len(foreign))}: {what}")
    if adapter.own:
        first, n = adapter.label(adapter.own[0]), len(adapter.own)
        key = next(iter(adapter.entries[adapter.own[0]].keys.values()))
        near = adapter.nearest(key, MISSPELT)
        tail = "" if near is None else f"; the nearest known name is {near}"
        what = f"{n} module{'s are' if n > 1 else ' is'} not in the table of {adapter.family.title}"
        yield Problem(
            "warning", None, f"{what}, and kept under {_own_names(n)}: {first}{_more(n)}{tail}"
        )


def _own_names(n: int) -> str:
    return "their own names" if n > 1 else "its own name"


def _more(n: int) -> str:
    return f" and {n - 1} more" if n > 1 else ""


def _modules(adapter: Adapter) -> Iterator[Mapping[str, Any]]:
    for entry in adapter.entries.values():
        facts = entry.facts
        yield {
            "module": adapter.label(entry.slot),
            "algorithm": entry.kind.name,
            "rank": facts.rank,
            "alpha": entry.alpha,
            "scale": facts.scale,
            "rows": facts.rows,
            "columns": facts.columns,
            "kernel": None if facts.kernel is None else list(facts.kernel),
            "dtype": adapter.source.infos[next(key for _, key in entry.tensors())].dtype,
        }


def _stranger(source: TensorSource) -> Report:
    """Report an adapter of an unknown family or format."""
    record = _plain(source, "adapter", Detection(None, None, 0, len(source.infos)))
    record["unclaimed"] = list(source.infos)
    record["problems"] = [{"severity": "error", "module": None, "what": _STRANGER}]
    return Report(record, _keys(source, {}))


def _plain(source: TensorSource, kind: str, found: Detection) -> dict[str, Any]:
    return {
        "bytes": source.size,
        "kind": kind,
        "family": found.family,
        "format": None,
        "evidence": _evidence(found),
        "algorithms": {},
        "components": {},
        "modules": 0,
        "parameters": sum(info.numel for info in source.infos.values()),
        "dtypes": _dtypes(source.infos.values()),
        "ranks": {},
        "scales": {},
        "alpha_source": "none",
        "unclaimed": [],
        "own_names": [],
        "problems": [],
        "loads_in": None,
        "metadata": dict(source.metadata),
    }


def _checkpoint(source: TensorSource, options: Options) -> Report:
    source = unpacked(source)
    try:
        checkpoint = Checkpoint.understand(source, family=options.family)
    except UnknownAdapter:
        if foreign(source.infos) is not None:
            Adapter.understand(source)  # which says what it is
        if sum(name.endswith(".weight") for name in source.infos) == 0:
            raise UnknownAdapter(
                "neither an adapter nor a checkpoint: no key ends in .weight",
                hint=f"the first key is {next(iter(source.infos), 'missing')!r}",
            ) from None
        found = replace(detect_checkpoint(source.infos, source.metadata), claimed=0)
        record = _plain(source, "checkpoint", found)
        return Report(record, _keys(source, {}))
    record = _plain(source, "checkpoint", checkpoint.detection)
    parts = [place.slot.component for place in checkpoint.places.values()]
    record["components"] = dict(Counter([*parts, *checkpoint.others.values()]).most_common())
    record["own_names"] = [f"{own.component}.{own.module}" for own in own_of(checkpoint.family)]
    record["modules"] = len({place.slot.target.module for place in checkpoint.places.values()})
    record["layout"] = ", ".join(
        dict.fromkeys(place.naming for place in checkpoint.places.values())
    )
    return Report(record, _keys(source, checkpoint.others), tuple(_places(checkpoint)))


def _places(checkpoint: Checkpoint) -> Iterator[Mapping[str, Any]]:
    for name, place in checkpoint.places.items():
        info = checkpoint.source.infos[name]
        yield {
            "module": checkpoint.label(place.slot),
            "key": name,
            "dtype": info.dtype,
            "shape": list(info.shape),
        }
