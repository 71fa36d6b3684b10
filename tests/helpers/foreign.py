"""Foreign tasks on a model's queue, and their results."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import redis as redis_py

from helpers.envelopes import JSON, envelope
from helpers.repository import message, numbered
from helpers.results import meta_of, outputs_of
from inferq.shared.names import Names

NAMES = Names()
QUEUE = NAMES.queue("m")
WAIT_S = 30.0
#: What Celery registers in every app, and no stranger may have run.
BUILTINS = (
    "celery.accumulate", "celery.backend_cleanup", "celery.chain", "celery.chord",
    "celery.chord_unlock", "celery.chunks", "celery.group", "celery.map", "celery.starmap",
)  # fmt: skip


def foreign(
    request_id: str,
    task: str = "someone.elses",
    *,
    args: object = (),
    kwargs: object = None,
    embed: object = None,
    **given: Any,
) -> bytes:
    """Another task, as a stock application sends it, unless `given` says otherwise."""
    headers = {"id": request_id, "task": task, **given.pop("headers", {})}
    content = json.dumps([args, kwargs or {}, embed]).encode()
    return envelope(content, kind=JSON, headers=headers, request_id=request_id, **given)


def result_of(store: redis_py.Redis, request_id: str) -> tuple[str, list[str]]:
    """The class and the arguments of the error that a task is answered with."""
    meta = meta_of(store, request_id)
    assert meta["status"] == "FAILURE", meta
    return meta["result"]["exc_type"], meta["result"]["exc_message"]


def serves(producer: redis_py.Redis, store: redis_py.Redis) -> None:
    request_id, raw = message("m", numbered(7))
    producer.lpush(QUEUE, raw)
    np.testing.assert_array_equal(outputs_of(store, request_id)["x"], numbered(7))
