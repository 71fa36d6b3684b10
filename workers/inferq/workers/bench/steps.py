"""Runs one step: warm-up, windows until they are stable, then waits for the last answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from inferq.workers.bench import figures
from inferq.workers.bench.crew import Crew
from inferq.workers.bench.figures import STABLE_WINDOWS, StepFigures, WindowFigures
from inferq.workers.bench.loads import Load
from inferq.workers.bench.messages import Done, Step, Stop, Window
from inferq.workers.bench.recorder import WARM_UP
from inferq.workers.bench.tally import Ended, Tally

#: Seconds from the order to the first request, so that all processes begin at once.
LEAD_S: Final = 0.1
#: Seconds that a report may be late: Redis or the machine may delay a process.
GRACE_S: Final = 30.0
#: Seconds to wait for answers after Ctrl-C.
INTERRUPTED_DRAIN_S: Final = 1.0
#: p99 of lateness from which on a note says that the generator could not keep up.
LATE_S: Final = 0.010


@dataclass(frozen=True)
class Rules:
    """How each step is measured; seconds."""

    window_s: float
    max_windows: int
    warmup_s: float
    timeout_s: float
    max_in_flight: int
    seed: int
    #: Rows of each request.
    rows: int


@dataclass
class _Seen:
    """What the processes have reported of a step."""

    #: Window → how many processes have reported it, and the sum of what they did.
    ended: dict[int, tuple[int, Ended]] = field(default_factory=dict)
    done: list[Done] = field(default_factory=list)

    def add(self, window: Window) -> int:
        """How many processes have reported that window now."""
        told, sum_ = self.ended.get(window.number, (0, Ended()))
        sum_.merge(window.ended)
        self.ended[window.number] = (told + 1, sum_)
        return told + 1


class Interrupted(Exception):
    """Ctrl-C. `step`: what was measured of the current step, if that is at least one window."""

    def __init__(self, step: StepFigures | None) -> None:
        super().__init__("interrupted")
        self.step = step


class StepRun:
    """One step.

    `on_window` gets all windows so far after each one: an empty list after the warm-up.
    """

    def __init__(
        self,
        crew: Crew,
        load: Load,
        number: int,
        rules: Rules,
        on_window: Callable[[Sequence[WindowFigures]], None],
    ) -> None:
        self._crew = crew
        self._load = load
        self._number = number
        self._rules = rules
        self._on_window = on_window
        self._trace = load.kind == "trace"
        self._seen = _Seen()
        self._windows: list[WindowFigures] = []
        self._begins_at = 0.0

    def run(self) -> StepFigures:
        """Measure. CrewFailed; Interrupted at KeyboardInterrupt."""
        try:
            self._begin()
            self._measure()
            if not self._trace:
                self._crew.tell(Stop(self._rules.timeout_s))
            self._finish(self._rules.timeout_s)
        except KeyboardInterrupt:
            self._crew.tell(Stop(INTERRUPTED_DRAIN_S))
            self._finish(INTERRUPTED_DRAIN_S)
            measured = bool(self._windows) or self._trace
            cut = self._figures(stable=False, interrupted=True) if measured else None
            raise Interrupted(cut) from None
        return self._figures(stable=self._trace or figures.is_stable(self._windows))

    def _begin(self) -> None:
        rules, load = self._rules, self._load
        shares = len(self._crew)
        self._begins_at = time.monotonic() + LEAD_S
        self._crew.tell(
            Step(
                load=load,
                begins_at=self._begins_at,
                warmup_s=0.0 if self._trace else rules.warmup_s,
                window_s=rules.window_s,
                drain_s=rules.timeout_s,
                max_in_flight=max(1, rules.max_in_flight // shares),
                seed=rules.seed,
                number=self._number,
            )
        )

    def _measure(self) -> None:
        """Until the windows are stable or there were `max_windows`; a trace until it has ended."""
        rules, seen = self._rules, self._seen
        wait_s = rules.window_s + rules.warmup_s + GRACE_S
        wait_s += rules.timeout_s if self._trace else 0.0
        while not (self._trace and len(seen.done) == len(self._crew)):
            self._receive(wait_s)
            if self._trace:
                continue
            if len(self._windows) >= rules.max_windows or figures.is_stable(self._windows):
                return

    def _receive(self, timeout: float) -> None:
        _, report = self._crew.receive(timeout)
        if isinstance(report, Done):
            self._seen.done.append(report)
        elif isinstance(report, Window) and self._seen.add(report) == len(self._crew):
            if report.number > WARM_UP:
                ended = self._seen.ended[report.number][1]
                self._windows.append(figures.window(ended, self._rules.window_s))
            self._on_window(self._windows)

    def _finish(self, drain_s: float) -> None:
        windows = list(self._windows)
        while len(self._seen.done) < len(self._crew):
            self._receive(drain_s + GRACE_S)
        if not self._trace:
            self._windows = windows  # what ended while they stopped is of no measured window

    def _figures(self, *, stable: bool, interrupted: bool = False) -> StepFigures:
        rules, seen = self._rules, self._seen
        whole = Tally()
        for done in seen.done:
            for tally in done.tallies.values():
                whole.merge(tally)
        if self._trace:
            tally = whole
            last_at = max([done.last_at for done in seen.done], default=self._begins_at)
            seconds = max(last_at - self._begins_at, self._load.times[-1], 1e-3)
            succeeded, ended = whole.succeeded, [e for _, e in seen.ended.values()]
        else:
            measured = range(len(self._windows))[-STABLE_WINDOWS:]
            tally = Tally()
            for done in seen.done:
                for number in measured:
                    tally.merge(done.tallies.get(number, Tally()))
            seconds = len(measured) * rules.window_s
            ended = [seen.ended[number][1] for number in measured]
            succeeded = sum(one.succeeded for one in ended)
        end = "" if stable else f"not stable after {len(self._windows)} windows"
        end = "interrupted" if interrupted else end
        answers = sum(one.succeeded + one.failed for one in ended)
        cpu_s = sum(one.cpu_s for one in ended)
        return StepFigures(
            load=self._load.value,
            stable=stable,
            seconds=seconds,
            requests_per_s=succeeded / seconds,
            rows_per_s=succeeded * rules.rows / seconds,
            latency_ms=figures.percentiles(tally.latency),
            late_ms=figures.percentiles(tally.late),
            counts=figures.counts(tally),
            errors=tally.errors,
            whole=figures.counts(whole),
            time_ms=figures.times(tally.split),
            gpu_ms=figures.gpu_times(tally.split),
            batch=figures.batches(tally.split),
            attempted_again=tally.split.attempted_again,
            generator_cpu_us=cpu_s / answers * 1e6 if answers else None,
            workers=sorted(tally.workers),
            engines=sorted(tally.engines),
            windows=self._windows,
            notes=_notes(tally, end),
        )


def _notes(tally: Tally, end: str) -> list[str]:
    """What a reader must know before trusting the figures, beginning with how the step ended."""
    notes = [end] if end else []
    late = tally.late.percentile(99)
    if late > LATE_S:
        notes.append(
            f"1 % was sent {late * 1000:.0f} ms late or more: the generator (more --processes "
            "may help), its machine or Redis fell behind"
        )
    if tally.not_sent:
        notes.append(
            f"{tally.not_sent} of {tally.due} were not sent in time (--max-in-flight, or behind)"
        )
    if tally.refused:
        notes.append(f"{tally.refused} were refused by admission: the queue was full")
    if tally.errors:
        each = ", ".join(f"{count} {code}" for code, count in sorted(tally.errors.items()))
        notes.append(f"{tally.failed} failed: {each}")
    if tally.unanswered:
        notes.append(f"{tally.unanswered} were not answered; they count as long as was waited")
    if tally.split.attempted_again:
        notes.append(f"{tally.split.attempted_again} were computed again: a worker died")
    return notes
