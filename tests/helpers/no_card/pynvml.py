"""A fake of nvidia-ml-py, since there is no card: what inferq asks of it, answered from `CARDS`.

With this folder first in ``sys.path`` (PYTHONPATH for a worker process) it is what `import pynvml`
finds. FAKE_GPUS in the environment says how many cards there are at first: 2.
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace

NVML_TEMPERATURE_GPU = 0
NVML_CLOCK_SM = 1
NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 1
NVML_VOLATILE_ECC = 0
NVML_AGGREGATE_ECC = 1
NVML_DEVICE_MIG_ENABLE = 1
nvmlEventTypeXidCriticalError = 8  # noqa: N816
nvmlClocksEventReasonGpuIdle = 0x1  # noqa: N816
nvmlClocksEventReasonApplicationsClocksSetting = 0x2  # noqa: N816
nvmlClocksEventReasonSwPowerCap = 0x4  # noqa: N816
nvmlClocksEventReasonHwSlowdown = 0x8  # noqa: N816
nvmlClocksEventReasonSyncBoost = 0x10  # noqa: N816
nvmlClocksEventReasonSwThermalSlowdown = 0x20  # noqa: N816
nvmlClocksEventReasonHwThermalSlowdown = 0x40  # noqa: N816
nvmlClocksEventReasonHwPowerBrakeSlowdown = 0x80  # noqa: N816
nvmlClocksEventReasonDisplayClockSetting = 0x100  # noqa: N816


class NVMLError(Exception):
    """As nvidia-ml-py's."""


class NVMLError_LibraryNotFound(NVMLError):  # noqa: N801
    """No driver."""


class NVMLError_DriverNotLoaded(NVMLError):  # noqa: N801
    """No kernel module."""


class NVMLError_NotSupported(NVMLError):  # noqa: N801
    """The card does not tell."""


class NVMLError_NoPermission(NVMLError):  # noqa: N801
    """Not of this card, from this container."""


class NVMLError_NotFound(NVMLError):  # noqa: N801
    """No MIG device has that number."""


class NVMLError_Timeout(NVMLError):  # noqa: N801
    """No event has come."""


@dataclass
class Mig:
    """A MIG device: one part of a card. It tells its memory, and no load, heat or power."""

    uuid: str
    memory: int = 10 << 30


@dataclass
class Card:
    """What one fake card answers."""

    number: int
    #: Functions that it does not support.
    silent: set[str] = field(default_factory=set)
    #: Functions that this process has no permission for.
    forbidden: set[str] = field(default_factory=set)
    #: Its MIG devices by their numbers; None: it is not in MIG mode.
    mig: dict[int, Mig] | None = None
    events: deque[SimpleNamespace] = field(default_factory=deque)
    load: int = 40
    reasons: int = 0

    @property
    def uuid(self) -> str:
        return f"GPU-{self.number:08x}-0000-0000-0000-000000000000"


CARDS = [Card(n) for n in range(int(os.environ.get("FAKE_GPUS", "2")))]
#: What nvmlInit raises; None: nothing.
BROKEN: NVMLError | None = None
#: Names of the functions that were asked, in order.
ASKED: list[str] = []
#: nvmlInit less nvmlShutdown.
OPEN = 0


def divide(card: Card, *uuids: str) -> None:
    """Put `card` into MIG mode, as a container sees it that was given these MIG devices.

    What it answers then is from public reports: the load is not supported (nvitop, issue 5), the
    card's own memory is refused (nvidia-container-toolkit, issue 842).
    """
    card.mig = {1 + 2 * number: Mig(uuid) for number, uuid in enumerate(uuids)}
    card.silent.add("nvmlDeviceGetUtilizationRates")
    card.forbidden.add("nvmlDeviceGetMemoryInfo")


def _asked(function: str, card: Card | Mig | None = None) -> None:
    ASKED.append(function)
    if isinstance(card, Card) and function in card.silent:
        raise NVMLError_NotSupported("Not Supported")
    if isinstance(card, Card) and function in card.forbidden:
        raise NVMLError_NoPermission("Insufficient Permissions")


def _whole(function: str, card: Card | Mig) -> Card:
    _asked(function, card)
    if isinstance(card, Mig):
        raise NVMLError_NotSupported("Not Supported")
    return card


def nvmlInit() -> None:  # noqa: N802
    global OPEN  # noqa: PLW0603
    if BROKEN is not None:
        raise BROKEN
    OPEN += 1


