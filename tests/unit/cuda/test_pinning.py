"""A worker process sees its GPU and no other. NVML is a fake here, since there is no card."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers.gpus import NO_CARD, fake_nvml

from inferq.shared.errors import ConfigError
from inferq.shared.settings import Settings
from inferq.workers.cuda.gpus import gpu_at
from inferq.workers.cuda.pinning import CUDA_MODULES, environment_of, pin

UUID = "GPU-00000001-0000-0000-0000-000000000000"
VARIABLES = {
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    "CUDA_VISIBLE_DEVICES": UUID,
    "INFERQ_GPU": "1",
}


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    for name in CUDA_MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    return fake_nvml(monkeypatch)


def _settings(**given: Any) -> Settings:
    return Settings.load(redis_url="redis://nowhere", **given)


def test_it_sees_its_gpu_only(nvml: Any) -> None:
    assert environment_of(gpu_at(1)) == VARIABLES
    pin(_settings(gpu=1))
    assert {name: os.environ[name] for name in VARIABLES} == VARIABLES


def test_what_its_supervisor_has_set_is_left(nvml: Any) -> None:
    os.environ.update(VARIABLES)
    pin(_settings())
    assert {name: os.environ[name] for name in VARIABLES} == VARIABLES


def test_a_mig_device_stays(nvml: Any) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = "MIG-5"
    pin(_settings(gpu=1))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "MIG-5"


def test_a_divided_card_is_pinned_by_the_uuid_of_its_mig_device(
    nvml: Any, caplog: pytest.LogCaptureFixture
) -> None:
    nvml.divide(nvml.CARDS[1], "MIG-bb01", "MIG-bb02")
    caplog.set_level("INFO")
    for _ in range(2):  # its supervisor, and then it itself
        pin(_settings(gpu=1))
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "MIG-bb01"
    assert "pinned to GPU 1, No Card 1, MIG-bb01 of its 2 MIG devices; " in caplog.text


def test_another_gpu_there_is_refused(nvml: Any) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES is '0', which leaves out GPU 1"):
        pin(_settings(gpu=1))


@pytest.mark.parametrize("name", CUDA_MODULES)
def test_after_an_import_that_looks_for_devices_it_is_too_late(
    nvml: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    with pytest.raises(ConfigError) as caught:
        pin(_settings(gpu=1))
    assert caught.value.message == (
        f"INFERQ_GPU is 1, but {name} is imported already; expected CUDA_VISIBLE_DEVICES={UUID} "
        "in the environment, or no such import before the worker's"
    )
    os.environ.update(VARIABLES)
    pin(_settings(gpu=1))  # that import has seen the right one


def test_on_the_cpu_it_sees_none(nvml: Any) -> None:
    pin(_settings(device="cpu"))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    with pytest.raises(ConfigError, match="INFERQ_DEVICE is 'cpu' and INFERQ_GPU is 1"):
        pin(_settings(device="cpu", gpu=1))


def test_without_a_choice_nothing_changes(nvml: Any) -> None:
    before = dict(os.environ)
    pin(_settings())
    assert os.environ == before
    assert not nvml.ASKED


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("INFERQ_GPU", "-1", "INFERQ_GPU is '-1'; expected greater than or equal to 0"),
        ("INFERQ_GPU", "0,1", "INFERQ_GPU is '0,1'; expected a valid integer"),
        ("INFERQ_DEVICE", "tpu", "INFERQ_DEVICE is 'tpu'; expected 'auto' or 'cpu'"),
    ],
)
def test_a_bad_choice_names_itself(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"^{expected}"):
        _settings()


#: Pins itself while another thread runs, and prints the cores of each thread and of a new process.
_BOUND = """
import os, subprocess, sys, threading
from pathlib import Path
from inferq.shared.settings import Settings
from inferq.workers.cuda import gpus
from inferq.workers.cuda.pinning import pin
gpus.PCI_DEVICES = Path(sys.argv[1])
threading.Thread(target=threading.Event().wait, daemon=True).start()
pin(Settings.load(redis_url="redis://nowhere", gpu=0))
print([sorted(os.sched_getaffinity(int(thread))) for thread in os.listdir("/proc/self/task")])
code = "import os; print(sorted(os.sched_getaffinity(0)))"
print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip())
"""


@pytest.mark.parametrize("near", ["one", "none of ours"])
def test_its_threads_run_on_the_cores_near_it(tmp_path: Path, near: str) -> None:
    allowed = sorted(os.sched_getaffinity(0))
    text, expected = (str(allowed[0]), allowed[:1]) if near == "one" else ("4000-4001", allowed)
    (tmp_path / "0000:3b:00.0").mkdir()
    (tmp_path / "0000:3b:00.0" / "local_cpulist").write_text(f"{text}\n")
    path = os.pathsep.join([str(NO_CARD), *(entry for entry in sys.path if entry)])
    env = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run(
        [sys.executable, "-c", _BOUND, str(tmp_path)],
        env={**env, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    threads, child = (eval(line) for line in done.stdout.splitlines())
    assert len(threads) >= 2
    assert [*threads, child] == [expected] * (len(threads) + 1)
