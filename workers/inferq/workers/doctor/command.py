"""``inferq doctor``: all checks, one line each."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import click
import msgspec
from redis.exceptions import RedisError

from inferq.shared.connect import redis_client
from inferq.shared.errors import ConfigError
from inferq.shared.settings import Settings
from inferq.workers.doctor.finding import Finding, Level, error, within
from inferq.workers.logs.printing import plain, say, say_json

#: Seconds that one group of checks may take.
REDIS_S: Final = 30.0
GPU_S: Final = 10.0
MODELS_S: Final = 120.0
WORKERS_S: Final = 10.0

_COLOURS: Final = {Level.OK: "green", Level.WARNING: "yellow", Level.ERROR: "red"}


@click.command()
@click.option(
    "--models",
    "folder",
    envvar="INFERQ_MODELS",
    type=click.Path(path_type=Path),
    help="The model repository to look at. Also: INFERQ_MODELS.",
)
@click.option("--json", "as_json", is_flag=True, help="JSON, for programs.")
@click.option(
    "--redis-url",
    envvar=["INFERQ_REDIS_URL", "CELERY_BROKER_URL"],
    help="Where the queues are. Also: INFERQ_REDIS_URL, CELERY_BROKER_URL.",
)
def doctor(folder: Path | None, as_json: bool, redis_url: str | None) -> None:
    """Check Redis, this host, the models and the workers; say what to do.

    Changes nothing. Exit status 1 if there is an error, else 0, also with warnings.
    """
    levels = set()
    told = []
    for finding in _findings(folder, redis_url):
        levels.add(finding.level)
        if as_json:
            told.append(msgspec.to_builtins(finding))
        else:
            _tell(finding)
    if as_json:
        say_json(told)
    raise SystemExit(1 if Level.ERROR in levels else 0)


def _findings(folder: Path | None, redis_url: str | None) -> Iterator[Finding]:
    from inferq.workers.doctor.environment import environment  # noqa: PLC0415
    from inferq.workers.doctor.host import gpus, packages  # noqa: PLC0415
    from inferq.workers.doctor.models import models  # noqa: PLC0415

    yield from environment(os.environ)
    settings: Settings | None = None
    try:
        settings = Settings.load(redis_url=redis_url)
    except ConfigError as problem:
        yield error("settings", problem.message, "correct it")
    if settings is not None:
        yield from _of_redis(settings)
    yield from packages()
    gpu = settings.gpu if settings is not None else None
    yield from within(GPU_S, "gpu", lambda: gpus(gpu))
    on_cpu = settings is not None and settings.device == "cpu"
    yield from within(MODELS_S, "models", lambda: models(folder, on_cpu))


def _of_redis(settings: Settings) -> Iterator[Finding]:
    """The findings about Redis and, if it answers, about its workers."""
    from inferq.workers.doctor.network import network  # noqa: PLC0415
    from inferq.workers.doctor.redis import (  # noqa: PLC0415
        examine,
        keys,
        open_to_all,
        unreachable,
    )

    def look() -> Iterable[Finding]:
        master = settings.sentinel_master
        with redis_client(settings.redis_url, sentinel_master=master) as client:
            yield from examine(client, settings.redis_url)
        yield from open_to_all(settings.redis_url)

    def look_at_keys() -> Iterable[Finding]:
        master = settings.sentinel_master
        with redis_client(settings.redis_url, sentinel_master=master) as client:
            yield from keys(client, settings.names())

    try:
        yield from network(settings.redis_url)
        found = within(REDIS_S, "redis", look)
    except ConfigError as problem:
        yield error("redis", problem.message, "correct the URL (--redis-url, INFERQ_REDIS_URL)")
        return
    except (RedisError, OSError) as problem:
        yield unreachable(settings.redis_url, problem)
        return
    yield from found
    if not any(finding.check == "version" and finding.level is Level.OK for finding in found):
        return
    try:
        yield from within(REDIS_S, "keys", look_at_keys)
    except (RedisError, OSError) as problem:
        yield error("keys", f"cannot be looked at: {problem}", "see what Redis says")
    yield from _of_workers(settings)


def _of_workers(settings: Settings) -> Iterator[Finding]:
    from kombu.exceptions import KombuError  # noqa: PLC0415 (slow to import)

    from inferq.workers.doctor.audits import audits  # noqa: PLC0415
    from inferq.workers.doctor.devices import devices  # noqa: PLC0415
    from inferq.workers.doctor.workers import workers  # noqa: PLC0415

    def audited() -> Iterable[Finding]:
        master = settings.sentinel_master
        with redis_client(settings.redis_url, sentinel_master=master) as client:
            yield from audits(client, settings.names())
            yield from devices(client, settings.names())

    try:
        yield from within(WORKERS_S, "audits", audited)
        yield from within(WORKERS_S, "workers", lambda: workers(settings))
    except (KombuError, RedisError, OSError) as problem:
        yield error("workers", f"cannot be asked: {problem}", "see what Redis says")


def _tell(finding: Finding) -> None:
    todo = f" → {finding.todo}" if finding.todo else ""
    told = plain(f"  {finding.check}: {finding.found}{todo}")
    say(told, mark=f"{finding.level:<7}", colour=_COLOURS[finding.level])
