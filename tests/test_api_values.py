"""What a caller in Python may write, and what is left behind: values of any type, short reprs, closed files, threads."""

from __future__ import annotations

import gc
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import adaptkit as ak
from adaptkit import ops
from adaptkit.errors import AdaptkitError, WrongUsage
from adaptkit.ops.many import plan_many, run_many
from adaptkit.ops.verb import verbs

LORA, LOKR = "lora-kohya.safetensors", "lokr-kohya.safetensors"
LONGEST = 2000  # characters; lines: 10
PART = {"only": "unet.mid_block.*"}  # of a pair: enough to compute with


class Somewhere:
    """A path object that is no `Path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


# reprs -----------------------------------------------------------------------------------------------------------


def results(tiny: Path, folder: Path) -> Iterator[Any]:
    """Every kind of object that a caller gets from a verb."""
    lora, base, tuned = tiny / LORA, tiny / "base.safetensors", tiny / "tuned.safetensors"
    inputs: dict[str, tuple[Any, ...]] = {
        "convert": (lora,),
        "resize": (lora,),
        "combine": ([(lora, 1.0), (lora, 0.5)],),
        "merge": (base, [(lora, 0.5)]),
        "extract": (base, tuned),
    }
    chosen: dict[str, dict[str, Any]] = {
        "convert": {"to": "comfy"},
        "resize": {"rank": 1},
        "extract": PART,
    }
    assert inputs.keys() == verbs().keys()
    for name, given in inputs.items():
        verb = verbs()[name]
        options = verb.options(output=folder / name, **chosen.get(name, {}))
        with verb.plan(*given, options) as plan:
            yield from (options, plan, verb.perform(plan))
            yield from vars(plan).values()
    compared = ops.compare.plan(tuned, base, ops.compare.Options(**PART))
    yield from (compared, ops.compare.run(compared))
    compared = ops.compare.plan(lora, lora, ops.compare.Options())
    yield from (compared, ops.compare.run(compared), compared.matches[0])
    advised = ops.advise.plan(base, tuned, ops.advise.Options(max_rank=4, **PART))
    yield from (advised, ops.advise.run(advised))
    yield ops.metadata.read(lora)
    yield ak.inspect(lora, base)
    yield from ak.inspect(lora, base)
    for found in (plan_many, run_many):
        options = ops.resize.Options(rank=1, output=folder / "many")
        many: list[Any] = found(ops.resize.VERB, [lora, tiny / LOKR], options)  # type: ignore[operator]
        yield from many
    recipe = folder / "recipe.toml"
    job = f'[[job]]\ncommand = "resize"\nadapter = "{lora.as_posix()}"\nrank = 1\n'
    recipe.write_text("".join(f'{job}output = "{n}.safetensors"\n' for n in range(12)))
    batch = ops.batch.plan(recipe, ops.batch.Options(jobs=0, keep_going=True))
    yield from (batch, ops.batch.preview(batch), *batch.jobs)
    with ak.open(lora) as style:
        yield from (style, style.modules, *style.modules.values())


def test_every_repr_is_at_most_ten_lines(tiny: Path, tmp_path: Path) -> None:
    ours = 0
    for found in results(tiny, tmp_path):
        if type(found).__module__.startswith("adaptkit"):
            ours += 1
            text = repr(found)
            assert text.count("\n") < 10, type(found)
            assert len(text) < LONGEST, (type(found), len(text))
    assert ours > 100


# values ----------------------------------------------------------------------------------------------------------


def test_paths_sizes_devices_and_patterns_of_any_type(tiny: Path, tmp_path: Path) -> None:
    made: list[bytes] = []
    for number, (path, only, size, device) in enumerate(
        [
            (tiny / LORA, ("unet",), 30_000, "cpu"),
            (str(tiny / LORA), "unet", "30KB", torch.device("cpu")),
            (Somewhere(tiny / LORA), ["unet"], "30 kb", "cpu"),
        ]
    ):
        output = [Path, str, Somewhere][number](tmp_path / f"{number}.safetensors")  # type: ignore[operator]
        options: dict[str, Any] = {"only": only, "size": size, "device": device, "memory": "300MB"}
        plan = ops.resize.plan(path, ops.resize.Options(output=output, **options))
        made.append(Path(ops.resize.run(plan).output).read_bytes())
        with ak.open(path) as style, style.resize(**options) as small:
            assert small.path.read_bytes() == made[0]
    assert made[0] == made[1] == made[2]
    assert len(made[0]) <= 30_000
    for bad in ("30QB", "much"):
        with pytest.raises(WrongUsage, match="is not a size"):
            ops.resize.Options(size=bad)  # type: ignore[arg-type]


def test_every_verb_takes_text_for_a_path(tiny: Path, tmp_path: Path) -> None:
    base, tuned, lora = (str(tiny / n) for n in ("base.safetensors", "tuned.safetensors", LORA))
    with ops.extract.plan(base, tuned, ops.extract.Options(output=str(tmp_path / "e"))):  # type: ignore[arg-type]
        pass
    merge = ops.merge.Options(output=str(tmp_path / "m"), blocks="te=0")  # type: ignore[arg-type]
    with ops.merge.plan(base, [(lora, 0.5)], merge) as plan:
        assert plan.options.blocks == ("te=0",)
    with ops.combine.plan([(lora, 1.0), (Somewhere(tiny / LORA), 1.0)], ops.combine.Options()):
        pass
    with ops.convert.plan(lora, ops.convert.Options(to="Comfy ", output=str(tmp_path / "c"))):  # type: ignore[arg-type]
        pass
    ops.compare.plan(lora, Somewhere(tiny / LORA), ops.compare.Options(base=base)).close()  # type: ignore[arg-type]
    ops.advise.plan(base, tuned, ops.advise.Options()).close()
    assert ops.metadata.read(lora).metadata == ops.metadata.read(tiny / LORA).metadata
    recipe = tmp_path / "recipe.toml"
    job = f'[[job]]\ncommand = "resize"\nadapter = "{(tiny / LORA).as_posix()}"\nrank = 1\n'
    recipe.write_text(job + 'output = "1.safetensors"\n')
    assert len(ops.batch.plan(str(recipe), ops.batch.Options()).jobs) == 1
    globs = [str(tiny / "lo*-kohya.safetensors"), str(tiny / "tuck*")]
    assert len(ak.inspect(globs[0])) == 3
    assert len(ak.inspect(*globs)) == 4


# what is left behind ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="lists the open files of Linux")
def test_files_are_closed_when_a_call_or_a_context_ends(tiny: Path, tmp_path: Path) -> None:
    gc.disable()  # closed by the call, not by chance
    try:
        before = _open()
        base, tuned, lora = tiny / "base.safetensors", tiny / "tuned.safetensors", tiny / LORA
        ak.merge(base, [lora], output=tmp_path / "m.safetensors", verify=True)
        ak.extract(base, tuned, rank=2, output=tmp_path / "e.safetensors", **PART).close()
        ak.combine([lora, (lora, 0.5)], output=tmp_path / "c.safetensors").close()
        ak.inspect(tiny)
        with ak.open(lora) as style:
            style.convert("comfy", output=tmp_path / "d.safetensors").close()
            with style.resize(rank=1) as small:
                small.save(tmp_path / "s.safetensors")
        ops.compare.run(ops.compare.plan(tuned, base, ops.compare.Options(**PART)))
        ops.advise.run(ops.advise.plan(base, tuned, ops.advise.Options(max_rank=2, **PART)))
        for wrong in (
            lambda: ak.merge(base, [tiny / "sdxl.safetensors"], output=tmp_path / "x"),
            lambda: ak.extract(base, base, rank=2),
            lambda: ak.open(lora, format="nothing"),
            lambda: ops.compare.plan(base, tuned, ops.compare.Options(only="nothing")),
            lambda: ops.compare.plan(lora, tiny / "sdxl.safetensors", ops.compare.Options()),
        ):
            with pytest.raises(AdaptkitError):
                wrong()
        assert _open() - before == set()
    finally:
        gc.enable()


def _open() -> set[str]:
    """The files of weights that this process holds open."""
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the one that lists them is closed by now
            found.add(str(link.readlink()))
    return {target for target in found if target.endswith((".safetensors", ".ckpt"))}


def test_threads_that_do_different_things_give_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    base, tuned, lora = tiny / "base.safetensors", tiny / "tuned.safetensors", tiny / LORA

    def work(name: str, path: Path) -> None:
        match name:
            case "merge":
                ak.merge(base, [lora], output=path)
            case "extract":
                ak.extract(base, tuned, rank=2, output=path, **PART).close()
            case "resize":
                with ak.open(lora) as style:
                    style.resize(error=0.2, output=path).close()
            case "combine":
                ak.combine([lora, (tiny / LOKR, 0.5)], rank=2, output=path).close()

    def apart(*jobs: tuple[str, str]) -> list[Path]:
        """The files of jobs that run at once, each in a folder of its own: its name is its title."""
        paths = [tmp_path / folder / f"{name}.safetensors" for name, folder in jobs]
        for path in paths:
            path.parent.mkdir(exist_ok=True)
        done = [(name, path) for (name, _), path in zip(jobs, paths, strict=True)]
        threads = [threading.Thread(target=work, args=one) for one in done]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return paths

    names = ("merge", "extract", "resize", "combine")
    alone = [apart((name, "alone"))[0].read_bytes() for name in names]
    state = torch.get_num_threads(), sys.getswitchinterval()
    together = apart(*((name, folder) for folder in "ab" for name in names))
    assert [path.read_bytes() for path in together] == alone * 2
    assert (torch.get_num_threads(), sys.getswitchinterval()) == state


def test_info_says_what_is_done(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "adaptkit")
    base, lora = tiny / "base.safetensors", tiny / LORA
    work: dict[str, Callable[[], Any]] = {
        "merge": lambda: ak.merge(base, [lora], output=tmp_path / "m"),
        "combine": lambda: ak.combine([lora, lora], output=tmp_path / "c").close(),
        "compare": lambda: ops.compare.run(ops.compare.plan(lora, lora, ops.compare.Options())),
        "inspect": lambda: ak.inspect(tiny),
    }
    for name, call in work.items():
        caplog.clear()
        call()
        said = [record.getMessage() for record in caplog.records]
        assert {record.name for record in caplog.records} == {"adaptkit"}
        assert said[0] == f"{name}: begins"
        assert any(line.startswith(f"{name}: done in ") for line in said)
        assert any(" of " in line for line in said) or name == "combine"
    logging.getLogger("adaptkit").setLevel(logging.WARNING)
    caplog.clear()
    ak.inspect(lora)
    assert caplog.records == []
