"""User code in processes of its own: what ends one of them ends one request, and nothing else."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from helpers import python_models
from helpers.capped import CappedProcess, capped
from helpers.python_models import POISONED, python_model
from helpers.repository import numbered
from helpers.wait import until
from helpers.worker import SupervisedWorker, Worker

from inferq.producer import Client, InferqError, RequestError, Result

COUNT = 200
#: Which of them is the poison.
AT = 77
TIMEOUT_S = 120.0
CAP_MB = 700


@contextmanager
def serving(
    url: str, root: Path, code: str = POISONED, *, knobs: str = "lanes = 2", table: str = ""
) -> Iterator[Worker]:
    python_model(root, "m", code, knobs=knobs, table=table)
    with Worker(url, root) as worker:
        yield worker


def ask(url: str, values: list[float]) -> list[Result | InferqError]:
    with Client(url) as client:
        items = ({"x": numbered(value)} for value in values)
        return list(client.map("m", items, timeout=TIMEOUT_S, return_errors=True))


def poisoned(poison: int) -> list[float]:
    values = [float(n) for n in range(COUNT)]
    values[AT] = poison
    return values


def check(found: list[Result | InferqError], *, but: int = AT) -> InferqError:
    """Each has its answer, but for the one at `but`: its error."""
    assert len(found) == COUNT
    for n, each in enumerate(found):
        if n != but:
            assert isinstance(each, Result), (n, each)
            assert np.array_equal(each.outputs["y"], numbered(2 * n)), n
    error = found[but]
    assert isinstance(error, InferqError)
    return error


def processes(worker: Worker | int) -> set[int]:
    """The processes of user code that a worker, or the process of that number, has now."""
    parent = worker if isinstance(worker, int) else worker.pid
    children = Path(f"/proc/{parent}/task").glob("*/children")
    found = set()
    for pid in (int(pid) for each in children for pid in each.read_text().split()):
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        if b"inferq.workers.user_code.child" in command:
            found.add(pid)
    return found


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text()


@pytest.mark.parametrize(
    ("poison", "told"),
    [
        (python_models.SEGFAULT, r"was killed by SIGSEGV while it ran this request"),
        (python_models.EXIT, r"ended with status 3 while it ran this request"),
        (python_models.LOOP, r"was ended after 1 s, timeout_s in \[python\] while it ran this"),
        (python_models.HANG_IN_C, r"was ended after 1 s, timeout_s"),
        (python_models.RAISE, r"model\.py, line 28: ValueError: five"),
    ],
)
def test_one_poison_among_200_requests_is_one_failure_and_the_worker_lives(
    redis_url: str, tmp_path: Path, poison: int, told: str
) -> None:
    with serving(redis_url, tmp_path, table="timeout_s = 1.0") as worker:
        error = check(ask(redis_url, poisoned(poison)))
        assert error.code == "engine_error"
        assert re.search(told, error.message), error.message
        assert worker.alive
        assert all(isinstance(each, Result) for each in ask(redis_url, [1.0, 2.0, 3.0]))
        assert "SIGKILL" not in worker.log
        assert len(processes(worker)) == 2


def test_a_request_error_in_a_rows_place_fails_that_request_alone_and_no_process(
    redis_url: str, tmp_path: Path
) -> None:
    with serving(redis_url, tmp_path) as worker:
        before = processes(worker)
        error = check(ask(redis_url, poisoned(python_models.REFUSE)))
        assert type(error) is RequestError
        assert error.message == "six"
        assert processes(worker) == before


def test_a_memory_bomb_under_a_limit_is_one_failure_and_the_worker_lives(
    redis_url: str, tmp_path: Path
) -> None:
    python_model(tmp_path, "m", POISONED, knobs="lanes = 2")
    with capped(CAP_MB) as cap:
        if cap.folder is None:
            pytest.skip("no cgroup can be made here")
        with CappedProcess(cap, redis_url, tmp_path) as worker:
            error = check(ask(redis_url, poisoned(python_models.BOMB)))
            assert "was killed by SIGKILL" in error.message
            assert cap.kills() >= 1
            assert worker.alive


BOUNDED_BOMB = POISONED.replace(
    "self.bomb = []",
    "import resource; resource.setrlimit(resource.RLIMIT_DATA, (1 << 29, 1 << 29)); self.bomb = []",
).replace(
    "self.bomb.append(np.ones(1 << 22))",
    "self.bomb.append(np.ones(1 << 22)) if len(self.bomb) < 500 else os._exit(9)",
)


def test_a_memory_bomb_in_a_process_with_a_limit_of_its_own_is_one_failure(
    redis_url: str, tmp_path: Path
) -> None:
    with serving(redis_url, tmp_path, BOUNDED_BOMB) as worker:
        error = check(ask(redis_url, poisoned(python_models.BOMB)))
        assert "model.py, line 26: MemoryError" in error.message
        assert worker.alive
        # What one request took is no reason for smaller batches.
        assert "no memory for a batch" not in worker.log


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "raise MemoryError"])
def test_batches_for_which_memory_does_not_suffice_at_warm_up_are_not_formed(
    redis_url: str, tmp_path: Path, end: str
) -> None:
    text = POISONED.replace('x = inputs["x"]', f'x = inputs["x"]\n        if len(x) > 8: {end}')
    with serving(redis_url, tmp_path, text, knobs="lanes = 1") as worker:
        found = ask(redis_url, [float(n) for n in range(COUNT)])
        assert all(isinstance(each, Result) for each in found)
        assert re.search(
            r"batches of at most \d+ rows, in place of 32, since there is no", worker.log
        )


def test_killed_processes_under_load_cost_no_request(redis_url: str, tmp_path: Path) -> None:
    with serving(redis_url, tmp_path) as worker:
        done = threading.Event()
        killed = 0

        def kill() -> None:
            nonlocal killed
            while not done.wait(0.2):
                loaded = [pid for pid in processes(worker) if f"loaded in {pid}" in worker.log]
                for pid in loaded[:1]:
                    os.kill(pid, signal.SIGKILL)
                    killed += 1

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        try:
            for _ in range(100):
                found = ask(redis_url, [float(n) for n in range(COUNT)])
                assert all(isinstance(each, Result) for each in found), found
                if killed >= 5:
                    break
        finally:
            done.set()
            killer.join()
        assert killed >= 5
        assert worker.alive
        assert "a fresh one takes its place" in worker.log


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_processes_end_with_their_worker(redis_url: str, tmp_path: Path, number: int) -> None:
    with serving(redis_url, tmp_path, table="timeout_s = 60.0") as worker:
        pids = processes(worker)
        assert len(pids) == 2
        with Client(redis_url) as client:
            client.submit("m", {"x": numbered(python_models.LOOP)})
            until(lambda: any(busy(pid) for pid in pids), what="a process loops")
            os.kill(worker.pid, number)
            if number == signal.SIGTERM:
                os.kill(worker.pid, signal.SIGQUIT)
            until(lambda: all(map(gone, pids)), 30.0, "the processes are gone")


def busy(pid: int) -> bool:
    """Whether it has computed for half a second more than it takes to start."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) > 100


