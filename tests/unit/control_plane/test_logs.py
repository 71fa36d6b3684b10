"""Log lines as JSON are whole, bounded and tell of whom they are; floods of them are held back."""

from __future__ import annotations

import io
import json
import logging
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferq.workers.control_plane.worker_logs import _keep_all_to_lines
from inferq.workers.logs import stderr
from inferq.workers.logs.fields import FIELDS, MAX_IDS, about
from inferq.workers.logs.flood import BURST, MAX_KINDS, WINDOW_S, Flood
from inferq.workers.logs.json_lines import MAX_LINE, JsonLines, fit
from inferq.workers.logs.one_line import OneLine
from inferq.workers.logs.stderr import Lines

FORMATTER = JsonLines("cpu1@host")


def record(text: object, *args: object, level: int = logging.ERROR, **fields: object) -> Any:
    made = logging.LogRecord("inferq.test", level, __file__, 1, text, args, None)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def told(made: logging.LogRecord) -> dict[str, Any]:
    line = FORMATTER.format(made)
    assert "\n" not in line
    found: dict[str, Any] = json.loads(line)
    return found


def raised(problem: BaseException) -> Any:
    try:
        raise problem
    except BaseException:  # noqa: BLE001
        return sys.exc_info()


# --- JSON ----------------------------------------------------------------------------------------


def test_a_line_tells_when_who_and_what() -> None:
    made = record("no %s of %s", "room", "m", **about("id1", model="m", rows=3))
    made.created = 1_700_000_000.0625
    assert told(made) == {
        "time": "2023-11-14T22:13:20.062Z", "level": "ERROR", "logger": "inferq.test",
        "message": "no room of m", "node": "cpu1@host", "model": "m", "rows": 3,
        "request_ids": ["id1"],
    }  # fmt: skip


def test_another_node_may_be_named() -> None:
    assert told(record("x", node="gpu1@host"))["node"] == "gpu1@host"


def test_an_exception_is_text_in_the_same_line() -> None:
    made = record("x")
    made.exc_info = raised(ValueError("two\nlines"))
    exception = told(made)["exception"]
    assert exception.startswith("Traceback (most recent call last):\n")
    assert exception.endswith("ValueError: two\nlines")


def test_celerys_own_lines_name_their_task() -> None:
    assert told(record("x", data={"id": "t1", "args": "x" * 10_000}))["request_ids"] == ["t1"]
    assert told(record("x", task_id="t2", task_name="n"))["request_ids"] == ["t2"]
    assert "request_ids" not in told(record("x", task_id="???"))


def test_arguments_that_do_not_fit_are_told_and_raise_nothing() -> None:
    message = told(record("%d of %d", "two"))["message"]
    assert "'%d of %d' cannot be filled in" in message


@pytest.mark.parametrize("character", ["x", "ü", "\x00", "😀", "\ud800", "\n", '"'])
def test_no_line_is_longer_than_the_limit_whatever_it_holds(character: str) -> None:
    long = character * 100_000
    made = record(
        long,
        model=long,
        node=long,
        error=long,
        incarnation=long,
        request_ids=[long] * 1000,
        failed_ids=[long] * 1000,
        late_ids=[long] * 1000,
    )
    made.name = long
    made.exc_info = raised(ValueError(long))
    assert MAX_LINE // 2 < len(FORMATTER.format(made)) <= MAX_LINE


def test_ids_beyond_the_first_ones_are_counted_only() -> None:
    fields = about(*(str(n) for n in range(1000)), model="m", requests=1000)
    assert fields["request_ids"] == [str(n) for n in range(MAX_IDS)]
    assert told(record("x", **fields))["requests"] == 1000


@given(st.text(), st.integers(100, 1000))
def test_a_text_that_is_cut_keeps_its_ends(text: str, most: int) -> None:
    text *= 50
    cut = fit(text, most)
    assert len(json.dumps(cut)) <= most
    if len(json.dumps(text)) <= most:
        assert cut == text
    else:
        assert (cut[0], cut[-1]) == (text[0], text[-1])


def test_the_docs_name_every_field() -> None:
    text = (Path(__file__).parents[3] / "docs" / "logs.md").read_text()
    always = ("time", "level", "logger", "message", "node", "exception")
    assert [name for name in (*always, *FIELDS) if f"`{name}`" not in text] == []


# --- stderr --------------------------------------------------------------------------------------


def test_what_is_printed_becomes_one_line_for_each_write() -> None:
    lines: list[str] = []
    stream = Lines(lines.append)
    print("one", file=stream)
    stream.write("two\nlines\n")
    print("not ", end="", file=stream)
    assert lines == ["one", "two\nlines"]
    print("yet\n\n", file=stream)
    stream.write("\n")
    assert lines == ["one", "two\nlines", "not yet\n"]


def test_what_telling_prints_is_not_told_again() -> None:
    stream = Lines(lambda text: print("handler failed", file=stream))
    print("one", file=stream)


def test_bytes_are_no_text() -> None:
    with pytest.raises(TypeError):
        Lines(print).write(b"x")  # type: ignore[arg-type]


