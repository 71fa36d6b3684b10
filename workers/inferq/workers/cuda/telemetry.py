"""How the GPU is: load, memory, heat, clocks and errors, read through NVML.

A driver may take its time, or never answer again. So a thread of its own asks it, when somebody
wants to know, and nobody waits for it for long.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Final

from inferq.workers.cuda import mig
from inferq.workers.cuda.gpus import VISIBLE, gpu_at, open_nvml
from inferq.workers.process.periodic import Periodic

logger = logging.getLogger(__name__)

#: Seconds for which a reading is good.
FRESH_S: Final = 1.0
#: Seconds that the driver is waited for; once, and no more while it still owes that answer.
WAIT_S: Final = 0.5
#: Seconds for which a reading is better than none, while the driver does not answer.
KEPT_S: Final = 10.0
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
    """Reads one GPU. Safe from any thread; raises nothing once it is made. ConfigError: no GPU.

    The thread begins with this object, owns NVML from then on, and ends with `close`.
    """

    def __init__(self, index: int) -> None:
        self.gpu = gpu_at(index)
        self._nvml: Any = open_nvml()
        self._handle: Any = self._ask("nvmlDeviceGetHandleByIndex", index)
        # A MIG device tells its own memory, and the GPU all else.
        visible = os.environ.get(VISIBLE, "")
        whole = self._handle if self.gpu.mig else None
        part = None if whole is None else mig.handle_of(self._nvml, whole, visible)
        self._memory_of: Any = self._handle if part is None else part
        self._uuid = self.gpu.uuid if part is None else visible
        self._events: Any = self._register()
        self._xid: int | None = None
        self._reading = Reading()
        self._read_at = -math.inf
        self._changed = threading.Condition()
        self._closed = False
        #: When the reading that is under way was begun; readings that have ended.
        self._began: float | None = None
        self._ended = 0
        # A driver that hangs is no fault of the loop: `read` goes on without it.
        self.loop = Periodic(
            "gpu",
            self._turn,
            every_s=math.inf,
            first_s=math.inf,
            stall_s=math.inf,
            failing="the GPU is not read",
            logger=logger,
            ending=self._shut_down,
        )
        self.loop.start()

    def read(self) -> Reading:
        """At most `FRESH_S` seconds old, after at most `WAIT_S`; after `close` the last one.

        Where the driver does not answer in time, it is the last one for `KEPT_S` seconds, and then
        one that tells nothing but the last Xid.
        """
        with self._changed:
            now = time.monotonic()
            if self._closed or now - self._read_at < FRESH_S:
                return self._reading
            before, until = self._ended, (self._began or now) + WAIT_S
            if self._began is None:
                self.loop.wake()
            self._changed.wait_for(lambda: self._ended > before or self._closed, until - now)
            if self._closed or time.monotonic() - self._read_at < KEPT_S:
                return self._reading
            return Reading(last_xid=self._reading.last_xid)

    def info(self) -> dict[str, Any]:
        """Flat keys, for ``celery inspect stats`` and Flower's worker page."""
        reading = asdict(self.read())
        if reading["throttled_by"] is not None:
            reading["throttled_by"] = ", ".join(reading["throttled_by"])
        gpu = self.gpu
        known = {"index": gpu.index, "name": gpu.name, "uuid": self._uuid}
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
        """Idempotent. A driver that does not answer is left to itself."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.loop.stop(WAIT_S)

    def _turn(self) -> None:
        self._began = time.monotonic()
        try:
            reading = self._read(self._nvml)
            with self._changed:
                self._reading, self._read_at = reading, time.monotonic()
        finally:
            with self._changed:
                self._ended, self._began = self._ended + 1, None
                self._changed.notify_all()

    def _shut_down(self) -> None:
        with suppress(Exception):
            if self._events is not None:
                self._nvml.nvmlEventSetFree(self._events)
        with suppress(Exception):
            self._nvml.nvmlShutdown()

    def _read(self, nvml: Any) -> Reading:
        load = self._of("nvmlDeviceGetUtilizationRates")
        memory = self._ask("nvmlDeviceGetMemoryInfo", self._memory_of)
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
