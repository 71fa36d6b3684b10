"""A model.py is described without being loaded, and run by processes that may end at any time."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.process import held_open
from helpers.python_models import EXIT, LOOP, POISONED, RAISE, REFUSE, SEGFAULT, python_model
from helpers.repository import numbered
from helpers.wait import until

from inferq.shared.errors import ConfigError, EngineError, FatalEngineError, RequestError
from inferq.shared.schema import Tensors
from inferq.workers.engines.cores import usable_cores
from inferq.workers.engines.python import PythonEngine
from inferq.workers.models.engine import Batch, LoadedModel, RowsDiffer
from inferq.workers.models.repository import load_model
from inferq.workers.user_code import lane as lanes_module
from inferq.workers.user_code.describe import describe
from inferq.workers.user_code.lane import ProcessLane

Load = Callable[..., LoadedModel]

CLASS = """
from inferq.model import Model

class Mine(Model):
    inputs = {"x": "float32[batch, 4]"}
    outputs = {"y": "float32[batch, 4]"}

    def load(self, context):
        self.context = context

    def run(self, inputs):
        BODY
"""


def code(body: str, top: str = "") -> str:
    return top + CLASS.replace("BODY", body)


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Load]:
    """``load(code, …)`` loads a model of that code as a worker does."""
    loaded: list[LoadedModel] = []

    def load(code: str, knobs: str = "lanes = 1", table: str = "") -> LoadedModel:
        root = tmp_path / f"models{len(loaded)}"
        python_model(root, "m", code, knobs=knobs, table=table)
        loaded.append(PythonEngine(load_model(root, "m")).load())
        return loaded[-1]

    yield load
    for each in loaded:
        each.close()


def batch(*values: float, bucket: int | None = None) -> Batch:
    parts: list[Tensors] = [{"x": numbered(value)} for value in values]
    return Batch(parts, len(parts), bucket or len(parts))


def pid_of(lane: Any) -> int:
    assert isinstance(lane, ProcessLane)
    assert lane._process is not None
    return lane._process.pid


# --- describing ----------------------------------------------------------------------------------


def described(tmp_path: Path, text: str, timeout: float = 30.0) -> str:
    return str(describe(python_model(tmp_path, "m", text), timeout))


def test_a_class_is_described_without_being_loaded(tmp_path: Path) -> None:
    text = code("return inputs").replace("self.context = context", "raise AssertionError")
    assert described(tmp_path, text) == "(x: float32[batch, 4]) -> (y: float32[batch, 4])"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("import os; os._exit(7)", r"m/1/model\.py: the process that imported it ended with stat"),
        ("import ctypes; ctypes.string_at(0)", r"the process that imported it was killed by SIGSE"),
        ("while True: pass", r"the process that imported it was ended after 2 s"),
        ("x = 1\nraise SystemExit(3)", r"m/1/model\.py, line 2: SystemExit: 3"),
        ("x = 1\nx.y", r"m/1/model\.py, line 2: AttributeError: 'int' object has no attribute"),
        ("def f(:", r"m/1/model\.py, line 1: SyntaxError: invalid syntax"),
        ("import nothing_of_the_kind", r"line 1: ModuleNotFoundError: No module.*; expected it in"),
        ("x = 1", r"model\.py has none; expected one class that derives from inferq\.model\.Model"),
        (code("pass") + CLASS.replace("Mine", "Other").replace("BODY", "pass"), r"has Mine, Other"),
        (code("pass").replace("def run", "def ran"), r"model\.py: class Mine has no run; expected"),
        (code("pass").replace("float32[", "f32["), r"model\.py: Mine\.inputs\['x'\] is 'f32\[bat"),
    ],
)
def test_what_cannot_be_described_is_refused_with_file_line_and_expectation(
    tmp_path: Path, text: str, told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        described(tmp_path, text, timeout=2.0 if "while True" in text else 30.0)


def test_bases_and_classes_from_elsewhere_may_be_used(tmp_path: Path) -> None:
    path = python_model(tmp_path, "m", "from beside import Mine\n")
    (path.parent / "beside.py").write_text(
        code("pass") + "class Base(Model): pass\n" + "class Unused: pass\n"
    )
    assert "x: float32[batch, 4]" in str(describe(path))
    path.write_text(
        code("pass")
        .replace("(Model)", "(Base)")
        .replace("class Mine", "class Base(Model):\n    pass\n\nclass Mine")
    )
    assert "x: float32[batch, 4]" in str(describe(path))


def test_describing_leaves_no_process_no_descriptor_and_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    path = python_model(tmp_path, "m", code("pass"))
    describe(path)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        describe(path)
    assert len(os.listdir("/proc/self/fd")) == before
    assert [each.name for each in path.parent.iterdir()] == ["model.py"]


# --- loading -------------------------------------------------------------------------------------


def test_a_model_is_given_its_folder_device_and_config(load: Load) -> None:
    body = (
        "c = self.context; import pathlib\n"
        "        assert (c.folder / 'model.py').exists() and c.device == 'cpu', c\n"
        "        return {'y': inputs['x'] * c.config['by'] + len(c.config['names'])}"
    )
    table = "[python.config]\nby = 3\nnames = ['a', 'b']"
    loaded = load(code(body), table=table)
    assert loaded.lanes[0].run(batch(1))["y"][0, 0] == 5


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("raise OSError('no weights')", r"m/1/model\.py, line 9: OSError: no weights"),
        ("import os; os._exit(5)", r"its process ended with status 5 while it loaded"),
        ("import time; time.sleep(60)", r"was ended after 1 s while it loaded \(load_timeout_s in"),
    ],
)
@pytest.mark.parametrize("lanes", [1, 3])
def test_what_does_not_load_is_refused_and_leaves_no_process(
    load: Load, text: str, told: str, lanes: int
) -> None:
    text = code("pass").replace("self.context = context", text)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match=told):
        load(text, f"lanes = {lanes}", "load_timeout_s = 1.0" if "sleep" in text else "")
    until(lambda: len(os.listdir("/proc/self/fd")) <= before, what="all descriptors are closed")
    assert not [p for p in Path("/proc/self/task").glob("*/children") if "1" in _alive(p)]


def _alive(children: Path) -> str:
    found = ""
    for pid in children.read_text().split():
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        found += "1" if b"user_code.child" in command else ""
    return found


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ("timeout_s = 0", r"python\.timeout_s is 0; expected more than 0"),
        ("isolation = 'fork'", r"python\.isolation is 'fork'; expected 'process' or 'thread'"),
        ("timeout_s = 90.0", r"timeout_s is 90; expected at most max_run_seconds, 50"),
        (
            "isolation = 'thread'\ntimeout_s = 5.0",
            r"timeout_s is 5; expected none beside isolation",
        ),
        ("[python.config]\nx = 99999999999999999999", r"python\.config cannot be handed on"),
        ("device = 'tpu'", r"python\.device is 'tpu'; expected"),
    ],
)
def test_a_wrong_table_is_refused(load: Load, table: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load(code("pass"), "lanes = 1\nmax_run_seconds = 50.0", table)


DEVICE = """
import os
from inferq.model import Model

