"""One tree of errors, each with a wire code, the same on both sides of the queue."""

from __future__ import annotations

import re

import pytest

from inferq.shared import errors
from inferq.shared.errors import (
    BY_CODE,
    MAX_MESSAGE_CHARS,
    Cancelled,
    EngineError,
    InferqError,
    QueueFull,
    RedisUnavailable,
    ResultTimeout,
    from_wire,
    to_wire,
)


def classes() -> list[type[InferqError]]:
    return [
        each
        for each in vars(errors).values()
        if isinstance(each, type) and issubclass(each, InferqError)
    ]


def test_the_tree_is_as_it_is_drawn() -> None:
    drawn: list[tuple[int, str]] = [
        (len(match[1]) // 4, match[2])
        for match in re.finditer(r"^    ([│ ├└─]*)(\w+)", errors.__doc__ or "", re.MULTILINE)
        if match[2] in vars(errors)
    ]
    assert len(drawn) == len(classes())
    parents: list[str] = []
    for depth, name in drawn:
        parents[depth:] = [name]
        cls = vars(errors)[name]
        assert depth == 0 or vars(errors)[parents[depth - 1]] in cls.__bases__
        assert cls.__doc__


def test_every_class_has_a_code_of_its_own() -> None:
    assert sorted(BY_CODE.values(), key=str) == sorted(classes(), key=str)
    assert all(cls.code == code for code, cls in BY_CODE.items())


def test_waits_and_lost_connections_are_what_python_calls_them() -> None:
    assert issubclass(ResultTimeout, TimeoutError)
    assert issubclass(RedisUnavailable, ConnectionError)


def test_detail_travels_and_a_message_is_cut_to_its_limit() -> None:
    wire = to_wire(QueueFull("x" * 10_000, depth=5, limit=4))
    error = from_wire("FAILURE", wire)
    assert type(error) is QueueFull
    assert error.detail == {"depth": 5, "limit": 4}
    assert len(error.message) == MAX_MESSAGE_CHARS


@pytest.mark.parametrize(
    ("status", "wire", "cls", "message"),
    [
        ("FAILURE", {"exc_type": "OSError", "exc_message": ["a", 1]}, EngineError, "OSError: a, 1"),
        ("FAILURE", {"exc_type": "KeyError", "exc_message": "x"}, EngineError, "KeyError: x"),
        ("FAILURE", None, EngineError, "failure"),
        ("FAILURE", "odd", EngineError, "failure"),
        ("FAILURE", {"code": "no such code"}, EngineError, "failure"),
        ("FAILURE", {"code": ["list"]}, EngineError, "failure"),
        ("FAILURE", {"code": "engine_error", "detail": [1]}, EngineError, ""),
        (
            "REVOKED",
            {"exc_type": "TaskRevokedError", "exc_message": ["terminated"]},
            Cancelled,
            "TaskRevokedError: terminated",
        ),
        ("REVOKED", None, Cancelled, "revoked"),
    ],
)
def test_what_others_stored_becomes_an_error_too(
    status: str, wire: object, cls: type[InferqError], message: str
) -> None:
    error = from_wire(status, wire)
    assert type(error) is cls
    assert error.message == message


def test_no_detail_gets_in_the_way_of_the_error() -> None:
    wire = {"code": "engine_error", "exc_message": ["why"], "detail": {"message": "other", 1: 2}}
    error = from_wire("FAILURE", wire)
    assert type(error) is EngineError
    assert error.message == "why"
