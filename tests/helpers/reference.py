"""The parts of docs/ that are generated from the code: every setting, every command.

    python -m helpers.reference        (`make docs`) writes them anew

A page holds each between the comments ``<!-- generated: name -->`` and ``<!-- end -->``; all else
on it is written by hand.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
import tokenize
from collections.abc import Callable, Iterator, Mapping
from io import StringIO
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from inferq.shared import settings
from inferq.shared.settings import ENV_PREFIX, Settings
from inferq.workers import cli

ROOT: Final = Path(__file__).parents[2]
DOCS: Final = ROOT / "docs"
#: What clients and workers must agree on; all other settings are a worker's.
OF_BOTH_SIDES: Final = (
    "redis_url", "sentinel_master", "result_expires_s", "global_keyprefix", "result_keyprefix",
    "priority_steps", "priority_sep",
)  # fmt: skip
_WIDTH: Final = 118


def descriptions() -> dict[str, str]:
    """Field of `Settings` → the ``#:`` comment above it, on one line."""
    source = inspect.getsource(settings)
    comments = {
        token.start[0]: token.string.removeprefix("#:").strip()
        for token in tokenize.generate_tokens(StringIO(source).readline)
        if token.type == tokenize.COMMENT and token.string.startswith("#:")
    }
    (body,) = [
        node.body
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == Settings.__name__
    ]
    found = {}
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            above: list[str] = []
            line = node.lineno - 1
            while line in comments:
                above.insert(0, comments[line])
                line -= 1
            found[node.target.id] = " ".join(above)
    return found


def settings_table(names: tuple[str, ...]) -> str:
    """One row for each of these fields of `Settings`."""
    told = descriptions()
    rows = ["| variable | value | default | meaning |", "|---|---|---|---|"]
    for name in names:
        field = Settings.model_fields[name]
        cells = (
            f"`{ENV_PREFIX}{name.upper()}`",
            _values(field),
            _default(field),
            _code(told[name]),
        )
        rows.append("| " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join(rows)


def _values(field: FieldInfo) -> str:
    low = high = None
    for bound in field.metadata:
        low = getattr(bound, "ge", low)
        high = getattr(bound, "le", high)
    text = _type(field.annotation)
    if low is None:
        return text
    return f"{text}, {low:,g} or more" if high is None else f"{text}, {low:,g} to {high:,}"


def _type(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _type(get_args(annotation)[0])
    if origin in (Union, UnionType):
        (kind,) = [each for each in get_args(annotation) if each is not NoneType]
        return _type(kind)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in get_args(annotation))
    if origin is tuple:
        inner = get_args(annotation)[0]
        return "comma-separated " + ("whole numbers" if inner is int else "list")
    kinds = {bool: "`1` or `0`", int: "whole number", float: "number", str: "text", Path: "path"}
    return kinds[annotation]


def _default(field: FieldInfo) -> str:
    value = field.default
    if field.is_required():
        return "none: must be set"
    if isinstance(value, bool):
        return f"`{int(value)}`"
    if value is None or value == "":
        return "not set"
    if isinstance(value, tuple):
        return f"`{','.join(map(str, value))}`"
    if isinstance(value, str) and not value.isprintable():
        return f"`{ascii(value)[1:-1]}`"
    return f"`{value:g}`" if isinstance(value, int | float) else f"`{value}`"


def commands() -> Iterator[tuple[str, click.Command, click.Context]]:
    """Each command with its whole name, in the order of the alphabet, groups first."""
    yield from _below("inferq", cli.inferq, None)


def _below(
    name: str, command: click.Command, parent: click.Context | None
) -> Iterator[tuple[str, click.Command, click.Context]]:
    context = click.Context(
        command,
        info_name=name.rpartition(" ")[2],
        parent=parent,
        max_content_width=_WIDTH,
        terminal_width=_WIDTH,
        **command.context_settings,
    )
    yield name, command, context
    if isinstance(command, click.Group):
        for each in command.list_commands(context):
            child = command.get_command(context, each)
            assert child is not None
            yield from _below(f"{name} {each}", child, context)


def cli_reference() -> str:
    """A section for each command: how it is called, what it does, its options."""
    return "\n\n".join(_section(*each) for each in commands())


def _section(name: str, command: click.Command, context: click.Context) -> str:
    usage = command.get_usage(context).removeprefix("Usage: ")
    parts = [f"## {name}", f"```\n{usage}\n```", _prose(command.help or "")]
    records = [
        record
        for parameter in command.get_params(context)
        if "--help" not in parameter.opts and (record := parameter.get_help_record(context))
        # What has no words of its own stands in the usage.
        if record[1]
    ]
    if records:
        rows = [f"| `{_cell(names)}` | {_cell(_code(told))} |" for names, told in records]
        parts.append("\n".join(["| option | what it does |", "|---|---|", *rows]))
    if isinstance(command, click.Group):
        each = command.list_commands(context)
        parts.append(
            "\n".join(f"- [`{name} {sub}`](#{f'{name} {sub}'.replace(' ', '-')})" for sub in each)
        )
    return "\n\n".join(part for part in parts if part)


def _prose(text: str) -> str:
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(
        textwrap.fill(
            _code(" ".join(each.split())), _WIDTH, break_long_words=False, break_on_hyphens=False
        )
        for each in paragraphs
    )


def _code(text: str) -> str:
    """Two backticks become Markdown's one; what Markdown would take for HTML is escaped."""
    text = text.replace("``", "`")
    # Outside of code only: every second part is within backticks.
    parts = text.split("`")
    parts[::2] = [re.sub(r"([<*])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


#: Page → name of a part → what makes it.
PARTS: Final[Mapping[str, Mapping[str, Callable[[], str]]]] = {
    "settings.md": {
        "settings of both sides": lambda: settings_table(OF_BOTH_SIDES),
        "settings of workers": lambda: settings_table(
            tuple(name for name in Settings.model_fields if name not in OF_BOTH_SIDES)
        ),
    },
    "cli.md": {"commands": cli_reference},
}


def with_parts(page: str, text: str) -> str:
    """`text` of `page`, with its generated parts made anew. ValueError: a part has no place."""
    for name, make in PARTS[page].items():
        begin, end = f"<!-- generated: {name} -->\n", "<!-- end -->"
        head, found, rest = text.partition(begin)
        _, closed, tail = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"{page} has no place for {name!r}; expected {begin.strip()} … {end}")
        text = f"{head}{begin}\n{make()}\n\n{end}{tail}"
    return text


if __name__ == "__main__":
    for page in PARTS:
        path = DOCS / page
        path.write_text(with_parts(page, path.read_text()))