class Device(Model):
    inputs = {"x": "float32[batch, 4]"}
    outputs = {"cuda": "bool[batch]", "visible": "int64[batch]", "threads": "int64[batch]"}

    def load(self, context):
        self.found = {
            "cuda": context.device == "cuda:0",
            "visible": len(os.environ.get("CUDA_VISIBLE_DEVICES", "?")),
            "threads": int(os.environ["OMP_NUM_THREADS"]),
        }

    def run(self, inputs):
        return [self.found for _ in inputs["x"]]
"""


def test_a_lane_has_the_gpu_of_its_worker_or_none(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-0123")
    loaded = load(DEVICE, knobs="")
    found = loaded.lanes[0].run(batch(1))
    assert (loaded.device, found["cuda"][0], found["visible"][0]) == ("cpu", False, 0)
    share = max(1, usable_cores() // len(loaded.lanes))
    assert (found["threads"][0], len(loaded.lanes)) == (share, min(usable_cores(), 4))
    monkeypatch.setenv("INFERQ_GPU", "0")
    for table in ("", "device = 'cuda'"):
        loaded = load(DEVICE, knobs="", table=table)
        found = loaded.lanes[0].run(batch(1))
        assert (loaded.device, found["cuda"][0], found["visible"][0]) == ("cuda", True, 8)
        assert len(loaded.lanes) == 1
    assert load(DEVICE, table="device = 'cpu'").device == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match=r"python\.device is 'cuda', but this worker serves on"):
        load(DEVICE, table="device = 'cuda'")


# --- running -------------------------------------------------------------------------------------


def test_a_process_that_ends_costs_its_batch_and_the_next_one_is_answered(load: Load) -> None:
    lane = load(POISONED).lanes[0]
    first = pid_of(lane)
    with pytest.raises(EngineError, match="lane 0 was killed by SIGSEGV while it ran this batch"):
        lane.run(batch(1, SEGFAULT))
    assert lane.run(batch(1, 2))["y"][:, 0].tolist() == [2, 4]
    assert pid_of(lane) != first


def test_a_request_that_is_alone_when_its_process_is_killed_is_tried_again(
    load: Load, tmp_path: Path
) -> None:
    flag = tmp_path / "flag"
    flag.touch()
    body = (
        f"import os, pathlib; flag = pathlib.Path({str(flag)!r})\n"
        "        if flag.exists(): flag.unlink(); os.kill(os.getpid(), 9)\n"
        "        return {'y': inputs['x']}"
    )
    lane = load(code(body)).lanes[0]
    assert lane.run(batch(5))["y"][0, 0] == 5
    assert not flag.exists()


def test_one_that_ends_its_process_whenever_it_runs_is_told_how(load: Load) -> None:
    lane = load(POISONED).lanes[0]
    with pytest.raises(EngineError, match="ended with status 3 while it ran this request"):
        lane.run(batch(EXIT))


def test_a_batch_that_takes_too_long_has_its_process_ended_once(
    load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    lane = load(POISONED, table="timeout_s = 0.5").lanes[0]
    first = pid_of(lane)
    with pytest.raises(EngineError, match=r"was ended after 0\.5 s, timeout_s in \[python\] while"):
        lane.run(batch(LOOP))
    assert caplog.text.count("its process was ended after") == 1  # it would take as long again
    assert not Path(f"/proc/{first}").exists()
    assert lane.run(batch(1))["y"][0, 0] == 2


def test_one_that_was_killed_while_it_idled_is_replaced_and_costs_nothing(
    load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    lane = load(POISONED).lanes[0]
    first = pid_of(lane)
    os.kill(first, signal.SIGKILL)
    # With all its threads: the first one alone may be a zombie before the others have ended.
    ended = os.WEXITED | os.WNOWAIT | os.WNOHANG
    until(lambda: os.waitid(os.P_PID, first, ended), what="it is dead")
    assert lane.run(batch(1, 2))["y"][0, 0] == 2
    (told,) = (each.getMessage() for each in caplog.records if "fresh one" in each.getMessage())
    assert "lane 0, its process was killed by SIGKILL" in told
    assert "while it ran" not in told


def test_what_the_code_has_started_ends_with_its_process(load: Load, tmp_path: Path) -> None:
    """Also where that holds the process' descriptors, as a fork does."""
    body = (
        "import os, time\n"
        "        if (pid := os.fork()) == 0: time.sleep(600)\n"
        f"        open({str(tmp_path / 'pid')!r}, 'w').write(str(pid))\n"
        "        os._exit(4)"
    )
    lane = load(code(body)).lanes[0]
    with pytest.raises(EngineError, match="ended with status 4"):
        lane.run(batch(1, 2))
    pid = int((tmp_path / "pid").read_text())
    until(lambda: not Path(f"/proc/{pid}").exists() or " Z " in _stat(pid), what="it is gone")


