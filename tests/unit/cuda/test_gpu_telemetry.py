"""What a worker tells of its GPU. NVML is a fake here, since there is no card."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.gpus import fake_nvml
from helpers.wait import until

from inferq.shared.errors import ConfigError
from inferq.workers.cuda import telemetry
from inferq.workers.cuda.telemetry import GpuTelemetry, Reading


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(telemetry, "FRESH_S", 0.0)
    monkeypatch.setattr(telemetry, "WAIT_S", 60.0)  # however busy the machine is
    return fake_nvml(monkeypatch)


def _xid(nvml: Any, number: int) -> None:
    event = SimpleNamespace(eventType=nvml.nvmlEventTypeXidCriticalError, eventData=number)
    nvml.CARDS[0].events.append(event)


def test_all_that_a_card_tells(nvml: Any) -> None:
    nvml.CARDS[0].reasons = (
        nvml.nvmlClocksEventReasonGpuIdle
        | nvml.nvmlClocksEventReasonSwPowerCap
        | nvml.nvmlClocksEventReasonHwThermalSlowdown
    )
    assert GpuTelemetry(0).read() == Reading(
        utilisation_percent=40,
        memory_used_bytes=3 << 30,
        memory_total_bytes=80 << 30,
        temperature_c=61,
        power_w=312.5,
        sm_clock_mhz=1980,
        throttled_by=("power_cap", "hw_thermal_slowdown"),
        ecc_uncorrected=0,
        ecc_uncorrected_lifetime=2,
        last_xid=None,
    )


@pytest.mark.parametrize(
    ("function", "unknown"),
    [
        ("nvmlDeviceGetUtilizationRates", {"utilisation_percent"}),
        ("nvmlDeviceGetTemperature", {"temperature_c"}),
        ("nvmlDeviceGetPowerUsage", {"power_w"}),
        ("nvmlDeviceGetClockInfo", {"sm_clock_mhz"}),
        ("nvmlDeviceGetTotalEccErrors", {"ecc_uncorrected", "ecc_uncorrected_lifetime"}),
        ("nvmlDeviceRegisterEvents", set()),
    ],
)
def test_what_the_card_does_not_tell_is_none_and_all_else_is_there(
    nvml: Any, function: str, unknown: set[str]
) -> None:
    nvml.CARDS[0].silent.add(function)
    reading = GpuTelemetry(0).read()
    missing = {f.name for f in fields(reading) if getattr(reading, f.name) is None}
    assert missing == unknown | {"last_xid"}


def test_a_card_that_is_lost_later_raises_nothing(
    nvml: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = GpuTelemetry(0)
    for name in [name for name in dir(nvml) if name.startswith("nvmlDeviceGet")]:
        monkeypatch.delattr(nvml, name)  # as far as to functions that the driver does not have
    assert gpu.read() == Reading()
    gpu.close()


def test_an_older_driver_tells_what_throttles_under_the_older_name(nvml: Any) -> None:
    nvml.CARDS[0].silent.add("nvmlDeviceGetCurrentClocksEventReasons")
    assert GpuTelemetry(0).read().throttled_by == ()
    nvml.CARDS[0].silent.add("nvmlDeviceGetCurrentClocksThrottleReasons")
    assert GpuTelemetry(0).read().throttled_by is None


def test_the_last_xid_stays(nvml: Any) -> None:
    gpu = GpuTelemetry(0)
    assert gpu.read().last_xid is None
    _xid(nvml, 13)
    _xid(nvml, 79)
    assert [gpu.read().last_xid, gpu.read().last_xid] == [79, 79]


def test_a_reading_is_good_for_a_while(nvml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "FRESH_S", 60.0)
    gpu = GpuTelemetry(0)
    first = gpu.read()
    asked = len(nvml.ASKED)
    nvml.CARDS[0].load = 90
    assert gpu.read() is first
    assert len(nvml.ASKED) == asked
    monkeypatch.setattr(telemetry, "FRESH_S", 0.0)
    assert gpu.read().utilisation_percent == 90


def test_the_info_is_flat(nvml: Any) -> None:
    nvml.CARDS[1].reasons = nvml.nvmlClocksEventReasonSwPowerCap
    nvml.CARDS[1].silent.add("nvmlDeviceGetPowerUsage")
    info = GpuTelemetry(1).info()
    assert info["inferq_gpu_index"] == 1
    assert info["inferq_gpu_name"] == "No Card 1"
    assert info["inferq_gpu_uuid"] == nvml.CARDS[1].uuid
    assert info["inferq_gpu_throttled_by"] == "power_cap"
    assert info["inferq_gpu_power_w"] is None
    assert set(info) == {f"inferq_gpu_{f.name}" for f in fields(Reading)} | {
        "inferq_gpu_index",
        "inferq_gpu_name",
        "inferq_gpu_uuid",
    }
    assert {type(value) for value in info.values()} <= {int, float, str, type(None)}


def test_closed_it_keeps_the_last_reading_and_leaves_nothing_open(nvml: Any) -> None:
    gpu = GpuTelemetry(0)
    last = gpu.read()
    gpu.close()
    gpu.close()
    assert nvml.OPEN == 0
    assert gpu.read() == last


@pytest.fixture
def hung(nvml: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The driver answers nothing before this is set."""
    answers = threading.Event()
    rates = nvml.nvmlDeviceGetUtilizationRates

    def hang(handle: object) -> object:
        assert answers.wait(60)
        return rates(handle)

    monkeypatch.setattr(telemetry, "WAIT_S", 0.05)
    monkeypatch.setattr(nvml, "nvmlDeviceGetUtilizationRates", hang)
    yield answers
    answers.set()


