"""The cells of every verb: the inputs, the command, and what its result must be."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tests.matrix import algebra, build, host, judge, spelling
from tests.matrix.build import Adapter, Made
from tests.matrix.judge import Verdict
from tests.matrix.spelling import Effect
from tests.matrix.st import UNIT, File, read, rounded

LOSSY = ("--algo", "--dtype", *host.OTHER_RULES)


@dataclass(frozen=True)
class Cell:
    """One command over inputs of one kind."""

    verb: str
    a: Adapter
    b: Adapter | None = None
    to: str = ""
    options: tuple[str, ...] = ()
    layout: str = "single"  # of the checkpoints: single or folder
    dtype: str = "fp32"  # of the checkpoints
    based: bool = False  # --base is given

    @property
    def id(self) -> str:
        a, b = self.a, self.b
        formats = a.format + (f"+{b.format}" if b else "") + (f">{self.to}" if self.to else "")
        parts = [self.verb, a.family, formats, str(a)]
        if b:
            parts.append(str(b))
        if self.verb in ("merge", "extract", "share"):
            parts.append(f"{self.layout}-{self.dtype}")
        more = "".join(self.options).replace("--", "_").strip("_")
        parts += [p for p in (more, "base" if self.based else "") if p]
        return "/".join(parts)


@dataclass
class Bench:
    """What a cell runs with."""

    cell: Cell
    folder: Path
    weights: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.weights = build.weights(self.cell.a.family)

    def made(self, spec: Adapter, name: str) -> Made:
        tail = "" if spec.format == "peft" else ".safetensors"
        made = build.adapter(spec, self.folder / f"{name}{tail}")
        assert made is not None, "no such cell"
        return made

    def effect(self, made: Made, spec: Adapter, *, merged: bool = False) -> Effect:
        """What the input means; and the oracle's reader must find the same in the file."""
        meant = spelling.effect(made.modules, self.weights, merged=merged)
        content = spelling.content(read(made.path), spec.family, spec.format)
        again = spelling.effect(content.modules.values(), self.weights, merged=merged)
        assert not content.strange, content.strange
        assert judge.relative(again, meant) < 1e-12, "the oracle does not read what it wrote"
        return meant

    def base(self) -> Path:
        family = self.cell.a.family
        single = family in build.UNETS or "te" not in build.groups(family)
        path = self.folder / ("base.safetensors" if single else "base")
        if not path.exists():
            layout = "single" if single else "folder"
            build.checkpoint(family, self.weights, path, layout, "F32")
        return path

    def output(self, format: str) -> Path:
        folder = self.folder / "out"
        folder.mkdir(exist_ok=True)
        return folder / ("out" if format == "peft" else "out.safetensors")


def _option(name: str, command: list[str], default: str) -> str:
    return command[command.index(name) + 1] if name in command else default


def _written(
    bench: Bench, ran: host.Run, command: list[str], output: Path, meant: Effect, format: str
) -> list[str]:
    """What holds for every verb that writes an adapter."""
    cell = bench.cell
    dtype = _option("--dtype", command, "keep")
    report = ran.report
    target = report["to"] if "--for" in command else _option("--to", command, format)
    found, wrong, count = judge.adapter(output, cell.a.family, target, bench.weights)
    based = "--base" in command
    unknown = algebra.dependent(cell.a.form + (cell.b.form if cell.b else "")) and not based
    exact = not any(option in command for option in LOSSY) and "--allow-unused" not in command
    # keys that no table names: what they change is said to be unknown, and they are counted
    unknown = unknown or bool(report.get("unread"))
    errors = judge.agrees(report["relative_error"], found, meant, unknown)
    if errors and "--allow-unused" in command:
        kept = {name: value for name, value in meant.items() if name in found}
        if not judge.agrees(report["relative_error"], found, kept, unknown):
            errors = [f"what is lost is not counted: {errors[0]}"]
    wrong += errors
    wrong += judge.stored(output, dtype)
    unit = judge.precision(output)
    if "--allow-unused" not in command:
        wrong += judge.biases_kept(found, meant, max(8 * unit, 1e-6))
    if exact and (lost := judge.relative(found, meant)) > max(8 * unit, 1e-6):
        wrong.append(f"nothing was to be lost, {lost:.3g} is")
    if report["modules"] != count and not any(n.endswith("|bias") for n in found):
        wrong.append(f"{report['modules']} modules reported, {count} written")
    held = output / "adapter_model.safetensors" if output.is_dir() else output
    if not output.is_dir() and report["bytes"] != held.stat().st_size:
        wrong.append(f"{report['bytes']} bytes reported, {held.stat().st_size} written")
    return wrong


