"""``inferq health``: do the workers on this host consume? For people and containers' probes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click
import msgspec
from redis.exceptions import RedisError

from inferq.shared.connect import redis_client
from inferq.shared.errors import ConfigError
from inferq.shared.settings import Settings
from inferq.workers.health import LOADS, Beat, default_folder, problem_of, read_beat, silence_s
from inferq.workers.not_served import listed


@click.command()
@click.option(
    "--file", "path", envvar="INFERQ_HEARTBEAT_FILE", type=click.Path(path_type=Path),
    help="A worker's heartbeat file. Also: INFERQ_HEARTBEAT_FILE. "
    "Default: those of all that `inferq worker` runs here.",
)  # fmt: skip
@click.option(
    "--redis-url", envvar=["INFERQ_REDIS_URL", "CELERY_BROKER_URL"],
    help="Asked if a worker has not heard from Redis. Also: INFERQ_REDIS_URL, CELERY_BROKER_URL.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="JSON, for programs.")
def health(path: Path | None, redis_url: str | None, as_json: bool) -> None:
    """Exit status 0 if every worker here consumes, else 1, with the reason.

    A worker that serves some of its models but not all is healthy, and says so. One that waits for
    a Redis that does not answer here either is healthy: to restart it would be of no use.
    """
    try:
        folder = default_folder()
    except ConfigError as error:
        raise click.ClickException(error.message) from error
    paths = [path] if path else sorted(folder.glob("*.json"))
    if not paths:
        raise click.ClickException(
            f"no worker's heartbeat in {folder}; expected one: start inferq worker here, or name "
            "with --file what a worker of `celery worker` has as INFERQ_HEARTBEAT_FILE"
        )
    healthy = True
    told = []
    for each in paths:
        beat = read_beat(each)
        problem, remark = _judge(beat, redis_url)
        healthy = healthy and problem is None
        if as_json:
            told.append(_told(each, beat, problem))
        else:
            _tell(each, beat, problem, remark)
    if as_json:
        click.echo(json.dumps(told, indent=2))
    raise SystemExit(0 if healthy else 1)


def _judge(beat: Beat | None, redis_url: str | None) -> tuple[str | None, str]:
    """What is wrong, and what else there is to say."""
    if beat is None:
        return "no heartbeat there", ""
    problem = problem_of(beat)
    if problem is None and (silent := silence_s(beat)) is not None:
        problem = f"it has not heard from Redis, which answers, for {silent:.0f} s"
    elif problem != LOADS:
        without = f"; not served: {listed(beat.not_served)}" if beat.not_served else ""
        return problem, f"{beat.computing} requests compute, {beat.waiting} wait{without}"
    try:
        settings = Settings.load(redis_url=redis_url)
        with redis_client(settings.redis_url, sentinel_master=settings.sentinel_master) as client:
            client.ping()
    except RedisError as unreachable:
        return None, f"waits for Redis: {unreachable}"
    except ConfigError as unknown:
        return problem, unknown.message
    return problem, ""


def _told(path: Path, beat: Beat | None, problem: str | None) -> dict[str, Any]:
    known = msgspec.to_builtins(beat) if beat is not None else {}
    return {"file": os.fspath(path), "healthy": problem is None, "problem": problem, **known}


def _tell(path: Path, beat: Beat | None, problem: str | None, remark: str) -> None:
    who = beat.node if beat is not None else os.fspath(path)
    if beat is not None and problem is not None:
        remark = os.fspath(path)
    click.echo(f"{who}: {'ok' if problem is None else problem}{remark and f' ({remark})'}")
