"""When requests are due: command-line values, traces, and the shares of several processes."""

from __future__ import annotations

import math
import re
from itertools import islice, takewhile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from inferq.shared.errors import (
    ConfigError,
)
from inferq.workers.bench import loads
from inferq.workers.bench.command import bench
from inferq.workers.bench.loads import Load, due_times
from inferq.workers.bench.sources import REFUSED_PAUSE_S, ClosedLoop, OpenLoop

# --- when to send -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("8", [8]),
        ("1:64:2x", [1, 2, 4, 8, 16, 32, 64]),
        ("1:50:3x", [1, 3, 9, 27]),
        ("10:30:10", [10, 20, 30]),
        ("1,4,10:12:1", [1, 4, 10, 11, 12]),
    ],
)
def test_concurrencies_are_numbers_ranges_and_lists(text: str, values: list[int]) -> None:
    assert [load.value for load in loads.concurrencies(text)] == values


def test_a_rate_need_not_be_whole() -> None:
    found = loads.rates("0.1:0.3:0.1", "poisson")
    assert [load.value for load in found] == [0.1, 0.2, 0.3]
    assert {load.distribution for load in found} == {"poisson"}


@pytest.mark.parametrize(
    ("text", "part", "expected"),
    [
        ("", "''", "expected a number, or START:END:STEP"),
        ("x", "'x'", "expected a number, or START:END:STEP"),
        ("nan", "'nan'", "expected a number"),
        ("1:2", "'1:2'", "expected a number, or START:END:STEP"),
        ("1:2:3:4", "'1:2:3:4'", "expected a number, or START:END:STEP"),
        ("4,0", "'0'", "expected 1 to 65536"),
        ("-1", "-1", "expected 1 to 65536"),
        ("70000", "70000", "expected 1 to 65536"),
        ("9:3:1", "9 to 3", "expected the smaller first"),
        ("1:9:0", "0", "expected a step above 0"),
        ("1:9:1x", "1", "expected a factor above 1"),
        ("1:9:0.5x", "0.5", "expected a factor above 1"),
        ("1.5", "1.5", "expected whole numbers"),
        ("1:1000:1", "'1:1000:1'", "expected at most 100"),
    ],
)
def test_a_bad_load_names_option_value_and_expectation(text: str, part: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loads.concurrencies(text)
    message = caught.value.message
    assert message.startswith(f"--concurrency {text!r}: ")
    assert part in message
    assert expected in message


def test_a_trace_begins_at_its_first_time(tmp_path: Path) -> None:
    (tmp_path / "trace").write_text("5\n\n5.5\n 7 \n7\n")
    load = loads.read_trace(tmp_path / "trace")
    assert load.times == (0.0, 0.5, 2.0, 2.0)
    assert load.value == 2.0


@pytest.mark.parametrize("text", ["1e-320", "0", "0.001:2000000:1000x"])
def test_a_rate_that_nobody_could_send_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"expected 0\.001 to 1e\+06$"):
        loads.rates(text, "constant")


def test_a_trace_that_lasts_no_time_has_a_mean_that_json_can_tell(tmp_path: Path) -> None:
    (tmp_path / "trace").write_text("0\n0\n1e-320\n")
    assert loads.read_trace(tmp_path / "trace").value == 3


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--window", "nan"),
        ("--warmup", "nan"),
        ("--timeout", "nan"),
        ("--timeout-ms", "nan"),
        ("--seed", str(2**63)),
    ],
)
def test_a_number_that_is_none_or_too_large_is_a_usage_error(option: str, value: str) -> None:
    result = CliRunner().invoke(bench, ["m", option, value, "--redis-url", "redis://127.0.0.1:1"])
    assert (result.exit_code, value in result.output) == (2, True), result.output


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty; expected one time in seconds per line"),
        ("1\nx\n", "line 2: 'x'; expected a time in seconds, 0 or more"),
        ("-1\n", "line 1: '-1'; expected a time in seconds, 0 or more"),
        ("inf\n", "line 1: 'inf'; expected a time in seconds"),
        ("2\n1\n", "line 2: '1'; expected at least 2, as the line before"),
        ("0\n90000\n", "lasts 90000 s; expected at most 86400 s"),
    ],
)
def test_a_bad_trace_names_the_line(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "trace").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(expected)):
        loads.read_trace(tmp_path / "trace")


