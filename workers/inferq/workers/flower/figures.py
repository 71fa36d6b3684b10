"""Figures of the page Inference: rates and percentiles of the last seconds, from workers' counts.

Workers publish what they have counted since their start (see `data_plane.counts`). What happened in
the last `WINDOW_S` seconds is the difference between a worker's counts now and then. So for each
live worker at most one snapshot per `SPACING_S` seconds is kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from inferq.workers.claims.settlement import DEAD_LETTER, FAILURE, REVOKED, SUCCESS
from inferq.workers.data_plane.counts import ROWS, SECONDS, Histogram, ModelStats, WorkerStats
from inferq.workers.flower.readings import MODELS, Reading
from inferq.workers.queues.depths import Depth

#: Seconds over which rates and percentiles are taken.
WINDOW_S: Final = 20.0
SPACING_S: Final = 4.0
#: Most workers that are read, and most points of a model's curve.
WORKERS: Final = 200
POINTS: Final = 60
#: Names in one note, at most.
NAMES: Final = 20
#: Seconds between two points of a curve.
POINT_S: Final = 2.0
#: The parts of a request's time, in order: name on the page → field of `ModelStats`.
PARTS: Final = {
    "queue": "queue_s",
    "input": "compute_input_s",
    "infer": "compute_infer_s",
    "output": "compute_output_s",
    "settle": "settle_s",
}
_ENDED: Final = (SUCCESS, FAILURE, REVOKED, DEAD_LETTER)


class Batches(msgspec.Struct, frozen=True):
    """Batches of `low` to `high` rows (None: and more)."""

    low: int
    high: int | None
    count: int


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """What workers did with one model in the last seconds. None: not known."""

    #: Seconds that this covers.
    window_s: float
    requests_per_s: float
    #: Failures and dead letters.
    failures_per_s: float
    batches_per_s: float
    #: Rows.
    mean_batch: float | None
    #: Share of padding in the computed rows, and share of the time that lanes computed.
    padding: float | None
    busy: float | None
    batches: Sequence[Batches]
    p50_s: float | None
    p95_s: float | None
    #: Mean seconds of a request in each of `PARTS`.
    split_s: Mapping[str, float]


class ModelRow(msgspec.Struct, frozen=True, kw_only=True):
    """One model: what waits, by Redis, and what workers report. None: no worker reports it."""

    model: str
    depth: int = 0
    by_priority: Mapping[str, int] = {}
    limit: int | None = None
    near_limit: bool = False
    oldest_age_s: float | None = None
    later: int = 0
    claimed: int = 0
    dead: int = 0
    consumers: int = 0
    versions: Sequence[int] = ()
    engines: Sequence[str] = ()
    lanes: int = 0
    lanes_busy: int = 0
    target_batch_size: int | None = None
    max_batch_size: int | None = None
    #: What an audit found wrong with its answers (None: nothing), and whether it runs unbatched.
    mismatch: str | None = None
    unbatched: bool = False
    rates: Rates | None = None
    #: The curves of `requests_per_s` and `depth`, oldest first.
    rate_points: Sequence[float] = ()
    depth_points: Sequence[int] = ()


class WorkerRow(msgspec.Struct, frozen=True, kw_only=True):
    """One worker process."""

    node: str
    pid: int
    state: str
    redis_up: bool
    device: str
    #: "name:version".
    models: Sequence[str]
    lanes: int
    lanes_busy: int
    up_s: float
    #: Seconds since it published something new.
    silent_s: float
    gpu: Mapping[str, float] | None
    versions: Mapping[str, str]


class Missing(msgspec.Struct, frozen=True, kw_only=True):
    """A model, or that newest `version` of it, that workers were told to serve and do not."""

    model: str
    version: int | None
    reason: str
    #: The workers that report it.
    nodes: Sequence[str]


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """All that the page shows. `problem`: why it is not up to date."""

    models: Sequence[ModelRow] = ()
    workers: Sequence[WorkerRow] = ()
    not_served: Sequence[Missing] = ()
    #: Seconds since Redis was read; None: it was not.
    age_s: float | None = None
    problem: str | None = None
    notes: Sequence[str] = ()
    #: A percentile that equals this many seconds may be longer.
    longest_s: float = SECONDS[-1]


@dataclass
class _Known:
    """What one worker published."""

    latest: WorkerStats
    #: time.monotonic() when `latest` was new.
    since: float
    earlier: deque[WorkerStats]


@dataclass
class _Course:
    rates: deque[float]
    depths: deque[int]


class Figures:
    """Keeps what is needed of past readings, and makes the page from the last one."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}
        self._courses: dict[str, _Course] = {}
        self._seen_at: float | None = None
        self._point_at = float("-inf")
        self._models: list[ModelRow] = []
        self._workers: list[WorkerRow] = []
        self._missing: list[Missing] = []
        self._notes: list[str] = []

    def page(self, reading: Reading | None, problem: str | None, now: float) -> Page:
        """`now`: of time.monotonic()."""
        if reading is None:
            return Page(problem=problem)
        if reading.at != self._seen_at:
            self._seen_at = reading.at
            self._see(reading)
        return Page(
            models=self._models,
            workers=self._workers,
            not_served=self._missing,
            age_s=round(max(0.0, now - reading.at), 1),
            problem=problem,
            notes=self._notes,
        )

    def _see(self, reading: Reading) -> None:
        stats = reading.stats[:WORKERS]
        self._know(stats, reading.at)
        depths = {depth.model: depth for depth in reading.depths.models}
        served: dict[str, list[ModelStats]] = {name: [] for name in depths}
        others: set[str] = set()
        for worker in stats:
            for model in worker.models:
                if model.model in served or len(served) < MODELS:
                    served.setdefault(model.model, []).append(model)
                else:
                    others.add(model.model)
        add_point = reading.at - self._point_at >= POINT_S
        if add_point:
            self._point_at = reading.at
        self._courses = {name: self._courses.get(name) or _course() for name in served}
        rows = []
        for name, stats_of_model in served.items():
            rates = self._rates(name)
            course = self._courses[name]
            if add_point:
                course.depths.append(depths[name].depth if name in depths else 0)
                if rates:
                    course.rates.append(rates.requests_per_s)
            rows.append(_row(name, depths.get(name), stats_of_model, rates, course))
        self._models = sorted(rows, key=lambda row: row.model)
        self._workers = [self._worker(worker, reading) for worker in stats]
        missing = _missing(stats)
        self._missing = missing[:MODELS]
        self._notes = [
            *reading.notes(),
            *_passed_over(stats),
            *_note(len(missing) - len(self._missing), "models that are not served"),
            *_note(len(others), "models that workers serve"),
            *_note(len(reading.stats) - len(stats), "workers"),
        ]

    def _know(self, stats: Sequence[WorkerStats], now: float) -> None:
        live = {worker.incarnation for worker in stats}
        self._known = {name: known for name, known in self._known.items() if name in live}
        for worker in stats:
            known = self._known.get(worker.incarnation)
            # The worker's clock may have been set, or nobody may have looked for a long time.
            if known is None or not 0 <= worker.at - known.latest.at <= WINDOW_S:
                kept = deque([worker], maxlen=int(WINDOW_S / SPACING_S) + 2)
                self._known[worker.incarnation] = _Known(worker, now, kept)
            elif worker.at != known.latest.at:
                known.latest, known.since = worker, now
                while len(known.earlier) > 1 and worker.at - known.earlier[0].at > WINDOW_S:
                    known.earlier.popleft()
                if worker.at - known.earlier[-1].at >= SPACING_S:
                    known.earlier.append(worker)

    def _rates(self, model: str) -> Rates | None:
        changes = []
        for known in self._known.values():
            then, now = known.earlier[0], known.latest
            if now.at <= then.at:
                continue
            before = {each.model: each for each in then.models}
            for after in now.models:
                if after.model == model and model in before:
                    changes.append((before[model], after, now.at - then.at))
        return _rates(changes) if changes else None

    def _worker(self, worker: WorkerStats, reading: Reading) -> WorkerRow:
        return WorkerRow(
            node=worker.node,
            pid=worker.pid,
            state=worker.state,
            redis_up=worker.redis_up,
            device=worker.device,
            models=[f"{each.model}:{each.version}" for each in worker.models],
            lanes=sum(each.lanes for each in worker.models),
            lanes_busy=sum(each.lanes_busy for each in worker.models),
            up_s=round(max(0.0, worker.at - worker.started_at)),
            silent_s=round(reading.at - self._known[worker.incarnation].since, 1),
            gpu=worker.gpu,
            versions=worker.versions,
        )


