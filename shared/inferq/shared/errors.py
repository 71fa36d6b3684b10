"""Every error inferq raises, on either side of the queue.

    InferqError
    ├── RequestError            the request itself cannot be served
    │   ├── ModelNotFound       no worker serves, or ever announced, this model
    │   ├── InvalidInput        an input's name, dtype, shape or content is wrong
    │   ├── NotRegistered       another task than inferq's, which this worker does not run
    │   ├── PayloadTooLarge     the request or its result exceeds a size limit
    │   └── PayloadExpired      a claim-checked payload was gone before it was read
    ├── QueueFull               admission refused: max_queue_depth or max_queue_bytes is reached
    ├── DeadlineExceeded        timeout_ms passed before the request was computed
    ├── Cancelled               revoked by the client, or past its `expires`
    ├── EngineError             the engine raised on this request
    │   └── FatalEngineError    the engine is beyond use; the worker process ends
    ├── DeadLettered            killed its worker max_attempts times, or is no message at all
    ├── ResultExpired           the result was stored and has been dropped since
    ├── ResultTimeout           the caller stopped waiting; the request goes on
    ├── RedisUnavailable        Redis could not be reached; nothing was accepted
    ├── ClientClosed            the client was closed before the result came
    └── ConfigError             a setting, model.toml or command line is wrong

Each class has a wire code. An error travels in the ``result`` field of Celery's result meta, in
Celery's own form (``exc_type``, ``exc_message``, ``exc_module``) plus ``code``, so a stock
``AsyncResult.get()`` raises an exception of the same name, and our client one of the same class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

#: Longest message that is sent over the wire; the rest is cut.
MAX_MESSAGE_CHARS = 2_000


class InferqError(Exception):
    """Root of the tree. ``detail`` holds values for programs, in plain types."""

    code: ClassVar[str] = "error"
    #: Where stock Celery finds the class, if it can be imported there.
    module: ClassVar[str] = __name__

    def __init__(self, message: str, **detail: Any) -> None:
        super().__init__(message)
        self.message = message
        self.detail: dict[str, Any] = detail


class RequestError(InferqError):
    """The request itself cannot be served; sending it again unchanged does not help."""

    code = "request_error"


class ModelNotFound(RequestError):
    """No worker serves, or has announced in the last day, the model asked for."""

    code = "model_not_found"


class InvalidInput(RequestError):
    """An input's name, dtype, shape or content does not fit the model's signature."""

    code = "invalid_input"


class NotRegistered(RequestError):
    """Another task than inferq's. Stock Celery raises its own exception of this name."""

    code = "not_registered"
    module = "celery.exceptions"


class PayloadTooLarge(RequestError):
    """The request, or its result, is larger than the limit that the message names."""

    code = "payload_too_large"


class PayloadExpired(RequestError):
    """The claim-checked payload of the request was gone before a worker read it."""

    code = "payload_expired"


class QueueFull(InferqError):
    """Admission refused.

    ``detail``: ``depth`` and ``limit`` (requests), ``estimated_bytes`` and ``limit_bytes``,
    ``estimated_wait_s``.
    """

    code = "queue_full"


class DeadlineExceeded(InferqError):
    """``timeout_ms`` passed before the request was computed; it was not computed."""

    code = "deadline_exceeded"


class Cancelled(InferqError):
    """The request was revoked, or its Celery ``expires`` passed, before it was computed."""

    code = "cancelled"


class EngineError(InferqError):
    """The engine raised while it ran this request."""

    code = "engine_error"


class FatalEngineError(EngineError):
    """The engine cannot go on (a sticky CUDA error): the worker hands back its claims and ends."""

    code = "fatal_engine_error"


class DeadLettered(InferqError):
    """The request was put on the dead-letter list. ``detail``: ``attempts``, ``reason``."""

    code = "dead_lettered"


class ResultExpired(InferqError):
    """The result was stored, and dropped after ``result_expires``, before it was read."""

    code = "result_expired"


class ResultTimeout(InferqError, TimeoutError):
    """The caller's wait ran out. The request goes on; ``Pending.result()`` may be called again."""

    code = "result_timeout"


class RedisUnavailable(InferqError, ConnectionError):
    """Redis could not be reached or refused the push; nothing was accepted."""

    code = "redis_unavailable"


class ClientClosed(InferqError):
    """The client was closed, or its process forked, before the result came; the request goes on."""

    code = "client_closed"


class ConfigError(InferqError):
    """A setting, a model.toml or a command line is wrong; the message names place and value."""

    code = "config_error"


def _tree(root: type[InferqError]) -> dict[str, type[InferqError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found.update(_tree(child))
    return found


BY_CODE: Mapping[str, type[InferqError]] = _tree(InferqError)


def to_wire(error: InferqError) -> dict[str, Any]:
    """The ``result`` field of a FAILURE meta, readable by stock Celery."""
    wire: dict[str, Any] = {
        "exc_type": type(error).__name__,
        "exc_message": [error.message[:MAX_MESSAGE_CHARS]],
        "exc_module": error.module,
        "code": error.code,
    }
    if error.detail:
        wire["detail"] = error.detail
    return wire


def from_wire(status: str, wire: object) -> InferqError:
    """The error that a terminal, unsuccessful result meta stands for.

    `status` is the meta's (FAILURE or REVOKED), `wire` its ``result`` field. What another
    program stored (a plain Celery exception, say) becomes an EngineError, or Cancelled if REVOKED.
    """
    fields = wire if isinstance(wire, dict) else {}
    message = _text(fields.get("exc_message", ""))
    detail = fields.get("detail")
    known = {str(k): v for k, v in detail.items()} if isinstance(detail, dict) else {}
    code = fields.get("code")
    cls = BY_CODE.get(code) if isinstance(code, str) else None
    if cls is None:
        cls = Cancelled if status == "REVOKED" else EngineError
        kind = _text(fields.get("exc_type", status))
        message = f"{kind}: {message}" if message else status.lower()
    error = cls(message)
    error.detail = known
    return error


def _text(said: object) -> str:
    """A message as somebody stored it, whatever it is; its length is bounded."""
    parts = said if isinstance(said, list | tuple) else [said]
    try:
        return ", ".join(map(str, parts))[:MAX_MESSAGE_CHARS]
    except RecursionError:
        return "a message that is nested too deep"
