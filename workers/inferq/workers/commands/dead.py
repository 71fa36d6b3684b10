"""``inferq dead``: list, show, replay and drop dead letters."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

import click
from redis.exceptions import RedisError

from inferq.shared.connect import check_server, redis_client
from inferq.shared.errors import InferqError
from inferq.shared.names import is_model_name, queue_of
from inferq.shared.settings import Settings
from inferq.workers.logs.printing import age, plain, print_table, say, say_json
from inferq.workers.queues.dead_letters import DeadLetters
from inferq.workers.queues.letter import Letter, headers_in, problem_with

#: Bytes shown of a message that cannot be read.
FIRST_BYTES = 200
_COLUMNS = ("model", "id", "reason", "attempts", "age", "worker", "size")

#: What was done with a letter: as a line, and as fields of JSON.
_Done = tuple[str, dict[str, Any]]

F = TypeVar("F", bound=Callable[..., Any])


def _check_model(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    if value is not None and not is_model_name(value):
        raise click.BadParameter(f"{value!r}; expected a model's name")
    return value


_redis_url = click.option(
    "--redis-url",
    envvar=["INFERQ_REDIS_URL", "CELERY_BROKER_URL"],
    help="Where the queues are. Also: INFERQ_REDIS_URL, CELERY_BROKER_URL.",
)
_as_json = click.option("--json", "as_json", is_flag=True, help="JSON, for programs.")


def _selection(command: F) -> F:
    """The arguments of `replay` and `drop`."""
    for decorate in (
        click.option("--yes", is_flag=True, help="Do not ask before --all."),
        click.option("--all", "everything", is_flag=True, help="All letters of --model."),
        click.option("--model", callback=_check_model, help="Look at this model's letters only."),
        click.argument("ids", nargs=-1, metavar="[ID]..."),
        _as_json,
        _redis_url,
    ):
        command = decorate(command)
    return command


@click.group()
def dead() -> None:
    """List, show, replay and drop dead letters."""


@dead.command("list")
@click.argument("model", required=False, callback=_check_model)
@_as_json
@_redis_url
def list_letters(model: str | None, as_json: bool, redis_url: str | None) -> None:
    """List the dead letters of MODEL, or of all models, newest first."""
    with _letters(redis_url) as letters:
        now = letters.now_ms()
        models = [model] if model else letters.models()
        rows = [_row(letter, now) for each in models for letter in letters.read(each)]
    if as_json:
        say_json(rows)
    elif rows:
        _print_table(rows)
    else:
        say(f"no dead letters{f' of {model}' if model else ''}", err=True)


@dead.command()
@click.argument("request_id", metavar="ID")
@click.option("--model", callback=_check_model, help="Look at this model's letters only.")
@_as_json
@_redis_url
def show(request_id: str, model: str | None, as_json: bool, redis_url: str | None) -> None:
    """Show all that is known of the dead letter ID (of each, if there are several)."""
    with _letters(redis_url) as letters:
        now = letters.now_ms()
        models = [model] if model else letters.models()
        details = [
            _details(letters, letter, now)
            for each in models
            for letter in letters.read(each)
            if letter.name == request_id
        ]
    if not details:
        raise click.ClickException(_unknown(request_id, model))
    if as_json:
        say_json(details)
        return
    for each in details:
        for key, value in each.items():
            parts = value.items() if isinstance(value, dict) else [(None, value)]
            for part, content in parts:
                say(f"{key if part is None else f'{key}.{plain(part)}'}: {plain(content)}")


@dead.command()
@_selection
def replay(
    ids: tuple[str, ...],
    model: str | None,
    everything: bool,
    yes: bool,
    as_json: bool,
    redis_url: str | None,
) -> None:
    """Put the requests of dead letters back into their queues, behind what waits there."""

    def act(letters: DeadLetters, letter: Letter) -> _Done:
        done = letters.replay(letter)
        queue = queue_of(letter.model)
        dropped = f"; dropped its passed {' and '.join(done.dropped)}" if done.dropped else ""
        return (
            f"replayed {letter.name} to {queue}, priority {done.step}{dropped}",
            {"queue": queue, "priority": done.step, "dropped": list(done.dropped)},
        )

    _each(ids, model, everything, yes, as_json, redis_url, "replay", act)


@dead.command()
@_selection
def drop(
    ids: tuple[str, ...],
    model: str | None,
    everything: bool,
    yes: bool,
    as_json: bool,
    redis_url: str | None,
) -> None:
    """Delete dead letters and their payloads. The results that are stored stay."""

    def act(letters: DeadLetters, letter: Letter) -> _Done:
        letters.drop(letter)
        return f"dropped {letter.name} of {letter.model}", {}

    _each(ids, model, everything, yes, as_json, redis_url, "drop", act)


def _each(
    ids: Sequence[str],
    model: str | None,
    everything: bool,
    yes: bool,
    as_json: bool,
    redis_url: str | None,
    verb: str,
    act: Callable[[DeadLetters, Letter], _Done],
) -> None:
    """`act` on each letter that was named; exit status 1 if one is unknown or refused."""
    if everything == bool(ids):
        raise click.UsageError("expected IDs or --all, one of both")
    if everything and model is None:
        raise click.UsageError("--all; expected --model with it")
    with _letters(redis_url) as letters:
        named, unknown = _named(letters, ids, model)
        for name in unknown:
            say(f"Error: {_unknown(name, model)}", err=True)
        if everything:
            count = sum(map(len, named.values()))
            _confirm(f"{verb} {count} dead letters of {model}?", yes)
        picked = (one for each, digests in named.items() for one in letters.pick(each, digests))
        refused = _act_on(picked, partial(act, letters), as_json)
    if unknown or refused:
        raise SystemExit(1)


def _named(
    letters: DeadLetters, ids: Sequence[str], model: str | None
) -> tuple[dict[str, set[bytes]], list[str]]:
    """Model → digests of the letters of these `ids` (none given: of all), and the unknown ids."""
    named: dict[str, set[bytes]] = {}
    known: set[str] = set()
    for each in [model] if model else letters.models():
        for letter in letters.read(each):
            if not ids or letter.name in ids:
                known.add(letter.name)
                named.setdefault(each, set()).add(letter.digest)
    return named, list(dict.fromkeys(name for name in ids if name not in known))


def _act_on(picked: Iterable[Letter], act: Callable[[Letter], _Done], as_json: bool) -> bool:
    """Apply `act`; True if one was refused.

    Each result is printed at once, or as JSON at the end.
    """
    refused = False
    told: list[dict[str, Any]] = []
    try:
        for letter in picked:
            try:
                text, details = act(letter)
                told.append({"model": letter.model, "id": letter.name, **details})
                if not as_json:
                    say(plain(text))
            except InferqError as problem:
                say(f"Error: {plain(letter.name)}: {plain(problem.message)}", err=True)
                refused = True
    finally:  # also if Redis was lost half way
        if as_json:
            say_json(told)
    return refused


def _confirm(question: str, yes: bool) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError("--all without a terminal to ask on; expected --yes")
    click.confirm(question, abort=True)


def _unknown(name: str, model: str | None) -> str:
    return f"no dead letter {name!r}{f' of {model}' if model else ''}"


@contextmanager
def _letters(redis_url: str | None) -> Iterator[DeadLetters]:
    """The dead letters of that Redis. Errors are reported in one line."""
    try:
        settings = Settings.load(redis_url=redis_url)
        url, master = settings.redis_url, settings.sentinel_master
        with redis_client(url, sentinel_master=master) as client:
            check_server(client)
            yield DeadLetters(client, settings.names())
    except InferqError as problem:
        raise click.ClickException(problem.message) from problem
    except RedisError as problem:
        raise click.ClickException(f"Redis: {problem}") from problem


def _row(letter: Letter, now_ms: float) -> dict[str, Any]:
    return {
        "model": letter.model,
        "id": letter.name,
        "reason": letter.reason,
        "attempts": letter.attempts,
        "at_ms": letter.at_ms,
        "age_s": max(0.0, round((now_ms - letter.at_ms) / 1000, 3)),
        "worker": letter.worker,
        "message_bytes": letter.size,
    }


def _details(letters: DeadLetters, letter: Letter, now_ms: float) -> dict[str, Any]:
    headers = headers_in(letter.message)
    found = {
        **_row(letter, now_ms),
        "at": datetime.fromtimestamp(letter.at_ms / 1000, UTC).isoformat(),
        "queue": letters.queue(letter),
        "stored_result": letters.status(letter),
        "args": headers.get("kwargsrepr"),
        "headers": headers,
        "payloads": {
            name: {"key": key, "bytes": size}
            for name, (key, size) in letters.payloads(letter).items()
        },
    }
    problem = problem_with(letter)
    if problem is not None:
        first = letter.message[:FIRST_BYTES].decode("utf-8", "backslashreplace")
        found |= {"unreadable": problem, "first_bytes": first}
    return found


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    cells = [
        [
            row["model"],
            row["id"],
            row["reason"],
            str(row["attempts"]),
            age(row["age_s"]),
            row["worker"],
            _size(row["message_bytes"]),
        ]
        for row in rows
    ]
    print_table(_COLUMNS, cells)


def _size(count: int) -> str:
    for unit, scale in (("MB", 1_000_000), ("KB", 1000)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"