def test_a_driver_that_does_not_answer_is_not_waited_for(
    nvml: Any, hung: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = GpuTelemetry(0)
    began = time.monotonic()
    assert gpu.read() == Reading(), "nothing was ever told"
    monkeypatch.setattr(telemetry, "WAIT_S", 0.0)
    for _ in range(100):
        assert gpu.info()["inferq_gpu_utilisation_percent"] is None
    assert time.monotonic() - began < 20, "of the 60 s that the driver takes"
    hung.set()
    until(lambda: gpu.read().utilisation_percent == 40, what="it answers again")
    gpu.close()


def test_the_last_reading_is_kept_for_a_while_and_its_xid_for_good(
    nvml: Any, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    gpu = GpuTelemetry(0)
    _xid(nvml, 79)
    last = gpu.read()
    request.getfixturevalue("hung")
    assert gpu.read() == last
    monkeypatch.setattr(telemetry, "KEPT_S", 0.0)
    assert gpu.read() == Reading(last_xid=79)


def test_it_closes_though_the_driver_hangs(nvml: Any, hung: threading.Event) -> None:
    gpu = GpuTelemetry(0)
    gpu.read()
    gpu.close()
    assert nvml.OPEN == 1
    assert gpu.read() == Reading()
    hung.set()
    until(lambda: nvml.OPEN == 0, what="the thread gives NVML back as soon as it can")


def test_of_a_divided_card_it_tells_the_memory_of_its_own_device(
    nvml: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml.divide(nvml.CARDS[0], "MIG-aa01", "MIG-aa02")
    nvml.CARDS[0].mig[3].memory = 20 << 30
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-aa02")
    gpu = GpuTelemetry(0)
    reading = gpu.read()
    assert (reading.memory_used_bytes, reading.memory_total_bytes) == (1 << 30, 20 << 30)
    assert reading.utilisation_percent is None
    assert reading.temperature_c == 61
    assert gpu.info()["inferq_gpu_uuid"] == "MIG-aa02"


def test_there_is_none_without_its_gpu(nvml: Any) -> None:
    with pytest.raises(ConfigError, match="gpu is 2; expected 0 to 1 on this host"):
        GpuTelemetry(2)
    assert nvml.OPEN == 0
