"""What inferq uses of Celery's canvas 5.7 beyond its public interface, all of it.

tests/integration/test_celery_private.py fails when an upgrade changes any of this.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any, Protocol
from uuid import uuid4

import msgspec
import pybase64
from celery import Celery, Task, states
from celery.app.amqp import AMQP
from celery.app.task import Context
from celery.canvas import Signature, _chain, _chord, group, maybe_signature
from celery.exceptions import ChordError, TaskRevokedError
from kombu import Producer
from kombu.serialization import dumps
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import dumps as to_json
from msgpack import packb

from inferq.shared.codec.content import MSGPACK

#: Headers that are Celery's and kombu's own.
HEADERS = frozenset(
    {
        "lang", "task", "id", "shadow", "eta", "expires", "group", "group_index", "retries",
        "timelimit", "root_id", "parent_id", "argsrepr", "kwargsrepr", "origin", "ignore_result",
        "replaced_task_nesting", "stamped_headers", "stamps", "compression",
    }
)  # fmt: skip
#: Every keyword that Celery and kombu take on a signature's way, to whatever end.
KEYWORDS = frozenset(
    name
    for taker in (
        Celery.send_task, AMQP.as_task_v2, Signature.__init__, Signature.apply_async,
        Signature.freeze, _chain.run, _chain.prepare_steps, group.apply_async, group._apply_tasks,
        _chord.apply_async, _chord.run, Task.apply_async, Producer.publish, Producer._publish,
    )
    for name in inspect.signature(taker).parameters
) | {
    "chord", "chain", "queue", "retry", "retry_policy", "serializer", "compression", "declare",
    "headers", "exchange", "exchange_type", "routing_key", "event_dispatcher", "stamped_headers",
    "use_link", "task_type", "delivery_info", "expiration",
}  # fmt: skip


def context_of(
    place: Mapping[str, Any],
    *,
    callbacks: Sequence[Any] | None,
    errbacks: Sequence[Any] | None,
    chain: Sequence[Any] | None,
    chord: Mapping[str, Any] | None,
) -> Context:
    """Celery's view of a request, for its canvas; `place`: those of its headers that tell where it
    stands (id, group, group_index, root_id, parent_id).
    """
    return Context(
        place,
        args=[],
        kwargs={},
        delivery_info={},
        called_directly=False,
        callbacks=callbacks,
        errbacks=errbacks,
        chain=chain,
        chord=chord,
    )


def await_no_results(app: Celery) -> None:
    """Have `app` not subscribe to the result of any task that this thread sends with it.

    Celery would do so before it sends one, and where Redis is away raise a RuntimeError after 20 s;
    and for each of a group, before it sends them. Of each thread, as its backend is.
    """
    app.backend.on_task_call = lambda _producer, _task_id: None
    app.backend.add_pending_result = lambda result, **_: result


class ChordKeys(msgspec.Struct, frozen=True):
    """Where Celery keeps what a chord's body waits for."""

    #: The ids of its header, if there are groups in it.
    header: str
    #: What each part came to.
    parts: str


def chord_keys(app: Celery, group_id: str) -> ChordKeys:
    key = app.backend.get_key_for_group
    return ChordKeys(*(bytes_to_str(key(group_id, end)) for end in ("", ".j")))


def result_key(app: Celery, task_id: str) -> str:
    return str(bytes_to_str(app.backend.get_key_for_task(task_id)))


def chord_part(app: Celery, raw: bytes, *, in_groups: bool) -> tuple[str, Any]:
    """The id of a chord's part, and what it came to. It raises why the part failed.

    `in_groups`: as Celery does where groups stand in the header: it raises the very error.
    """
    backend = app.backend
    _, task_id, state, result = backend.decode(raw)
    if in_groups:
        return task_id, _come_to(backend.meta_from_decoded({"status": state, "result": result}))
    return task_id, backend._unpack_chord_result((1, task_id, state, result), tuple)


def stored_part(app: Celery, task_id: str, raw: bytes | None) -> Any:
    """What is stored of a chord's part. ChordError: that is nothing."""
    meta = app.backend.decode_result(raw) if raw is not None else None
    if meta is None or meta["status"] not in states.READY_STATES:
        raise ChordError(f"Join error: there is no result of {task_id}")
    return _come_to(meta)