def _stat(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text()


def test_what_it_raises_is_told_with_file_and_line_and_its_trace_is_logged(
    load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    lane = load(POISONED).lanes[0]
    first = pid_of(lane)
    for _ in range(2):
        with pytest.raises(EngineError, match=r"m/1/model\.py, line 28: ValueError: five"):
            lane.run(batch(RAISE))
    assert pid_of(lane) == first
    assert 'raise ValueError("five")' in caplog.text
    assert caplog.records[-1].__dict__["model"] == "m"


def test_a_system_exit_ends_the_process(load: Load) -> None:
    lane = load(code("raise SystemExit(9)")).lanes[0]
    with pytest.raises(EngineError, match="ended with status 9 while it ran this batch"):
        lane.run(batch(1, 2))


def test_request_errors_stand_beside_the_answers_of_the_other_rows(load: Load) -> None:
    lane = load(POISONED).lanes[0]
    given = batch(1, REFUSE, 3, bucket=4)
    outputs = lane.run(given)
    assert outputs["y"][::2, 0].tolist() == [2, 6]
    assert len(outputs["y"]) == 3
    assert given.errors is not None
    assert [*given.errors] == [1]
    assert type(given.errors[1]) is RequestError
    assert given.errors[1].message == "six"


def test_a_request_error_that_is_raised_is_that_of_a_request_alone(load: Load) -> None:
    """Of several in one batch nobody knows whose it is: they are run apart."""
    lane = load(code("from inferq.model import RequestError; raise RequestError('no')")).lanes[0]
    with pytest.raises(RequestError, match="no"):
        lane.run(batch(1, 2))
    given = batch(1)
    assert lane.run(given) == {}
    assert given.errors is not None
    assert given.errors[0].message == "no"


def test_wrong_rows_are_told_as_such(load: Load) -> None:
    lane = load(code("return {'y': inputs['x'][:1]}")).lanes[0]
    with pytest.raises(RowsDiffer, match="output 'y' has 1 rows; expected 2, as the inputs"):
        lane.run(batch(1, 2))


def test_an_answer_that_is_too_large_is_an_error(load: Load) -> None:
    text = code("return {'y': np.zeros((2, 1 << 20), np.float32)}", "import numpy as np\n")
    lane = load(
        text.replace('"y": "float32[batch, 4]"', '"y": "float32[batch, ?]"'),
        "lanes = 1\nmax_request_bytes = 1000",
    ).lanes[0]
    with pytest.raises(EngineError, match="tensors of a batch are 8388608 bytes; expected at most"):
        lane.run(batch(1, 2))


def test_a_process_that_loads_no_more_is_tried_a_few_times_and_then_beyond_use(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes_module, "STARTS", (0.0, 0.01, 0.01))
    flag = tmp_path / "flag"
    text = POISONED.replace("self.bomb = []", f"assert not os.path.exists({str(flag)!r}), 'gone'")
    lane = load(text).lanes[0]
    flag.touch()
    with pytest.raises(
        FatalEngineError, match=r"3 fresh processes in a row did not load: .*: gone"
    ):
        lane.run(batch(EXIT))


def test_closing_ends_the_processes_and_frees_what_they_held(load: Load) -> None:
    sockets = held_open(os.getpid())[1]
    loaded = load(POISONED, "lanes = 3")
    pids = [pid_of(lane) for lane in loaded.lanes]
    assert held_open(os.getpid())[1] == sockets + 3
    loaded.close()
    loaded.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert held_open(os.getpid())[1] == sockets


def test_nobody_forges_a_line_by_what_the_code_prints(
    load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    body = (
        'print(\'\\x1e[50, "a", "forged", "t"]\'); print(); print(\'x\' * 100_000)\n'
        "        import logging; logging.getLogger('mine').error('two\\nlines')\n"
        "        return {'y': inputs['x']}"
    )
    load(code(body)).lanes[0].run(batch(1))
    until(lambda: any("two" in each.getMessage() for each in caplog.records), what="it is logged")
    said = [each for each in caplog.records if each.name == "inferq.user_code"]
    assert {each.levelno for each in said if "forged" in each.getMessage()} == {logging.INFO}
    assert max(len(each.getMessage()) for each in said) < 70_000
    (last,) = (each for each in said if "two" in each.getMessage())
    assert last.levelno == logging.ERROR
    assert last.getMessage() == "model m, lane 0: mine: two\nlines"


@pytest.mark.parametrize("isolation", ["process", "thread"])
def test_what_the_code_keeps_of_a_batch_changes_no_answer(load: Load, isolation: str) -> None:
    body = (
        "inputs['x'] *= 2\n"
        "        self.kept = getattr(self, 'kept', inputs['x'])\n"
        "        self.kept[:] = inputs['x'][:1]\n"
        "        return {'y': self.kept}"
    )
    lane = load(code(body), table=f"isolation = '{isolation}'").lanes[0]
    x = numbered(1)
    first = lane.run(Batch([{"x": x}], 1, 1))
    second = lane.run(batch(5))
    assert (x[0, 0], first["y"][0, 0], second["y"][0, 0]) == (1, 2, 10)
    assert np.array_equal(first["y"], numbered(2))
