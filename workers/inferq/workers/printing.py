"""What commands print for people: a table on a terminal, columns elsewhere, each in plain text."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import click


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on a terminal; elsewhere columns that a program can split."""
    cells = [[plain(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
        for line in (list(headings), *cells):
            padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            click.echo("  ".join(padded).rstrip())
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
    """Fit for a terminal: what others wrote does not steer it."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def age(seconds: float) -> str:
    """In the unit that suits it."""
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
