"""``inferq worker``: the Celery worker command with inferq's defaults filled in."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from inferq.shared.errors import InferqError
from inferq.shared.names import model_of, queue_of


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
    """Serve models. Runs ``celery -A inferq.workers.app worker -P solo -Q … -n …`` in this process.

    CELERY_OPTIONS go to Celery as they are (-E, --statedb FILE, …).
    """
    from inferq.shared.settings import Settings  # noqa: PLC0415 (heavy)
    from inferq.workers.repository import model_names  # noqa: PLC0415

    try:
        settings = Settings.load(redis_url=redis_url, models=repository)
        served = _queues(queues) or [queue_of(model) for model in model_names(repository)]
    except InferqError as problem:
        raise click.ClickException(problem.message) from problem
    if not served:
        raise click.ClickException(f"no model in {str(repository)!r}; expected <model>/<version>/")
    command = [
        sys.executable, "-m", "celery", "-A", "inferq.workers.app", "worker", "-P", "solo",
        "-Q", ",".join(served), "-n", name or f"cpu{os.getpid()}@%h", "-l", loglevel,
        *celery_options,
    ]  # fmt: skip
    environment = {
        **os.environ,
        "INFERQ_REDIS_URL": settings.redis_url,
        "INFERQ_MODELS": str(repository.absolute()),
    }
    os.execve(command[0], command, environment)  # noqa: S606 - no shell is wanted


def _queues(queues: tuple[str, ...]) -> list[str]:
    """-Q as given: repeated, or comma-separated as Celery has it."""
    names = [name for part in queues for name in part.split(",") if name]
    for name in names:
        if model_of(name) is None:
            raise click.BadParameter(f"{name!r}; expected inferq.<model>", param_hint="--queue")
    return names