def convert(bench: Bench) -> Verdict:
    """convert and resize: one adapter in, one out."""
    cell = bench.cell
    made = bench.made(cell.a, "style")
    meant = bench.effect(made, cell.a)
    format = cell.to or cell.a.format
    output = bench.output(format)
    arguments = [cell.verb, str(made.path), "--family", cell.a.family, "-o", str(output), "--json"]
    arguments += ["--to", cell.to] if cell.to else []
    arguments += [*cell.options, *(["--base", str(bench.base())] if cell.based else [])]

    def result(ran: host.Run, command: list[str]) -> list[str]:
        wrong = _written(bench, ran, command, output, meant, format)
        if "--rank" in command and "--algo" not in command and cell.a.form == "lora" and not wrong:
            wrong += _optimal(bench, output, format, meant, int(_option("--rank", command, "1")))
        if "--error" in command:
            found, _, _ = judge.adapter(output, cell.a.family, format, bench.weights)
            asked = float(_option("--error", command, "0"))
            if (
                min(judge.relative(found, meant), judge.relative(found, meant, False))
                > asked * 1.001
            ):
                wrong.append(f"--error {asked} asked, {judge.relative(found, meant):.4g} measured")
        return wrong

    names = [made.path.name, *made.file.tensors]
    return judge.drive(arguments, output, result, bench.base(), names)


def _optimal(bench: Bench, output: Path, format: str, meant: Effect, rank: int) -> list[str]:
    """A truncated LoRA is the optimum of its rank, module by module."""
    content = spelling.content(read(output), bench.cell.a.family, format)
    best, found = 0.0, 0.0
    for layer, part, module in content.modules.values():
        name = layer.component + layer.name
        rows = slice(part.start, part.stop) if part else slice(None)
        whole = meant[name][rows].reshape(len(meant[name][rows]), -1)
        got = spelling.effect([(layer, part, module)], bench.weights).get(name)
        if got is None:
            continue
        sigma = np.linalg.svd(whole, compute_uv=False)
        best += float((sigma[rank:] ** 2).sum())
        found += float(((got[rows].reshape(whole.shape) - whole) ** 2).sum())
    slack = (16 * judge.precision(output)) ** 2 * judge.norm(meant) ** 2
    if found > best * 1.002 + slack:
        return [f"rank {rank}: squared error {found:.4g}, the optimum is {best:.4g}"]
    return []


def combine(bench: Bench) -> Verdict:
    cell = bench.cell
    assert cell.b is not None
    one, two = bench.made(cell.a, "one"), bench.made(cell.b, "two")
    meant = judge.plus(
        judge.scaled(bench.effect(one, cell.a), 0.5), judge.scaled(bench.effect(two, cell.b), -1.25)
    )
    format = cell.to or cell.a.format
    output = bench.output(format)
    arguments = ["combine", f"{one.path}:0.5", f"{two.path}:-1.25", "--family", cell.a.family]
    arguments += ["-o", str(output), "--json", *(["--to", cell.to] if cell.to else [])]
    arguments += [*cell.options, *(["--base", str(bench.base())] if cell.based else [])]

    def result(ran: host.Run, command: list[str]) -> list[str]:
        return _written(bench, ran, command, output, meant, format)

    names = [one.path.name, two.path.name, *one.file.tensors, *two.file.tensors]
    return judge.drive(arguments, output, result, bench.base(), names)


def compare(bench: Bench) -> Verdict:
    cell = bench.cell
    assert cell.b is not None
    one, two = bench.made(cell.a, "one"), bench.made(cell.b, "two")
    a, b = bench.effect(one, cell.a), bench.effect(two, cell.b)
    arguments = ["compare", str(one.path), str(two.path), "--family", cell.a.family, "--json"]
    arguments += [*cell.options, *(["--base", str(bench.base())] if cell.based else [])]

    def result(ran: host.Run, command: list[str]) -> list[str]:
        return judge.agrees(ran.report["relative_error"], a, b, False)

    names = [one.path.name, two.path.name, *one.file.tensors, *two.file.tensors]
    return judge.drive(arguments, None, result, bench.base(), names)


TYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}


def _model(bench: Bench, name: str, values: dict[str, np.ndarray]) -> tuple[Path, dict]:
    cell = bench.cell
    path = bench.folder / (name if cell.layout == "folder" else f"{name}.safetensors")
    origin = build.checkpoint(cell.a.family, values, path, cell.layout, TYPES[cell.dtype])
    return path, origin


def _spelled(key: str, file: File) -> str:
    """A denoiser's keys may stand behind another prefix in a new single file, or behind none."""
    if key in file.tensors:
        return key
    bare = key.removeprefix("model.diffusion_model.").removeprefix("net.")
    prefixes = ("", "model.diffusion_model.", "diffusion_model.", "net.")
    return next((p + bare for p in prefixes if p + bare in file.tensors), key)


def _room(exact: np.ndarray, kind: str, touched: bool) -> np.ndarray | float:
    """One rounding to the type, after sums in float32 of terms as large as W and ΔW; none for what
    is copied.
    """
    if not touched:
        return 0.0
    room = UNIT[kind] * np.abs(exact) * 1.001
    room = room + 32 * UNIT["F32"] * (np.abs(exact).max() + 1e-3)
    return room + (2.0**-25 if kind == "F16" else 0.0)


def merge(bench: Bench) -> Verdict:
    """Every tensor is W + s·ΔW, rounded once to its own type; the others are as they were."""
    cell = bench.cell
    bench.weights = build.weights(cell.a.family, TYPES[cell.dtype])
    base, _ = _model(bench, "model", bench.weights)
    made = bench.made(cell.a, "style")
    strength = 0.75
    meant = judge.scaled(bench.effect(made, cell.a, merged=True), strength)
    given = [f"{made.path}:{strength}"]
    if cell.b is not None:
        second = bench.made(cell.b, "second")
        two = bench.effect(second, cell.b, merged=True)
        meant = judge.plus(meant, judge.scaled(two, -0.5))
        given.append(f"{second.path}:-0.5")
    target = "folder" if "folder" in cell.options else cell.layout
    target = "single" if "single-file" in cell.options else target
    held = {name for name, _, _ in build.origin(cell.a.family, cell.layout).values()}
    origin = {
        spelled: place
        for spelled, place in build.origin(cell.a.family, target).items()
        if place[0] in held
    }
    output = bench.output("peft" if target == "folder" else "kohya")
    arguments = ["merge", str(base), *given, "--family", cell.a.family]
    arguments += ["-o", str(output), "--json", *cell.options]

    def result(ran: host.Run, command: list[str]) -> list[str]:
        wrong: list[str] = []
        lost = {False: [0.0, 0.0], True: [0.0, 0.0]}  # squares: of what is lost, of what is added
        files: dict[str, File] = {}
        for spelled, (name, file, part) in origin.items():
            key = spelled.partition(":")[2]
            if file not in files:
                files[file] = read(output / file if file else output)
            before = build.seen(bench.weights[name], part)
            change = meant.get(name)
            exact = before if change is None else before + build.seen(change, part)
            key = _spelled(key, files[file])
            got = files[file].tensors.get(key)
            if got is None or files[file].dtypes[key] != TYPES[cell.dtype]:
                wrong.append(f"{key}: {files[file].dtypes.get(key, 'not there')}")
                continue
            if (np.abs(got - exact) > _room(exact, TYPES[cell.dtype], change is not None)).any():
                worst = np.abs(got - exact).max() / max(np.abs(exact).max(), 1e-30)
                wrong.append(f"{key}: off by {worst:.3g} of the largest weight")
            if change is not None:
                sums = lost[name.endswith("|bias")]
                sums[0] += float(((got - exact) ** 2).sum())
                sums[1] += float(((exact - before) ** 2).sum())
        placed = {name for name, _, _ in origin.values()}
        if (missing := sorted(set(meant) - placed)) and "--allow-unused" not in command:
            wrong.append(f"{missing} have no place in the checkpoint, and that is not said")
        (weights, added), (biases, more) = lost[False], lost[True]
        shares = (weights / added, (weights + biases) / (added + more)) if added else (0.0,)
        reported = ran.report["relative_error"]
        # sums in float32 lose that much of a small ΔW, which is not the loss of the number format
        if not any(judge.near(reported, share**0.5, 3e-6) for share in shares):
            wrong.append(
                f"{reported:.4g} lost to rounding reported, {shares[0] ** 0.5:.4g} measured"
            )
        return wrong

    names = [base.name, made.path.name, "second", *made.file.tensors]
    return judge.drive(arguments, output, result, base, names)


