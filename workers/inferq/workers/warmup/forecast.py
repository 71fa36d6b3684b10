"""Estimates how much memory a larger batch takes, from smaller ones, and whether it is there.

Sizes are elements of the inputs, so that rows of different lengths compare. The memory of a process
is extrapolated by a line through what it took so far, and at least in proportion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from inferq.workers.process import shares
from inferq.workers.warmup.limits import Gauge, Limit, Usage, forget_peak, limits, usage

#: In service a model takes so many times the memory that warm-up saw: batches of changing sizes
#: leave gaps in an engine's memory (ONNX Runtime's arena: measured 1.2 to 1.3).
IN_SERVICE: Final = 1.3
#: A size that is tried long before the ones in between may take so many times what is expected.
UNSEEN: Final = 2.0
#: Share of a limit that is left to everything else: requests, results, other processes.
RESERVE: Final = 0.05

_GAUGES: Final[tuple[Gauge, ...]] = ("resident", "mapped")


@dataclass(frozen=True)
class Short:
    """Why a batch does not fit: the memory it would take in addition, and what is left."""

    needed: int
    limit: Limit

    def __str__(self) -> str:
        mb = 1_000_000
        return (
            f"about {max(0, self.needed) / mb:.0f} MB more, and {self.limit.left / mb:.0f} of "
            f"{self.limit.limit / mb:.0f} MB of {self.limit.name} are left"
        )


def _shared(limit: Limit, now: Usage) -> Limit:
    """`limit` as it is for this process, where others have their parts of the host's memory."""
    count = shares.processes_on_host()
    if count == 1 or limit.gauge == "mapped":  # which is counted for each by itself
        return limit
    part = shares.host_share(limit.limit)
    left = min(limit.left, part - now.now(limit.gauge))
    return Limit(f"{limit.name}, shared by {count} processes", part, part - left)


class Forecast:
    """The forecast of one model, from `start` on.

    If the kernel gives no figures, everything fits.
    """

    def __init__(
        self,
        read: Callable[[], Usage] = usage,
        left: Callable[[], Sequence[Limit]] = limits,
        forget: Callable[[], None] = forget_peak,
    ) -> None:
        self._read = read
        self._left = left
        self._forget = forget
        self._base: Usage | None = None
        #: Elements that have run at once → the most memory taken beyond the base, by gauge.
        self._grown: dict[int, dict[Gauge, int]] = {}

    def start(self) -> None:
        """Take the memory in use now as the base, which batches do not use."""
        self._forget()
        try:
            self._base = self._read()
        except (OSError, KeyError, ValueError):
            self._base = None

    def ran(self, elements: int) -> None:
        """Note that batches of so many elements in all have just run."""
        if self._base is None:
            return
        now = self._read()
        before = self._grown.get(elements, dict.fromkeys(_GAUGES, 0))
        self._grown[elements] = {
            # The peak of mapped memory cannot be reset: what was mapped before counts as base.
            gauge: max(before[gauge], now.peak(gauge) - self._base.peak(gauge))
            for gauge in _GAUGES
        }
        self._forget()

    def growth(self, elements: int, gauge: Gauge) -> float:
        """Bytes beyond the base that so many elements will take."""
        known = [size for size in self._grown if size <= elements]
        if not known:
            return 0.0
        last = max(known)
        taken = max(self._grown[size][gauge] for size in known)
        per_element = taken / last
        smaller = [size for size in known if size < last]
        if smaller:
            below = max(smaller)
            rise = self._grown[last][gauge] - self._grown[below][gauge]
            per_element = max(per_element, rise / (last - below))
        return taken + per_element * (elements - last)

    def short(self, elements: int, factor: float = IN_SERVICE) -> Short | None:
        """Why batches of so many elements in all do not fit; None if they do.

        `factor`: how much more than expected they may take.
        """
        if self._base is None or not self._grown:
            return None
        now = self._read()
        worst: Short | None = None
        for limit in (_shared(each, now) for each in self._left()):
            taken = now.now(limit.gauge) - self._base.now(limit.gauge)
            needed = int(factor * self.growth(elements, limit.gauge) - taken)
            over = needed + RESERVE * limit.limit - limit.left
            if over > 0 and (worst is None or limit.left < worst.limit.left):
                worst = Short(needed, limit)
        return worst
