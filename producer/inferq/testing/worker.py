"""Answers requests in the caller's thread: reads the message, runs the model, writes the result."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from inferq.producer.outgoing import Outgoing
from inferq.shared import codec
from inferq.shared.errors import (
    ClientClosed,
    ConfigError,
    EngineError,
    InferqError,
    InvalidInput,
    ModelNotFound,
    PayloadTooLarge,
    QueueFull,
    RedisUnavailable,
    RequestError,
    ResultTimeout,
    from_wire,
    to_wire,
)
from inferq.shared.schema import Array, Receipt
from inferq.testing.models import ENGINE, VERSION, LoadedModel, Served, load

_log: Final = logging.getLogger(__name__)
#: The worker's name in receipts.
WORKER: Final = "inferq.testing"
#: What a client raises before it pushes a request.
_REFUSALS: Final = (
    ModelNotFound, InvalidInput, PayloadTooLarge, QueueFull, RedisUnavailable, ClientClosed,
    ConfigError,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class SeenRequest:
    """A request that passed the client's checks, as a worker reads it."""

    model: str
    #: Read-only.
    inputs: Mapping[str, Array]
    priority: int
    #: As the caller gave it; None: without a deadline.
    timeout_ms: float | None
    request_id: str


@dataclass
class _Fault:
    error: InferqError
    #: Requests that it is still for; None: all.
    left: int | None


class FakeWorker:
    """Serves some models. Any thread may use it."""

    def __init__(self, models: Mapping[str, Served]) -> None:
        self._models = load(models)
        self._seen: dict[str, list[SeenRequest]] = {name: [] for name in self._models}
        self._faults: dict[str, _Fault] = {}
        self._counting = threading.Lock()

    def announced(self) -> dict[str, bytes]:
        """Model → what a worker announces of it."""
        return {name: codec.encode_advert(each.advert) for name, each in self._models.items()}

    def answer(self, outgoing: Outgoing) -> bytes | None:
        """The stored result of a request; None: it has none, and will have none.

        Raises the error that the client's caller gets at once, if that is set.
        """
        model = self._models[outgoing.model]
        seen = _read(outgoing)
        error = self._note(seen)
        if isinstance(error, _REFUSALS):
            raise error
        if isinstance(error, ResultTimeout):
            return None
        date_done = datetime.now(UTC).isoformat()
        try:
            if error is not None:
                raise error
            began = time.monotonic()
            outputs = _run(model, seen)
            receipt = _receipt(model, seen, (time.monotonic() - began) * 1000)
            return codec.encode_success(seen.request_id, outputs, receipt, date_done)
        except InferqError as problem:
            return codec.encode_failure(seen.request_id, problem, date_done)

    def _note(self, seen: SeenRequest) -> InferqError | None:
        """Remember a request. Returns the error that is set for it: an object of its own."""
        with self._counting:
            self._seen[seen.model].append(seen)
            fault = self._faults.get(seen.model)
            if fault is None:
                return None
            if fault.left is not None:
                fault.left -= 1
                if not fault.left:
                    del self._faults[seen.model]
        return from_wire("FAILURE", to_wire(fault.error))

    # --- what a test sets and asks ----------------------------------------------------------------

    def fail(self, model: str, error: InferqError, times: int | None) -> None:
        """See `Controls.fails`."""
        self._check_known(model)
        if not isinstance(error, InferqError):
            raise ConfigError(
                f"error is {error!r:.100}; expected an InferqError, such as "
                'inferq.producer.DeadlineExceeded("…")'
            )
        if times is not None and (type(times) is not int or times < 1):
            raise ConfigError(f"times is {times!r:.100}; expected a whole number above 0, or None")
        with self._counting:
            self._faults[model] = _Fault(error, times)

    def recover(self, model: str) -> None:
        """See `Controls.recovers`."""
        self._check_known(model)
        with self._counting:
            self._faults.pop(model, None)

    def seen(self, model: str) -> list[SeenRequest]:
        """See `Controls.requests`."""
        self._check_known(model)
        with self._counting:
            return list(self._seen[model])

    def _check_known(self, model: str) -> None:
        if model not in self._models:
            names = ", ".join(map(repr, self._models)) or "none"
            raise ConfigError(
                f"model {model!r:.120} is none of this client; expected one of {names}"
            )


def _read(outgoing: Outgoing) -> SeenRequest:
    """What a worker reads of a message."""
    envelope = codec.decode_envelope(outgoing.message)
    headers, payloads = envelope.headers, dict(outgoing.payloads)
    given = codec.decode_body(envelope).kwargs
    unknown = sorted(given.keys() - {"inputs", "model"})
    if unknown:
        raise NotImplementedError(f"a fake worker does not know the argument {unknown[0]!r:.100}")
    inputs: dict[str, Array] = {}
    for name, tensor in given["inputs"].items():
        key = codec.reference_of(tensor)
        whole = tensor if key is None else {**tensor, "data": payloads[key]}
        inputs[name] = codec.decode_tensor(name, whole)
    sent, deadline = headers.inferq_sent_ms, headers.inferq_deadline_ms
    # The message holds both as Unix times, of which a double leaves fractions of a microsecond.
    timeout = None if deadline is None or sent is None else round(deadline - sent, 2)
    return SeenRequest(
        outgoing.model, inputs, envelope.properties.priority or 0, timeout, headers.id
    )


def _run(model: LoadedModel, seen: SeenRequest) -> dict[str, Array]:
    """The model's outputs, or the error that a worker gives this request."""
    try:
        return model.run(seen.inputs)
    except RequestError:
        raise
    except EngineError as problem:
        raise EngineError(problem.message) from problem
    except Exception as problem:
        _log.exception("model %s raised", model.name)
        raise EngineError(f"{type(problem).__name__}: {problem}") from problem


def _receipt(model: LoadedModel, seen: SeenRequest, compute_ms: float) -> dict[str, Any]:
    receipt = Receipt(
        queue_ms=0.0,
        form_ms=0.0,
        compute_ms=compute_ms,
        settle_ms=0.0,
        batch_size=model.rows(seen.inputs),
        padding=0,
        requests=1,
        worker=WORKER,
        engine=ENGINE,
        model=model.name,
        version=VERSION,
        attempt=1,
    )
    found: dict[str, Any] = msgspec.to_builtins(receipt)
    return found
