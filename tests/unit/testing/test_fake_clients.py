"""Fake clients: they are drop-in, their faults can be set, and they need nothing but themselves.

tests/integration/test_service_testing.py compares them with real clients and a worker.
"""

from __future__ import annotations

import asyncio
import inspect
import multiprocessing
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from inferq.model import Context, Model
from inferq.producer import (
    AsyncClient,
    Cancelled,
    Client,
    ClientClosed,
    ConfigError,
    DeadLettered,
    DeadlineExceeded,
    EngineError,
    InferqError,
    InvalidInput,
    ModelNotFound,
    PayloadTooLarge,
    Pending,
    QueueFull,
    RedisUnavailable,
    RequestError,
    Result,
    ResultTimeout,
    State,
    core,
)
from inferq.producer.dialogue import carry, look_up, push
from inferq.producer.outcome import outcome_of
from inferq.producer.outgoing import Outgoing
from inferq.producer.pending import Outcome, PendingRequest
from inferq.testing import FakeAsyncClient, FakeClient, FakeModel, fake_model
from inferq.testing.models import DEFAULT_MAX_BATCH_SIZE, DEFAULT_MAX_REQUEST_BYTES
from inferq.workers.models import config

ROOT = Path(__file__).parents[3]
X = np.arange(8, dtype=np.float32).reshape(2, 4)
ITEMS = [{"x": np.full((1, 4), n, np.float32)} for n in range(40)]
SPECS = {"x": "float32[batch, 4]"}


def double(**knobs: int) -> FakeModel:
    return fake_model(
        inputs=SPECS,
        outputs={"y": "float32[batch, 4]"},
        run=lambda inputs: {"y": inputs["x"] * 2},
        **knobs,
    )


def doubling() -> FakeClient:
    return FakeClient({"double": double()})


def works(client: FakeClient) -> bool:
    return bool((client.infer("double", {"x": X}).outputs["y"] == 2 * X).all())


class Scaled(Model):
    """Counts what it is asked."""

    inputs: ClassVar = SPECS
    outputs: ClassVar = {"y": "float32[batch, 4]"}

    scale = 0.0
    runs = 0

    def load(self, context: Context) -> None:
        self.scale = float(context.config.get("scale", 3.0))

    def run(self, inputs: dict[str, Any]) -> dict[str, Any]:
        self.runs += 1
        return {"y": inputs["x"] * np.float32(self.scale)}


# --- drop-in -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fake", "real"), [(FakeClient, Client), (FakeAsyncClient, AsyncClient)])
def test_every_public_method_has_the_signature_of_the_real_clients(fake: type, real: type) -> None:
    names = {name for name in dir(real) if not name.startswith("_")}
    assert {"submit", "infer", "map", "close"} <= names
    assert {name for name in dir(fake) if not name.startswith("_")} - names == {
        "fails", "recovers", "requests",
    }  # fmt: skip
    for name in names | {"__enter__", "__exit__", "__aenter__", "__aexit__"}:
        if hasattr(real, name):
            mine, theirs = getattr(fake, name), getattr(real, name)
            assert inspect.signature(mine) == inspect.signature(theirs), name
            assert inspect.iscoroutinefunction(mine) == inspect.iscoroutinefunction(theirs), name
    assert issubclass(fake, real)


def test_pending_requests_have_the_members_of_real_ones() -> None:
    with doubling() as client:
        pending = client.submit("double", {"x": X})
    assert isinstance(pending, Pending)
    fake = type(pending)
    assert vars(fake).keys() - {"result", "__module__", "__doc__", "__slots__"} == set()
    assert inspect.signature(fake.result) == inspect.signature(Pending.result)


def test_limits_are_by_default_those_of_model_toml() -> None:
    assert DEFAULT_MAX_BATCH_SIZE == config.DEFAULT_MAX_BATCH_SIZE
    assert DEFAULT_MAX_REQUEST_BYTES == config.DEFAULT_REQUEST_BYTES


