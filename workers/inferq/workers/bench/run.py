"""A whole run: reads the model's advert, tries one request, starts processes, runs every step."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Protocol

import numpy as np
import redis

from inferq.producer.dialogue import look_up, submit
from inferq.producer.session import Session
from inferq.shared.connect import redis_client
from inferq.shared.errors import InferqError, RedisUnavailable, ResultTimeout
from inferq.shared.schema import Array, ModelAdvert, nbytes
from inferq.shared.settings import Settings
from inferq.shared.text import dtype_name
from inferq.workers.bench import arrays
from inferq.workers.bench.crew import Crew, CrewFailed
from inferq.workers.bench.figures import (
    How,
    InputFigures,
    Report,
    Request,
    StepFigures,
    WindowFigures,
)
from inferq.workers.bench.loads import Load
from inferq.workers.bench.messages import Setup, packed
from inferq.workers.bench.steps import Interrupted, Rules, StepRun


@dataclass(frozen=True)
class Options:
    """What ``inferq bench`` was asked to do; times in seconds."""

    model: str
    loads: Sequence[Load]
    processes: int
    batch: int | None
    data: arrays.Data
    shapes: Mapping[str, tuple[int, ...]]
    files: Sequence[str]
    priority: int | None
    timeout_ms: float | None
    timeout_s: float
    window_s: float
    max_windows: int
    warmup_s: float
    max_in_flight: int
    seed: int
    redis_url: str | None


class Watcher(Protocol):
    """Is told how a run goes."""

    def begun(self, advert: ModelAdvert, request: Request) -> None: ...
    def step_begins(self, load: Load, number: int) -> None: ...
    def window(self, windows: Sequence[WindowFigures]) -> None: ...
    def step_ended(self, step: StepFigures) -> None: ...


@dataclass
class Outcome:
    """The results of a run, also of one that ended early."""

    report: Report
    #: By Ctrl-C.
    interrupted: bool = False
    #: What ended it: Redis or a producer process failed.
    problem: InferqError | None = None


@dataclass
class _Target:
    """The model as it was before the run, and the requests for it."""

    advert: ModelAdvert
    items: list[dict[str, Array]]
    rows: int
    request: Request
    redis_version: str
    began_at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))


def run(options: Options, watcher: Watcher) -> Outcome:
    """Measure every step, in order.

    Raises, before anything is measured: ConfigError, InvalidInput, ModelNotFound, ResultTimeout,
    RedisUnavailable, and whatever error the model answers one request with.
    """
    settings = Settings.load(redis_url=options.redis_url)
    target = _look(options, settings)
    watcher.begun(target.advert, target.request)
    steps: list[StepFigures] = []
    interrupted, problem = False, None
    try:
        with Crew(_setups(options, settings, target)) as crew:
            for number, load in enumerate(options.loads):
                watcher.step_begins(load, number)
                step = StepRun(crew, load, number, _rules(options, target), watcher.window).run()
                steps.append(step)
                watcher.step_ended(step)
    except Interrupted as end:
        interrupted = True
        if end.step is not None:
            steps.append(end.step)
            watcher.step_ended(end.step)
    except KeyboardInterrupt:
        interrupted = True
    except CrewFailed as failure:
        problem = failure
    cut = interrupted or problem is not None
    return Outcome(_report(options, target, steps, interrupted=cut), interrupted, problem)


def _look(options: Options, settings: Settings) -> _Target:
    """Read what is served, and try one request: most mistakes show there."""
    session = Session(settings)
    try:
        view = session.carry(look_up(session.core, options.model))
        advert = view.advert
        if options.files:
            items, data = arrays.read(advert, options.files, options.batch), "files"
        else:
            data = options.data
            items = arrays.made(advert, options.shapes, options.batch, data, options.seed)
        rows = arrays.check(advert, items)
        if not session.core.is_served(options.model):
            raise ResultTimeout(f"model {options.model!r}: no live worker serves it now")
        pending = session.carry(
            submit(session.core, options.model, items[0], options.priority, None, session.make)
        )
        try:
            pending.result(options.timeout_s)
        except ResultTimeout:
            pending.cancel()
            raise
    finally:
        session.close()
    inputs = [
        InputFigures(name, dtype_name(array), list(array.shape)) for name, array in items[0].items()
    ]
    request = Request(
        rows=rows,
        bytes=nbytes(items[0]),
        inputs=inputs,
        data=data,
        priority=options.priority,
        timeout_ms=options.timeout_ms,
    )
    return _Target(advert, items, rows, request, _server(settings))


def _server(settings: Settings) -> str:
    url, master = settings.redis_url, settings.sentinel_master
    try:
        with redis_client(url, sentinel_master=master) as client:
            info = client.info("server")
    except redis.RedisError as problem:
        raise RedisUnavailable(f"Redis cannot be reached: {problem}") from problem
    name = "valkey" if "valkey_version" in info else "redis"
    return f"{name} {info[f'{name}_version']}"


def _setups(options: Options, settings: Settings, target: _Target) -> list[Setup]:
    return [
        Setup(
            redis_url=settings.redis_url,
            model=options.model,
            items=packed(target.items),
            share=share,
            shares=options.processes,
            priority=options.priority,
            timeout_ms=options.timeout_ms,
        )
        for share in range(options.processes)
    ]


def _rules(options: Options, target: _Target) -> Rules:
    return Rules(
        window_s=options.window_s,
        max_windows=options.max_windows,
        warmup_s=options.warmup_s,
        timeout_s=options.timeout_s,
        max_in_flight=options.max_in_flight,
        seed=options.seed,
        rows=target.rows,
    )


def _report(
    options: Options, target: _Target, steps: list[StepFigures], *, interrupted: bool
) -> Report:
    load = options.loads[0]
    advert = target.advert
    return Report(
        model=options.model,
        version=advert.version,
        engine=advert.engine,
        max_batch_size=advert.max_batch_size,
        began_at=target.began_at,
        versions={
            "inferq": version("inferq"),
            "python": platform.python_version(),
            "numpy": np.__version__,
            "server": target.redis_version,
        },
        host=socket.gethostname(),
        cores=len(os.sched_getaffinity(0)),
        how=How(
            kind=load.kind,
            distribution=load.distribution if load.kind == "rate" else None,
            processes=options.processes,
            window_s=options.window_s,
            max_windows=options.max_windows,
            warmup_s=options.warmup_s,
            max_in_flight=options.max_in_flight,
            timeout_s=options.timeout_s,
            seed=options.seed,
        ),
        request=target.request,
        interrupted=interrupted,
        steps=steps,
    )
