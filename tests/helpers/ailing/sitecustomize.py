"""On a worker's PYTHONPATH: the first worker process that comes there ails, those after it do not.

INFERQ_TEST_AILS_AT is a file that does not exist yet, INFERQ_TEST_AILS the name of a background
loop that ends, ``<name>:hangs`` of one that hangs, or ``links``, which are then never published.
With ``hanging links`` links into the queue "hangs" hang in all of them.
Everybody loses patience after INFERQ_TEST_STUCK_S seconds.
"""

import os
import time

import redis

from inferq.workers.process import periodic
from inferq.workers.supervision import health

_ails, _, _how = os.environ["INFERQ_TEST_AILS"].partition(":")
_first: bool | None = None

_PATIENCE_S = float(os.environ["INFERQ_TEST_STUCK_S"])
setattr(health, "STUCK_S", _PATIENCE_S)  # noqa: B010 - it is final


def _is_first() -> bool:
    global _first  # noqa: PLW0603
    if _first is None:
        try:
            os.close(os.open(os.environ["INFERQ_TEST_AILS_AT"], os.O_CREAT | os.O_EXCL))
            _first = True
        except FileExistsError:
            _first = False
    return _first


_turn = periodic.Periodic._take_turn


def _take_turn(loop: periodic.Periodic) -> float:
    if loop.name == _ails and _is_first():
        loop._stall_s = _PATIENCE_S
        loop._began = time.monotonic()
        if _how:
            time.sleep(3600)
        raise SystemExit
    return _turn(loop)


periodic.Periodic._take_turn = _take_turn  # type: ignore[method-assign,assignment]

if _ails == "links":
    from inferq.workers.canvas.sender import LinkSender

    _collecting = LinkSender.collecting

    def _never(sender: LinkSender, *given: object) -> object:
        if _is_first():
            raise redis.TimeoutError("silence")
        return _collecting(sender, *given)  # type: ignore[arg-type]

    LinkSender.collecting = _never  # type: ignore[method-assign,assignment]

if _ails == "hanging links":
    from inferq.workers.canvas.celery_canvas import Published
    from inferq.workers.canvas.sender import LinkSender

    _take = LinkSender.take

    def _hangs(sender: LinkSender, published: Published) -> None:
        if published.queue == "hangs":
            time.sleep(3600)
        _take(sender, published)

    LinkSender.take = _hangs  # type: ignore[method-assign,assignment]
