"""The command line: Click and rich live here and nowhere else."""

from __future__ import annotations

import gc
import os
import sys
from contextlib import suppress
from importlib import import_module
from pkgutil import iter_modules
from typing import NoReturn

import click

from adaptkit import __version__
from adaptkit.errors import AdaptkitError

__all__ = ["cli", "main", "run"]

_INTERRUPTED = 130
# the order of `adaptkit --help`: the way people work; a command not named here comes last
_ORDER = (
    "inspect",
    "convert",
    "resize",
    "combine",
    "extract",
    "advise",
    "merge",
    "compare",
    "batch",
    "formats",
    "families",
    "algorithms",
    "help",
)
_SHARED = ("options", "show")  # modules of this package that are no commands


class _Lazy(click.Group):
    """One command for each module of this package, imported when it is looked up."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        names = [found.name for found in iter_modules(__path__) if found.name not in _SHARED]
        return sorted(names, key=lambda name: (*_ORDER, name).index(name))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        command: click.Command = getattr(import_module(f"adaptkit.cli.{cmd_name}"), cmd_name)
        return command


@click.group(
    cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, message="%(prog)s %(version)s")
def cli() -> None:
    """Inspect, convert, resize, combine, extract, merge and compare diffusion-model adapters (LoRA, LoKr, …).

    Every key is accounted for, every lossy step reports its exact error, and no file appears half-written.

    \b
    adaptkit inspect style.safetensors
    adaptkit convert style.safetensors --for comfyui
    adaptkit extract base.ckpt tuned.ckpt --algo lokr
    adaptkit merge base.safetensors style.safetensors:0.8

    `adaptkit help` lists the pages of the guide.
    """


def main() -> NoReturn:
    """Run the command line and exit as the contract says: 0 done, 1 refused, 2 wrong usage, 130 interrupted."""
    _utf8()
    # torch's threads spin while they wait for one another: beside one other busy process that made an SVD 13 times slower
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault(
        "OPENBLAS_NUM_THREADS", "1"
    )  # NumPy multiplies no matrix here, and its threads spin at first
    gc.set_threshold(
        200_000, 20, 20
    )  # headers are many small objects that live to the end: looking for cycles cost 10 %
    try:
        code = cli.main(prog_name="adaptkit", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as usage:
        usage.show()
        sys.exit(usage.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(_INTERRUPTED)
    except BrokenPipeError:  # `adaptkit … | head`: not our failure
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except AdaptkitError as error:
        _fail(str(error), error.hint, error.exit_code)
    except (
        Exception
    ) as error:  # a defect of ours: say so in one line, keep the traceback for those who ask
        if os.environ.get("ADAPTKIT_DEBUG"):
            raise
        _fail(
            f"unexpected {type(error).__name__}: {error}",
            "this is a bug; ADAPTKIT_DEBUG=1 shows the traceback",
            1,
        )


def run() -> NoReturn:
    """`main` as the program: leaves without Python's taking apart of a hundred thousand small objects (50 ms)."""
    code: object = 1
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code if isinstance(code, int) else 0)


def _utf8() -> None:
    """Windows pipes default to a legacy code page that cannot hold a path in any script."""
    for stream in (sys.stdout, sys.stderr):
        if (
            hasattr(stream, "reconfigure")
            and (stream.encoding or "").lower().replace("-", "") != "utf8"
        ):
            stream.reconfigure(encoding="utf-8", errors="replace")


def _fail(message: str, hint: str | None, code: int) -> NoReturn:
    if os.environ.get("ADAPTKIT_DEBUG"):
        import traceback

        traceback.print_exc()
    click.echo(click.style("error:", fg="red", bold=True) + f" {message}", err=True)
    if hint:
        click.echo(click.style("hint:", fg="cyan", bold=True) + f" {hint}", err=True)
    sys.exit(code)
