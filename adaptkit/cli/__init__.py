"""The command line; no other package imports Click or rich."""

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
from adaptkit.process import explained, give_back

__all__ = ["cli", "main", "run"]

_INTERRUPTED = 130
# the order of `adaptkit --help`; a command that is not listed comes last
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
# modules of this package that are not commands
_SHARED = ("options", "show")


class _Lazy(click.Group):
    """A group with one command per module of this package, imported on lookup."""

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
    """Inspect, convert, resize, combine, extract, merge and compare diffusion-model adapters.

    adaptkit accounts for every key, measures the error of every lossy step, and writes each file
    completely or not at all. It reads LoRA, LoKr and other algorithms.

    \b
    adaptkit inspect style.safetensors
    adaptkit convert style.safetensors --for comfyui
    adaptkit extract base.ckpt tuned.ckpt --algo lokr
    adaptkit merge base.safetensors style.safetensors:0.8

    `adaptkit help` lists the pages of the guide.
    """


def main() -> NoReturn:
    """Run the command line; exit with 0 (done), 1 (failed), 2 (usage) or 130 (interrupted)."""
    _utf8()
    # torch's threads spin while they wait: next to one busy process, an SVD took 13 times longer
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # NumPy multiplies no matrix here, and its threads spin at the start
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # headers are many small objects that live to the end: searching them for cycles cost 10 %
    gc.set_threshold(200_000, 20, 20)
    give_back()
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
    except BrokenPipeError:
        # the reader of the pipe has ended, as in `adaptkit … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except AdaptkitError as error:
        _fail(str(error), error.hint, error.exit_code)
    except Exception as error:
        if os.environ.get("ADAPTKIT_DEBUG"):
            raise
        if isinstance(told := explained(error), AdaptkitError):
            _fail(str(told), told.hint, told.exit_code)
        _fail(
            f"unexpected {type(error).__name__}: {error}",
            "this is a bug in adaptkit; set ADAPTKIT_DEBUG=1 to see the traceback",
            1,
        )


def run() -> NoReturn:
    """Run `main` and exit without freeing a hundred thousand small objects (50 ms)."""
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
    """Switch the streams to UTF-8: Windows pipes default to a legacy code page."""
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