def test_an_exception_that_nobody_catches_is_one_line(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", stderr._on_uncaught_in_thread)

    def fail() -> None:
        raise ValueError("lost")

    thread = threading.Thread(target=fail, name="loser")
    thread.start()
    thread.join(10)
    stderr._on_uncaught(*raised(TypeError("main")))
    assert [each.getMessage() for each in caplog.records] == [
        "uncaught ValueError in loser",
        "uncaught TypeError",
    ]
    assert "lost" in told(caplog.records[0])["exception"]


# --- floods --------------------------------------------------------------------------------------


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_burst_passes_and_the_rest_is_counted_in_the_next_line_that_does() -> None:
    clock = Clock()
    flood = Flood(clock)
    assert sum(flood.filter(record("bad %s", n)) for n in range(BURST + 7)) == BURST
    clock.now += WINDOW_S
    after = record("bad %s", "one")
    assert flood.filter(after)
    assert after.getMessage() == "bad one (and 7 more like it before)"
    assert told(after)["left_out"] == 7
    again = record("bad %s", "one")
    assert flood.filter(again)
    assert again.getMessage() == "bad one"


def test_each_kind_of_line_has_its_own_burst() -> None:
    flood = Flood(Clock())
    for made in (
        {"text": "a"},
        {"text": "b"},
        {"text": "a", "level": logging.INFO},
        {"text": "a", "model": "m"},
    ):
        assert sum(flood.filter(record(**made)) for _ in range(2 * BURST)) == BURST


def test_debug_lines_all_pass() -> None:
    flood = Flood(Clock())
    assert all(flood.filter(record("x", level=logging.DEBUG)) for _ in range(10 * BURST))


def test_kinds_that_never_end_take_no_memory() -> None:
    flood = Flood(Clock())
    for n in range(10 * MAX_KINDS):
        assert flood.filter(record(f"bad {n}"))
    assert len(flood._seen) == MAX_KINDS


def test_what_is_filled_in_begins_no_line_of_its_own() -> None:
    def line(text: str, *args: object) -> str:
        made = record(text, *args)
        assert OneLine().filter(made)
        return str(made.getMessage())

    forged = "a\n[now: CRITICAL] \x1b[31mforged\r\u2028"
    escaped = r"a\n[now: CRITICAL] \x1b[31mforged\r\u2028"
    assert line("refused %s:\n%s, %d", forged, ValueError(forged), 3) == (
        f"refused {escaped}:\n{escaped}, 3"
    )
    assert line("%(id)s %(count)05.1f", {"id": forged, "count": 2.5}) == f"{escaped} 002.5"
    assert line("50 %") == "50 %"
    assert line("%r", [forged]) == repr([forged])


def escaped_trace(problem: BaseException) -> str:
    """As a worker's text log has it."""
    made = record("it failed")
    made.exc_info = raised(problem)
    assert OneLine().filter(made)
    return logging.Formatter().format(made)


FORGED = "a\n[now: CRITICAL] \x1b[31mforged\r\u2028"
ESCAPED = r"a\n[now: CRITICAL] \x1b[31mforged\r\u2028"


def chained() -> Exception:
    try:
        try:
            raise ValueError(FORGED)
        except ValueError as first:
            raise KeyError("second") from first
    except KeyError:
        try:
            raise RuntimeError(FORGED)
        except RuntimeError as last:
            last.add_note(FORGED)
            return last


def test_the_texts_of_exceptions_are_one_line_each_in_a_traceback() -> None:
    text = escaped_trace(chained())
    assert "\n[now" not in text
    assert "\x1b" not in text
    for line in (f"ValueError: {ESCAPED}", "KeyError: 'second'", f"RuntimeError: {ESCAPED}"):
        assert line in text
    assert text.count("Traceback (most recent call last):\n  File ") == 3
    assert "The above exception was the direct cause" in text
    assert "During handling of the above exception" in text
    assert text.index("ValueError") < text.index("KeyError") < text.index("RuntimeError")


def test_a_traceback_without_odd_texts_is_as_python_tells_it() -> None:
    made = record("it failed")
    made.exc_info = raised(ValueError("plain"))
    expected = logging.Formatter().format(made)
    made.exc_text = None
    OneLine().filter(made)
    assert logging.Formatter().format(made) == expected


@pytest.mark.parametrize(
    "problem",
    [
        ExceptionGroup(FORGED, [ValueError(FORGED), ExceptionGroup(FORGED, [KeyError(FORGED)])]),
        SyntaxError(FORGED, (FORGED, 1, 1, FORGED)),
        UnicodeDecodeError("utf-8", b"\n[now", 0, 1, FORGED),
        type(FORGED, (Exception,), {})("x"),
        type("Odd", (Exception,), {"__str__": lambda self: 1 / 0})("x"),
    ],
    ids=["group", "syntax", "decoding", "class", "no text"],
)
def test_no_exception_writes_a_line_of_its_own(problem: BaseException) -> None:
    text = escaped_trace(problem)
    assert "\n[now" not in text
    assert "\x1b" not in text
    assert text.startswith("it failed\nTraceback")


def test_lines_of_whatever_logger_are_kept_to_themselves() -> None:
    written = io.StringIO()
    root = logging.Logger("root of a worker")
    root.addHandler(logging.StreamHandler(written))
    _keep_all_to_lines(root)
    try:
        raise ValueError(FORGED)
    except ValueError:
        root.exception("somebody's library says %s", FORGED)
    text = written.getvalue()
    assert f"somebody's library says {ESCAPED}\nTraceback" in text
    assert text.endswith(f"ValueError: {ESCAPED}\n")
    assert "\n[now" not in text


def test_a_traceback_is_of_bounded_length() -> None:
    assert len(escaped_trace(ValueError("x\n" * 1_000_000))) < 10_000