def _come_to(meta: Mapping[str, Any]) -> Any:
    result = meta["result"]
    if meta["status"] in states.PROPAGATE_STATES:
        raise result if isinstance(result, Exception) else ChordError(f"Join error: {result!r}")
    return result


class Header(msgspec.Struct, frozen=True):
    """A chord's header as Celery saves it: of groups, all that is in them; ids else."""

    tasks: list[Any]

    def ids(self) -> Iterator[str]:
        """Those of all tasks whose results are asked for."""
        waiting = list(self.tasks)
        while waiting:
            (task_id, _), inside = waiting.pop()
            if inside is None:
                yield task_id
            else:
                waiting += inside

    def filled(self, results: Mapping[str, Any]) -> list[Any]:
        """The results, by id, in the place of each task."""
        return [
            results[task_id] if inside is None else Header(inside).filled(results)
            for (task_id, _), inside in self.tasks
        ]


def saved_header(app: Celery, raw: bytes) -> Header:
    (_, tasks) = app.backend.decode(raw)["result"]
    return Header(tasks)


class _HeaderResult:
    """Stands for the result of a chord's header, which Celery joins. See `join_by`."""

    supports_native_join = True

    def __init__(self, results: Callable[[], list[Any]]) -> None:
        self._results = results

    def on_ready(self) -> None:
        """Celery waits for nothing after this."""

    def join_native(self, **_: object) -> list[Any]:
        return self._results()


def join_by(app: Celery, results: Callable[[str], list[Any]]) -> None:
    """Have `app` ask `results`, by a chord's group id, what its parts came to; of this thread.

    Celery itself reads all of them in one piece, and waits for those of groups.
    """
    app.backend.restore_group = lambda group_id: _HeaderResult(partial(results, group_id))


def store_by(app: Celery, store: Callable[[str, bytes], None]) -> None:
    """Have what `app`'s backend stores of tasks go through `store`, by key; of this thread.

    Celery writes over whatever stands there but a SUCCESS.
    """
    backend = app.backend

    def set_with_state(key: str | bytes, value: str | bytes, _state: str) -> None:
        store(
            key.decode() if isinstance(key, bytes) else key,
            value.encode() if isinstance(value, str) else value,
        )

    backend._set_with_state = set_with_state


class Claims(Protocol):
    """See `chord_claims`."""

    #: Whether the present claim is to stay.
    stays: bool

    @property
    def token(self) -> str: ...

    def free(self, key: str | bytes) -> bool: ...


def claim_by(app: Celery, claims: Claims) -> None:
    """Have `app` claim chords' bodies by the token of `claims`; of this thread.

    Celery makes up a token each time, so that none can tell whose a claim is.
    """
    backend = app.backend
    if vars(backend).get("_claims") is claims:
        return
    backend._claims = claims
    count = backend._chord_part_return_script
    extend = backend._chord_claim_extend_script
    clean = backend._chord_cleanup_script

    def counted(keys: list[str], args: list[Any], client: object) -> Any:
        given = [*args[:-1], claims.token]
        found = count(keys=keys, args=given, client=client)
        ready, more, size, claimed = found
        whole = size and ready == int(size) + int(more or 0)
        if whole and not claimed and claims.free(keys[-1]):
            found = count(keys=keys, args=given, client=client)
        return found

    def extended(keys: list[str], args: list[Any], client: object) -> Any:
        return extend(keys=keys, args=[claims.token, *args[1:]], client=client)

    def cleaned(keys: list[str], args: list[Any], client: object) -> Any:
        if claims.stays:
            return True
        return clean(keys=keys, args=[claims.token, *args[1:]], client=client)

    backend._chord_part_return_script = counted
    backend._chord_claim_extend_script = extended
    backend._chord_cleanup_script = cleaned


class _Router:
    """Leaves a queue the name that it is. Celery's keeps an object of each name for good."""

    def __init__(self, default: str) -> None:
        self._default = default

    def route(self, options: dict[str, Any], *_: object) -> dict[str, Any]:
        return {**options, "queue": options.get("queue") or self._default}


