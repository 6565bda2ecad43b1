"""Judge which hosts load a file, and how to write one for a host."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

from adaptkit.detect import families, formats
from adaptkit.errors import NoSuchName, NotRepresentable
from adaptkit.formats.contract import Alpha
from adaptkit.hosts._measured import measurement, reads
from adaptkit.hosts._pieces import common_alphas, examples, pieces_as, pieces_of
from adaptkit.hosts.contract import NO_MODEL, Loss, Recipe, Verdict
from adaptkit.keymap.kinds import low_rank_kind
from adaptkit.registry import discover

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Mapping, Sequence
    from pathlib import Path

    from adaptkit.adapter import Adapter
    from adaptkit.families.contract import ModelFamily
    from adaptkit.hosts.contract import Host, Piece
    from adaptkit.names import Slot

    # the share of lost modules, how to write, the losses, and the number of modules
    _Form = tuple[float, Recipe, dict[Loss, list[Piece]], int]

__all__ = ["complete", "format_for", "hosts", "judge", "losses", "named", "recipe", "usual_format"]

SHOWN = 3  # modules named per reason
PREFERRED = ("kohya", "comfy", "diffusers")  # the better known first


def hosts() -> Mapping[str, Host]:
    """Every host by name."""
    return discover("adaptkit.hosts", "HOST")


def named(name: str) -> Host:
    """The host of a name, whatever its case, or of another name for it; NoSuchName if none is."""
    wanted = name.strip().lower()
    found = {other: host for host in hosts().values() for other in (*host.also, host.name)}
    if wanted not in found:
        raise NoSuchName.among("host", name, found)
    return found[wanted]


def judge(adapter: Adapter) -> dict[str, Verdict]:
    """The verdict of each host on a file."""
    pieces = pieces_of(adapter) if adapter.known else ()
    return {name: _verdict(host, adapter, pieces) for name, host in hosts().items()}


def losses(adapter: Adapter, host: str) -> dict[Slot, str] | None:
    """The slots that a host loses, and why; None if it is not measured."""
    pieces = pieces_of(adapter) if adapter.known else ()
    target = hosts()[host]
    if _unmeasured(target, adapter, pieces):
        return None
    if adapter.family.name in target.unsupported:
        return {piece.slot: target.unsupported[adapter.family.name] for piece in pieces}
    found = _lost(target, adapter.format.name, adapter.family.name, pieces)
    if any(loss.whole for loss in found):
        why = next(loss.what for loss in found if loss.whole)
        return {piece.slot: why for piece in pieces}
    return {piece.slot: loss.what for loss, lost in found.items() for piece in lost}


def complete(host: Host, format: str) -> list[str]:
    """The families whose denoiser a host loads completely in a format."""
    found: list[str] = []
    for name in families():
        pieces = examples(name, format)
        known = pieces and name not in host.unsupported and _knows(host, format, name, pieces)
        if known and not _lost(host, format, name, pieces):
            found.append(name)
    return found


@cache
def usual_format(family: str) -> str:
    """The format in which the most hosts load a whole LoRA of a family's denoiser.

    Of equally good ones the earlier of `PREFERRED`, which is also that of an unknown family.
    """
    best, most = PREFERRED[0], -1
    if family not in families():
        return best
    files = [name for name, form in formats().items() if form.alpha is not Alpha.CONFIG]
    for format in (*PREFERRED, *(name for name in files if name not in PREFERRED)):
        loading = len(hosts())
        for host in hosts():
            if loading <= most:  # it cannot be better: the other hosts need not be asked
                break
            loading -= _missed(host, format, family) != 0.0
        if loading > most:
            best, most = format, loading
    return best


def format_for(host: str, family: ModelFamily) -> str:
    """The format in which a host loads the most of a LoRA of a family's denoiser.

    Raises `NotRepresentable` if it loads nothing of it in any.
    """
    target = named(host)
    tried = {
        name: missed
        for name in target.formats(family.name)
        if (missed := _missed(target.name, name, family.name)) is not None
    }
    if not tried or min(tried.values()) == 1.0:
        raise _untried(target, family, None)
    return min(tried, key=lambda name: tried[name])


@cache
def _missed(name: str, format: str, family: str) -> float | None:
    """The share of a denoiser that a host does not load in a format; None if not measured."""
    host = hosts()[name]
    pieces = examples(family, format) if family in families() else ()
    if not pieces or family in host.unsupported or not _knows(host, format, family, pieces):
        return None
    lost = _lost(host, format, family, pieces)
    gone = len(pieces) if any(loss.whole for loss in lost) else sum(map(len, lost.values()))
    return gone / len(pieces)


def _verdict(host: Host, adapter: Adapter, pieces: tuple[Piece, ...]) -> Verdict:
    unknown = _unmeasured(host, adapter, pieces)
    if unknown:
        return Verdict(None, f"not measured{unknown}")
    if adapter.family.name in host.unsupported:
        return Verdict(False, host.unsupported[adapter.family.name])
    lost = _lost(host, adapter.format.name, adapter.family.name, pieces)
    if lost:
        return Verdict(False, "; ".join(_reasons(lost, len(pieces))))
    strange = [*map(adapter.label, adapter.own), *adapter.unclaimed]
    if strange:
        # what adaptkit does not know, a host may
        return Verdict(None, f"not measured for {_some(strange)}")
    return Verdict(True)


def _unmeasured(host: Host, adapter: Adapter, pieces: tuple[Piece, ...]) -> str:
    """What of a file no table of a host can be about; empty if there is nothing."""
    if not adapter.known:
        return ": the model family is unknown"
    if adapter.family.name in host.unsupported:
        return ""
    if adapter.source.layout:
        return f" for files in the layout of {adapter.source.layout}"
    if adapter.detection.wrapper:
        return f" for names behind {adapter.detection.wrapper!r}"
    strange = sorted({piece.algorithm for piece in pieces} - set(host.algorithms))
    if strange:
        return f" for {' and '.join(strange)}"
    known = _knows(host, adapter.format.name, adapter.family.name, pieces)
    return "" if known else f" for {adapter.format.name} keys of {adapter.family.title}"


def _knows(host: Host, format: str, family: str, pieces: tuple[Piece, ...]) -> bool:
    """Whether a host was tried with every module of a file under its name."""
    untried = host.untried.get(family)
    if untried and any(re.search(untried, str(piece.slot.target)) for piece in pieces):
        return False
    table = _table(host, format, family, pieces)
    told = {(piece.slot.component, piece.names): piece for piece in pieces}  # few rows, many blocks
    return all(reads(table, piece) is not None for piece in told.values())


def _table(
    host: Host, format: str, family: str, pieces: tuple[Piece, ...]
) -> Mapping[str, Mapping[str, bool | list[str]]] | None:
    """The names of a family that a host was tried with in a format, or in what it takes it for."""
    cell = host.cell(format, family, pieces)
    used = cell.like if cell and cell.like else format
    return measurement(host.name).names.get(family, {}).get(used)


def _lost(
    host: Host, format: str, family: str, pieces: tuple[Piece, ...]
) -> dict[Loss, list[Piece]]:
    """The modules a host does not load, by their first loss.

    A loss of the whole file excludes all others.
    """
    cell = host.cell(format, family, pieces)
    if cell is not None and not all(
        any(re.search(p, str(x.slot.target)) for x in pieces) for p in cell.needs
    ):
        return {cell.partial: list(pieces)}
    found_out = cell.check(pieces) if cell is not None and cell.check is not None else None
    if found_out is not None and found_out.whole:
        return {found_out: list(pieces)}
    table = _table(host, format, family, pieces)
    more = () if found_out is None else (found_out,)
    conditions = sorted(
        (*more, *(cell.losses if cell else ()), *host.always), key=lambda loss: not loss.whole
    )
    name = (cell.unread if cell else None) or host.unread
    none, every = (cell.none, cell.every) if cell else (None, False)
    asked = any(loss.odd for loss in (*conditions, *(() if none is None else (none,))))
    common = common_alphas(pieces) if asked else {}
    found: dict[Loss, list[Piece]] = {}
    unread = left = 0
    bearers: list[bool] = []  # of those that `none` is about, which are read
    # a file has many modules, of few kinds
    alike: dict[Hashable, tuple[list[Loss], bool]] = {}
    for piece in pieces:
        likeness = piece.likeness
        if likeness not in alike:
            fitting = [loss for loss in conditions if loss.fits(piece, common)]
            alike[likeness] = fitting, not every and reads(table, piece) is False
        fitting, missed = alike[likeness]
        # a loss of the whole file outweighs any other reason
        loss = next((loss for loss in fitting if loss.about(piece)), None)
        if none is not None and none.holds(piece, common):
            bearers.append(not missed)
        if missed:
            unread += 1
            left += piece.keys
            loss = name if loss is None or (name.whole and not loss.whole) else loss
        elif loss is not None:
            left += loss.leaves(piece)
        if loss is not None:
            found.setdefault(loss, []).append(piece)
    whole = next((loss for loss in found if loss.whole), None)
    if whole is not None:
        return {whole: found[whole]}
    for holds, loss in (
        (unread == len(pieces), host.nothing),
        (host.spare is not None and left > host.spare, host.refuses),
        (bool(bearers) and not any(bearers), none),
    ):
        if holds and loss is not None:
            return {loss: list(pieces)}
    return found


def _reasons(lost: Mapping[Loss, Sequence[Piece]], total: int) -> Iterator[str]:
    """One short sentence per loss, with count and first modules."""
    by_text: dict[str, list[Piece]] = {}
    for loss, pieces in lost.items():
        kinds = " and ".join(sorted({piece.algorithm for piece in pieces}))
        by_text.setdefault(loss.what.format(kinds=kinds), []).extend(pieces)
        if loss == Loss(loss.what, whole=True):  # unconditional: any such file, any modules
            yield loss.what
            return
    for text, pieces in by_text.items():
        if len(pieces) == total:
            yield f"{total} modules {text}"
        else:
            labels = [piece.label for piece in pieces]
            yield f"{len(pieces)} of {total} modules {text}: {_some(labels)}"


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:SHOWN])
    return f"{shown} and {len(names) - SHOWN} more" if len(names) > SHOWN else shown


def recipe(host: str, adapter: Adapter, algorithm: str | None = None) -> Recipe:
    """Choose how to write an adapter for a host, perhaps in another algorithm.

    The form with the most modules loaded wins; modules lost even so become warnings. Raises
    `NotRepresentable` if every form loads nothing.
    """
    target = named(host)
    path = adapter.source.path
    if not adapter.known:
        raise NotRepresentable(
            f"what {target.title} loads is not known for an unknown family",
            hint="name the format to write: --to",
            file=path,
        )
    tried = _tried(target, adapter, algorithm)
    if not tried:
        raise _untried(target, adapter.family, path)
    missing, form, lost, total = min(tried, key=lambda made: made[0])
    reasons = tuple(_reasons(lost, total))
    if missing == 1.0:  # nothing is left of what the format has a place for
        kinds = sorted(
            {piece.algorithm for loss, pieces in lost.items() if loss.besides for piece in pieces}
        )
        what = (
            f"{' and '.join(kinds)} for {adapter.family.title}"
            if kinds
            else f"form of this adapter: {reasons[0]}"
        )
        raise NotRepresentable(
            f"{target.title} loads no {what}",
            hint=_helping(target, adapter, algorithm),
            file=path,
        )
    warnings = tuple(f"in {target.title}, {reason}" for reason in reasons)
    return replace(form, warnings=warnings)


def _tried(host: Host, adapter: Adapter, algorithm: str | None) -> list[_Form]:
    return [
        made
        for format in host.formats(adapter.family.name)
        for made in _forms(host, adapter, format, algorithm)
    ]


def _helping(host: Host, adapter: Adapter, algorithm: str | None) -> str:
    """What else may be tried where every form of an adapter loads nothing."""
    hint = "--skip drops modules that stop it"
    lora = low_rank_kind().name
    if algorithm != lora and any(made[0] < 1.0 for made in _tried(host, adapter, lora)):
        hint = f"--algo {lora} writes a LoRA if that is exact; {hint}"
    return hint


def _untried(host: Host, family: ModelFamily, path: Path | None) -> NotRepresentable:
    """Why no form of an adapter can be recommended for a host."""
    if family.name in host.unsupported:
        why = host.unsupported[family.name]
        return NotRepresentable(
            f"{host.title} has {why}" if why == NO_MODEL else why,
            hint="`adaptkit inspect` shows the hosts that load it",
            file=path,
        )
    if family.name not in measurement(host.name).names:
        return NotRepresentable(
            f"not measured: what {host.title} loads for {family.title}",
            hint="name the format to write: --to",
            file=path,
        )
    return NotRepresentable(
        f"not measured: what {host.title} loads of all modules in this adapter for {family.title}",
        hint="name the format to write: --to",
        file=path,
    )


def _forms(host: Host, adapter: Adapter, format: str, algorithm: str | None) -> Iterator[_Form]:
    """The ways to write this format, with alpha kept and folded.

    Yields the share of lost modules, the recipe, the losses and the number of modules. Modules that
    the format has no place for count as lost; `convert` itself refuses or lists them.
    """
    # unfolded first: `min` keeps the first of equally good forms, and alpha stays readable
    for fold in (False, True):
        made = Recipe(format, fold, dialect=host.dialect)
        pieces, homeless = pieces_as(adapter, made, algorithm)
        if not pieces or not _knows(host, format, adapter.family.name, pieces):
            continue
        lost = _lost(host, format, adapter.family.name, pieces)
        gone = len(pieces) if any(loss.whole for loss in lost) else sum(map(len, lost.values()))
        share = (gone + homeless) / (len(pieces) + homeless)
        yield share, made, lost, len(pieces)