def test_limits_of_a_model_are_checked() -> None:
    knobs = double(max_batch_size=1, max_request_bytes=32)
    with FakeClient({"double": knobs}) as client:
        with pytest.raises(InvalidInput, match=r"dim 0 of shape .* is 0; expected at least 1"):
            client.infer("double", {"x": X[:0]})
        assert client.requests("double") == []
        client.infer("double", {"x": X[:1]})
    with FakeClient({"double": double(max_batch_size=4, max_request_bytes=32)}) as client:
        with pytest.raises(PayloadTooLarge, match="48 bytes; expected at most 32"):
            client.infer("double", {"x": X[[0, 0, 0]]})
        assert client.requests("double") == []


def test_more_rows_than_a_batch_has_are_several_requests() -> None:
    with FakeClient({"double": double(max_batch_size=1)}) as client:
        np.testing.assert_array_equal(client.infer("double", {"x": X}).outputs["y"], 2 * X)
        assert len(client.requests("double")) == len(X)


# --- models --------------------------------------------------------------------------------------


def test_a_class_is_loaded_and_an_object_is_taken_as_it_is() -> None:
    mine = Scaled()
    mine.load(Context(Path(), config={"scale": 5.0}))
    with FakeClient({"class": Scaled, "object": mine, "known": FakeModel(mine, 2)}) as client:
        for model, scale in (("class", 3), ("object", 5), ("known", 5)):
            outputs = client.infer(model, {"x": X}).outputs
            assert outputs["y"].tolist() == (X * scale).tolist()
    assert mine.runs == 2


