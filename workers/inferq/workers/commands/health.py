"""``inferq health``: whether the workers on this host consume. For people and container probes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click
import msgspec
from redis.exceptions import RedisError

from inferq.shared.connect import redis_client
from inferq.shared.errors import ConfigError
from inferq.shared.settings import Settings
from inferq.workers.logs.printing import plain, say, say_json
from inferq.workers.models.not_served import listed
from inferq.workers.supervision import runtime_folder
from inferq.workers.supervision.health import LOADS, Beat, problem_of, read_beat, silence_s
from inferq.workers.supervision.redis_identity import place_of, run_id_of


@click.command()
@click.option(
    "--file",
    "path",
    envvar="INFERQ_HEARTBEAT_FILE",
    type=click.Path(path_type=Path),
    help="A worker's heartbeat file. Also: INFERQ_HEARTBEAT_FILE. "
    "Default: those of all that `inferq worker` runs here.",
)
@click.option(
    "--redis-url",
    envvar=["INFERQ_REDIS_URL", "CELERY_BROKER_URL"],
    help="Whose workers to look at; asked if one has not heard from it. "
    "Also: INFERQ_REDIS_URL, CELERY_BROKER_URL.",
)
@click.option("--json", "as_json", is_flag=True, help="JSON, for programs.")
def health(path: Path | None, redis_url: str | None, as_json: bool) -> None:
    """Exit status 0 if every worker of this Redis here consumes, else 1, with the reason.

    Workers of other Redis servers are named and left out; without a URL all are checked.
    A worker that serves only some of its models is healthy, and those it lacks are named. One that
    waits for a Redis that does not answer here either is healthy: a restart would not help it.
    """
    paths = [path] if path else _found()
    beats = {each: read_beat(each, anybodys=path is not None) for each in paths}
    if path is None:
        beats = _own(beats, redis_url)
    healthy = True
    told = []
    for each, beat in beats.items():
        problem, remark = _judge(beat, redis_url)
        healthy = healthy and problem is None
        if as_json:
            told.append(_as_json(each, beat, problem))
        else:
            _tell(each, beat, problem, remark)
    if as_json:
        say_json(told)
    raise SystemExit(0 if healthy else 1)


def _found() -> list[Path]:
    """All heartbeats in the folders where workers on this host write them. ClickException: none."""
    folders = runtime_folder.all_known()
    problems = {folder: runtime_folder.problem_of(folder) for folder in folders}
    paths = [
        path
        for folder in folders
        if problems[folder] is None
        for path in sorted(folder.glob("*.json"))
    ]
    for problem in filter(None, problems.values()):
        if not paths:
            raise click.ClickException(problem)
        say(f"passed over: {problem}", err=True)
    if not paths:
        raise click.ClickException(
            f"no worker's heartbeat in {' or '.join(map(str, folders))}; expected one: start "
            "inferq worker here, or name with --file what a worker of `celery worker` has as "
            "INFERQ_HEARTBEAT_FILE"
        )
    return paths


def _own(beats: dict[Path, Beat | None], redis_url: str | None) -> dict[Path, Beat | None]:
    """The beats of the workers of that Redis. ClickException if all are of others."""
    try:
        settings = Settings.load(redis_url=redis_url)
        mine = place_of(settings)
    except ConfigError:  # no Redis is named
        return beats
    run_id: str | None = None
    own: dict[Path, Beat | None] = {}
    others: list[str] = []
    for path, beat in beats.items():
        if beat is not None and beat.redis is not None and beat.redis != mine:
            if run_id is None:
                run_id = run_id_of(settings)
            space = (beat.redis.db, beat.redis.prefix)
            if space != (mine.db, mine.prefix) or beat.run_id != run_id or not run_id:
                others.append(f"{beat.node} of {beat.redis}")
                continue
        own[path] = beat
    if others:
        say(plain(f"passed over, as of other Redis servers: {', '.join(others)}"), err=True)
    if not own:
        raise click.ClickException(
            f"no worker's heartbeat of {mine} here; expected one: start inferq worker with this "
            "Redis' URL, or name with --redis-url whose workers to look at"
        )
    return own


def _judge(beat: Beat | None, redis_url: str | None) -> tuple[str | None, str]:
    """What is wrong with the worker, and further remarks."""
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


def _as_json(path: Path, beat: Beat | None, problem: str | None) -> dict[str, Any]:
    known = msgspec.to_builtins(beat) if beat is not None else {}
    return {"file": os.fspath(path), "healthy": problem is None, "problem": problem, **known}


def _tell(path: Path, beat: Beat | None, problem: str | None, remark: str) -> None:
    who = beat.node if beat is not None else os.fspath(path)
    if beat is not None and problem is not None:
        remark = os.fspath(path)
    say(plain(f"{who}: {'ok' if problem is None else problem}{remark and f' ({remark})'}"))
