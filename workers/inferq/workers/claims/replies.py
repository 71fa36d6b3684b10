"""Reads the replies to many questions at once; some may be about keys of the wrong type."""

from __future__ import annotations

from typing import Any

from redis.client import Pipeline

from inferq.workers.claims.wrong_type import is_wrong_type


def of_each(pipe: Pipeline) -> list[Any]:
    """Execute `pipe`; None stands for a reply that the key has the wrong type.

    Raises redis' other errors.
    """
    replies: list[Any] = pipe.execute(raise_on_error=False)
    for place, reply in enumerate(replies):
        if isinstance(reply, Exception):
            if not is_wrong_type(reply):
                raise reply
            replies[place] = None
    return replies
