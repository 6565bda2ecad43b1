"""Run the command line in this process, and judge what it did."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import adaptkit.cli


@dataclass(frozen=True)
class Run:
    code: int
    out: str
    err: str

    @property
    def report(self) -> dict:
        return json.loads(self.out)

    @property
    def error(self) -> str:
        found = re.search(r"^error: (.*)", self.err, re.MULTILINE)
        return found[1] if found else ""

    @property
    def hint(self) -> str:
        found = re.search(r"^hint: (.*)", self.err, re.MULTILINE | re.DOTALL)
        return found[1] if found else ""


def run(arguments: list[str]) -> Run:
    out, err, code = io.StringIO(), io.StringIO(), 0
    old, sys.argv = sys.argv, ["adaptkit", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            adaptkit.cli.main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        sys.argv = old
    return Run(code, out.getvalue(), err.getvalue())


RULES = {"--rank": "2", "--energy": "0.9", "--size": "40KB"}  # what a hint leaves to the user
FLAGS = ("--allow-unused", "--vectors", "--overwrite")
VALUED = ("--algo", "--to", "--for", "--dtype", "--family", "--method")
OTHER_RULES = (*RULES, "--error", "--sv-ratio", "--sv-fro", "--sv-cumulative")


def _clause(text: str, base: Path, last: str) -> list[str]:
    """The options of one alternative; `or full` goes on with the option named before."""
    found: list[str] = []
    for option, word in re.findall(r"(--[a-z-]+)(?:[ =]([A-Za-z0-9.*_-]+))?", text):
        value = word.rstrip(".")
        if option == "--base":
            found += [option, str(base)]
        elif option in FLAGS:
            found += [option]
        elif option in RULES:
            found += [option, value if value[:1].isdigit() else RULES[option]]
        elif option in VALUED and value not in ("", "and", "or"):
            found += [option, value]
    if not found and last and (word := re.fullmatch(r"\s*(lora|lokr|full)\b.*", text, re.DOTALL)):
        found = [last, word[1]]
    return found


def suggestions(hint: str, base: Path) -> list[list[str]]:
    """The alternatives that a hint names, each with its options; a checkpoint is what the cell has."""
    found: list[list[str]] = []
    if "right --base" in hint:  # a question
        return found
    for text in re.split(r"[;,]|\bor\b", hint):
        last = found[-1][0] if found and found[-1][0] == "--algo" else ""
        if (new := _clause(text, base, last)) and new not in found:
            found.append(new)
    return found


def without(arguments: list[str], option: list[str]) -> list[str]:
    """The command without what `option` replaces: a value of the same option, or another rank rule."""
    gone = {name for name in option if name.startswith("--")} - set(FLAGS)
    if gone & set(OTHER_RULES):
        gone |= set(OTHER_RULES)
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in gone:
            skip = True
        else:
            kept.append(argument)
    return kept