@pytest.mark.parametrize(
    ("models", "told"),
    [
        ([Scaled], r"models are \[.*; expected a mapping of name to model"),
        ({".x": Scaled}, r"model '\.x'; expected at most 100 letters"),
        ({"m": lambda inputs: inputs}, r"model 'm' is <function .*; expected a class that derives"),
        ({"m": int}, r"model 'm' is <class 'int'>; expected a class that derives"),
        ({"m": FakeModel(Scaled, 0)}, r"max_batch_size of model 'm' is 0; expected a whole number"),
        ({"m": Model}, r"class Model has no run"),
        (
            {"m": fake_model(inputs={"x": "float8[n]"}, outputs=SPECS, run=dict)},
            r"FakeModel\.inputs\['x'\] is 'float8\[n\]'; expected one of the dtypes",
        ),
    ],
)
def test_what_is_no_model_is_refused_by_name(models: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        FakeClient(models)


def test_a_model_that_is_not_batchable_has_any_rows() -> None:
    total = fake_model(
        inputs={"x": "float32[n]"},
        outputs={"sum": "float32[]"},
        run=lambda inputs: {"sum": inputs["x"].sum()},
    )
    with FakeClient({"total": total}) as client:
        result = client.infer("total", {"x": [1.0] * 100})
    assert result.outputs["sum"] == 100
    assert result.receipt is not None
    assert result.receipt.batch_size == 1


def test_an_answer_that_does_not_fit_is_an_engine_error_that_says_how() -> None:
    wrong = fake_model(inputs=SPECS, outputs={"y": "float32[batch]"}, run=lambda _: {"y": [1.0]})
    with (
        FakeClient({"wrong": wrong}) as client,
        pytest.raises(EngineError, match="output 'y' has 1 rows; expected 2, as the inputs"),
    ):
        client.infer("wrong", {"x": X})


def test_the_traceback_of_a_function_that_raises_is_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def run(inputs: dict[str, Any]) -> dict[str, Any]:
        raise LookupError("no such word")

    broken = fake_model(inputs=SPECS, outputs=SPECS, run=run)
    with FakeClient({"broken": broken}) as client:
        pending = client.submit("broken", {"x": X})
        assert pending.state == State.FAILED
        with pytest.raises(EngineError, match=r"^LookupError: no such word$"):
            pending.result()
    assert "model broken raised" in caplog.text
    assert "in run" in caplog.text


def test_results_keep_their_values_when_a_model_uses_its_memory_again() -> None:
    memory = np.zeros((2, 4), np.float32)

    def run(inputs: dict[str, Any]) -> dict[str, Any]:
        memory[:] = inputs["x"]
        return {"y": memory}

    echo = fake_model(inputs=SPECS, outputs={"y": "float32[batch, 4]"}, run=run)
    with FakeClient({"echo": echo}) as client:
        first = client.infer("echo", {"x": X})
        client.infer("echo", {"x": X + 1})
    assert first.outputs["y"].tolist() == X.tolist()


def test_a_model_may_ask_the_client_for_another() -> None:
    def run(inputs: dict[str, Any]) -> dict[str, Any]:
        return {"y": client.infer("double", {"x": inputs["x"]}).outputs["y"] + 1}

    outer = fake_model(inputs=SPECS, outputs={"y": "float32[batch, 4]"}, run=run)
    with FakeClient({"double": double(), "outer": outer}) as client:
        assert client.infer("outer", {"x": X}).outputs["y"].tolist() == (2 * X + 1).tolist()


# --- requests ------------------------------------------------------------------------------------


def test_requests_are_told_as_a_worker_reads_them() -> None:
    with doubling() as client:
        pending = client.submit("double", {"x": X.tolist()}, priority=4, timeout_ms=250.5)
        client.infer("double", {"x": X})
        with pytest.raises(InvalidInput):
            client.infer("double", {"x": X.astype(np.int8)})
        first, second = client.requests("double")
    assert (first.model, first.priority, first.timeout_ms) == ("double", 4, 250.5)
    assert first.request_id == pending.request_id
    np.testing.assert_array_equal(first.inputs["x"], X, strict=True)
    assert (second.priority, second.timeout_ms) == (0, None)


def test_what_a_caller_or_model_writes_later_is_not_in_the_requests() -> None:
    def run(inputs: dict[str, Any]) -> dict[str, Any]:
        inputs["x"][:] = -1
        return {"y": inputs["x"]}

    wide = {"x": "float32[batch, n]"}
    with FakeClient({"m": fake_model(inputs=wide, outputs={"y": wide["x"]}, run=run)}) as client:
        for size in (4, 30_000):  # the larger is claim-checked
            given = np.zeros((1, size), np.float32)
            client.infer("m", {"x": given})
            given[:] = 7
            assert not client.requests("m")[-1].inputs["x"].any()


# --- faults --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [ModelNotFound, InvalidInput, PayloadTooLarge, QueueFull, RedisUnavailable,
             ClientClosed, ConfigError]
)  # fmt: skip
def test_a_refusal_is_raised_by_submit(kind: type[InferqError]) -> None:
    with doubling() as client:
        error = kind("not now", depth=3)
        client.fails("double", error, times=2)
        for _ in range(2):
            with pytest.raises(kind, match="not now") as caught:
                client.submit("double", {"x": X})
            assert type(caught.value) is kind
            assert caught.value is not error
            assert caught.value.detail == {"depth": 3}
        assert works(client)
        assert len(client.requests("double")) == 3


@pytest.mark.parametrize(
    ("kind", "state"),
    [
        (DeadlineExceeded, State.FAILED), (EngineError, State.FAILED),
        (RequestError, State.FAILED), (DeadLettered, State.FAILED), (Cancelled, State.CANCELLED),
    ],
)  # fmt: skip
def test_any_other_error_is_the_result_of_the_request(
    kind: type[InferqError], state: State
) -> None:
    with doubling() as client:
        client.fails("double", kind("so it ended", attempts=3), times=1)
        pending = client.submit("double", {"x": X})
        assert (pending.done(), pending.state) == (True, state)
        with pytest.raises(kind, match="so it ended") as caught:
            pending.result()
        assert (type(caught.value), caught.value.detail) == (kind, {"attempts": 3})
        assert works(client)


