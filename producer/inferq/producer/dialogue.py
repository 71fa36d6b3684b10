"""The dialogues with Redis, the same for threads and asyncio: what is sent, and what replies mean.

Each dialogue is a generator that yields commands and is sent their replies. So the two clients
differ only in how they send commands. What a dialogue yields at once makes one round trip, and may
be executed twice without harm. If the commands cannot be sent, the error is raised at the yield.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Final, TypeVar

from inferq.producer.admission import ModelView
from inferq.producer.core import Core, P
from inferq.producer.outgoing import PUSH_BLOCK, Inputs, Outgoing, Push
from inferq.producer.pending import PendingRequest
from inferq.producer.window import BLOCK_BYTES
from inferq.shared.errors import Cancelled, ClientClosed, InferqError, RedisUnavailable
from inferq.shared.resp import Command, Reply

_log: Final = logging.getLogger(__name__)

T = TypeVar("T")
Dialogue = Generator[Sequence[Command], list[Reply], T]


def carry(dialogue: Dialogue[T], call: Callable[[Sequence[Command]], list[Reply]]) -> T:
    """Have a dialogue with Redis over `call`."""
    try:
        commands = next(dialogue)
        while True:
            try:
                replies = call(commands)
            except Exception as problem:  # noqa: BLE001  the dialogue decides what it means
                commands = dialogue.throw(problem)
            else:
                commands = dialogue.send(replies)
    except StopIteration as end:
        value: T = end.value
        return value


async def carry_async(
    dialogue: Dialogue[T], call: Callable[[Sequence[Command]], Awaitable[list[Reply]]]
) -> T:
    """Have a dialogue with Redis over `call`."""
    try:
        commands = next(dialogue)
        while True:
            try:
                replies = await call(commands)
            except Exception as problem:  # noqa: BLE001  the dialogue decides what it means
                commands = dialogue.throw(problem)
            else:
                commands = dialogue.send(replies)
    except StopIteration as end:
        value: T = end.value
        return value


def look_up(core: Core, model: str) -> Dialogue[ModelView]:
    """What is known of `model`; asks Redis if that is too old. Raises ModelNotFound."""
    core.check_open()
    view = core.admission.current(model, time.monotonic())
    if view is None:
        questions = core.admission.questions(model)
        asked_at = time.monotonic()
        replies = yield questions
        view = core.admission.learn(model, replies, asked_at, time.monotonic())
    return view


def submit(
    core: Core,
    model: str,
    inputs: Inputs,
    priority: int | None,
    timeout_ms: float | None,
    make: Callable[[Outgoing, float], P],
    outputs: Sequence[str] | None = None,
) -> Dialogue[P]:
    """Check one request, encode it, push it; see `Client.submit`."""
    view = yield from look_up(core, model)
    pending = core.build(view, inputs, priority, timeout_ms, make, outputs)
    for block in in_blocks(pending.parts) if pending.parts else ([pending],):
        refused = yield from push(core, block, view)
        if refused:
            core.drop(pending)
            raise refused[0]
    return pending


def in_blocks(parts: Sequence[PendingRequest]) -> Iterator[Sequence[PendingRequest]]:
    """`parts` of a request in portions that are pushed at once."""
    begin = size = 0
    for end, part in enumerate(parts, start=1):
        size += part.nbytes
        if size > BLOCK_BYTES or end - begin == PUSH_BLOCK or end == len(parts):
            yield parts[begin:end]
            begin, size = end, 0


def push(
    core: Core, block: Sequence[PendingRequest], view: ModelView
) -> Dialogue[list[InferqError]]:
    """Push requests in order. Those that Redis refuses are resolved with the errors returned."""
    refused: Mapping[str, InferqError]
    try:
        core.check_open()  # the client may have been closed since these were entered
        refused = yield from _push(core, block, view)
    except (RedisUnavailable, ClientClosed) as problem:
        refused = dict.fromkeys([pending.request_id for pending in block], problem)
    except BaseException:
        for pending in block:
            core.drop(pending)
        raise
    return core.pushed(block, refused)


def _push(
    core: Core, block: Sequence[PendingRequest], view: ModelView
) -> Dialogue[dict[str, RedisUnavailable]]:
    out = Push.of([one.outgoing for one in block if one.outgoing is not None])
    asked_at = time.monotonic()
    if not core.admission.is_due(view, asked_at):
        return out.refused((yield out.commands))
    model = view.advert.name
    replies = yield [*out.commands, *core.admission.questions(model)]
    answers = replies[len(out.commands) :]
    # The requests are in the queue, whatever is wrong with the answer (the model may be gone).
    with suppress(InferqError):
        core.admission.learn(model, answers, asked_at, time.monotonic())
    return out.refused(replies)


def cancel(core: Core, pending: PendingRequest) -> Dialogue[bool]:
    """Cancel a request unless its result is stored. Returns whether it is cancelled now."""
    for part in pending.parts:
        yield from cancel(core, part)
    if not pending.done() and not pending.parts:
        tell = core.revoked(pending, (yield core.revoke(pending)))
        if tell:
            yield tell
    return isinstance(pending.outcome, Cancelled)


def greet(core: Core) -> Dialogue[None]:
    """Find out what this server is. ConfigError if it cannot be used."""
    core.greeted((yield core.greet()))


def resume(core: Core) -> Dialogue[None]:
    """Catch up on a new connection that has subscribed already."""
    yield from sweep(core)
    lost = core.lost()
    for start in range(0, len(lost), PUSH_BLOCK):
        out = Push.of(lost[start : start + PUSH_BLOCK])
        refused = out.refused((yield out.commands))
        if refused:
            raise next(iter(refused.values()))
    core.pushed_again()
    if lost:
        _log.warning("Redis was restarted: pushed %d requests again", len(lost))


def read(core: Core, ids: Sequence[str]) -> Dialogue[None]:
    """Read those results of `ids` that are stored."""
    for block in core.blocks(ids):
        core.take(block, (yield [core.ask(block)])[0])


def sweep(core: Core) -> Dialogue[None]:
    """Read the results of everything unresolved, whether or not Redis reported any."""
    began = time.monotonic()
    asked = core.unresolved()
    if asked:
        yield from read(core, asked)
    else:
        yield [("PING",)]  # is the connection alive?
    core.swept(asked, began)


def ask_about_models(core: Core) -> Dialogue[None]:
    """Ask again about the models that requests wait for."""
    for model in core.models():
        questions = core.admission.questions(model)
        asked_at = time.monotonic()
        replies = yield questions
        # If nobody announces it any more, its requests wait on, as "queued_no_worker".
        with suppress(InferqError):
            core.admission.learn(model, replies, asked_at, time.monotonic())
