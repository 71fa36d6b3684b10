"""What a backend service imports: clients that submit requests and return arrays."""

from inferq.producer.aio import AsyncClient
from inferq.producer.client import Client
from inferq.producer.pending import AsyncPending, Pending, Result, State
from inferq.shared.errors import (
    Cancelled,
    ClientClosed,
    ConfigError,
    DeadLettered,
    DeadlineExceeded,
    EngineError,
    FatalEngineError,
    InferqError,
    InvalidInput,
    ModelNotFound,
    PayloadExpired,
    PayloadTooLarge,
    QueueFull,
    RedisUnavailable,
    RequestError,
    ResultExpired,
    ResultTimeout,
)
from inferq.shared.schema import Receipt
from inferq.shared.settings import Settings

__all__ = [
    "AsyncClient", "AsyncPending", "Cancelled", "Client", "ClientClosed", "ConfigError",
    "DeadLettered", "DeadlineExceeded", "EngineError", "FatalEngineError", "InferqError",
    "InvalidInput", "ModelNotFound", "PayloadExpired", "PayloadTooLarge", "Pending", "QueueFull",
    "Receipt", "RedisUnavailable", "RequestError", "Result", "ResultExpired", "ResultTimeout",
    "Settings", "State",
]  # fmt: skip
