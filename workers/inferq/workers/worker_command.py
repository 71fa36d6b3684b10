"""``inferq worker``: Celery's worker command with inferq's defaults filled in, and a supervisor."""

from __future__ import annotations

import logging
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path

import click

from inferq.shared.errors import InferqError
from inferq.shared.names import model_of, queue_of

#: Seconds that the supervisor waits for Redis: it has signals to pass on meanwhile.
REDIS_TIMEOUT_S = 2.0


@click.command(context_settings={"ignore_unknown_options": True})
@click.option(
    "--models", "repository", envvar="INFERQ_MODELS", required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The model repository. Also: INFERQ_MODELS.",
)  # fmt: skip
@click.option(
    "-Q", "--queue", "queues", multiple=True,
    help="Serve this queue, inferq.<model>; repeatable. Default: every model in the repository.",
)  # fmt: skip
@click.option(
    "-n", "--name", default=None,
    help="Celery node name; %h is the host. Default: cpu<pid>@%h, so that replicas differ.",
)  # fmt: skip
@click.option(
    "--redis-url", envvar=["INFERQ_REDIS_URL", "CELERY_BROKER_URL"],
    help="Queues and results. Also: INFERQ_REDIS_URL, CELERY_BROKER_URL.",
)  # fmt: skip
@click.option("-l", "--loglevel", default="INFO", show_default=True)
@click.argument("celery_options", nargs=-1, type=click.UNPROCESSED)
def worker(
    repository: Path,
    queues: tuple[str, ...],
    name: str | None,
    redis_url: str | None,
    loglevel: str,
    celery_options: tuple[str, ...],
) -> None:
    """Serve models. Keeps ``celery -A inferq.workers.app worker -P solo -Q … -n …`` alive.

    A worker process that dies is replaced, and what it held goes back to its queues at once.
    SIGTERM and Ctrl-C finish what computes, a second one hands everything back, a third one kills.
    CELERY_OPTIONS go to Celery as they are (-E, --statedb FILE, …).
    """
    from inferq.shared.connect import redis_client  # noqa: PLC0415 (heavy)
    from inferq.shared.settings import Settings  # noqa: PLC0415
    from inferq.workers.health import default_folder, forget_the_dead  # noqa: PLC0415
    from inferq.workers.repository import model_names  # noqa: PLC0415
    from inferq.workers.supervisor import Child, Supervisor  # noqa: PLC0415

    try:
        settings = Settings.load(redis_url=redis_url, models=repository)
        served = _queues(queues) or [queue_of(model) for model in model_names(repository)]
        folder = None if settings.heartbeat_file else default_folder()
        if folder:
            forget_the_dead(folder)
    except InferqError as problem:
        raise click.ClickException(problem.message) from problem
    if not served:
        raise click.ClickException(f"no model in {str(repository)!r}; expected <model>/<version>/")
    node = (name or f"cpu{os.getpid()}@%h").replace("%h", socket.gethostname())
    command = [
        sys.executable, "-m", "celery", "-A", "inferq.workers.app", "worker", "-P", "solo",
        "-Q", ",".join(served), "-n", node, "-l", loglevel, *celery_options,
    ]  # fmt: skip
    heartbeat = folder / f"{node}.json" if folder else Path(str(settings.heartbeat_file))
    environment = {
        **os.environ,
        "INFERQ_REDIS_URL": settings.redis_url,
        "INFERQ_MODELS": str(repository.absolute()),
        "INFERQ_HEARTBEAT_FILE": str(heartbeat),
    }
    logging.basicConfig(
        level=logging.INFO, format="[%(asctime)s: %(levelname)s/supervisor] %(message)s"
    )
    client = redis_client(
        settings.redis_url, sentinel_master=settings.sentinel_master, socket_timeout=REDIS_TIMEOUT_S
    )
    child = Child(node, command, environment, heartbeat)
    status = Supervisor([child], client, settings.names()).run()
    if folder:
        with suppress(OSError):  # others' heartbeats are in it
            folder.rmdir()
    raise SystemExit(status)


def _queues(queues: tuple[str, ...]) -> list[str]:
    """-Q as given: repeated, or comma-separated as Celery has it."""
    names = [name for part in queues for name in part.split(",") if name]
    for name in names:
        if model_of(name) is None:
            raise click.BadParameter(f"{name!r}; expected inferq.<model>", param_hint="--queue")
    return names
