"""adaptkit help: the guide, a folder of Markdown pages inside the package.

A page is one file, `guide/GROUP/TOPIC.md`: a title, a summary of one line, and its text.
Adding a file adds a topic.
"""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING, NamedTuple

import click

from adaptkit.errors import NoSuchName

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from importlib.resources.abc import Traversable

    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.markdown import Markdown

__all__ = ["GROUPS", "Page", "help", "pages", "rendered"]

GROUPS = {  # folder of the guide -> heading
    "jobs": "I want to …",
    "commands": "Commands",
    "reference": "Reference",
    "project": "About adaptkit",
}
WIDEST = 100  # columns: longer lines of prose are hard to read
_MARKER = "<!--"  # begins the lines that mark a generated section


class Page(NamedTuple):
    """One topic of the guide."""

    topic: str
    group: str
    title: str
    summary: str
    text: str  # Markdown, without the markers of generated sections


def pages(commands: Sequence[str] = ()) -> dict[str, Page]:
    """Every page by topic, group by group: `commands` in their order, other pages by name."""
    from importlib.resources import files

    guide = files("adaptkit") / "guide"
    found = [
        _page(group, file)
        for group in GROUPS
        for file in (guide / group).iterdir()
        if file.name.endswith(".md")
    ]
    groups = list(GROUPS)

    def place(page: Page) -> tuple[int, int, str]:
        order = commands.index(page.topic) if page.topic in commands else len(commands)
        return groups.index(page.group), order, page.topic

    return {page.topic: page for page in sorted(found, key=place)}


def _page(group: str, file: Traversable) -> Page:
    lines = file.read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.startswith(_MARKER)) + "\n"
    title, summary = [line for line in lines if line][:2]
    return Page(file.name.removesuffix(".md"), group, title.removeprefix("# "), summary, text)


def rendered(page: Page, width: int) -> str:
    """The page as rich draws it in so many columns, with the escape codes of its styles."""
    from io import StringIO

    from rich.console import Console
    from rich.theme import Theme

    out, theme = StringIO(), Theme({"markdown.code": "cyan", "markdown.h1": "bold underline"})
    console = Console(file=out, width=width, force_terminal=True, highlight=False, theme=theme)
    console.print(_markdown(page.text))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _markdown(text: str) -> Markdown:
    """Rich's Markdown with titles on the left, plain backgrounds, and whole names in tables."""
    from rich.markdown import CodeBlock, Heading, Markdown, TableElement
    from rich.syntax import Syntax
    from rich.table import Table

    class _Title(Heading):
        LEVEL_ALIGN = dict.fromkeys(("h1", "h2", "h3"), "left")

    class _Code(CodeBlock):
        def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
            code, theme = str(self.text).rstrip(), self.theme
            yield Syntax(code, self.lexer_name, theme=theme, word_wrap=True, padding=(0, 0, 0, 2))

    class _Table(TableElement):
        def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
            for part in super().__rich_console__(console, options):
                if isinstance(part, Table):
                    part.columns[0].no_wrap = True
                    for column in part.columns:
                        column.overflow = "fold"
                yield part

    class _Guide(Markdown):
        elements = Markdown.elements | {
            "heading_open": _Title,
            "fence": _Code,
            "table_open": _Table,
        }

    return _Guide(text, code_theme="ansi_dark", hyperlinks=False)


def _listed(known: Iterable[Page]) -> str:
    known = list(known)
    column = max(len(page.topic) for page in known)
    lines = ["Usage: adaptkit help [TOPIC]"]
    for group, heading in GROUPS.items():
        lines += ["", click.style(heading, bold=True)]
        lines += [
            f"  {click.style(f'{page.topic:{column}}', fg='cyan')}  {page.summary}"
            for page in known
            if page.group == group
        ]
    return "\n".join(lines) + "\n"


def _topics(_: click.Context, __: click.Parameter, start: str) -> list[str]:
    """The topics that begin so, for a shell."""
    return [topic for topic in pages() if topic.startswith(start.lower())]


@click.command()
@click.argument("topic", required=False, shell_complete=_topics)
@click.pass_context
def help(ctx: click.Context, topic: str | None) -> None:
    """Show a page of the guide, or list the pages.

    The guide has a page for each job, command and table. On a terminal the page is formatted and
    paged; in a pipe or a file it is plain Markdown.

    \b
    adaptkit help
    adaptkit help smaller-file
    adaptkit help resize
    """
    group = ctx.parent.command if ctx.parent else None
    known = pages(group.list_commands(ctx) if isinstance(group, click.Group) else ())
    if topic is None:
        return _show(_listed(known.values()))
    page = known.get(topic.lower())
    if page is None:
        raise NoSuchName.among("topic", topic, known)
    if sys.stdout.isatty():
        _show(rendered(page, min(shutil.get_terminal_size().columns, WIDEST)))
    else:
        click.echo(page.text, nl=False)


def _show(text: str) -> None:
    """Print a text, through the pager where it is longer than the screen."""
    if sys.stdout.isatty() and text.count("\n") >= shutil.get_terminal_size().lines:
        click.echo_via_pager(text)
    else:
        click.echo(text, nl=False)
