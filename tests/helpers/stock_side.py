"""The stock side: a Celery application that never heard of inferq, as another team would write it.

``celery -A stock_side worker`` runs its plain tasks. Run as a program it is a producer that runs
the functions sent to its standard input, in the namespace of this module: see `stock.Side`.

It imports nothing of inferq, and says so with every answer. Where it is only imported for its
names, by the tests, it connects to nothing.
"""

from __future__ import annotations

import base64
import json
import os
import struct
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any

from celery import Celery, Signature, chain, chord, group
from celery.result import AsyncResult
from kombu.utils.uuid import uuid

__all__ = [
    "CONTENT", "WAIT_S", "AsyncResult", "app", "chain", "chord", "ending", "forge", "group",
    "infer", "inputs", "noted", "numbers", "plain", "send", "tensor", "time", "uuid", "values",
]  # fmt: skip

#: Seconds that a result may take.
WAIT_S = 30.0
#: How this application is configured: json, which is Celery untouched, or msgpack.
CONTENT = os.environ.get("STOCK_CONTENT", "json")

# Broker and result backend come from CELERY_BROKER_URL and CELERY_RESULT_BACKEND.
app = Celery("stock")
if CONTENT == "msgpack":
    app.conf.update(
        accept_content=["json", "msgpack"], task_serializer="msgpack", result_serializer="msgpack"
    )


# --- what it asks for ----------------------------------------------------------------------------


def tensor(row: list[float]) -> dict[str, Any]:
    """One row of float32 as this application's serialiser can hold it."""
    data = struct.pack(f"<{len(row)}f", *row)
    return {
        "dtype": "<f4",
        "shape": [1, len(row)],
        "data": data if CONTENT == "msgpack" else base64.b64encode(data).decode(),
    }


def inputs(n: float) -> dict[str, Any]:
    """The inputs of a request that can be told from all others."""
    return {"x": tensor([n, n, n, n])}


def send(model: str, n: float, **options: Any) -> AsyncResult:
    """Ask `model` for the echo of `n`."""
    return app.send_task(
        "inferq.infer",
        kwargs={"model": model, "inputs": inputs(n)},
        queue=f"inferq.{model}",
        **options,
    )


def forge(
    model: str, content_type: str | None = None, body: bytes | None = None, **headers: Any
) -> AsyncResult:
    """Send what Celery's own producer would not: another client of its protocol might."""
    task_id = uuid()
    kwargs = {"model": model, "inputs": inputs(1)}
    message = app.amqp.as_task_v2(task_id, "inferq.infer", kwargs=kwargs)
    encoding = {"content_type": content_type, "content_encoding": "utf-8"} if content_type else {}
    with app.producer_pool.acquire() as producer:
        producer.publish(
            message.body if body is None else body,
            exchange="",
            routing_key=f"inferq.{model}",
            headers={**message.headers, **headers},
            serializer=app.conf.task_serializer,
            **message.properties,
            **encoding,
        )
    return app.AsyncResult(task_id)


def infer(model: str, n: float | None = None) -> Signature:
    """The same as a signature; without `n` the inputs are its first argument."""
    kwargs = {"model": model} if n is None else {"model": model, "inputs": inputs(n)}
    return app.signature("inferq.infer", kwargs=kwargs, queue=f"inferq.{model}")


def plain(task: str, *args: Any) -> Signature:
    """A signature of one of the plain tasks below."""
    return app.signature(f"stock.{task}", args=args, queue=f"plain.{CONTENT}")


# --- how it reads what comes back ----------------------------------------------------------------


def numbers(data: Any) -> Iterator[float]:
    """All numbers of a tensor's data: bytes, base64 text or nested lists."""
    if isinstance(data, str):
        data = base64.b64decode(data)
    if isinstance(data, bytes):
        yield from struct.unpack(f"<{len(data) // 4}f", data)
    elif isinstance(data, list):
        for part in data:
            yield from numbers(part)
    else:
        yield data


def values(outputs: dict[str, Any]) -> list[float]:
    """The numbers of an echo."""
    return list(numbers(outputs["x"]["data"]))


def ending(result: AsyncResult) -> list[str]:
    """State, exception's class name and message of a request, once it has ended."""
    problem = result.get(timeout=WAIT_S, propagate=False)
    return [result.state, type(problem).__name__, str(problem)]


def noted(key: str) -> Any:
    """What the task `note` has put under `key`; waits for it."""
    found = app.backend.client.blpop([key], timeout=WAIT_S)
    assert found is not None, f"nothing was noted under {key}"
    return json.loads(found[1])


# --- plain tasks ---------------------------------------------------------------------------------


@app.task(name="stock.inputs")  # type: ignore[untyped-decorator]
def make_inputs(n: float) -> dict[str, Any]:
    """The inputs of a request: what a chain into inferq hands on."""
    return inputs(n)


@app.task(name="stock.total")  # type: ignore[untyped-decorator]
def total(outputs: dict[str, Any]) -> float:
    """The sum of an echo: what a chain or a link from inferq hands on."""
    return sum(values(outputs))


@app.task(name="stock.totals")  # type: ignore[untyped-decorator]
def totals(parts: list[Any]) -> list[Any]:
    """The sums of a chord's parts, of which some may be plain numbers, or groups' lists."""
    return [
        totals(part) if isinstance(part, list) else total(part) if isinstance(part, dict) else part
        for part in parts
    ]


@app.task(name="stock.merge")  # type: ignore[untyped-decorator]
def merge(parts: list[Any]) -> dict[str, Any]:
    """The inputs of a request, made from a chord's parts."""
    return inputs(sum(totals(parts)))


@app.task(name="stock.plus")  # type: ignore[untyped-decorator]
def plus(a: float, b: float) -> float:
    """A part of a chord that is no request."""
    return a + b


@app.task(name="stock.fail")  # type: ignore[untyped-decorator]
def fail() -> None:
    """A part that fails."""
    raise ValueError("asked to fail")


@app.task(name="stock.note")  # type: ignore[untyped-decorator]
def note(outputs: dict[str, Any], key: str) -> None:
    """A link: puts the sum where `noted` finds it."""
    app.backend.client.rpush(key, json.dumps(total(outputs)))


@app.task(name="stock.note_error")  # type: ignore[untyped-decorator]
def note_error(task_id: str, key: str) -> None:
    """A link_error, as Celery's guide has it: it is given the id and reads the error itself."""
    result = app.AsyncResult(task_id)
    app.backend.client.rpush(key, json.dumps([result.state, type(result.result).__name__]))


# --- running what the tests send -----------------------------------------------------------------


def main() -> None:
    """Run functions, one a line: ``{"source", "name", "args"}`` → ``{"value" | "error", …}``."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        call = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            exec(call["source"], globals())
            answer["value"] = globals()[call["name"]](*call["args"])
        except Exception:  # noqa: BLE001 - whatever it is, the test is told
            answer["error"] = traceback.format_exc()
        answer["inferq"] = [name for name in sys.modules if name.split(".")[0] == "inferq"]
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