def test_a_fault_without_a_number_lasts_until_the_model_recovers() -> None:
    with FakeClient({"double": double(), "other": double()}) as client:
        client.fails("double", EngineError("broken"))
        for _ in range(3):
            with pytest.raises(EngineError, match="broken"):
                client.infer("double", {"x": X})
        client.infer("other", {"x": X})
        client.recovers("double")
        client.recovers("double")
        assert works(client)


def test_a_later_fault_takes_the_place_of_an_earlier_one() -> None:
    with doubling() as client:
        client.fails("double", EngineError("first"))
        client.fails("double", EngineError("second"), times=1)
        with pytest.raises(EngineError, match="second"):
            client.infer("double", {"x": X})
        assert works(client)


def test_bad_input_is_told_before_a_fault_and_uses_none_up() -> None:
    with doubling() as client:
        client.fails("double", QueueFull("full"), times=1)
        with pytest.raises(InvalidInput):
            client.infer("double", {"x": X.astype(np.int8)})
        with pytest.raises(QueueFull):
            client.infer("double", {"x": X})


def test_a_request_that_is_never_answered_times_out_at_once_and_can_be_cancelled() -> None:
    began = time.monotonic()
    with doubling() as client:
        client.fails("double", ResultTimeout("…"), times=3)
        first, second, third = (client.submit("double", {"x": X}) for _ in range(3))
        assert (first.done(), first.state) == (False, State.QUEUED)
        with pytest.raises(ResultTimeout, match="queued and goes on"):
            first.result(timeout=None)
        assert first.cancel() is True
        assert first.state == State.CANCELLED
        with pytest.raises(Cancelled):
            first.result()
        assert works(client)
        assert not second.done()
    for pending in (second, third):
        with pytest.raises(ClientClosed, match="the client was closed"):
            pending.result()
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("in_flight", [1, 3, 256])
def test_map_meets_faults_at_their_places_and_waits_for_none(in_flight: int) -> None:
    kinds: list[type[InferqError]] = [ResultTimeout, DeadlineExceeded, RedisUnavailable]
    began = time.monotonic()
    for kind in kinds:
        with doubling() as client:
            client.fails("double", kind("…"), times=1)
            found = list(client.map("double", ITEMS, in_flight=in_flight, return_errors=True))
            failed = [type(each) for each in found if not isinstance(each, Result)]
            assert failed
            assert set(failed) == {kind}
            assert failed == [type(each) for each in found[: len(failed)]]
            if kind is not RedisUnavailable:  # of which a whole push has one
                assert len(failed) == 1
            for n, each in enumerate(found[len(failed) :], len(failed)):
                assert isinstance(each, Result)
                assert each.outputs["y"].tolist() == [[2.0 * n] * 4]
    assert time.monotonic() - began < 20


def test_map_waits_for_room_in_a_queue_that_was_full() -> None:
    with doubling() as client:
        client.fails("double", QueueFull("full"), times=1)
        assert len(list(client.map("double", ITEMS))) == len(ITEMS)
        client.fails("double", QueueFull("full"))
        found = list(client.map("double", ITEMS[:3], return_errors=True))
        assert [type(each) for each in found] == [QueueFull] * 3


@pytest.mark.parametrize(
    ("set_it", "told"),
    [
        (lambda c: c.fails("doubel", EngineError("")), "'doubel' is none .*; expected one of 'dou"),
        (lambda c: c.recovers("doubel"), "model 'doubel' is none of this client"),
        (lambda c: c.requests("doubel"), "model 'doubel' is none of this client"),
        (
            lambda c: c.fails("double", TimeoutError()),
            r"error is TimeoutError\(\); expected",
        ),
        (lambda c: c.fails("double", EngineError), "error is <class .*; expected an InferqError"),
        (lambda c: c.fails("double", EngineError(""), times=0), "times is 0; expected a whole"),
    ],
)
def test_a_fault_that_cannot_be_is_refused(set_it: Any, told: str) -> None:
    with doubling() as client:
        with pytest.raises(ConfigError, match=told):
            set_it(client)
        assert works(client)


