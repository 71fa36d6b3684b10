"""Shows the progress and the results of a run as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from inferq.shared.schema import ModelAdvert
from inferq.workers.bench.compare import Ratio
from inferq.workers.bench.figures import Report, Request, StepFigures, WindowFigures
from inferq.workers.bench.loads import Load, kind_title
from inferq.workers.logs.printing import plain, print_table, say

if TYPE_CHECKING:
    from rich.status import Status


class Progress:
    """A run's `Watcher`: writes lines to stderr, and on a terminal one that is updated."""

    def __init__(self, steps: int, max_windows: int) -> None:
        self._steps = steps
        self._max_windows = max_windows
        self._doing = ""
        self._status: Status | None = None

    def __enter__(self) -> Progress:
        from rich.console import Console  # noqa: PLC0415 (comes with an extra)

        console = Console(stderr=True)
        if console.is_terminal:
            self._status = console.status("")
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def begun(self, advert: ModelAdvert, request: Request) -> None:
        """See `Watcher`."""
        inputs = ", ".join(
            f"{one.name} {one.dtype}[{','.join(map(str, one.shape))}]" for one in request.inputs
        )
        self._say(
            f"{advert.name} version {advert.version} on {advert.engine}, batches of at most "
            f"{advert.max_batch_size}; {request.data} requests of {request.rows} "
            f"row{'s'[: request.rows != 1]}, {request.bytes:,} bytes: {inputs}"
        )

    def step_begins(self, load: Load, number: int) -> None:
        """See `Watcher`."""
        self._doing = f"{load} ({number + 1} of {self._steps})"
        self._move("warm-up")

    def window(self, windows: Sequence[WindowFigures]) -> None:
        """See `Watcher`."""
        if windows:
            last = windows[-1]
            self._move(
                f"window {len(windows)} of at most {self._max_windows}: "
                f"{last.requests_per_s:,.0f} requests/s, p95 {ms(last.p95_ms)} ms"
            )

    def step_ended(self, step: StepFigures) -> None:
        """See `Watcher`."""
        latency = step.latency_ms
        shown = "no answers"
        if latency is not None:
            shown = f"p50 {ms(latency.p50)} ms, p99 {ms(latency.p99)} ms"
        self._say(f"{self._doing}: {step.requests_per_s:,.1f} requests/s, {shown}")
        for note in step.notes:
            self._say(f"  {note}")

    def _move(self, what: str) -> None:
        if self._status is not None:
            self._status.update(plain(f"{self._doing}: {what}"))

    def _say(self, line: str) -> None:
        if self._status is not None:
            self._status.console.print(plain(line), markup=False, highlight=False)
        else:
            say(plain(line), err=True)


def print_report(report: Report) -> None:
    """Two tables of all steps, on stdout; each fits 80 columns as long as nothing failed."""
    loads = [_load(step) for step in report.steps]
    _print(report, loads, [_done(report, step) for step in report.steps])
    say("where the time of an answer went, in ms; rows of a batch")
    _print(report, loads, [_spent(step) for step in report.steps])
    if not all(step.stable for step in report.steps):
        say("*: not stable")


def _print(report: Report, loads: Sequence[str], rows: Sequence[dict[str, str]]) -> None:
    headings = (kind_title(report.how.kind), *rows[0])
    print_table(headings, [(load, *row.values()) for load, row in zip(loads, rows, strict=True)])


def _load(step: StepFigures) -> str:
    return f"{step.load:g}" + ("" if step.stable else "*")


def _done(report: Report, step: StepFigures) -> dict[str, str]:
    """The results of each step. Columns that are empty in every step are left out."""
    latency = step.latency_ms
    cells = {"requests/s": f"{step.requests_per_s:.1f}"}
    if report.request.rows > 1:
        cells["rows/s"] = f"{step.rows_per_s:.1f}"
    for name in ("p50", "p90", "p95", "p99", "max"):
        heading = "p50 ms" if name == "p50" else name
        cells[heading] = ms(getattr(latency, name)) if latency else "-"
    cells["CPU µs"] = "-" if step.generator_cpu_us is None else f"{step.generator_cpu_us:.0f}"
    for heading, field in (
        ("failed", "failed"),
        ("unanswered", "unanswered"),
        ("refused", "refused"),
        ("not sent", "not_sent"),
    ):
        if any(getattr(one.counts, field) for one in report.steps):
            cells[heading] = str(getattr(step.counts, field))
    return cells


def _spent(step: StepFigures) -> dict[str, str]:
    """Where the time went."""
    split, batch = step.time_ms, step.batch
    names = ("late", "queue", "form", "compute", "settle", "other")
    times = {name: ms(getattr(split, name)) if split else "-" for name in names}
    return {**times, "rows": f"{batch.rows:.1f}" if batch else "-"}


def print_ratios(ratios: Sequence[Ratio], kind: str, notes: Sequence[str]) -> None:
    """A table of what changed, on stdout."""
    rows = [
        [f"{one.load:g}", *(f"{value:.3f}" if value else "-" for value in one.values())]
        for one in ratios
    ]
    columns = ("requests/s", "p50", "p95", "p99", "queue", "compute", "CPU")
    say("now ÷ before")
    print_table((kind, *columns), rows)
    for note in notes:
        say(plain(note))


def ms(value: float) -> str:
    """Milliseconds with their significant digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
