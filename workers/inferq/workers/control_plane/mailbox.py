"""Reads what remote control, and other workers at the start, send to a worker.

Anybody who may publish in Redis can send anything there. In stock Celery a broken message makes the
worker reopen its mailbox, or ends the worker. Here a message is either read as it should be, or
skipped with one log line. `install` replaces the functions that read messages.
"""

from __future__ import annotations

import logging
import time
from fnmatch import fnmatch
from typing import Annotated, Any, Final

import msgspec
from celery.worker.consumer.mingle import Mingle
from celery.worker.pidbox import Pidbox

from inferq.shared.codec.messages import MAX_ID_CHARS
from inferq.workers.control_plane.kombu_guard import Odd
from inferq.workers.control_plane.revokes import MAX_REVOKED, Revokes, TooMany, newest

logger = logging.getLogger(__name__)

#: Largest logical clock that is accepted: a larger one would stay for ever.
MAX_CLOCK: Final = 1 << 53
#: Most bytes of a command, except commands that name requests.
MAX_BYTES: Final = 64 * 1024
NAMING: Final = frozenset({"revoke", "terminate", "query_task", "hello"})
#: Seconds to wait for other workers' answers at the start, and most answers that are read.
HELLO_S: Final = 5.0
MAX_NODES: Final = 1_000
#: Longest text of a problem in a log line or an answer.
MAX_TEXT: Final = 300

Name = Annotated[str, msgspec.Meta(max_length=200)]
Clock = Annotated[int, msgspec.Meta(ge=0, le=MAX_CLOCK)]
Id = Annotated[str, msgspec.Meta(max_length=MAX_ID_CHARS)]


class ReplyTo(msgspec.Struct):
    exchange: Name
    routing_key: Name


class Command(msgspec.Struct):
    """A control message, as kombu's mailbox sends it."""

    method: Name
    arguments: dict[str, Any] | None = None
    destination: list[str] | None = None
    pattern: Name | None = None
    matcher: Name | None = None
    reply_to: ReplyTo | None = None
    ticket: Name | None = None

    def is_for(self, hostname: str) -> bool:
        """Whether the worker of this name is meant. Raises Odd."""
        if self.destination:
            return hostname in self.destination
        if not self.pattern or not self.matcher:
            return True
        if self.matcher != "glob":  # a regular expression could run for ever
            raise Odd(f"its matcher is {self.matcher!r}; expected 'glob'")
        return fnmatch(hostname, self.pattern)


class Neighbour(msgspec.Struct):
    """Another worker's answer to `hello`; in older versions `revoked` is a mapping."""

    clock: Clock = 0
    revoked: list[Id] | dict[Id, Any] | None = None


def install() -> None:
    """Make Celery's worker in this process survive whatever it is sent."""
    Pidbox.on_message = _on_message
    Pidbox.start = _start
    Mingle.sync = _sync


def _start(self: Any, consumer: Any) -> None:
    self.node.channel = consumer.connection.channel()
    self.consumer = self.node.listen(callback=self.on_message)
    self.consumer.on_decode_error = _on_decode_error


def _on_decode_error(_message: Any, problem: Exception) -> None:
    """Skip the message. Stock Celery acknowledges it, by a tag that its sender chose."""
    logger.warning("a control message is passed over: %s", _short(problem))


def _on_message(self: Any, body: Any, message: Any) -> None:
    self._forward_clock()
    try:
        command = _read(self, body, message)
    except Odd as problem:
        logger.warning("a control message is passed over: %s", problem)
    else:
        if command is not None:
            _obey(self, command)


def _read(box: Any, body: Any, message: Any) -> Command | None:
    """The command in a message; None: it is for other workers. Raises Odd."""
    try:
        command = msgspec.convert(body, Command)
        clock = msgspec.convert(message.headers.get("clock") or 0, Clock)
    except (msgspec.ValidationError, RecursionError) as problem:
        raise Odd(_short(problem)) from None
    if len(message.body) > MAX_BYTES and command.method not in NAMING:
        raise Odd(
            f"{command.method[:50]!r} with {len(message.body)} bytes; expected at most {MAX_BYTES}"
        )
    if not command.is_for(box.hostname):
        return None
    if command.method not in box.node.handlers:
        raise Odd(f"no such command: {command.method!r}")
    replies = box.node.mailbox.reply_exchange.name
    if command.reply_to is not None and command.reply_to.exchange != replies:
        raise Odd(f"its reply_to is {command.reply_to.exchange!r}; expected {replies!r}")
    box.node.adjust_clock(clock)
    return command


def _obey(box: Any, command: Command) -> None:
    try:
        reply = box.node.handlers[command.method](box.node.state, **(command.arguments or {}))
    except Exception as problem:  # noqa: BLE001 - whatever was given to it
        logger.warning("control command %s failed: %s", command.method, _short(problem))
        reply = {"error": _short(problem)}
    to = command.reply_to
    if to is None:
        return
    try:
        box.node.reply({box.hostname: reply}, to.exchange, to.routing_key, command.ticket)
    except Exception as problem:  # noqa: BLE001 - or this would end the worker
        logger.warning("control command %s is not answered: %s", command.method, _short(problem))
        if isinstance(problem, OSError | box.c.connection_errors) and not isinstance(
            problem, KeyError
        ):
            box.reset()


def _short(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}"[:MAX_TEXT]


# --- what others tell a worker that starts --------------------------------------------------------


class _Enough(Exception):
    """Ends the wait for answers."""


def _sync(_self: Any, consumer: Any) -> None:
    """Learn from other workers which ids are revoked, as Celery's own mingle does."""
    try:
        answers = _ask(consumer)
    except Exception as problem:
        if isinstance(problem, consumer.connection_errors) and not isinstance(problem, KeyError):
            raise
        logger.warning("mingle: what others answer cannot be read: %s", _short(problem))
        return
    revokes, known = Revokes(), 0
    for answer in answers:
        for node, told in answer.items() if isinstance(answer, dict) else ():
            if node == consumer.hostname or not told:
                continue
            try:
                neighbour = msgspec.convert(told, Neighbour)
                revokes.add(list(neighbour.revoked or ())[-MAX_REVOKED:])
            except (msgspec.ValidationError, TypeError, TooMany) as problem:
                name = str(node)[:100]
                logger.warning("mingle: what %r tells is passed over: %s", name, _short(problem))
            else:
                consumer.app.clock.adjust(neighbour.clock)
                known += 1
    logger.info("mingle: in step with %d other workers", known)


def _ask(consumer: Any) -> list[Any]:
    answers: list[Any] = []
    until = time.monotonic() + HELLO_S

    def heard(answer: Any) -> None:
        answers.append(answer)
        if len(answers) >= MAX_NODES or time.monotonic() > until:
            raise _Enough

    asking = consumer.app.control.inspect(
        timeout=1.0, connection=consumer.connection, callback=heard
    )
    try:
        asking.hello(consumer.hostname, newest())
    except _Enough:
        pass
    except Exception as problem:
        if not answers:
            raise
        logger.warning("mingle: some answers cannot be read: %s", _short(problem))
    return answers
