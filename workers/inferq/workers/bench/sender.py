"""One process' part of a step: sends what is due, in blocks, until it is told to stop."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import cycle
from typing import Final

from inferq.producer.dialogue import Dialogue, look_up, push
from inferq.producer.outgoing import PUSH_BLOCK
from inferq.producer.pending import Pending
from inferq.producer.session import Session
from inferq.producer.window import BLOCK_BYTES
from inferq.shared.errors import InferqError, QueueFull, ResultTimeout
from inferq.shared.schema import nbytes
from inferq.shared.settings import Settings
from inferq.workers.bench.loads import due_times
from inferq.workers.bench.messages import Done, Setup, Step, Window, unpacked
from inferq.workers.bench.recorder import WARM_UP, Recorder, Shot
from inferq.workers.bench.sources import ClosedLoop, OpenLoop, Source

#: Seconds without a push after which Redis is checked.
ASK_S: Final = 1.0
#: Seconds that a schedule which is behind may take to send requests of a past window.
CATCH_UP_S: Final = 1.0
#: Seconds that cancelling unanswered requests may take.
TAKE_BACK_S: Final = 2.0


class Brake:
    """How another thread ends a step."""

    def __init__(self) -> None:
        #: Wakes the sending thread.
        self.wake = threading.Event()
        #: When (monotonic seconds) waiting for answers ends; None: go on sending.
        self.drain_until: float | None = None

    def stop(self, drain_s: float) -> None:
        """Send no more; wait `drain_s` seconds for answers."""
        self.drain_until = time.monotonic() + drain_s
        self.wake.set()


class Sender:
    """Keeps one client over all steps."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.session = Session(Settings.load(redis_url=setup.redis_url))
        items = unpacked(setup.items)
        offset = setup.share % len(items)
        self.items = cycle(items[offset:] + items[:offset])
        self.most = PUSH_BLOCK
        size = nbytes(items[0])
        if size:
            self.most = max(1, min(PUSH_BLOCK, BLOCK_BYTES // size))
        self.talked_at = 0.0

    def close(self) -> None:
        """Leave nothing open."""
        self.session.close()

    def run(self, step: Step, brake: Brake, report: Callable[[Window], None]) -> Done:
        """Send until `brake` says to stop, or a trace ends; then wait for answers.

        `report` gets what ended in each window soon after the window. RedisUnavailable if Redis is
        gone.
        """
        return _Run(self, step, brake, report).run()

    def ask(self) -> None:
        """Check Redis and the model. RedisUnavailable, ModelNotFound, ConfigError."""
        core = self.session.core
        core.admission.expire(self.setup.model)
        self.session.carry(look_up(core, self.setup.model))
        self.talked_at = time.monotonic()


class _Run:
    """One call of `Sender.run`."""

    def __init__(
        self, sender: Sender, step: Step, brake: Brake, report: Callable[[Window], None]
    ) -> None:
        self._sender = sender
        self._session = sender.session
        self._setup = sender.setup
        self._step = step
        self._brake = brake
        self._report = report
        self._recorder = Recorder(
            step.begins_at + step.warmup_s,
            step.window_s,
            one_window=step.load.kind == "trace",
            freed=self._freed,
        )
        self._source = self._new_source()
        self._window = WARM_UP
        self._cpu_s = time.process_time()

    def _new_source(self) -> Source:
        step, setup, recorder = self._step, self._setup, self._recorder
        if step.load.kind == "concurrency":
            users = int(step.load.value)
            mine = users // setup.shares + (setup.share < users % setup.shares)
            return ClosedLoop(mine, step.begins_at)
        seed = (step.seed, step.number)
        times = due_times(step.load, setup.share, setup.shares, seed)
        return OpenLoop(
            (step.begins_at + time for time in times),
            lambda: step.max_in_flight - recorder.in_flight,
            recorder.not_sent,
        )

    def _freed(self, at: float, refused: bool) -> None:
        self._source.freed(at, refused)
        if self._source.closed or (self._brake.drain_until and not self._recorder.in_flight):
            self._brake.wake.set()

    def run(self) -> Done:
        """See `Sender.run`."""
        wake = self._brake.wake
        while self._brake.drain_until is None:
            wake.clear()
            now = self._tell_windows()
            due = self._source.take(now, self._sender.most)
            if due:
                self._carry(self._hand_over(due))
                continue
            next_due = self._source.next_due()
            if next_due == math.inf and not self._source.closed:  # a trace is at its end
                self._brake.stop(self._step.drain_s)
                break
            until = min(next_due, self._recorder.end_of(self._window), now + ASK_S)
            if until > now and self._brake.drain_until is None:
                wake.wait(until - now)
            if time.monotonic() - self._sender.talked_at > ASK_S:
                self._sender.ask()
        self._source.give_up(time.monotonic())
        self._drain()
        return Done(self._recorder.tallies(), self._recorder.last_at)

    def _tell_windows(self) -> float:
        """Report the windows that are over. Returns the time now."""
        now = time.monotonic()
        while self._is_over(self._recorder.end_of(self._window), now):
            ended = self._recorder.take(self._window)
            cpu_s = time.process_time()
            ended.cpu_s, self._cpu_s = cpu_s - self._cpu_s, cpu_s
            self._report(Window(self._window, ended))
            self._window += 1
        return now

    def _is_over(self, end: float, now: float) -> bool:
        behind = not self._source.closed and self._source.next_due() < end
        return now >= end + (CATCH_UP_S if behind else 0.0)

    def _carry(self, dialogue: Dialogue[bool]) -> None:
        if self._session.carry(dialogue):
            self._sender.talked_at = time.monotonic()
        else:  # Redis refused, or is gone: which of the two?
            self._sender.ask()

    def _hand_over(self, dues: Sequence[float]) -> Dialogue[bool]:
        """Push a request for each of `dues`. False if Redis did not take all of them."""
        core, setup, recorder = self._session.core, self._setup, self._recorder
        view = yield from look_up(core, setup.model)
        ready: list[Shot] = []
        for due in dues:
            try:
                pending = core.build(
                    view,
                    next(self._sender.items),
                    setup.priority,
                    setup.timeout_ms,
                    self._session.make,
                )
            except QueueFull:
                recorder.refused(due)
                self._source.freed(time.monotonic(), True)
            else:
                shot = Shot(recorder, pending, due)
                pending.watcher = shot
                ready.append(shot)
        if not ready:
            return True
        recorder.sending(ready)
        return not (yield from push(core, [shot.pending for shot in ready], view))

    def _drain(self) -> None:
        recorder, brake = self._recorder, self._brake
        while recorder.in_flight:
            brake.wake.clear()
            left = (brake.drain_until or 0.0) - time.monotonic()
            if left <= 0:
                break
            if recorder.in_flight:
                brake.wake.wait(min(ASK_S, left))
            if time.monotonic() - self._sender.talked_at > ASK_S:
                self._sender.ask()
        self._give_back(recorder.abandon_all())

    def _give_back(self, left: Sequence[Pending]) -> None:
        """Cancel what was not answered, so that no worker computes it in vain."""
        until = time.monotonic() + TAKE_BACK_S
        for pending in left:
            if time.monotonic() < until:
                with suppress(InferqError):
                    pending.cancel()
            overdue = ResultTimeout(f"request {pending.request_id}: no answer in time")
            self._session.core.drop(pending, overdue)
