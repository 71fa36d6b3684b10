"""Checks a table of model.toml by a pydantic model, and reports errors in one line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError
from pydantic_core import ErrorDetails

from inferq.shared.errors import ConfigError

#: Most rows of a batch; no engine runs more at once.
MAX_BATCH_SIZE: Final = 65_536
MAX_SIZES: Final = 256
MAX_LANES: Final = 256
HOUR_MS: Final = 3_600_000

Flag = StrictBool
Text = Annotated[str, Field(min_length=1, max_length=256)]
Lanes = Annotated[int, Field(strict=True, ge=0, le=MAX_LANES)]
Rows = Annotated[int, Field(strict=True, ge=1, le=MAX_BATCH_SIZE)]
Milliseconds = Annotated[float, Field(strict=True, ge=0, le=HOUR_MS)]

Table = TypeVar("Table", bound=BaseModel)


class TableError(ConfigError):
    """An error in a table of model.toml, not in the model's file."""


_SHOWN_CHARS: Final = 100
_EXPECTED: Final = {
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "tuple_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "dataclass_type": "a table",
    "too_short": "at least {min_length} of them",
    "too_long": "at most {max_length} of them",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than_equal": "at most {le}",
}


class TomlTable(BaseModel):
    """Base of all tables: frozen, and closed to keys that it does not name."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def validate(model: type[Table], table: Mapping[str, Any], prefix: str = "") -> Table:
    """`table` as a `model`. TableError naming each key (after `prefix`), value and expectation."""
    try:
        return model.model_validate(dict(table))
    except ValidationError as problem:
        raise TableError(_explain(model, problem, prefix)) from None


def nearest(key: str, known: Iterable[str]) -> str:
    """The expectation for a message: the known key that was probably meant, or all known keys."""
    names = sorted(known)
    close = difflib.get_close_matches(key, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(names)}"


def _explain(model: type[BaseModel], problem: ValidationError, prefix: str) -> str:
    lines: list[str] = []
    places: set[str] = set()
    for error in problem.errors(include_url=False):
        place = prefix + ".".join(map(str, error["loc"]))
        if error["type"] == "too_short" and any(p.startswith(f"{place}.") for p in places):
            continue  # It is too short only because bad items were left out.
        places.add(place)
        if error["type"] in {"extra_forbidden", "unexpected_keyword_argument"}:
            known = model.model_fields if len(error["loc"]) == 1 else ()
            hint = f"; {nearest(str(error['loc'][-1]), known)}" if known else ""
            lines.append(f"{place} is not a known key{hint}")
        elif error["type"] in {"missing", "missing_argument"}:
            lines.append(f"{place} is missing")
        else:
            value = repr(error["input"])
            if len(value) > _SHOWN_CHARS:
                value = value[:_SHOWN_CHARS] + "…"
            lines.append(f"{place} is {value}; expected {_expected(error)}")
    return "; ".join(lines)


def _expected(error: ErrorDetails) -> str:
    # In TOML's words: pydantic's are Python's.
    named = _EXPECTED.get(error["type"])
    if named is not None:
        return named.format(**error.get("ctx", {}))
    return re.sub(r"^(Value error, |Input should be (a valid )?)", "", error["msg"])


@contextmanager
def naming(path: Path, *, tables: Path | None = None) -> Iterator[None]:
    """Put `path` before the message of a ConfigError without it.

    `tables`: the file of TableErrors, if that is another one.
    """
    try:
        yield
    except ConfigError as problem:
        place = tables if tables is not None and isinstance(problem, TableError) else path
        if str(place) in problem.message:
            raise
        raise ConfigError(f"{place}: {problem.message}") from problem.__cause__
