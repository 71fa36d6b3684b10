"""Prints what commands show: text without control characters, tables, JSON.

Others write the names in model files, the values in Redis and the texts of messages. Commands print
them only through this module.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import click


def say(text: str, *, err: bool = False, mark: str = "", colour: str | None = None) -> None:
    """Print lines to stdout (`err`: to stderr), after `mark`; a terminal shows it in `colour`."""
    shown = click.style(plain(mark), fg=colour) if colour else plain(mark)
    click.echo(shown + plain_lines(text), err=err)


def say_json(document: object) -> None:
    """Print JSON, with everything escaped that is not ASCII."""
    click.echo(json.dumps(document, indent=2).replace("\x7f", "\\u007f"))


@contextmanager
def plain_failures() -> Iterator[None]:
    """While a command runs: its failure is also printed without control characters."""
    try:
        yield
    except click.ClickException as failure:
        failure.message = plain_lines(failure.message)  # type: ignore[misc]
        raise


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on a terminal; elsewhere columns that a program can split."""
    cells = [[plain(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
        for line in (list(headings), *cells):
            padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            say("  ".join(padded).rstrip())
        return
    from rich.console import Console  # noqa: PLC0415 (comes with an extra)
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table()
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for line in cells:
        table.add_row(*map(Text, line))
    Console().print(table)


def plain(value: object) -> str:
    """`value` without control characters, which could steer a terminal."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def plain_lines(text: str) -> str:
    """The same of each line of `text`."""
    return "\n".join(map(plain, text.split("\n")))


def age(seconds: float) -> str:
    """A duration in a suitable unit."""
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
