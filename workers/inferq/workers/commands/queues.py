"""``inferq queues``: how many requests wait in each queue, and how many workers serve it."""

from __future__ import annotations

from collections.abc import Mapping

import click
import msgspec
from redis.exceptions import RedisError

from inferq.shared.connect import check_server, redis_client
from inferq.shared.errors import InferqError
from inferq.shared.names import is_model_name
from inferq.shared.settings import Settings
from inferq.workers.claims.wrong_type import find_wrong_types
from inferq.workers.logs.printing import age, plain, print_table, say, say_json
from inferq.workers.metrics.published import read_rates
from inferq.workers.queues.depths import Depth, DepthReader, Depths

_COLUMNS = (
    "model", "depth", "by priority", "oldest", "rate", "later", "claimed", "dead", "consumers",
)  # fmt: skip


def _check_models(_: click.Context, __: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    for model in value:
        if not is_model_name(model):
            raise click.BadParameter(f"{model!r}; expected a model's name")
    return value


@click.command()
@click.argument("models", nargs=-1, metavar="[MODEL]...", callback=_check_models)
@click.option("--json", "as_json", is_flag=True, help="JSON, for programs.")
@click.option(
    "--redis-url",
    envvar=["INFERQ_REDIS_URL", "CELERY_BROKER_URL"],
    help="Where the queues are. Also: INFERQ_REDIS_URL, CELERY_BROKER_URL.",
)
def queues(models: tuple[str, ...], as_json: bool, redis_url: str | None) -> None:
    """Show what waits of each MODEL, or of all that Redis knows; no worker is needed.

    oldest: how long ago the oldest request that is claimed next was sent. rate: requests answered
    per second, as workers have told every 2 s; - if none did. later: requests whose ETA is ahead.
    claimed: held by workers. consumers: live workers that serve the model. Exit status 1 if Redis
    cannot be asked.
    """
    try:
        settings = Settings.load(redis_url=redis_url)
        url, master = settings.redis_url, settings.sentinel_master
        with redis_client(url, sentinel_master=master) as client:
            check_server(client)
            depths = DepthReader(client, settings.names()).read(models or None)
            rates = read_rates(client, settings.names())
            wrong = find_wrong_types(
                client, settings.names(), [each.model for each in depths.models]
            )
    except InferqError as problem:
        raise click.ClickException(problem.message) from problem
    except RedisError as problem:
        raise click.ClickException(f"Redis: {problem}") from problem
    if as_json:
        told = msgspec.to_builtins(depths, str_keys=True)
        for each in told["models"]:
            each["rate"] = rates.get(each["model"])
        told["wrong_type"] = [msgspec.to_builtins(each) for each in wrong]
        say_json(told)
        return
    _print(depths, rates)
    for key in wrong:
        say(plain(str(key)), err=True)


def _print(depths: Depths, rates: Mapping[str, float]) -> None:
    if depths.models:
        print_table(_COLUMNS, [_row(depth, rates.get(depth.model)) for depth in depths.models])
    else:
        say("no models: Redis knows no queue, dead letter or worker of any", err=True)
    for depth in depths.models:
        if depth.near_limit:
            limit = f"{depth.max_queue_depth} (max_queue_depth)"
            full = depth.depth >= (depth.max_queue_depth or 0)
            state = f"full: at its limit of {limit}" if full else f"near its limit of {limit}"
            say(f"{depth.model}: {state}", err=True)
        if depth.depth and not depth.consumers:
            say(f"{depth.model}: requests wait and no worker serves it", err=True)
    if depths.unlisted:
        say(f"{depths.unlisted} more queues, of models that no worker announced", err=True)
    if depths.later_unread:
        say(f"later: {depths.later_unread} more, of models not looked at", err=True)


def _row(depth: Depth, rate: float | None) -> list[str]:
    split = [f"{step}: {count}" for step, count in depth.by_priority.items() if count]
    return [
        depth.model,
        str(depth.depth),
        ", ".join(split) or "-",
        "-" if depth.oldest_age_s is None else age(depth.oldest_age_s),
        "-" if rate is None else f"{rate:.1f}/s",
        *map(str, (depth.later, depth.claimed, depth.dead, depth.consumers)),
    ]