def _missing(stats: Sequence[WorkerStats]) -> list[Missing]:
    """Each missing model, with all workers that report the same reason."""
    nodes: dict[tuple[str, int, str], list[str]] = {}
    for worker in stats:
        for each in worker.not_served:
            nodes.setdefault((each.model, each.version or 0, each.reason), []).append(worker.node)
    return [
        Missing(model=model, version=version or None, reason=reason, nodes=told)
        for (model, version, reason), told in sorted(nodes.items())
    ]


def _passed_over(stats: Sequence[WorkerStats]) -> list[str]:
    names = sorted({name for worker in stats for name in worker.passed_over})
    if not names:
        return []
    more = f" and {len(names) - NAMES} more" if len(names) > NAMES else ""
    return [f"Folders passed over, as they hold no model: {', '.join(names[:NAMES])}{more}."]


def _note(left_out: int, what: str) -> list[str]:
    return [f"{left_out} more {what} are not shown."] if left_out else []


def _course() -> _Course:
    return _Course(deque(maxlen=POINTS), deque(maxlen=POINTS))


def _row(
    name: str,
    depth: Depth | None,
    stats: Sequence[ModelStats],
    rates: Rates | None,
    course: _Course,
) -> ModelRow:
    row = ModelRow(
        model=name,
        versions=sorted({each.version for each in stats}),
        engines=sorted({each.engine for each in stats}),
        lanes=sum(each.lanes for each in stats),
        lanes_busy=sum(each.lanes_busy for each in stats),
        target_batch_size=max((each.target_batch_size for each in stats), default=None),
        max_batch_size=max((each.max_batch_size for each in stats), default=None),
        mismatch=next((str(each.mismatch) for each in stats if each.mismatch), None),
        unbatched=any(each.unbatched for each in stats),
        rates=rates,
        rate_points=list(course.rates),
        depth_points=list(course.depths),
    )
    if depth is None:
        return row
    return msgspec.structs.replace(
        row,
        depth=depth.depth,
        by_priority={str(step): count for step, count in depth.by_priority.items()},
        limit=depth.max_queue_depth,
        near_limit=depth.near_limit,
        oldest_age_s=depth.oldest_age_s,
        later=depth.later,
        claimed=depth.claimed,
        dead=depth.dead,
        consumers=depth.consumers,
    )


