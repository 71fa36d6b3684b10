"""The results of a run: figures of every step, as in the JSON that docs/bench.md shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

import msgspec

from inferq.shared.errors import ConfigError
from inferq.workers.bench.histogram import Histogram
from inferq.workers.bench.loads import Kind
from inferq.workers.bench.tally import Ended, Split, Tally

FORMAT: Final = "inferq-bench"
#: Raised when a field changes its meaning or is removed, not when one is added.
FORMAT_VERSION: Final = 1
#: Bytes of a report that is read.
MAX_BYTES: Final = 64 * 1024 * 1024
#: Windows that are compared; the figures are taken from them.
STABLE_WINDOWS: Final = 3
#: Largest deviation of any of them from their mean.
STABLE_WITHIN: Final = 0.10


class Percentiles(msgspec.Struct, frozen=True):
    """Of durations, in ms."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


class Counts(msgspec.Struct, frozen=True):
    """due = sent + refused + not_sent; sent = succeeded + failed + unanswered."""

    due: int
    sent: int
    succeeded: int
    failed: int
    unanswered: int
    refused: int
    not_sent: int


class Times(msgspec.Struct, frozen=True):
    """The parts of a success' mean latency, in ms. Their sum is that mean."""

    late: float
    queue: float
    form: float
    compute: float
    settle: float
    other: float


class GpuTimes(msgspec.Struct, frozen=True):
    """Parts of `compute` by the card's clock: means in ms."""

    h2d: float
    compute: float
    d2h: float


class BatchFigures(msgspec.Struct, frozen=True):
    """Means over batches."""

    rows: float
    padding: float


class WindowFigures(msgspec.Struct, frozen=True):
    """What ended in one window."""

    requests_per_s: float
    p95_ms: float


class StepFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One load. All but `whole` and `windows` is of the measured windows only."""

    #: Requests in flight, or requests/s.
    load: float
    stable: bool
    #: Seconds measured.
    seconds: float
    #: Successes.
    requests_per_s: float
    rows_per_s: float
    #: From the intended send time to the decoded answer; None if there was no answer.
    latency_ms: Percentiles | None
    #: From the intended send time until it was pushed.
    late_ms: Percentiles | None
    counts: Counts
    #: By code.
    errors: dict[str, int]
    #: Including the warm-up, and what was sent before all processes had stopped.
    whole: Counts
    time_ms: Times | None
    gpu_ms: GpuTimes | None
    batch: BatchFigures | None
    attempted_again: int
    #: CPU µs that the producer processes used per answer.
    generator_cpu_us: float | None
    workers: list[str]
    engines: list[str]
    windows: list[WindowFigures]
    notes: list[str]


class InputFigures(msgspec.Struct, frozen=True):
    """One input of each request."""

    name: str
    dtype: str
    shape: list[int]


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What each request was."""

    rows: int
    bytes: int
    inputs: list[InputFigures]
    #: random, zeros or files.
    data: str
    priority: int | None
    timeout_ms: float | None


class How(msgspec.Struct, frozen=True, kw_only=True):
    """How it was measured."""

    kind: Kind
    #: For a rate.
    distribution: str | None
    processes: int
    window_s: float
    max_windows: int
    warmup_s: float
    #: For a rate or a trace.
    max_in_flight: int
    timeout_s: float
    seed: int


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A whole run."""

    format: Literal["inferq-bench"] = FORMAT
    format_version: int = FORMAT_VERSION
    model: str
    #: Of the model.
    version: int
    engine: str
    max_batch_size: int
    #: UTC, ISO 8601.
    began_at: str
    #: Of inferq, Python, NumPy and the Redis server.
    versions: dict[str, str]
    #: Of the load generator.
    host: str
    cores: int
    how: How
    request: Request
    #: True: ended by Ctrl-C, or because Redis went away; the steps are what was measured by then.
    interrupted: bool
    steps: list[StepFigures]


def percentiles(histogram: Histogram) -> Percentiles | None:
    """In ms; None if there is nothing in it."""
    if not histogram.total:
        return None
    at = {p: histogram.percentile(p) * 1000 for p in (50, 90, 95, 99)}
    return Percentiles(histogram.mean * 1000, at[50], at[90], at[95], at[99], histogram.most * 1000)


def counts(tally: Tally) -> Counts:
    """As they are."""
    return Counts(
        due=tally.due,
        sent=tally.sent,
        succeeded=tally.succeeded,
        failed=tally.failed,
        unanswered=tally.unanswered,
        refused=tally.refused,
        not_sent=tally.not_sent,
    )


def times(split: Split) -> Times | None:
    """Means; None if nobody sent a receipt."""
    n = split.receipts
    if not n:
        return None
    return Times(
        late=split.late / n,
        queue=split.queue / n,
        form=split.form / n,
        compute=split.compute / n,
        settle=split.settle / n,
        other=split.other / n,
    )


def gpu_times(split: Split) -> GpuTimes | None:
    """Means; None if no GPU served."""
    n = split.gpu_receipts
    return GpuTimes(split.h2d / n, split.gpu_compute / n, split.d2h / n) if n else None


def batches(split: Split) -> BatchFigures | None:
    """Means; None if nobody sent a receipt."""
    n = split.batches
    return BatchFigures(split.batch_rows / n, split.padding / n) if n else None


def window(ended: Ended, seconds: float) -> WindowFigures:
    """Of a window of so many seconds."""
    return WindowFigures(ended.succeeded / seconds, ended.latency.percentile(95) * 1000)


def is_stable(windows: Sequence[WindowFigures]) -> bool:
    """Whether throughput and p95 of the last windows are each within 10 % of their mean."""
    last = windows[-STABLE_WINDOWS:]
    if len(last) < STABLE_WINDOWS:
        return False
    for values in ([one.requests_per_s for one in last], [one.p95_ms for one in last]):
        mean = sum(values) / len(values)
        if not mean or any(abs(value - mean) > STABLE_WITHIN * mean for value in values):
            return False
    return True


def read_report(path: Path) -> Report:
    """A report that ``--json`` wrote. ConfigError: it cannot be read, or is none."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as problem:
        raise ConfigError(f"{path} cannot be read: {problem.strerror or problem}") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path} is too large; expected at most {MAX_BYTES} bytes")
    try:
        version = msgspec.json.decode(data, type=_Head).format_version
        if version == FORMAT_VERSION:
            return msgspec.json.decode(data, type=Report)
    except (msgspec.MsgspecError, UnicodeDecodeError) as problem:
        raise ConfigError(
            f"{path} is no report of inferq bench ({problem}); expected what --json wrote"
        ) from None
    raise ConfigError(f"{path} has format_version {version}; expected {FORMAT_VERSION}")


class _Head(msgspec.Struct):
    format: Literal["inferq-bench"]
    format_version: int