def test_a_process_that_is_told_to_end_waits_for_its_worker_to_end_it(
    redis_url: str, tmp_path: Path
) -> None:
    """As systemd tells all processes of a unit."""
    with serving(redis_url, tmp_path) as worker:
        pids = processes(worker)
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
        assert all(isinstance(each, Result) for each in ask(redis_url, [1.0] * COUNT))
        assert processes(worker) == pids


LOGGING = """
import logging
from inferq.model import Model

class Logging(Model):
    inputs = {"x": "float32[batch, 4]"}
    outputs = {"y": "float32[batch, 4]"}

    def load(self, context):
        print("printed at load")
        logging.getLogger("mine").warning("logged: %s", context.config["word"])

    def run(self, inputs):
        for n in range(1000):
            print("line", n)
        return {"y": inputs["x"] * 2}
"""


def test_what_the_code_prints_and_logs_is_in_the_workers_log_with_model_and_lane(
    redis_url: str, tmp_path: Path
) -> None:
    table = "[python.config]\nword = 'abc'"
    with serving(redis_url, tmp_path, LOGGING, knobs="lanes = 1", table=table) as worker:
        ask(redis_url, [float(n) for n in range(COUNT)])
        log = worker.log
        assert re.search(r"INFO.*model m, lane 0: printed at load", log)
        assert re.search(r"WARNING.*model m, lane 0: mine: logged: abc", log)
        assert log.count("model m, lane 0: line") < 200


