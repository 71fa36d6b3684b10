"""``celery -A proj inferq …``: inferq's commands as a sub-command of Celery's.

They use the Redis of `proj`, unless the environment or their own options name another. Every
``celery`` command of an environment with inferq imports this module, so it imports little itself.
"""

from __future__ import annotations

import os
from typing import Any, Final
from urllib.parse import parse_qsl, urlsplit

import click

#: Option of kombu's Redis transport → our setting's variable.
_OPTIONS: Final = {
    "global_keyprefix": "INFERQ_GLOBAL_KEYPREFIX",
    "master_name": "INFERQ_SENTINEL_MASTER",
    "priority_steps": "INFERQ_PRIORITY_STEPS",
    "sep": "INFERQ_PRIORITY_SEP",
}


class _Commands(click.Group):
    """The sub-commands of `cli`, imported when they are asked for."""

    def invoke(self, ctx: click.Context) -> Any:
        from inferq.workers import cli  # noqa: PLC0415 (heavy)
        from inferq.workers.logs.printing import plain_failures  # noqa: PLC0415

        try:
            with plain_failures():
                return super().invoke(ctx)
        except ModuleNotFoundError as problem:
            raise cli.missing(problem) from None

    def list_commands(self, ctx: click.Context) -> list[str]:
        from inferq.workers import cli  # noqa: PLC0415

        return cli.inferq.list_commands(ctx)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        from inferq.workers import cli  # noqa: PLC0415

        return cli.inferq.get_command(ctx, cmd_name)


@click.group("inferq", cls=_Commands)
@click.pass_context
def inferq(ctx: click.Context) -> None:
    """Batched deep-learning inference behind a Redis queue."""
    from inferq.workers.process.visible_passwords import warn_of_visible_password  # noqa: PLC0415

    if ctx.invoked_subcommand != "worker":  # which logs it
        warn_of_visible_password()
    if os.environ.get("INFERQ_REDIS_URL"):
        return
    # CELERY_BROKER_URL is Celery's own variable: the app takes it, and keeps its prefix.
    conf = getattr(getattr(ctx.obj, "app", None), "conf", None)
    if conf is not None and conf.broker_url:
        for variable, value in _settings(conf).items():
            os.environ.setdefault(variable, value)


def _settings(conf: Any) -> dict[str, str]:
    """The environment variables that name the queues of a Celery app with this configuration."""
    from inferq.shared.tls import with_tls  # noqa: PLC0415

    url = with_tls(_our_url(str(conf.broker_url)), conf.broker_use_ssl)
    found = {"INFERQ_REDIS_URL": url}
    transport = conf.broker_transport_options or {}
    given = {variable: transport.get(option) for option, variable in _OPTIONS.items()}
    backend = conf.result_backend_transport_options or {}
    given["INFERQ_RESULT_KEYPREFIX"] = backend.get("global_keyprefix")
    for variable, value in given.items():
        if value is not None:
            listed = isinstance(value, list | tuple)
            found[variable] = ",".join(map(str, value)) if listed else str(value)
    return found


def _our_url(url: str) -> str:
    """Celery's URL of a Redis in redis-py's form: they differ for Unix sockets."""
    parts = urlsplit(url)
    if parts.scheme != "redis+socket":
        return url
    db = dict(parse_qsl(parts.query)).get("virtual_host", "0")
    return f"unix://{parts.netloc}{parts.path}?db={db}"
