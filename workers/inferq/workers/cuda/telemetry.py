"""How the GPU is: load, memory, heat, clocks and errors, read through NVML."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Final

from inferq.workers.cuda.gpus import gpu_at, open_nvml

#: Seconds for which a reading is good.
FRESH_S: Final = 1.0
#: Most Xid events taken in one reading.
MAX_EVENTS: Final = 64
#: NVML's names of what holds the clocks down, and ours. An idle GPU is none of it.
_THROTTLING: Final = {
    "nvmlClocksEventReasonApplicationsClocksSetting": "clocks_setting",
    "nvmlClocksEventReasonDisplayClockSetting": "display_clock_setting",
    "nvmlClocksEventReasonSwPowerCap": "power_cap",
    "nvmlClocksEventReasonSyncBoost": "sync_boost",
    "nvmlClocksEventReasonSwThermalSlowdown": "thermal_slowdown",
    "nvmlClocksEventReasonHwSlowdown": "hw_slowdown",
    "nvmlClocksEventReasonHwThermalSlowdown": "hw_thermal_slowdown",
    "nvmlClocksEventReasonHwPowerBrakeSlowdown": "hw_power_brake",
}


@dataclass(frozen=True)
class Reading:
    """None: the card does not tell."""

    #: Percent of the last moments in which a kernel ran.
    utilisation_percent: int | None = None
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    temperature_c: int | None = None
    power_w: float | None = None
    sm_clock_mhz: int | None = None
    #: What holds the clocks down; empty: nothing.
    throttled_by: tuple[str, ...] | None = None
    #: Uncorrected memory errors since the driver was loaded, and in the card's life.
    ecc_uncorrected: int | None = None
    ecc_uncorrected_lifetime: int | None = None
    #: NVIDIA's number of the last critical error since this was made; None: there was none either.
    last_xid: int | None = None


class GpuTelemetry:
    """Reads one GPU. Safe from any thread; raises nothing once it is made. ConfigError: no GPU."""

    def __init__(self, index: int) -> None:
        self.gpu = gpu_at(index)
        self._lock = threading.Lock()
        self._nvml: Any = open_nvml()
        self._handle: Any = self._ask("nvmlDeviceGetHandleByIndex", index)
        self._events: Any = self._register()
        self._xid: int | None = None
        self._reading = Reading()
        self._read_at = -FRESH_S

    def read(self) -> Reading:
        """At most `FRESH_S` seconds old; after `close` the last one."""
        with self._lock:
            now = time.monotonic()
            if self._nvml is not None and now - self._read_at >= FRESH_S:
                self._reading, self._read_at = self._read(self._nvml), now
            return self._reading

    def info(self) -> dict[str, Any]:
        """Flat keys, for ``celery inspect stats`` and Flower's worker page."""
        reading = asdict(self.read())
        if reading["throttled_by"] is not None:
            reading["throttled_by"] = ", ".join(reading["throttled_by"])
        gpu = self.gpu
        known = {"index": gpu.index, "name": gpu.name, "uuid": gpu.uuid}
        return {f"inferq_gpu_{key}": value for key, value in {**known, **reading}.items()}

    def numbers(self) -> dict[str, float]:
        """What of `read` is a number and is told, and the GPU's index.

        `throttled` is 1 or 0, and `last_xid` 0 where there was none.
        """
        reading = self.read()
        told = {**asdict(reading), "index": self.gpu.index, "last_xid": reading.last_xid or 0}
        if reading.throttled_by is not None:
            told["throttled"] = int(bool(reading.throttled_by))
        return {key: n for key, n in told.items() if isinstance(n, int | float)}

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            nvml, self._nvml = self._nvml, None
            if nvml is None:
                return
            with suppress(Exception):
                if self._events is not None:
                    nvml.nvmlEventSetFree(self._events)
            with suppress(Exception):
                nvml.nvmlShutdown()

    def _read(self, nvml: Any) -> Reading:
        load = self._of("nvmlDeviceGetUtilizationRates")
        memory = self._of("nvmlDeviceGetMemoryInfo")
        milliwatts = self._of("nvmlDeviceGetPowerUsage")
        uncorrected = "nvmlDeviceGetTotalEccErrors", nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED
        return Reading(
            utilisation_percent=None if load is None else int(load.gpu),
            memory_used_bytes=None if memory is None else int(memory.used),
            memory_total_bytes=None if memory is None else int(memory.total),
            temperature_c=self._of("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
            power_w=None if milliwatts is None else milliwatts / 1000,
            sm_clock_mhz=self._of("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
            throttled_by=self._throttled_by(nvml),
            ecc_uncorrected=self._of(*uncorrected, nvml.NVML_VOLATILE_ECC),
            ecc_uncorrected_lifetime=self._of(*uncorrected, nvml.NVML_AGGREGATE_ECC),
            last_xid=self._last_xid(nvml),
        )

    def _throttled_by(self, nvml: Any) -> tuple[str, ...] | None:
        reasons = self._of("nvmlDeviceGetCurrentClocksEventReasons")
        if reasons is None:  # drivers before 535
            reasons = self._of("nvmlDeviceGetCurrentClocksThrottleReasons")
        if reasons is None:
            return None
        return tuple(name for bit, name in _THROTTLING.items() if reasons & getattr(nvml, bit, 0))

    def _register(self) -> Any:
        """A set of events that gets this GPU's Xids; None where the driver allows none."""
        events = self._ask("nvmlEventSetCreate")
        if events is None:
            return None
        try:
            self._nvml.nvmlDeviceRegisterEvents(
                self._handle, self._nvml.nvmlEventTypeXidCriticalError, events
            )
        except Exception:  # noqa: BLE001
            self._ask("nvmlEventSetFree", events)
            return None
        return events

    def _last_xid(self, nvml: Any) -> int | None:
        if self._events is not None:
            for _ in range(MAX_EVENTS):
                # 0 ms: what has come, or the error that nothing has.
                event = self._ask("nvmlEventSetWait_v2", self._events, 0)
                if event is None:
                    break
                if event.eventType == nvml.nvmlEventTypeXidCriticalError:
                    self._xid = int(event.eventData)
        return self._xid

    def _of(self, function: str, *given: Any) -> Any:
        return self._ask(function, self._handle, *given)

    def _ask(self, function: str, *given: Any) -> Any:
        """What NVML answers; None for an error, whichever: the card, the driver or its age."""
        try:
            return getattr(self._nvml, function)(*given)
        except Exception:  # noqa: BLE001
            return None