NOT_LOADED = """
from pathlib import Path
from inferq.model import Model

class Once(Model):
    inputs = {"x": "float32[batch, 4]"}
    outputs = {"y": "float32[batch, 4]"}

    def load(self, context):
        if Path(context.config["flag"]).exists():
            raise RuntimeError("the weights are gone")

    def run(self, inputs):
        if (inputs["x"] == -2).any():
            import os; os._exit(1)
        return {"y": inputs["x"] * 2}
"""


def test_a_model_that_loads_no_more_ends_the_worker_and_costs_no_request(
    redis_url: str, tmp_path: Path
) -> None:
    """The next one does not serve that model, and says so; what was sent to it waits."""
    flag = tmp_path / "flag"
    models = tmp_path / "models"
    table = f"[python.config]\nflag = '{flag}'"
    with (
        serving(redis_url, models, NOT_LOADED, knobs="lanes = 1", table=table) as worker,
        Client(redis_url) as client,
    ):
        flag.touch()
        client.submit("m", {"x": numbered(-2)})
        until(lambda: not worker.alive, 60.0, "the worker ends")
        assert worker.process.returncode == 70
        assert re.search(r"did not load: .*line 11: RuntimeError: the weights are gone", worker.log)
        flag.unlink()
        with Worker(redis_url, models, name="next"):
            found = ask(redis_url, [1.0])
            assert isinstance(found[0], Result)


def test_a_model_that_cannot_be_loaded_is_refused_alone(redis_url: str, tmp_path: Path) -> None:
    python_model(tmp_path, "good", POISONED)
    python_model(tmp_path, "bad", "import a_package_that_is_not_there\n" + POISONED)
    python_model(tmp_path, "late", POISONED.replace("self.bomb = []", "raise KeyError('weights')"))
    with Worker(redis_url, tmp_path, ["good"], bad=["bad", "late"]) as worker:
        until(lambda: "line 11: KeyError: 'weights'" in worker.log, what="late is refused")
        assert re.search(
            r"bad/1/model\.py, line 1: ModuleNotFoundError: No module named "
            r"'a_package_that_is_not_there'; expected it in the worker's environment",
            worker.log,
        )
        with Client(redis_url) as client:
            assert client.infer("good", {"x": numbered(1)}).outputs["y"][0, 0] == 2


def test_code_that_releases_the_gil_may_run_in_the_workers_own_threads(
    redis_url: str, tmp_path: Path
) -> None:
    with serving(redis_url, tmp_path, table='isolation = "thread"') as worker:
        assert processes(worker) == set()
        error = check(ask(redis_url, poisoned(python_models.REFUSE)))
        assert error.message == "six"
        error = check(ask(redis_url, poisoned(python_models.RAISE)))
        assert "ValueError: five" in error.message


def test_a_worker_that_is_killed_loses_no_request_and_leaves_no_process(
    redis_url: str, tmp_path: Path
) -> None:
    python_model(tmp_path, "m", SLOW, knobs="lanes = 2\nmax_batch_size = 4")
    with SupervisedWorker(redis_url, tmp_path) as worker, Client(redis_url) as client:
        pending = [client.submit("m", {"x": numbered(n)}) for n in range(COUNT)]
        for _ in range(2):
            child = worker.child()
            until(lambda: any(each.done() for each in pending), 60.0, "some are answered")
            left = processes(child)
            os.kill(child, signal.SIGKILL)
            until(lambda: all(map(gone, left)), what="its lanes are gone")  # noqa: B023
            until(lambda: worker.child() != child, 60.0, "another child serves")  # noqa: B023
        for n, each in enumerate(pending):
            assert np.array_equal(each.result(TIMEOUT_S).outputs["y"], numbered(2 * n))


SLOW = POISONED.replace('x = inputs["x"]', 'time.sleep(0.05); x = inputs["x"]')
