"""``inferq bench``: its figures against what the worker did, stalls, faults, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import redis as redis_py
from click.testing import CliRunner
from helpers.repository import fake_model
from helpers.wait import until
from helpers.worker import Worker

from inferq.workers.bench.figures import Counts, Report, StepFigures, read_report
from inferq.workers.cli import inferq
from inferq.workers.process.embedded import EmbeddedRedis

#: Short windows: these tests are of counts and of seconds, not of milliseconds.
QUICK = ("--window", "0.3", "--max-windows", "3", "--warmup", "0.1")
END_S = 90.0


class Bench:
    """A running `inferq bench`, with what it says in files."""

    def __init__(self, process: subprocess.Popen[bytes], out: Path, err: Path) -> None:
        self.process = process
        self._out = out
        self._err = err

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def wait(self) -> int:
        return self.process.wait(END_S)

    def says(self, text: str) -> None:
        """Wait until it has said so on stderr."""
        until(lambda: text in self.err or self.process.poll() is not None, END_S, text)
        assert text in self.err

    def producers(self) -> list[int]:
        """The pids of its processes."""
        folder = Path(f"/proc/{self.process.pid}/task")
        children = [(task / "children").read_text().split() for task in folder.iterdir()]
        return [int(pid) for some in children for pid in some]


@contextmanager
def running(redis_url: str, *args: object) -> Iterator[Bench]:
    """`inferq bench` with `args`, ended at the end."""
    with tempfile.TemporaryDirectory(prefix="inferq-bench-test-") as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        with out.open("wb") as to_out, err.open("wb") as to_err:
            process = subprocess.Popen(
                [sys.executable, "-m", "inferq.workers.cli", "bench", *map(str, args)],
                stdout=to_out,
                stderr=to_err,
                stdin=subprocess.DEVNULL,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
                    "INFERQ_REDIS_URL": redis_url,
                },
            )
        try:
            yield Bench(process, out, err)
        finally:
            process.kill()
            process.wait()


def measured(redis_url: str, *args: object, status: int = 0) -> Report:
    """The report of a whole run, and nothing else on stdout."""
    with running(redis_url, *args, "--json", "-") as bench, tempfile.TemporaryDirectory() as folder:
        assert bench.wait() == status, bench.err
        path = Path(folder) / "report.json"
        path.write_text(bench.out)
        return read_report(path)


Serve = Callable[..., Worker]


@pytest.fixture
def serve(redis_url: str, tmp_path: Path) -> Iterator[Serve]:
    """``serve(knobs="…", fake="…")`` starts a worker that serves `m`, which echoes."""
    workers: list[Worker] = []

    def start(url: str = redis_url, *, knobs: str = "max_batch_size = 8", fake: str = "") -> Worker:
        fake_model(tmp_path / "models", "m", knobs="warm_up = false\n" + knobs, fake=fake)
        worker = Worker(url, tmp_path / "models")
        workers.append(worker)
        return worker.__enter__()

    yield start
    for worker in workers:
        worker.close()


def answered(redis: redis_py.Redis) -> int:
    """Results that the worker has stored: its own count."""
    return sum(1 for _ in redis.scan_iter("celery-task-meta-*", count=1000))


def adds_up(counts: Counts) -> bool:
    ended = counts.succeeded + counts.failed + counts.unanswered
    sent = counts.sent + counts.refused + counts.not_sent
    return counts.sent == ended and counts.due == sent


@pytest.mark.parametrize("processes", [1, 2])
def test_every_request_is_answered_and_counted_as_the_worker_counts(
    redis: redis_py.Redis, redis_url: str, serve: Serve, processes: int
) -> None:
    serve(fake="delay_ms = 2")
    report = measured(redis_url, "m", "--concurrency", "2,8", "--processes", processes, *QUICK)
    assert [step.load for step in report.steps] == [2, 8]
    for step in report.steps:
        assert adds_up(step.counts)
        assert adds_up(step.whole)
        assert step.whole.succeeded == step.whole.sent >= step.counts.sent > 0
        # A window's successes are nearly those of the requests that were due in it.
        ended = step.requests_per_s * step.seconds
        assert step.counts.succeeded == pytest.approx(ended, abs=2 * step.load)
        assert step.requests_per_s == pytest.approx(
            sum(window.requests_per_s for window in step.windows[-3:]) / 3, rel=1e-4
        )
    # One more: the request that is tried before.
    assert answered(redis) == 1 + sum(step.whole.sent for step in report.steps)
    assert report.how.processes == processes


def test_the_split_of_the_time_is_that_of_the_model(redis_url: str, serve: Serve) -> None:
    serve(fake="delay_ms = 20", knobs="max_batch_size = 4")
    (step,) = measured(redis_url, "m", "--concurrency", "8", "--batch", "2", *QUICK).steps
    assert step.time_ms is not None
    assert step.latency_ms is not None
    assert step.batch is not None
    assert step.time_ms.compute >= 20
    assert step.latency_ms.p50 >= 40  # 8 requests of 2 rows are 4 batches of 4 rows: 1 lane
    assert 2 <= step.batch.rows <= 4
    assert step.rows_per_s == pytest.approx(2 * step.requests_per_s, rel=1e-4)
    assert step.rows_per_s <= 4 / 0.020 * 1.15
    parts = step.time_ms
    total = parts.late + parts.queue + parts.form + parts.compute + parts.settle + parts.other
    assert total == pytest.approx(step.latency_ms.mean, rel=0.001)


def test_an_open_loop_sends_what_it_was_told_to(
    redis: redis_py.Redis, redis_url: str, serve: Serve
) -> None:
    serve()
    report = measured(
        redis_url,
        "m",
        "--rate",
        "50:100:50",
        "--distribution",
        "constant",
        "--processes",
        2,
        *QUICK,
    )
    for step in report.steps:
        assert step.counts.due == pytest.approx(step.load * step.seconds, abs=1)
        assert step.counts.not_sent == 0
        assert step.whole.succeeded == step.whole.sent
        assert adds_up(step.whole)
    assert answered(redis) == 1 + sum(step.whole.sent for step in report.steps)


def test_a_trace_is_sent_to_its_last_line(
    redis: redis_py.Redis, redis_url: str, serve: Serve, tmp_path: Path
) -> None:
    serve()
    times = np.sort(np.random.default_rng(3).random(80))
    (tmp_path / "trace").write_text("\n".join(map(str, times)))
    report = measured(redis_url, "m", "--trace", tmp_path / "trace", "--processes", 3)
    (step,) = report.steps
    assert step.counts == step.whole == Counts(80, 80, 80, 0, 0, 0, 0)
    assert answered(redis) == 81
    assert step.seconds >= times[-1] - times[0]


def _stalled(
    redis: redis_py.Redis, bench: Bench, worker: Worker, after: int, seconds: float
) -> float:
    """Stop the worker once it has answered `after` requests; for how long it stood still."""
    until(lambda: answered(redis) >= after or bench.process.poll() is not None, END_S)
    worker.pause()
    began = time.monotonic()
    until(lambda: time.monotonic() - began > seconds, END_S)
    worker.resume()
    return time.monotonic() - began


def _report(bench: Bench, path: Path) -> StepFigures:
    assert bench.wait() == 0, bench.err
    return read_report(path).steps[0]


def test_a_stall_shows_in_an_open_loop_though_few_requests_were_sent_to_see_it(
    redis: redis_py.Redis, redis_url: str, serve: Serve, tmp_path: Path
) -> None:
    """500 requests in 5 s; the worker stands still for one second of them."""
    worker = serve()
    (tmp_path / "trace").write_text("\n".join(str(n / 100) for n in range(500)))
    out = tmp_path / "out.json"
    with running(redis_url, "m", "--trace", tmp_path / "trace", "--json", out) as bench:
        stall = _stalled(redis, bench, worker, 100, 1.0)
        step = _report(bench, out)
    assert step.counts == Counts(500, 500, 500, 0, 0, 0, 0)
    assert step.latency_ms is not None
    # Each of the 100 that were due meanwhile waited for the rest of it: p99 is near the whole.
    assert step.latency_ms.p99 >= 900 * stall * 0.9
    assert step.latency_ms.p90 >= 300
    assert step.latency_ms.p50 < 500


def test_the_same_stall_hides_from_the_percentiles_of_a_closed_loop(
    redis: redis_py.Redis, redis_url: str, serve: Serve, tmp_path: Path
) -> None:
    """One user asks once in a second that stands still: that is why --rate is there."""
    worker = serve()
    out = tmp_path / "out.json"
    closed = ("--concurrency", 1, "--window", 1.5, "--max-windows", 3, "--warmup", 0)
    with running(redis_url, "m", *closed, "--json", out) as bench:
        _stalled(redis, bench, worker, 20, 1.0)
        step = _report(bench, out)
    assert step.latency_ms is not None
    assert step.latency_ms.max >= 950
    assert step.latency_ms.p95 < 500
    assert step.counts.due == step.counts.succeeded


def test_what_is_due_beyond_the_limit_is_not_sent_and_counted(
    redis: redis_py.Redis, redis_url: str, serve: Serve
) -> None:
    serve(fake="delay_ms = 50", knobs="max_batch_size = 1")
    (step,) = measured(redis_url, "m", "--rate", 400, "--max-in-flight", 10, *QUICK).steps
    assert step.counts.not_sent > step.counts.sent > 0
    assert adds_up(step.counts)
    assert adds_up(step.whole)
    assert step.latency_ms is not None
    assert any("were not sent in time" in note for note in step.notes)
    assert answered(redis) == 1 + step.whole.sent


@pytest.mark.parametrize("load", [("--rate", "300"), ("--concurrency", "40")])
def test_what_admission_refuses_is_counted(
    redis: redis_py.Redis, redis_url: str, serve: Serve, load: Sequence[str]
) -> None:
    serve(fake="delay_ms = 50", knobs="max_batch_size = 1\nmax_queue_depth = 5")
    (step,) = measured(redis_url, "m", *load, *QUICK).steps
    assert step.whole.refused > 0
    assert step.counts.failed == step.counts.unanswered == 0
    assert adds_up(step.counts)
    assert adds_up(step.whole)
    assert answered(redis) == 1 + step.whole.sent


def test_errors_are_counted_by_code_beside_the_successes(
    redis_url: str, serve: Serve, tmp_path: Path
) -> None:
    serve(fake="faults = true", knobs="max_batch_size = 1")
    np.save(tmp_path / "x.npy", np.array([[1] * 4, [-1] * 4], np.float32))
    (step,) = measured(
        redis_url,
        "m",
        "--input",
        f"x={tmp_path / 'x.npy'}",
        "--batch",
        1,
        "--concurrency",
        2,
        *QUICK,
    ).steps
    assert step.errors == {"engine_error": step.counts.failed}
    assert step.counts.failed == pytest.approx(step.counts.succeeded, abs=4)
    assert adds_up(step.whole)


def test_a_deadline_is_given_to_every_request(redis_url: str, serve: Serve) -> None:
    serve(fake="delay_ms = 50", knobs="max_batch_size = 1")
    (step,) = measured(
        redis_url, "m", "--concurrency", 16, "--timeout-ms", 200, "--priority", 3, *QUICK
    ).steps
    assert step.errors.keys() == {"deadline_exceeded"}
    assert step.counts.succeeded > 0
    assert adds_up(step.whole)


def test_the_table_comparison_and_picture_are_of_one_run(
    redis_url: str, serve: Serve, tmp_path: Path
) -> None:
    serve()
    old, new, picture = (tmp_path / name for name in ("old.json", "new.json", "out.png"))
    with running(redis_url, "m", "--concurrency", "1,2", *QUICK, "--json", old) as bench:
        assert bench.wait() == 0, bench.err
        lines = bench.out.splitlines()
        assert lines[0].split()[:2] == ["in", "flight"]
        assert [line.split()[0].rstrip("*") for line in lines[1:3]] == ["1", "2"]
        assert lines[4].split()[2:6] == ["late", "queue", "form", "compute"]
        assert "concurrency 2 (2 of 2): " in bench.err
    again = ("--concurrency", "2,3", *QUICK, "--json", new, "--plot", picture, "--compare", old)
    with running(redis_url, "m", *again) as bench:
        assert bench.wait() == 0, bench.err
        before, now = (read_report(path).steps for path in (old, new))
        _, _, table = bench.out.partition("now ÷ before\n")
        load, shown, *_ = table.splitlines()[1].split()
        assert load == "2"
        ratio = now[0].requests_per_s / before[1].requests_per_s
        assert float(shown) == pytest.approx(ratio, abs=0.002)
        assert "not measured before: 3" in bench.out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert json.loads(new.read_text())["format_version"] == 1


# --- ends -------------------------------------------------------------------------------------


def test_ctrl_c_shows_what_was_measured_and_leaves_nothing_behind(
    redis_url: str, serve: Serve, tmp_path: Path
) -> None:
    serve(fake="delay_ms = 5")
    out = tmp_path / "out.json"
    args = ("--concurrency", "2,4", "--processes", 2, "--window", 0.3, "--max-windows", 1000)
    with running(redis_url, "m", *args, "--json", out) as bench:
        bench.says("concurrency 2 (1 of 2): ")
        producers = bench.producers()
        assert len(producers) == 2
        bench.process.send_signal(signal.SIGINT)
        assert bench.wait() == 130
        assert "Traceback" not in bench.err
        assert bench.out.splitlines()[1].startswith("2")
        report = read_report(out)
        assert report.interrupted
        assert report.steps[0].load == 2
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in producers))


def test_ctrl_c_before_anything_was_measured_is_no_traceback(redis_url: str, serve: Serve) -> None:
    serve()
    with running(redis_url, "m", "--window", 60) as bench:
        bench.says("requests of 1 row")
        until(lambda: len(bench.producers()) == 1)
        bench.process.send_signal(signal.SIGINT)
        assert bench.wait() == 130
        assert "Traceback" not in bench.err
        assert bench.out == ""


def test_requests_that_nobody_waits_for_are_taken_back(
    redis: redis_py.Redis, redis_url: str, serve: Serve
) -> None:
    worker = serve(fake="delay_ms = 5")
    with running(redis_url, "m", "--concurrency", 4, "--window", 60) as bench:
        until(lambda: answered(redis) > 20, END_S)
        worker.pause()
        bench.process.send_signal(signal.SIGINT)
        assert bench.wait() == 130
    revoked = [
        key
        for key in redis.scan_iter("celery-task-meta-*")
        if b"REVOKED" in (redis.get(key) or b"")
    ]
    assert 1 <= len(revoked) <= 4


@pytest.mark.parametrize("load", [("--concurrency", "4,8,16"), ("--rate", "20:60:20")])
def test_a_redis_that_goes_away_is_one_line_and_what_was_measured_is_shown(
    new_redis: Callable[..., EmbeddedRedis], serve: Serve, load: Sequence[str]
) -> None:
    server = new_redis()
    worker = serve(server.url, fake="delay_ms = 5")
    args = (*load, "--processes", 2, "--window", 0.3, "--max-windows", 3)
    with running(server.url, "m", *args) as bench:
        bench.says(" (1 of 3): ")
        server.kill()
        assert bench.wait() == 1
        assert bench.err.splitlines()[-1].startswith("Error: Redis cannot be reached: ")
        assert "Traceback" not in bench.err
        assert bench.out.splitlines()[1].split()[0].rstrip("*") in ("4", "20")
    worker.kill()  # it would wait through its grace for a Redis that never comes back


def test_a_producer_process_that_dies_is_one_line(redis_url: str, serve: Serve) -> None:
    serve()
    with running(redis_url, "m", "--processes", 2, "--concurrency", 4, "--window", 60) as bench:
        until(lambda: len(bench.producers()) == 2, END_S)
        os.kill(bench.producers()[1], signal.SIGKILL)
        assert bench.wait() == 1
        assert bench.err.splitlines()[-1].startswith("Error: a producer process ended: ")


def test_a_worker_that_is_gone_is_not_waited_for(
    redis_url: str, serve: Serve, redis: redis_py.Redis
) -> None:
    assert serve().stop() == 0
    with running(redis_url, "m") as bench:
        assert bench.wait() == 1
        assert bench.err == "Error: model 'm': no live worker serves it now\n"
    assert answered(redis) == 0


def test_what_is_wrong_is_one_line_before_anything_is_sent(
    redis: redis_py.Redis, redis_url: str, serve: Serve
) -> None:
    serve()
    for args, expected in (
        ("--rate 1 --trace t", "--rate and --trace; expected one of"),
        ("--rate x", "--rate 'x': 'x'; expected a number"),
        ("--batch 9", "inputs of model 'm' have 9 rows; expected 1 to 8"),
        ("--shape x=1,5", "--shape x: 5; expected 4, as in x: float32[batch, 4]"),
        ("--shape x=1,4 --input i", "--shape 'x=1,4' with --input; expected one"),
        ("--input none.npz", "none.npz cannot be read: No such file"),
        ("--plot /none/x.png", "--plot /none/x.png: no folder /none"),
        ("--compare /none/x.json", "/none/x.json cannot be read"),
        ("--processes 3 --concurrency 2", "--processes 3; expected at most 2"),
    ):
        command = ["bench", "m", *args.split(), "--redis-url", redis_url]
        done = CliRunner().invoke(inferq, command)
        assert done.exit_code == 1
        assert done.stderr.startswith(f"Error: {expected}")
        assert len(done.stderr.splitlines()) == 1
        assert done.stdout == ""
    assert answered(redis) == 0