def nvmlShutdown() -> None:  # noqa: N802
    global OPEN  # noqa: PLW0603
    OPEN -= 1


def nvmlDeviceGetCount() -> int:  # noqa: N802
    return len(CARDS)


def nvmlDeviceGetHandleByIndex(index: int) -> Card:  # noqa: N802
    _asked("nvmlDeviceGetHandleByIndex", CARDS[index])
    return CARDS[index]


def nvmlDeviceGetMigMode(card: Card) -> list[int]:  # noqa: N802
    _asked("nvmlDeviceGetMigMode", card)
    return [0, 0] if card.mig is None else [NVML_DEVICE_MIG_ENABLE, NVML_DEVICE_MIG_ENABLE]


def nvmlDeviceGetMaxMigDeviceCount(card: Card) -> int:  # noqa: N802
    _asked("nvmlDeviceGetMaxMigDeviceCount", card)
    return 0 if card.mig is None else 7


def nvmlDeviceGetMigDeviceHandleByIndex(card: Card, index: int) -> Mig:  # noqa: N802
    _asked("nvmlDeviceGetMigDeviceHandleByIndex", card)
    found = (card.mig or {}).get(index)
    if found is None:
        raise NVMLError_NotFound("Not Found")
    return found


def nvmlDeviceGetUUID(card: Card | Mig) -> str:  # noqa: N802
    return card.uuid


def nvmlDeviceGetName(card: Card) -> str:  # noqa: N802
    _asked("nvmlDeviceGetName", card)
    return f"No Card {card.number}"


def nvmlDeviceGetPciInfo(card: Card) -> SimpleNamespace:  # noqa: N802
    return SimpleNamespace(busId=f"00000000:{0x3B + card.number:02X}:00.0")


def nvmlDeviceGetCudaComputeCapability(_card: Card) -> tuple[int, int]:  # noqa: N802
    return 9, 0


def nvmlDeviceGetMemoryInfo(card: Card | Mig) -> SimpleNamespace:  # noqa: N802
    _asked("nvmlDeviceGetMemoryInfo", card)
    if isinstance(card, Mig):
        return SimpleNamespace(total=card.memory, used=1 << 30, free=card.memory - (1 << 30))
    return SimpleNamespace(total=80 << 30, used=3 << 30, free=77 << 30)


def nvmlDeviceGetUtilizationRates(card: Card | Mig) -> SimpleNamespace:  # noqa: N802
    card = _whole("nvmlDeviceGetUtilizationRates", card)
    return SimpleNamespace(gpu=card.load, memory=1)


def nvmlDeviceGetTemperature(card: Card | Mig, _sensor: int) -> int:  # noqa: N802
    card = _whole("nvmlDeviceGetTemperature", card)
    return 61


def nvmlDeviceGetPowerUsage(card: Card | Mig) -> int:  # noqa: N802
    card = _whole("nvmlDeviceGetPowerUsage", card)
    return 312_500


def nvmlDeviceGetClockInfo(card: Card | Mig, _clock: int) -> int:  # noqa: N802
    card = _whole("nvmlDeviceGetClockInfo", card)
    return 1980


def nvmlDeviceGetCurrentClocksEventReasons(card: Card | Mig) -> int:  # noqa: N802
    card = _whole("nvmlDeviceGetCurrentClocksEventReasons", card)
    return card.reasons


def nvmlDeviceGetCurrentClocksThrottleReasons(card: Card | Mig) -> int:  # noqa: N802
    card = _whole("nvmlDeviceGetCurrentClocksThrottleReasons", card)
    return card.reasons


def nvmlDeviceGetTotalEccErrors(card: Card | Mig, _kind: int, counter: int) -> int:  # noqa: N802
    card = _whole("nvmlDeviceGetTotalEccErrors", card)
    return 2 if counter == NVML_AGGREGATE_ECC else 0


def nvmlEventSetCreate() -> list[Card]:  # noqa: N802
    return []


def nvmlDeviceRegisterEvents(card: Card, _kinds: int, events: list[Card]) -> None:  # noqa: N802
    _asked("nvmlDeviceRegisterEvents", card)
    events.append(card)


def nvmlEventSetWait_v2(events: list[Card], timeout_ms: int) -> SimpleNamespace:  # noqa: N802
    assert timeout_ms == 0, "it must not wait"
    for card in events:
        if card.events:
            return card.events.popleft()
    raise NVMLError_Timeout("Timeout")


def nvmlEventSetFree(events: list[Card]) -> None:  # noqa: N802
    events.clear()
