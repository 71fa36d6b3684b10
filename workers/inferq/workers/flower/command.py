"""``inferq flower``: stock Flower, with inferq's configuration."""

from __future__ import annotations

import os
import sys

import click

from inferq.shared.errors import InferqError

_OWN = """\
--conf refused: inferq flower has a configuration of its own; expected, in a file for Celery's
flower command: from inferq.workers.flower.configure import configure; configure()"""


@click.command(context_settings={"ignore_unknown_options": True})
@click.option(
    "--redis-url",
    envvar=["INFERQ_REDIS_URL", "CELERY_BROKER_URL"],
    help="Where the queues are. Also: INFERQ_REDIS_URL, CELERY_BROKER_URL.",
)
@click.option(
    "--address",
    default="127.0.0.1",
    show_default=True,
    envvar="FLOWER_ADDRESS",
    help="Listen here. Also: FLOWER_ADDRESS.",
)
@click.option(
    "--port",
    default=5555,
    show_default=True,
    envvar="FLOWER_PORT",
    type=click.IntRange(0, 65535),
    help="Also: FLOWER_PORT.",
)
@click.option(
    "--basic-auth",
    metavar="USER:PASSWORD",
    envvar="INFERQ_FLOWER_BASIC_AUTH",
    help="Let in only who knows it. Off loopback one is made up and printed if none is given. "
    "Also, and better, since others see a command line: INFERQ_FLOWER_BASIC_AUTH.",
)
@click.option(
    "--allow-host",
    "hosts",
    metavar="NAME[,NAME…]",
    envvar="INFERQ_FLOWER_HOSTS",
    help="On loopback, without a password: answer also where a browser asks for this host, as "
    "through a proxy that passes the Host on. Also: INFERQ_FLOWER_HOSTS.",
)
@click.argument("flower_options", nargs=-1, type=click.UNPROCESSED)
def flower(
    redis_url: str | None,
    address: str,
    port: int,
    basic_auth: str | None,
    hosts: str | None,
    flower_options: tuple[str, ...],
) -> None:
    """Show queues, workers and the page Inference in a browser.

    Becomes ``celery -A inferq.workers.app flower --conf=…``. FLOWER_OPTIONS go to Flower as they
    are (--url-prefix=flower, --max-tasks=10000, --persistent=true, …).
    """
    from inferq.shared.connect import redis_client  # noqa: PLC0415 (heavy)
    from inferq.shared.settings import Settings  # noqa: PLC0415
    from inferq.workers.flower import CONF, access  # noqa: PLC0415
    from inferq.workers.process.children import safe_environment  # noqa: PLC0415

    try:
        settings = Settings.load(redis_url=redis_url)
        redis_client(settings.redis_url, sentinel_master=settings.sentinel_master).close()
        access.decide(address, (), basic_auth)
        access.hosts(hosts)
    except InferqError as problem:
        raise click.ClickException(problem.message) from problem
    _check_options(flower_options)
    environment = {**safe_environment(os.environ), "INFERQ_REDIS_URL": settings.redis_url}
    if basic_auth:
        environment[access.VARIABLE] = basic_auth
        environment.pop("FLOWER_BASIC_AUTH", None)
    if hosts:
        environment[access.HOSTS_VARIABLE] = hosts
    command = [
        sys.executable, "-m", "inferq.workers.celery_process", "-A", "inferq.workers.app", "flower",
        f"--conf={CONF}", f"--address={address}", f"--port={port}", *flower_options,
    ]  # fmt: skip
    sys.stdout.flush()
    os.execve(sys.executable, command, environment)  # noqa: S606 (no shell is wanted)


def _check_options(given: tuple[str, ...]) -> None:
    """Refuse unknown options, which Flower itself ignores."""
    from flower.options import options as known  # noqa: PLC0415 (an extra)

    for option in given:
        name, _, _ = option.removeprefix("--").partition("=")
        if not option.startswith("--"):
            raise click.UsageError("an argument without --; expected --name=value")
        if name not in known:
            raise click.UsageError(f"--{name} is no option of Flower; expected --name=value")
        if name == "conf":
            raise click.UsageError(_OWN)
