"""The command line; no other package imports Click or rich."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from contextlib import suppress
from difflib import get_close_matches
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, NoReturn

import click

from adaptkit import __version__
from adaptkit.cli.show.text import json_safe, safe, trouble
from adaptkit.errors import InternalError
from adaptkit.process import explained, give_back

if TYPE_CHECKING:
    from collections.abc import Mapping

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
    "metadata",
    "batch",
    "clean",
    "formats",
    "families",
    "algorithms",
    "help",
)
# what other tools call a command
_CALLED = {
    "average": "combine",
    "diff": "compare",
    "difference": "extract",
    "identify": "inspect",
    "info": "inspect",
    "list": "inspect",
    "prune": "resize",
    "recipe": "batch",
    "shrink": "resize",
    "show": "inspect",
    "stats": "inspect",
    "svd": "extract",
    "bake": "merge",
    "fuse": "merge",
    "rename": "convert",
}
# modules of this package that are not commands
_SHARED = ("options", "show", "tables", "values")
# commands that share a module
_TABLES = ("formats", "families", "algorithms")


class _ReaderGoneError(Exception):
    """The reader of the pipe has ended, as in `adaptkit … | head`."""


class _Lazy(click.Group):
    """A group with one command per module of this package, imported on lookup."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        found = (module.name for module in iter_modules(__path__))
        names = [*(name for name in found if name not in _SHARED), *_TABLES]
        return sorted(names, key=lambda name: (*_ORDER, name).index(name))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        home = "tables" if cmd_name in _TABLES else cmd_name
        command: click.Command = getattr(import_module(f"adaptkit.cli.{home}"), cmd_name)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a reader that has ended is no failure, which Click would make it."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise _ReaderGoneError from None
        except Exception as error:
            _log(error)
            raise

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; name the nearest one, or what other tools call so."""
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            given = args[0].lower()
            known = self.list_commands(ctx)
            near = get_close_matches(given, [*known, *_CALLED], n=1, cutoff=0.6)
            meant = _CALLED.get(near[0], near[0]) if near else None
            hint = f"did you mean {meant}?" if meant else f"commands: {', '.join(known)}"
            ctx.fail(f"no such command {args[0]!r}; {hint}")
        return super().resolve_command(ctx, args)


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
    """Run the command line; exit with 0 (done), 1 (failed), 2 (usage) or 130 (interrupted).

    A termination cleans up as an interrupt does: SIGTERM exits with 143, SIGHUP with 129.
    """
    _utf8()
    _catch_signals()
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
        usage.message = safe(usage.message)  # type: ignore[misc]
        _document(type(usage).__name__, usage.format_message())
        usage.show()
        sys.exit(usage.exit_code)
    except (click.Abort, KeyboardInterrupt) as stop:
        # Click turns either into an Abort
        told = stop.__cause__ or stop
        click.echo("terminated" if isinstance(told, Terminated) else "interrupted", err=True)
        sys.exit(getattr(told, "code", _INTERRUPTED))
    except (_ReaderGoneError, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        found = InternalError.of(explained(error))  # type: ignore[arg-type]
        _document(type(found).__name__, found.message, found.to_dict())
        _fail(str(found), found.hint, found.exit_code)


def run() -> NoReturn:
    """Run `main` and exit without freeing a hundred thousand small objects (50 ms)."""
    code: object = 1
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    except KeyboardInterrupt as stop:
        # a second signal, while the first was told
        code = getattr(stop, "code", _INTERRUPTED)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code if isinstance(code, int) else 0)


class Terminated(KeyboardInterrupt):
    """A signal to end; handled wherever ^C is."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.code = 128 + number


def _catch_signals() -> None:
    """Let SIGTERM and SIGHUP clean up; a signal that the parent ignores (nohup) stays ignored."""

    def stop(number: int, _frame: object) -> NoReturn:
        raise Terminated(number)

    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        # outside the main thread, handlers cannot be set
        with suppress(ValueError):
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, stop)


def _log(error: Exception) -> None:
    """Tell a log file, if there is one, why the command ends."""
    if "logging" in sys.modules and not isinstance(error, click.exceptions.Exit):
        from adaptkit.ops.stages import log

        told = error.format_message() if isinstance(error, click.ClickException) else str(error)
        log().info("error: %s", told)


def _document(kind: str, message: str, facts: Mapping[str, str | None] | None = None) -> None:
    """Print the error as the one JSON document that `--json` promises."""
    if "--json" not in sys.argv[1:]:
        return
    told = {"hint": None, "file": None, "tensor": None, **(facts or {})}
    error = {**told, "type": kind, "message": message}
    text = json.dumps({"adaptkit": __version__, "error": error}, ensure_ascii=False, indent=2)
    click.echo(json_safe(text))


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
    trouble(message, hint)
    sys.exit(code)