def extract(bench: Bench) -> Verdict:
    """The adapter of two checkpoints; the difference is made by an adapter's form, and rounded by
    the type.
    """
    cell = bench.cell
    kind = TYPES[cell.dtype]
    bench.weights = build.weights(cell.a.family, kind)
    stored = build.adapter(cell.a, bench.folder / "hidden.safetensors")
    assert stored is not None
    change = bench.effect(stored, cell.a)
    tuned = {n: rounded(w + change.get(n, 0.0), kind) for n, w in bench.weights.items()}
    base, origin = _model(bench, "base", bench.weights)
    other, _ = _model(bench, "tuned", tuned)
    held = {name for name, _, _ in origin.values()}
    meant = {n: tuned[n] - bench.weights[n] for n in sorted(held) if n in change}
    output = bench.output(cell.to)
    arguments = ["extract", str(base), str(other), "--family", cell.a.family, "--to", cell.to]
    arguments += ["-o", str(output), "--json", *cell.options]

    def result(ran: host.Run, command: list[str]) -> list[str]:
        wrong = _written(bench, ran, command, output, meant, _option("--to", command, cell.to))
        said = "--vectors" not in command or ran.report["unused"]  # biases left out are listed
        return [w for w in wrong if not (said and "|bias: off" in w)]

    names = [base.name, other.name, *(s.partition(":")[2] for s in origin)]
    return judge.drive(arguments, output, result, base, names)


def share(bench: Bench) -> Verdict:
    """compare ADAPTER CHECKPOINT --base: the strength and the share of the adapter in the
    difference.
    """
    cell = bench.cell
    kind = TYPES[cell.dtype]
    bench.weights = build.weights(cell.a.family, kind)
    made = bench.made(cell.a, "style")
    own = bench.effect(made, cell.a)
    noise = build.adapter(
        Adapter(cell.a.family, "kohya", "full", cell.a.group, seed=3),
        bench.folder / "n.safetensors",
    )
    assert noise is not None
    other = judge.scaled(spelling.effect(noise.modules, bench.weights), 0.1)
    change = judge.plus(judge.scaled(own, 0.8), other)
    tuned = {n: rounded(w + change.get(n, 0.0), kind) for n, w in bench.weights.items()}
    base, _ = _model(bench, "base", bench.weights)
    target, _ = _model(bench, "tuned", tuned)
    difference = {n: tuned[n] - bench.weights[n] for n in change}
    arguments = ["compare", str(made.path), str(target), "--base", str(base)]
    arguments += ["--family", cell.a.family, "--json", *cell.options]

    def result(ran: host.Run, command: list[str]) -> list[str]:
        report = ran.report
        inner = sum(float((own[n] * difference[n]).sum()) for n in own if n in difference)
        strength = inner / judge.norm(own) ** 2
        error = judge.relative(own, difference)
        wrong = []
        if (
            "strength" in report
            and abs(report["strength"] - strength) > 1e-4 * abs(strength) + 1e-6
        ):
            wrong.append(f"strength {report['strength']:.6g} reported, {strength:.6g} measured")
        if "strength" not in report and not judge.near(report["relative_error"], error):
            wrong.append(f"{report['relative_error']:.4g} reported, {error:.4g} measured")
        return wrong

    names = [base.name, target.name, made.path.name, *made.file.tensors]
    return judge.drive(arguments, None, result, base, names)


VERBS = {
    "convert": convert,
    "resize": convert,
    "combine": combine,
    "compare": compare,
    "merge": merge,
    "extract": extract,
    "share": share,
}


def play(cell: Cell, folder: Path) -> Verdict:
    return VERBS[cell.verb](Bench(cell, folder))