# --- asyncio, threads, forks ---------------------------------------------------------------------


def test_many_tasks_may_share_an_async_client() -> None:
    async def ask() -> list[float]:
        async with FakeAsyncClient({"double": double()}) as client:
            found = await asyncio.gather(*(client.infer("double", item) for item in ITEMS))
            client.fails("double", ResultTimeout("…"), times=1)
            pending = await client.submit("double", {"x": X})
            with pytest.raises(ResultTimeout):
                await pending.result(timeout=None)
            assert await pending.cancel() is True
            client.fails("double", ResultTimeout("…"), times=1)
            late = [each async for each in client.map("double", ITEMS[:2], return_errors=True)]
            assert [type(each) for each in late] == [ResultTimeout, Result]
            return [float(each.outputs["y"][0, 0]) for each in found]

    assert asyncio.run(ask()) == [2.0 * n for n in range(40)]


def test_many_threads_may_share_a_client() -> None:
    def ask(n: int) -> list[float]:
        return [float(client.infer("double", item).outputs["y"][0, 0]) for item in ITEMS]

    with doubling() as client, ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(24))) == [[2.0 * n for n in range(40)]] * 24
        assert len(client.requests("double")) == 24 * 40


def test_a_request_is_resolved_when_submit_returns_also_if_another_thread_has_its_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    holds, goes_on = threading.Event(), threading.Event()

    def slowly(pending: PendingRequest, raw: bytes) -> Outcome | None:
        holds.set()
        assert goes_on.wait(60)
        return outcome_of(pending, raw)

    def push_it() -> bool:
        carry(push(session.core, [pending], view), session._call)
        return pending.done()

    monkeypatch.setattr(core, "outcome_of", slowly)
    with doubling() as client, ThreadPoolExecutor(2) as pool:
        session = client._session
        view = carry(look_up(session.core, "double"), session._call)
        pending = session.core.build(view, {"x": X}, None, None, session.make)
        other = pool.submit(works, client)
        assert holds.wait(60)
        mine = pool.submit(push_it)
        wait([mine], timeout=0.1)  # for so long it might return too early
        goes_on.set()
        assert mine.result(60)
        assert other.result(60)


def test_a_request_is_answered_once_however_many_objects_stand_for_it() -> None:
    mine = Scaled()
    with FakeClient({"m": mine}) as client:
        session = client._session
        view = carry(look_up(session.core, "m"), session._call)

        def twice(outgoing: Outgoing, now: float) -> Pending:
            session.make(outgoing, now)
            return session.make(outgoing, now)

        for error in (None, ResultTimeout("…")):
            if error is not None:
                client.fails("m", error, times=1)
            pending = session.core.build(view, {"x": X}, None, None, twice)
            carry(push(session.core, [pending], view), session._call)
            assert pending.done() == (error is None)
        assert mine.runs == 1
        assert len(client.requests("m")) == 2


def test_a_forked_child_may_use_the_client() -> None:
    with doubling() as client:
        assert works(client)

        def child() -> None:
            sys.exit(0 if works(client) else 1)

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join(60)
        assert process.exitcode == 0


# --- by itself -----------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "test-a-service.md").read_text()
ALONE = """
import socket, sys, time

def refuse(*_):
    raise AssertionError("a socket")

socket.socket.connect = socket.socket.bind = refuse
{example}
began = time.monotonic()
tests = [each for name, each in list(globals().items()) if name.startswith("test_")]
for each in tests:
    each()
assert len(tests) == 2
heavy = {{"onnxruntime", "torch", "onnx", "inferq.workers", "celery.worker"}} & set(sys.modules)
assert not heavy, heavy
print(time.monotonic() - began)
"""


def test_the_example_of_the_docs_runs_in_less_than_a_second_without_sockets() -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", ALONE.format(example=example)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.0