def _rates(changes: Sequence[tuple[ModelStats, ModelStats, float]]) -> Rates:
    """Each of `changes`: a worker's counts then, its counts now, and the seconds in between."""
    ended = failures = batches = busy = 0.0
    rows = padding = 0
    for before, after, seconds in changes:
        outcomes = {key: after.outcomes.get(key, 0) - before.outcomes.get(key, 0) for key in _ENDED}
        ended += sum(outcomes.values()) / seconds
        failures += (outcomes[FAILURE] + outcomes[DEAD_LETTER]) / seconds
        batches += (after.batches - before.batches) / seconds
        rows += after.rows - before.rows
        padding += after.padding_rows - before.padding_rows
        if after.lanes:
            busy += (after.busy_s - before.busy_s) / (seconds * after.lanes)
    sizes = _since(changes, "batch_size", ROWS)
    total = _since(changes, "total_s", SECONDS)
    split = {part: _mean(_since(changes, field, SECONDS)) for part, field in PARTS.items()}
    return Rates(
        window_s=round(max(seconds for _, _, seconds in changes), 1),
        requests_per_s=_rounded(max(0.0, ended)),
        failures_per_s=_rounded(max(0.0, failures)),
        batches_per_s=_rounded(max(0.0, batches)),
        mean_batch=_mean(sizes),
        padding=round(padding / (rows + padding), 3) if rows + padding > 0 else None,
        busy=min(1.0, round(busy / len(changes), 3)),
        batches=_batches(sizes),
        p50_s=total.quantile(0.50, SECONDS),
        p95_s=total.quantile(0.95, SECONDS),
        split_s={part: mean for part, mean in split.items() if mean is not None},
    )


def _since(
    changes: Iterable[tuple[ModelStats, ModelStats, float]], field: str, bounds: Sequence[float]
) -> Histogram:
    """What was observed meanwhile. A worker with other bounds is left out."""
    size = len(bounds) + 1
    sum_, counts = 0.0, [0] * size
    for before, after, _ in changes:
        then: Histogram = getattr(before, field)
        now: Histogram = getattr(after, field)
        if len(then.counts) == len(now.counts) == size:
            sum_ += max(0.0, now.sum - then.sum)
            pairs = zip(counts, now.counts, then.counts, strict=True)
            counts = [n + max(0, new - old) for n, new, old in pairs]
    return Histogram(counts, sum_)


def _mean(histogram: Histogram) -> float | None:
    count = histogram.count
    return _rounded(histogram.sum / count) if count else None


def _batches(sizes: Histogram) -> list[Batches]:
    """Bars from the first size that occurred to the last."""
    occurred = [place for place, count in enumerate(sizes.counts) if count]
    if not occurred:
        return []
    lows = [1, *(bound + 1 for bound in ROWS)]
    return [
        Batches(lows[place], ROWS[place] if place < len(ROWS) else None, sizes.counts[place])
        for place in range(occurred[0], occurred[-1] + 1)
    ]


def _rounded(value: float) -> float:
    """Rounded to four significant digits."""
    return float(f"{value:.4g}")
