"""Changes kombu's Redis transport so that a bad value in Redis affects nothing but itself.

In stock kombu, one broadcast that is no message, one odd member of a table of bindings or one odd
record of `unacked` ends the worker or makes it reconnect for ever. So does one record that Redis
does not let this process put back: each consumer of kombu tries to put back whatever any consumer
took long ago and never acknowledged. `install` replaces the functions that read these, in this
process. tests/integration/test_celery_private.py fails when an upgrade changes any of it.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Final

from kombu.transport import redis as transport
from kombu.utils.encoding import bytes_to_str
from redis.exceptions import NoPermissionError, ResponseError

from inferq.workers.claims.wrong_type import HASH, LIST, SET, ZSET, WrongTypeReports, is_wrong_type

logger = logging.getLogger(__name__)

#: Longest broadcast that is read: a worker's answer with 50,000 revoked ids has 3 MB.
MAX_BROADCAST_BYTES: Final = 8 << 20
#: Records of `unacked` that are read in one trip, and trips each time.
PAGE: Final = 100
MAX_PAGES: Final = 100
NOTHING_ROUTED: Final = "No answers to Celery's remote control go by it"
NOT_SWEPT: Final = "Celery's old bindings stay"
NOT_PUT_BACK: Final = "What dead workers held for Celery is not put back"

_wrong_types = WrongTypeReports()
#: Stock functions, which the replacements call.
_queue_bind = transport.Channel._queue_bind
_refresh_bindings = transport.Channel._refresh_bindings
_sweep_bindings = transport.Channel.sweep_bindings
_size = transport.Channel._size


class Odd(Exception):
    """What was read is not kombu's. The text says why."""


def install() -> None:
    """Make kombu survive whatever it reads."""
    channel, qos = transport.Channel, transport.QoS
    channel._receive_one = _receive_one
    channel._queue_bind = _bind
    channel._refresh_bindings = _refresh
    channel.sweep_bindings = _sweep
    channel._size = _length
    channel.get_table = _get_table
    qos.restore_visible = _restore_visible
    qos.restore_by_tag = _restore_by_tag


# --- broadcasts ----------------------------------------------------------------------------------


def _receive_one(self: Any, client: Any) -> bool | None:
    """Channel._receive_one, but it skips a broadcast that cannot be read."""
    try:
        response = client.parse_response()
    except self.connection_errors:
        self._in_listen = None
        raise
    if not isinstance(response, list | tuple):
        return None
    payload = self._handle_message(client, response)
    if not bytes_to_str(payload["type"]).endswith("message") or not payload["data"]:
        return None
    try:
        message = _broadcast(payload["data"])
    except Odd as problem:
        logger.warning("a broadcast is no message and is passed over: %s", problem)
        raise transport.Empty from None
    topic = bytes_to_str(payload["channel"])
    if topic[:1] == "/":
        topic = topic.partition(".")[2]
    queue = self._fanout_to_queue.get(topic.split("/", 1)[0])
    if queue is None:  # nobody listens any more
        return None
    delivered: bool = self.connection._deliver(message, queue) or True
    return delivered


