"""Writes to a full Redis: forces through the commands that make room again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import redis

from inferq.shared.lua import source
from inferq.shared.names import Names
from inferq.shared.resp import Command, ReplyError
from inferq.workers.claims.wrong_type import is_wrong_type


def forced(commands: Sequence[Command], names: Names) -> Command:
    """One command that runs `commands` even on a full Redis and replies the list of replies.

    Each may have at most a few thousand words: Lua's stack holds no more.
    """
    words: list[Any] = []
    for command in commands:
        words.append(len(command))
        words += command
    return ("EVAL", source("letters") + source("force"), 1, names.nowhere, *words)


def pipelined(client: redis.Redis, names: Names, commands: Sequence[Command]) -> list[Any]:
    """The replies to `commands`, in a pipeline; in one script if Redis is full.

    Raises redis errors after all were tried: one that fails does not undo the others.
    """
    replies = attempted(client, names, commands)
    problem = next((reply for reply in replies if isinstance(reply, Exception)), None)
    if problem is not None:
        raise problem
    return replies


def attempted(client: redis.Redis, names: Names, commands: Sequence[Command]) -> list[Any]:
    """As `pipelined`, with WRONGTYPE errors among the replies: the key is at fault, not Redis."""
    with client.pipeline(transaction=False) as pipe:
        for command in commands:
            pipe.execute_command(*command)  # type: ignore[no-untyped-call]
        replies = pipe.execute(raise_on_error=False)
    refused = [n for n, reply in enumerate(replies) if is_full(reply)]
    if refused:
        again = forced([commands[n] for n in refused], names)
        for n, reply in zip(refused, client.execute_command(*again), strict=True):  # type: ignore[no-untyped-call]
            replies[n] = reply
    for reply in replies:
        if isinstance(reply, Exception) and not is_wrong_type(reply):
            raise reply
    return replies


def is_full(reply: object) -> bool:
    """Whether Redis refused a command because it is out of memory."""
    if isinstance(reply, redis.OutOfMemoryError):
        return True
    return isinstance(reply, ReplyError) and "OOM " in str(reply)