class _Nowhere:
    """Stands for kombu's producer, of which no canvas needs more."""

    connection = SimpleNamespace(_reraise_as_library_errors=nullcontext)


def _dumped(body: object, serializer: str) -> tuple[str, str, str | bytes]:
    """As kombu's `dumps`, with the groups in it written whole.

    The length of one of Celery's groups is that of its tasks, for which msgpack takes the number of
    its keys.
    """
    if serializer == "msgpack":
        packed: bytes = packb(body, use_bin_type=True, strict_types=True, default=_plain)
        return MSGPACK, "binary", packed
    written: tuple[str, str, str | bytes] = dumps(body, serializer=serializer)
    return written


def _plain(value: object) -> object:
    """`value`, of a class of its own, as what it is a kind of."""
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, str):
        return str(value)
    raise TypeError(f"{value!r:.100} is of {type(value).__name__}; expected what msgpack holds")


class Published(msgspec.Struct, frozen=True):
    """A message as kombu's Redis transport writes it, and where it is to go."""

    queue: str
    priority: int
    message: bytes


def divert(
    app: Celery, take: Callable[[Published], None], push: Callable[[Callable[[], object]], None]
) -> None:
    """Have each message that `app` is to publish go to `take`, and never to kombu.

    kombu shares its connections, and what it knows of queues, among all of a process, and keeps
    all that it is given. `push` is called with what publishes a chord's body, which is to be in
    Redis when it returns. No task runs in this process: `app` knows none.
    """

    def push_at_once(publish: Callable[..., object], *args: object) -> None:
        push(lambda: publish(*args))

    app.finalize()
    app.tasks.clear()
    app.amqp.router = _Router(app.conf.task_default_queue)
    app.amqp._retry_publish = push_at_once
    app.producer_or_acquire = lambda _=None: nullcontext(_Nowhere)

    def send(
        _producer: object,
        _name: str,
        message: Any,
        queue: str,
        priority: int = 0,
        expiration: float | None = None,
        headers: Mapping[str, Any] | None = None,
        **_: object,
    ) -> None:
        properties = dict(message.properties)
        if expiration is not None:
            properties["expiration"] = str(int(expiration * 1000))
        told = {**message.headers, **(headers or {})}
        kind, encoding, body = _dumped(message.body, app.conf.task_serializer)
        envelope = {
            "body": pybase64.b64encode_as_string(body.encode() if isinstance(body, str) else body),
            "content-encoding": encoding,
            "content-type": kind,
            "headers": told,
            "properties": {
                **properties,
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": queue},
                "priority": priority,
                "body_encoding": "base64",
                "delivery_tag": str(uuid4()),
            },
        }
        take(Published(queue, priority, to_json(envelope).encode()))

    app.amqp.send_task_message = send


def be_current(app: Celery) -> None:
    """Have this thread's signatures belong to `app` where Celery forgets whose they are."""
    app.set_current()


def publish_success(app: Celery, request: Context, result: object) -> None:
    """Publish links and the rest of a chain, as celery.app.trace does after a task's success."""
    origin = {"parent_id": request.id, "root_id": request.root_id or request.id}
    signatures = [maybe_signature(each, app=app) for each in request.callbacks or ()]
    groups = [each for each in signatures if isinstance(each, group)]
    others = [each for each in signatures if not isinstance(each, group)]
    if len(others) > 1:
        others = [group(others, app=app)]
    for each in groups + others:
        each.apply_async((result,), **origin)
    if request.chain:
        following = maybe_signature(request.chain[-1], app=app)
        following.apply_async((result,), chain=request.chain[:-1], **origin)


def finish_chord(app: Celery, request: Context, status: str, result: object) -> None:
    """Count this request as a finished part of its chord, which may start the chord's body."""
    if request.chord:
        app.backend.on_chord_part_return(request, status, result)


def publish_failure(app: Celery, request: Context, error: Exception) -> None:
    """Fail the rest of the chain and call errbacks, as Backend.mark_as_failure does."""
    app.backend._fail_chain(request.chain, error, None, store_result=True, state=states.FAILURE)
    if request.errbacks:
        app.backend._call_task_errbacks(request, error, None)


def revoked_error(reason: str) -> TaskRevokedError:
    return TaskRevokedError(reason)