def _broadcast(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_BROADCAST_BYTES:
        raise Odd(f"{len(data)} bytes; expected at most {MAX_BROADCAST_BYTES}")
    message = _parsed(data)
    if not isinstance(message, dict):
        raise Odd(f"a {type(message).__name__}; expected a mapping")
    properties, headers = message.get("properties"), message.get("headers")
    if not isinstance(properties, dict) or not isinstance(headers, dict | None):
        raise Odd("its properties or headers are no mapping")
    if not isinstance(properties.get("delivery_tag"), str):
        raise Odd("its delivery_tag is no string")
    if not isinstance(properties.get("delivery_info"), dict | None):
        raise Odd("its delivery_info is no mapping")
    if properties.get("body_encoding") != "base64" or not isinstance(message.get("body"), str):
        raise Odd("its body is not base64")
    if (headers or {}).get("compression"):
        raise Odd("it is compressed")
    return message


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(bytes_to_str(data))
    except (ValueError, RecursionError) as problem:
        raise Odd(f"it cannot be read: {str(problem)[:200]}") from None


# --- keys that are of another type, or have odd members -------------------------------------------


def _length(self: Any, queue: str) -> int:
    try:
        return int(_size(self, queue))
    except ResponseError as problem:
        if not is_wrong_type(problem):
            raise
        return 0


def _bind(self: Any, exchange: str, routing_key: str, pattern: str, queue: str) -> None:
    with _passing_over_types(self, exchange):
        _queue_bind(self, exchange, routing_key, pattern, queue)


def _refresh(self: Any, queues: Sequence[str]) -> None:
    exchanges = {each for queue in queues for each, _, _ in self.state.queue_bindings(queue)}
    with _passing_over_types(self, *exchanges):
        _refresh_bindings(self, queues)


def _sweep(self: Any, limit: int = 100) -> int:
    with _passing_over_types(self):
        return int(_sweep_bindings(self, limit))
    return 0


@contextmanager
def _passing_over_types(channel: Any, *exchanges: str) -> Iterator[None]:
    """Report the tables of these exchanges that have the wrong type, and go on."""
    try:
        yield
    except ResponseError as problem:
        if not is_wrong_type(problem):
            raise
        for each in exchanges:
            _tell(channel, channel.keyprefix_queue % each, SET, NOTHING_ROUTED)
            _tell(channel, channel.keyprefix_binding_permanent % each, SET, NOT_SWEPT)
        _tell(channel, channel.keyprefix_binding_deadlines, ZSET, NOT_SWEPT)


def _get_table(self: Any, exchange: str) -> list[tuple[str, ...]]:
    key = self.keyprefix_queue % exchange
    with self.conn_or_acquire() as client:
        try:
            members = client.smembers(key)
        except ResponseError as problem:
            if not is_wrong_type(problem):
                raise
            _tell(self, key, SET, NOTHING_ROUTED)
            return []
    rows = [tuple(bytes_to_str(member).split(self.sep)) for member in members]
    for row in rows:
        if len(row) != 3:
            _say_once(key, repr(row)[:200], "no binding; it is passed over, and stays there")
    return [row for row in rows if len(row) == 3]


def _tell(channel: Any, key: str, expected: str, until: str) -> None:
    with channel.conn_or_acquire() as client:
        kind = bytes_to_str(client.type(channel.global_keyprefix + key))
    _wrong_types.report(channel.global_keyprefix + key, kind, expected, until)


def _say_once(key: str, member: str, what: str) -> None:
    if (known := f"{member} in {key}") not in _wrong_types:
        _wrong_types.note(known)
        logger.error("%s in %s is %s", member, key, what)


# --- what dead workers held -----------------------------------------------------------------------


def _restore_visible(self: Any, start: int = 0, num: int | None = 10, interval: int = 10) -> None:
    """QoS.restore_visible, but what cannot be put back stays there and does not stop the rest.

    It has no mutex: each message is put back in a transaction of its own, so only one process does.
    """
    self._vrestore_count += 1
    if (self._vrestore_count - 1) % (interval or 1):
        return
    newest, stay = time.time() - self.visibility_timeout, 0
    with self.channel.conn_or_acquire() as client:
        try:
            for _ in range(MAX_PAGES):
                found = client.zrange(
                    self.unacked_index_key,
                    newest,
                    0,
                    desc=True,
                    byscore=True,
                    offset=stay,
                    num=PAGE,
                )
                stay += sum(not _put_back(self, tag, client) for tag in found)
                if len(found) < PAGE:
                    break
        except ResponseError as problem:
            if not is_wrong_type(problem):
                raise
            _tell(self.channel, self.unacked_index_key, ZSET, NOT_PUT_BACK)
            _tell(self.channel, self.unacked_key, HASH, NOT_PUT_BACK)
        else:
            for key in (self.unacked_index_key, self.unacked_key):
                _wrong_types.resolve(self.channel.global_keyprefix + key)


def _put_back(qos: Any, tag: bytes, client: Any) -> bool:
    """Whether it was put back, or is not there any more."""
    try:
        qos.restore_by_tag(tag, client)
    except Odd as problem:
        said = repr(tag)[:200]
        _say_once(qos.unacked_key, said, f"not put back, and stays there: {problem}")
        return False
    except NoPermissionError:
        _say_refused()
        return False
    return True


@cache
def _say_refused() -> None:
    """Log it once, although kombu tries again and again."""
    logger.warning(
        "kombu's unacked holds a message of a queue that this process' Redis user may not write "
        "to: it stays there until a worker of that queue puts it back"
    )


def _restore_by_tag(self: Any, tag: Any, client: Any = None, leftmost: bool = False) -> None:
    """QoS.restore_by_tag, but raises Odd for what cannot be put back, which stays there."""

    def restore(pipe: Any) -> None:
        record = pipe.hget(self.unacked_key, tag)
        keys, message = _destination(self.channel, pipe, record) if record else ([], "")
        pipe.multi()
        self._remove_from_indices(tag, pipe)
        for key in keys:
            (pipe.lpush if leftmost else pipe.rpush)(key, message)

    with self.channel.conn_or_acquire(client) as connected:
        connected.transaction(restore, self.unacked_key)


def _destination(channel: Any, pipe: Any, record: bytes) -> tuple[list[str], str]:
    """The keys of a record's queues, and its message. Raises Odd."""
    parts = _parsed(record)
    if not isinstance(parts, list) or len(parts) != 3:
        raise Odd("it is no message with an exchange and a routing key")
    message, exchange, routing_key = parts
    if not isinstance(exchange, str) or not isinstance(routing_key, str):
        raise Odd("its exchange or routing key is no string")
    if not isinstance(message, dict) or not isinstance(message.get("headers"), dict):
        raise Odd("its message has no headers")
    info = (message.get("properties") or {}) if isinstance(message.get("properties"), dict) else {}
    if not isinstance(info.get("delivery_info"), dict):
        raise Odd("its message has no delivery_info")
    message["headers"]["redelivered"] = info["delivery_info"]["redelivered"] = True
    priority = channel._get_message_priority(message, reverse=False)
    keys = [channel._q_for_pri(each, priority) for each in channel._lookup(exchange, routing_key)]
    if not keys:
        raise Odd(f"no queue is bound to {exchange[:200]!r} by {routing_key[:200]!r}")
    for key in keys:
        kind = bytes_to_str(pipe.type(channel.global_keyprefix + key))
        if kind not in (LIST, "none"):
            raise Odd(f"{key[:200]!r} is a {kind}; expected a {LIST}")
    return keys, json.dumps(message)
