"""The threads that do the schedule's faults to Redis and to the network; crew does the workers'."""

from __future__ import annotations

import threading
import time

import redis

from chaos.burst import Beside
from chaos.clock import Clock
from chaos.crew import Worker, held_by
from chaos.proxy import Proxy
from chaos.record import Hit, Record
from chaos.schedule import ON_TAIL, WORKERS, Fault, Kind
from chaos.store import Store

#: Seconds until who is in a black hole gives up waiting for a reply.
NOTICED_S = 5.0


class OnRedis(threading.Thread):
    """Starts Redis and does its restarts. Redis ends with the thread that started it."""

    def __init__(
        self, store: Store, beside: Beside, faults: list[Fault], clock: Clock, record: Record
    ) -> None:
        super().__init__(name="chaos-redis", daemon=True)
        self._store, self._faults, self._clock, self._record = store, faults, clock, record
        self._beside = beside
        #: Stands before the workers, once they are there.
        self.proxy: Proxy | None = None
        self.pending = len(faults)
        self.started = threading.Event()
        #: Whether Redis can be had back.
        self.well = True
        self.over = threading.Event()

    def run(self) -> None:
        try:
            self._store.start()
            self.started.set()
            for fault in self._faults:
                if not self._clock.wait(fault.at_s, self.over):
                    break
                far = fault.kind is Kind.FAR_BACK
                mark = self._beside.burst(self.over) if far else None
                if self.proxy is not None and fault.kind in (Kind.CUT_AGAIN, Kind.FAR_BACK):
                    self.proxy.cut_catching_up([f"w{n}" for n in range(WORKERS)])
                self._store.restart(
                    fault.length_s, cut_tail=fault.kind in ON_TAIL, fsync=fault.fsync, mark=mark
                )
                self._record.done.append((time.monotonic(), fault))
                self.pending -= 1
        except Exception as problem:  # noqa: BLE001  the run must hear of it
            self.well = False
            self._record.troubles.append(f"Redis: {problem!r}")
        self.over.wait()


class OnNetwork(threading.Thread):
    """Cuts, delays and swallows."""

    def __init__(
        self,
        proxy: Proxy,
        crew: list[Worker],
        store: Store,
        faults: list[Fault],
        clock: Clock,
        record: Record,
    ) -> None:
        super().__init__(name="chaos-network", daemon=True)
        self._proxy, self._crew, self._store = proxy, crew, store
        self._faults, self._clock, self._record = faults, clock, record
        self._undone = set(range(len(faults)))
        self.over = threading.Event()

    @property
    def pending(self) -> int:
        return len(self._undone)

    def run(self) -> None:
        for n, fault in enumerate(self._faults):
            if not self._clock.wait(fault.at_s, self.over):
                return
            # Those that last may overlap.
            threading.Thread(target=self._do, args=(n, fault), daemon=True).start()

    def _do(self, n: int, fault: Fault) -> None:
        try:
            self._hit(fault)
            match fault.kind:
                case Kind.CUT:
                    self._proxy.cut(fault.targets)
                case Kind.DELAY:
                    self._proxy.delay(fault.targets, fault.delay_s)
                    self.over.wait(fault.length_s)
                    self._proxy.delay(fault.targets, 0.0)
                    self._hit(fault)
                case _:
                    at = time.monotonic()
                    for target in (worker.place for worker in self._crew):
                        if target not in fault.targets:
                            continue
                        self._record.away += [(at, target), (at + NOTICED_S, target)]
                        self._record.up.append((at + NOTICED_S + 1.0, target))
                    thaw = self._proxy.swallow(fault.targets)
                    if not fault.for_good:
                        self.over.wait(fault.length_s)
                        thaw()
        except Exception as problem:  # noqa: BLE001  the run must hear of it
            self._record.troubles.append(f"{fault.kind}: {problem!r}")
        self._record.done.append((time.monotonic(), fault))
        self._undone.discard(n)

    def _hit(self, fault: Fault) -> None:
        """Note whose recovery it delays: it is timed from here on, if a worker's death is."""
        at = time.monotonic()
        for worker in self._crew:
            if worker.place in fault.targets:
                try:
                    with self._store.client() as client:
                        ids = held_by(client, worker.prefix)
                except (redis.RedisError, RuntimeError):  # then Redis' return counts for them
                    continue
                self._record.hits.append(Hit(at, fault.kind, worker.place, ids))
        for target in fault.targets:
            if target.startswith("p"):
                self._record.deaf.append((at, int(target[1:])))
