"""`inferq worker` starts one child a device, each with what pins it, or says in a line why not.

NVML is a fake where a test has GPUs, since there is no card.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from helpers.bad_models import OTHERS, write_others
from helpers.gpus import fake_nvml
from helpers.repository import fake_model

from inferq.workers.cli import inferq
from inferq.workers.cuda import mps
from inferq.workers.supervision import memory_for_each
from inferq.workers.supervision.supervisor import Child
from inferq.workers.warmup.limits import Limit

HOST = socket.gethostname()
UUIDS = [f"GPU-0000000{n}-0000-0000-0000-000000000000" for n in range(2)]


class _Commanded:
    """`inferq worker` up to the start of its children."""

    def __init__(self, models: Path) -> None:
        self.models = models
        self.children: list[Child] = []
        self.allow_remote_shutdown = False

    def run(self) -> int:
        return 0

    def __call__(self, *options: str) -> list[Child]:
        """The children that it would start."""
        output = self.fails(*options, status=0)
        assert output == ""
        return self.children

    def fails(self, *options: str, status: int = 1) -> str:
        self.children = []
        command = ["worker", "--models", str(self.models), "--redis-url", "redis://nowhere"]
        done = CliRunner().invoke(inferq, [*command, *options])
        assert done.exit_code == status, done.output
        return done.output


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Commanded:
    fake_model(tmp_path / "models", "m")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    commanded = _Commanded(tmp_path / "models")

    def supervisor(
        children: Sequence[Child], *_: object, allow_remote_shutdown: bool
    ) -> _Commanded:
        commanded.children = list(children)
        commanded.allow_remote_shutdown = allow_remote_shutdown
        return commanded

    monkeypatch.setattr("inferq.workers.supervision.supervisor.Supervisor", supervisor)
    monkeypatch.setattr(memory_for_each, "limits", list)
    return commanded


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Any:
    return fake_nvml(monkeypatch)


def _chosen(child: Child) -> dict[str, str]:
    names = ("CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES", "INFERQ_GPU", "INFERQ_DEVICE")
    return {name: child.environment[name] for name in names if name in child.environment}


def _gpu(index: int) -> dict[str, str]:
    return {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": UUIDS[index],
        "INFERQ_GPU": str(index),
    }


def test_all_gpus_are_a_child_each(worker: _Commanded, nvml: Any) -> None:
    children = worker("--gpu", "all")
    assert [child.node for child in children] == [f"gpu0@{HOST}", f"gpu1@{HOST}"]
    assert [_chosen(child) for child in children] == [_gpu(0), _gpu(1)]
    for child in children:
        assert child.node in child.command
        # As two stacks may have workers of one name, its Redis is in the name, too.
        assert re.fullmatch(rf"{child.node}-[0-9a-f]{{8}}\.json", child.heartbeat.name)
        assert child.environment["INFERQ_HEARTBEAT_FILE"] == str(child.heartbeat)


def test_memory_that_is_too_little_for_a_process_on_each_gpu_is_told_of(
    worker: _Commanded,
    nvml: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cgroup = Limit("the cgroup /", 3 << 30, 0)
    monkeypatch.setattr(memory_for_each, "limits", lambda: [cgroup])
    worker("--gpu", "0")
    worker("--cpu")
    assert "worker processes share" not in caplog.text
    worker("--gpu", "all")
    assert "2 worker processes share 3.2 GB of memory, the limit of the cgroup /" in caplog.text


def test_remote_shutdown_ends_it_only_where_that_is_allowed(worker: _Commanded) -> None:
    worker()
    assert not worker.allow_remote_shutdown
    worker("--allow-remote-shutdown")
    assert worker.allow_remote_shutdown


@pytest.mark.parametrize(("given", "indices"), [("1", [1]), ("1,0", [1, 0])])
def test_gpus_by_number(worker: _Commanded, nvml: Any, given: str, indices: list[int]) -> None:
    assert [_chosen(child) for child in worker("--gpu", given)] == [_gpu(i) for i in indices]


def test_names_of_the_users_own(worker: _Commanded, nvml: Any) -> None:
    children = worker("--gpu", "all", "-n", "video%i@%h")
    assert [child.node for child in children] == [f"video0@{HOST}", f"video1@{HOST}"]
    assert worker("--gpu", "1", "-n", "video@x")[0].node == "video@x"
    assert worker.fails("--gpu", "all", "-n", "video@%h") == (
        "Error: -n is 'video@%h'; expected %i in it, the GPU's number, "
        "since 2 GPUs are served by a worker process each\n"
    )


def test_several_children_share_no_heartbeat(
    worker: _Commanded, nvml: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFERQ_HEARTBEAT_FILE", str(tmp_path / "beat"))
    assert worker("--gpu", "0")[0].heartbeat == tmp_path / "beat"
    assert worker.fails("--gpu", "all") == (
        f"Error: INFERQ_HEARTBEAT_FILE is '{tmp_path}/beat'; expected it unset, "
        "since each of 2 workers has a file of its own\n"
    )


def test_without_a_choice_one_child_runs_as_its_models_say(worker: _Commanded) -> None:
    (child,) = worker()
    assert child.node == f"cpu{os.getpid()}@{HOST}"
    assert _chosen(child).keys() <= {"CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES"}


def test_children_send_task_events_unless_told_not_to(worker: _Commanded, nvml: Any) -> None:
    assert ["-E" in child.command for child in worker("--gpu", "all")] == [True, True]
    assert "-E" not in worker("--no-events")[0].command


def test_the_cpu_is_one_child(worker: _Commanded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (child,) = worker("--cpu")
    assert _chosen(child) == {"INFERQ_DEVICE": "cpu"}
    assert child.node == f"cpu{os.getpid()}@{HOST}"


def test_the_environment_chooses_too_and_the_command_line_wins(
    worker: _Commanded, nvml: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFERQ_GPU", "1")
    (child,) = worker()
    assert (child.node, _chosen(child)) == (f"gpu1@{HOST}", _gpu(1))
    assert _chosen(worker("--gpu", "0")[0]) == _gpu(0)
    assert _chosen(worker("--cpu")[0]) == {"INFERQ_DEVICE": "cpu"}
    monkeypatch.setenv("INFERQ_DEVICE", "cpu")
    assert worker.fails() == (
        "Error: INFERQ_DEVICE is 'cpu' and INFERQ_GPU is '1'; expected one of them\n"
    )
    assert _chosen(worker("--gpu", "0")[0]) == _gpu(0)
    monkeypatch.delenv("INFERQ_GPU")
    assert _chosen(worker()[0]) == {"INFERQ_DEVICE": "cpu"}


def test_both_are_refused(worker: _Commanded, nvml: Any) -> None:
    said = "Error: --cpu and --gpu are both given; expected one of them\n"
    assert worker.fails("--cpu", "--gpu", "0") == said


def test_a_gpu_that_is_not_there(worker: _Commanded, nvml: Any) -> None:
    assert worker.fails("--gpu", "0,2") == (
        "Error: gpu is 2; expected 0 to 1 on this host; `inferq worker --cpu` serves on the CPU\n"
    )


def test_a_url_that_is_none_is_one_line(worker: _Commanded) -> None:
    (line,) = worker.fails("--redis-url", "http://x").splitlines()
    assert line.startswith("Error: Redis URL 'http://x'; expected one of redis://")
    assert worker.children == []


def _served(child: Child) -> str:
    return child.command[list(child.command).index("-Q") + 1]


def test_every_folder_that_holds_a_model_has_its_queue_consumed(worker: _Commanded) -> None:
    (worker.models / "bad" / "1").mkdir(parents=True)
    (worker.models / "my model" / "1").mkdir(parents=True)
    write_others(worker.models)
    (child,) = worker()
    assert _served(child) == "inferq.bad,inferq.m"
    assert "INFERQ_STRICT" not in child.environment
    assert _served(worker("-Q", "inferq.x,inferq.y")[0]) == "inferq.x,inferq.y"


def test_strict_refuses_folders_that_hold_no_model_unless_models_are_named(
    worker: _Commanded, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert worker("--strict")[0].environment["INFERQ_STRICT"] == "1"
    (worker.models / "my model" / "1").mkdir(parents=True)
    write_others(worker.models)
    said = worker.fails("--strict")
    for name in ("my model", *OTHERS):
        assert name in said
    (child,) = worker("--strict", "-Q", "inferq.m")
    assert child.environment["INFERQ_STRICT"] == "1"
    monkeypatch.setenv("INFERQ_STRICT", "yes")
    assert worker.fails() == said
    monkeypatch.setenv("INFERQ_STRICT", "perhaps")
    assert "INFERQ_STRICT is 'perhaps'; expected " in worker.fails()


def test_a_repository_of_nothing_that_can_be_served_is_refused(
    worker: _Commanded, tmp_path: Path
) -> None:
    worker.models = tmp_path / "other"
    worker.models.mkdir()
    assert "expected <model>/<version>/" in worker.fails()
    (worker.models / "my model" / "1").mkdir(parents=True)
    assert worker.fails().startswith("Error: model name is 'my model'; expected letters")


def test_the_repository_is_still_required(tmp_path: Path) -> None:
    done = CliRunner().invoke(inferq, ["worker", "--redis-url", "redis://nowhere"])
    assert done.exit_code == 2
    assert "Missing option '--models'" in done.output


@pytest.mark.skipif(Path("/proc/driver/nvidia").exists(), reason="there is an NVIDIA driver here")
@pytest.mark.parametrize("options", [[], ["--models", "."]])
def test_without_a_driver_it_is_one_line(options: list[str], tmp_path: Path) -> None:
    """Nothing is a fake here."""
    command = [sys.executable, "-m", "inferq.workers.cli", "worker", "--gpu", "0", *options]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("Error: no GPU can be used: ")
    assert done.stderr.endswith("; `inferq worker --cpu` serves on the CPU\n")
    assert done.stderr.count("\n") == 1


def test_metrics_of_several_gpus_are_at_ports_in_a_row(
    worker: _Commanded, nvml: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(*options: str) -> list[str | None]:
        return [child.environment.get("INFERQ_METRICS") for child in worker(*options)]

    assert told("--gpu", "1,0", "--metrics", "[::]:9100") == ["[::]:9100", "[::]:9101"]
    assert told("--gpu", "0,1", "--metrics", "h:0") == ["h:0", "h:0"]
    assert told("--cpu") == [None]
    monkeypatch.setenv("INFERQ_METRICS", "127.0.0.1:65534")
    assert told("--gpu", "all") == ["127.0.0.1:65534", "127.0.0.1:65535"]
    assert worker.fails("--gpu", "all", "--metrics", "h:65535") == (
        "Error: --metrics is 'h:65535'; expected a port of at most 65534, since 2 workers have one "
        "each\n"
    )
    assert worker.fails("--metrics", "9100") == (
        "Error: setting 'metrics' is '9100'; expected HOST:PORT, PORT from 0 to 65535\n"
    )


def test_a_node_is_called_as_a_file_may_be(worker: _Commanded) -> None:
    """`inferq health` looks for its heartbeat in one folder."""
    for name in ("../../etc/x", "a/b@%h"):
        assert f"Error: -n is {name!r}; expected no /" in worker.fails("-n", name)


def test_several_processes_of_a_gpu_are_a_child_each(worker: _Commanded, nvml: Any) -> None:
    children = worker("--gpu", "all", "--processes", "2")
    assert [child.node.partition("@")[0] for child in children] == [
        "gpu0-1", "gpu0-2", "gpu1-1", "gpu1-2",
    ]  # fmt: skip
    assert [_chosen(child) for child in children] == [_gpu(0), _gpu(0), _gpu(1), _gpu(1)]
    assert {child.environment["INFERQ_PROCESSES"] for child in children} == {"2"}
    assert len({child.heartbeat for child in children}) == 4


def test_each_child_knows_how_many_share_the_host(
    worker: _Commanded, nvml: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFERQ_PROCESSES_ON_HOST", "9")
    for options, count in (
        (("--gpu", "all"), "2"),
        (("--gpu", "all", "--processes", "2"), "4"),
        (("--cpu", "--processes", "3"), "3"),
        (("--cpu",), None),
    ):
        children = worker(*options)
        assert {each.environment.get("INFERQ_PROCESSES_ON_HOST") for each in children} == {count}


def test_several_processes_of_the_cpu_are_a_child_each(worker: _Commanded) -> None:
    children = worker("--cpu", "--processes", "3")
    assert [child.node for child in children] == [f"cpu{os.getpid()}-{n}@{HOST}" for n in (1, 2, 3)]
    assert {child.environment["INFERQ_DEVICE"] for child in children} == {"cpu"}


def test_one_process_is_started_as_if_nothing_were_said(
    worker: _Commanded, nvml: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = worker("--gpu", "0")
    assert "INFERQ_PROCESSES" not in alone[0].environment
    assert worker("--gpu", "0", "--processes", "1") == alone
    monkeypatch.setenv("INFERQ_PROCESSES", "2")
    assert len(worker("--gpu", "0")) == 2
    assert worker("--gpu", "0", "--processes", "1") == alone, "the command line wins"


@pytest.mark.parametrize("given", ["0", "65", "-1", "2.5", "two", "", "١", "1" * 5000])
def test_a_number_of_processes_that_is_none_is_refused(worker: _Commanded, given: str) -> None:
    assert worker.fails("--processes", given) == (
        f"Error: --processes is {given!r}; expected a whole number from 1 to 64, of worker "
        "processes on each device: leave it out for one\n"
    )
    assert worker.children == []


@pytest.mark.parametrize("given", ["0", "65", "two"])
def test_the_environment_may_not_ask_for_such_a_number_either(
    worker: _Commanded, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setenv("INFERQ_PROCESSES", given)
    assert worker.fails().startswith(f"Error: INFERQ_PROCESSES is {given!r}; expected ")


def test_names_of_the_users_own_tell_processes_apart(worker: _Commanded, nvml: Any) -> None:
    children = worker("--gpu", "all", "--processes", "2", "-n", "v%i.%p@%h")
    assert [child.node.partition("@")[0] for child in children] == ["v0.1", "v0.2", "v1.1", "v1.2"]
    assert worker("--cpu", "-n", "w%p@x")[0].node == "w1@x"
    assert worker.fails("--cpu", "--processes", "2", "-n", "w@%h") == (
        "Error: -n is 'w@%h'; expected %p in it, the process's number, since 2 worker processes "
        "serve on each device\n"
    )
    assert "expected %i in it" in worker.fails("--gpu", "all", "--processes", "2", "-n", "w%p")


def test_metrics_of_several_processes_are_at_ports_in_a_row(worker: _Commanded, nvml: Any) -> None:
    children = worker("--gpu", "0,1", "--processes", "2", "--metrics", "h:9100")
    told = [child.environment["INFERQ_METRICS"] for child in children]
    assert told == ["h:9100", "h:9101", "h:9102", "h:9103"]
    assert "expected a port of at most 65532" in worker.fails(
        "--gpu", "0,1", "--processes", "2", "--metrics", "h:65533"
    )


def test_several_processes_share_no_heartbeat(
    worker: _Commanded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFERQ_HEARTBEAT_FILE", str(tmp_path / "beat"))
    assert "since each of 2 workers has a file of its own" in worker.fails("--processes", "2")


def test_whether_mps_runs_is_said_where_several_processes_share_a_gpu(
    worker: _Commanded,
    nvml: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(mps, "_PROC", tmp_path / "proc")
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    worker("--gpu", "0")
    assert caplog.messages == []
    worker("--gpu", "0", "--processes", "3")
    assert caplog.messages.pop() == (
        "3 worker processes share each GPU, and its memory; no MPS is noticed: their kernels take "
        "turns"
    )
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    worker("--gpu", "0", "--processes", "3")
    assert caplog.messages.pop().endswith(f"MPS is noticed (CUDA_MPS_PIPE_DIRECTORY is {tmp_path})")
    worker("--cpu", "--processes", "3")
    assert caplog.messages.pop() == "3 worker processes share this host's cores"


@pytest.mark.parametrize(
    "options",
    [["--statedb=/s/state"], ["--statedb", "/s/state"], ["-S", "/s/state"], ["-S/s/state"]],
    ids=" ".join,
)
def test_several_processes_keep_no_state_in_one_file(
    worker: _Commanded, options: list[str]
) -> None:
    assert options[0] in worker("--", *options)[0].command
    assert worker.fails("--processes", "2", "--", *options) == (
        "Error: --statedb is '/s/state'; expected %n in it, the node's name without its host, "
        "since 2 worker processes have a file each\n"
    )


def test_files_of_several_processes_are_called_after_their_nodes(
    worker: _Commanded, nvml: Any
) -> None:
    children = worker("--gpu", "all", "--", "--statedb=/s/%n.state", "--pidfile", "/s/%n.pid")
    assert [list(child.command[-3:]) for child in children] == [
        [f"--statedb=/s/gpu{n}.state", "--pidfile", f"/s/gpu{n}.pid"] for n in range(2)
    ]
    assert "--pidfile is '/s/x'; expected %n in it" in worker.fails(
        "--gpu", "all", "--", "--pidfile", "/s/x"
    )