def test_a_trace_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        loads.read_trace(tmp_path / "none")


def _first(load: Load, shares: int, seconds: float, seed: int = 7) -> list[float]:
    """What is due within `seconds` in all shares together, in order."""
    return sorted(
        at
        for share in range(shares)
        for at in takewhile(lambda at: at < seconds, due_times(load, share, shares, (seed, 0)))
    )


@pytest.mark.parametrize("shares", [1, 3])
def test_poisson_arrivals_have_the_mean_and_the_variance_of_poisson(shares: int) -> None:
    load = Load("rate", 200.0, "poisson")
    gaps = np.diff(_first(load, shares, 100.0))
    # 20,000 gaps: standard errors are 0.7 % of the mean, 2.2 % of the variance.
    assert gaps.mean() == pytest.approx(1 / 200, rel=0.03)
    assert gaps.var() == pytest.approx(1 / 200**2, rel=0.1)
    per_second = np.histogram(_first(load, shares, 100.0), 100, (0, 100))[0]
    assert per_second.var() / per_second.mean() == pytest.approx(1.0, abs=0.5)


def test_poisson_arrivals_are_the_same_for_the_same_seed_only() -> None:
    load = Load("rate", 50.0, "poisson")
    assert _first(load, 2, 5.0) == _first(load, 2, 5.0)
    assert _first(load, 2, 5.0) != _first(load, 2, 5.0, seed=8)
    one, other = (list(islice(due_times(load, share, 2, (7, 0)), 5)) for share in (0, 1))
    assert one != other


@pytest.mark.parametrize("shares", [1, 2, 5])
def test_shares_of_a_constant_rate_and_of_a_trace_are_the_whole(shares: int) -> None:
    even = _first(Load("rate", 8.0), shares, 2.0)
    assert even == [n / 8 for n in range(16)]
    times = (0.0, 0.1, 0.1, 0.4, 2.0)
    assert _first(Load("trace", 1.0, times=times), shares, 9.0) == list(times)


def test_a_closed_loop_has_so_many_users_and_asks_when_one_is_answered() -> None:
    loop = ClosedLoop(3, begins_at=10.0)
    assert loop.take(9.0, 32) == []
    assert loop.next_due() == 10.0
    assert loop.take(10.5, 2) == [10.0, 10.0]
    assert loop.take(10.6, 2) == [10.0]
    assert (loop.take(10.7, 2), loop.next_due()) == ([], math.inf)
    loop.freed(11.0, False)
    assert loop.take(11.2, 2) == [11.0]


def test_a_user_who_was_refused_asks_again_a_little_later() -> None:
    loop = ClosedLoop(1, begins_at=0.0)
    loop.take(0.0, 1)
    loop.freed(1.0, True)
    assert loop.take(1.0, 1) == []
    assert loop.next_due() == 1.0 + REFUSED_PAUSE_S
    assert loop.take(2.0, 1) == [1.0 + REFUSED_PAUSE_S]


def test_an_open_loop_sends_late_what_it_can_and_counts_what_it_may_not() -> None:
    missed: list[float] = []
    room = 2
    loop = OpenLoop(iter([0.0, 0.1, 0.2, 0.3, 1.0, 2.0]), lambda: room, missed.append)
    assert loop.take(0.35, 32) == [0.0, 0.1]
    room = 0
    assert loop.take(0.35, 32) == []
    assert missed == [0.2, 0.3]
    room = 1
    assert (loop.take(0.9, 32), loop.next_due()) == ([], 1.0)
    assert loop.take(1.0, 32) == [1.0]
    loop.give_up(5.0)
    assert missed == [0.2, 0.3, 2.0]
    assert loop.next_due() == math.inf
