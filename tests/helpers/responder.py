"""A thread that stands in for a worker: it takes messages, echoes them, and stores the results.

It speaks the client's side of the protocol only (lists, metas, reply channels), with none of a
worker's guarantees, so that the producer's tests can make it slow, silent or wrong.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import msgpack
import redis

from helpers.scoped import Scoped
from inferq.shared import codec
from inferq.shared.errors import InferqError, PayloadExpired
from inferq.shared.names import Names
from inferq.shared.schema import Array, ModelAdvert, Signature, TensorSpec

#: The name of its connection, in CLIENT LIST.
RESPONDER = "responder"
DONE_AT = "2026-01-01T00:00:00+00:00"
RECEIPT = {
    "queue_ms": 1.0, "form_ms": 0.0, "compute_ms": 0.0, "settle_ms": 0.0, "batch_size": 1,
    "padding": 0, "requests": 1, "worker": "stand-in", "engine": "echo", "model": "echo",
    "version": 1, "attempt": 1,
}  # fmt: skip


def advert(name: str = "echo", **given: Any) -> ModelAdvert:
    """x: float32[batch, 4] → x, up to 8 rows."""
    spec = TensorSpec(name="x", dtype="float32", shape=("batch", 4))
    fields: dict[str, Any] = {
        "name": name, "version": 1, "engine": "echo",
        "signature": Signature(inputs=(spec,), outputs=(spec,)), "max_batch_size": 8,
        "batchable": True, "max_queue_depth": 0, "max_request_bytes": 1 << 30,
        "default_priority": 0, "default_timeout_ms": 0, "seconds_per_row": 0.0,
    }  # fmt: skip
    return ModelAdvert(**{**fields, **given})


def announce(client: redis.Redis, model: ModelAdvert, *, live: bool = True) -> None:
    """What a worker's lease thread stores: the advert, and (if `live`) a lease of an hour."""
    names = Names()
    client.set(names.model(model.name), codec.encode_advert(model))
    client.delete(names.serving(model.name))
    if live:
        seconds, _ = client.time()
        client.zadd(names.serving(model.name), {"stand-in": (seconds + 3600) * 1000})


@dataclass
class Seen:
    """One message that was taken."""

    headers: codec.Headers
    priority: int | None
    inputs: dict[str, Array]
    raw: bytes
    payload_keys: list[str] = field(default_factory=list)


class Responder(Scoped):
    """``with Responder(url) as responder``: echoes `models` until the end of the block.

    `answer` makes a message's outputs, or raises the error that its result shall be; None leaves
    it without a result. While `paused`, messages stay in their lists.
    """

    def __init__(
        self,
        url: str,
        models: Iterable[str] = ("echo",),
        answer: Callable[[Seen], dict[str, Array] | None] = lambda seen: seen.inputs,
        *,
        block: int = 32,
        tell: bool = True,
    ) -> None:
        self._client = redis.Redis.from_url(url, socket_timeout=5, client_name=RESPONDER)
        self._names = Names()
        self._queues = [self._names.queue(model, step) for step in (0, 3, 6, 9) for model in models]
        self._answer = answer
        self._block = block
        self._tell = tell
        self._ending = threading.Event()
        self._running = threading.Event()
        self._running.set()
        self._paused = threading.Event()
        self._thread = threading.Thread(target=self._run, name="responder")
        self.seen: list[Seen] = []

    def _begin(self) -> None:
        self._thread.start()

    def _end(self) -> None:
        self._ending.set()
        self._running.set()
        self._thread.join(20)
        self._client.close()

    def pause(self) -> None:
        """Take nothing more; on return, nothing is in hand either."""
        self._paused.clear()
        self._running.clear()
        assert self._paused.wait(20)

    def resume(self) -> None:
        self._running.set()

    def _run(self) -> None:
        while not self._ending.is_set():
            if not self._running.is_set():
                self._paused.set()
                self._running.wait()
            try:
                if not self._serve():
                    time.sleep(0.001)
            except redis.RedisError:
                time.sleep(0.02)

    def _serve(self) -> bool:
        for queue in self._queues:
            raws: Any = self._client.rpop(queue, self._block)
            if raws:
                self._settle(raws)
                return True
        return False

    def _settle(self, raws: Iterable[bytes]) -> None:
        pipe = self._client.pipeline(transaction=True)
        replies: dict[str, list[str]] = defaultdict(list)
        for raw in raws:
            envelope = codec.decode_envelope(raw)
            request_id = envelope.headers.id
            try:
                meta = self._meta(request_id, self._see(envelope, raw))
            except InferqError as error:
                meta = codec.encode_failure(request_id, error, DONE_AT)
            if meta is None:
                continue
            pipe.set(self._names.meta(request_id), meta, ex=600, nx=True)
            if envelope.headers.inferq_reply:
                replies[envelope.headers.inferq_reply].append(request_id)
        if self._tell:
            for channel, ids in replies.items():
                pipe.publish(channel, msgpack.packb(ids))
        pipe.execute()

    def _meta(self, request_id: str, seen: Seen) -> bytes | None:
        outputs = self._answer(seen)
        if outputs is None:
            return None
        return codec.encode_success(request_id, outputs, RECEIPT, DONE_AT)

    def _see(self, envelope: codec.Envelope, raw: bytes) -> Seen:
        inputs: dict[str, Array] = {}
        keys = []
        for name, tensor in codec.decode_body(envelope).kwargs["inputs"].items():
            key = codec.reference_of(tensor)
            if key is not None:
                keys.append(key)
                data = self._client.get(key)
                if data is None:
                    raise PayloadExpired(f"payload {key} is gone")
                tensor = {**tensor, "data": data}  # noqa: PLW2901
            inputs[name] = codec.decode_tensor(name, tensor)
        seen = Seen(envelope.headers, envelope.properties.priority, inputs, raw, keys)
        self.seen.append(seen)
        return seen
