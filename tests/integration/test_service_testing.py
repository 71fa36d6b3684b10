"""A fake client does what a real one does with a worker: the same tests for both, sync and asyncio.

The model's file is served by a worker, and is imported for the fake.
"""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.python_models import python_model
from helpers.worker import Worker

from inferq.model import Model
from inferq.producer import (
    AsyncClient,
    Client,
    ClientClosed,
    EngineError,
    InferqError,
    InvalidInput,
    ModelNotFound,
    PayloadTooLarge,
    RequestError,
    Result,
    State,
)
from inferq.testing import FakeAsyncClient, FakeClient, FakeModel
from inferq.workers.process.embedded import EmbeddedRedis

ROWS = 8
MOST = 200_000
TIMEOUT_S = 60.0
KNOBS = f"lanes = 1\nmax_batch_size = {ROWS}\nmax_request_bytes = {MOST}"

#: What it is to do is the first number of a row of `x`.
CODE = """
import numpy as np
from inferq.model import Model, RequestError

class Mixed(Model):
    inputs = {
        "x": "float32[batch, n]", "half": "float16[batch]", "id": "int64[batch]",
        "yes": "bool[batch]", "wave": "complex64[batch, 2]", "text": "string[batch]",
        "raw": "bytes[batch, 1]",
    }
    outputs = {
        "y": "float32[batch, n]", "half": "float16[batch]", "id": "int64[batch]",
        "yes": "bool[batch]", "wave": "complex64[batch, 2]", "text": "string[batch]",
        "raw": "bytes[batch, 1]",
    }

    def run(self, inputs):
        asked = set(inputs["x"][:, 0].tolist())
        answer = {name: inputs[name] for name in inputs if name != "x"}
        answer["y"] = inputs["x"] * 2
        if -1 in asked:
            raise ValueError("five")
        if -2 in asked:
            return RequestError("refused")
        if -3 in asked:
            first = {name: array[0] for name, array in answer.items()}
            return [first, RequestError("the last row")]
        if -4 in asked:
            answer["id"] = answer["id"].astype(np.int32)
        if -5 in asked:
            del answer["yes"]
        if -6 in asked:
            answer["half"] = answer["half"][:, None]
        if -7 in asked:
            return None
        if -8 in asked:
            answer["y"] = answer["y"].astype(">f4")
        if -9 in asked:
            inputs["x"][:] = 9
        return answer
"""


def given(rows: int = 2, n: int = 3, first: float = 1.0, **changed: Any) -> dict[str, Any]:
    x = np.arange(1, rows * n + 1, dtype=np.float32).reshape(rows, n)
    if x.size:
        x[0, 0] = first
    inputs: dict[str, Any] = {
        "x": x,
        "half": np.arange(rows, dtype=np.float16) / 3,
        "id": np.arange(rows, dtype=np.int64) - 2**60,
        "yes": np.arange(rows) % 2 == 0,
        "wave": np.full((rows, 2), 1 - 2j, np.complex64),
        "text": np.array([f"größe {row}" for row in range(rows)], object),
        "raw": np.array([b"\xff\x00" * row for row in range(rows)], object).reshape(rows, 1),
    }
    inputs.update(changed)
    return {name: value for name, value in inputs.items() if value is not None}


class Asked:
    """A client of either kind, asked as a service asks it."""

    def __init__(self, new: Callable[[], Client | AsyncClient]) -> None:
        self._new = new

    def infer(self, model: str, inputs: Any, **options: Any) -> Result:
        client = self._new()
        if isinstance(client, Client):
            with client:
                return client.infer(model, inputs, timeout=TIMEOUT_S, **options)
        return asyncio.run(self._infer(client, model, inputs, options))

    async def _infer(
        self, client: AsyncClient, model: str, inputs: Any, options: dict[str, Any]
    ) -> Result:
        async with client:
            return await client.infer(model, inputs, timeout=TIMEOUT_S, **options)

    def map(self, model: str, items: Sequence[Any], **options: Any) -> list[Result | InferqError]:
        client = self._new()
        if isinstance(client, Client):
            with client:
                return list(client.map(model, iter(items), timeout=TIMEOUT_S, **options))
        return asyncio.run(self._map(client, model, items, options))

    async def _map(
        self, client: AsyncClient, model: str, items: Sequence[Any], options: dict[str, Any]
    ) -> list[Result | InferqError]:
        async with client:
            found = client.map(model, items, timeout=TIMEOUT_S, **options)
            return [each async for each in found]

    def error(self, model: str, inputs: Any, **options: Any) -> InferqError:
        with pytest.raises(InferqError) as caught:
            self.infer(model, inputs, **options)
        return caught.value


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return python_model(tmp_path_factory.mktemp("models"), "mixed", CODE, knobs=KNOBS)


@pytest.fixture(scope="module")
def url(model_file: Path) -> Iterator[str]:
    """Of a Redis at which a worker serves the model."""
    with EmbeddedRedis("valkey") as server, Worker(server.url, model_file.parents[2]):
        yield server.url


@pytest.fixture(scope="module")
def served(model_file: Path) -> dict[str, FakeModel]:
    """The same model for a fake client."""
    spec = importlib.util.spec_from_file_location("mixed_model", model_file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    mixed: type[Model] = module.Mixed
    return {"mixed": FakeModel(mixed, max_batch_size=ROWS, max_request_bytes=MOST)}


@pytest.fixture(params=["Client", "AsyncClient", "FakeClient", "FakeAsyncClient"])
def asked(request: pytest.FixtureRequest) -> Asked:
    """Each of the four in turn."""
    if request.param.startswith("Fake"):
        served = request.getfixturevalue("served")
        fake = FakeClient if request.param == "FakeClient" else FakeAsyncClient
        return Asked(lambda: fake(served))
    url = request.getfixturevalue("url")
    real = Client if request.param == "Client" else AsyncClient
    return Asked(lambda: real(url))


@pytest.fixture(params=["Client", "FakeClient"])
def client(request: pytest.FixtureRequest) -> Iterator[Client]:
    """A sync client of either kind."""
    if request.param == "FakeClient":
        with FakeClient(request.getfixturevalue("served")) as fake:
            yield fake
    else:
        with Client(request.getfixturevalue("url")) as real:
            yield real


def check(result: Result | InferqError, inputs: dict[str, Any]) -> None:
    assert isinstance(result, Result), result
    expected = {**inputs, "y": inputs["x"] * 2}
    del expected["x"]
    assert set(result.outputs) == set(expected)
    for name, array in expected.items():
        found = result.outputs[name]
        np.testing.assert_array_equal(found, array, strict=True)
        assert not found.flags.writeable


def test_arrays_of_every_kind_come_back_read_only_with_a_receipt(asked: Asked) -> None:
    inputs = given()
    result = asked.infer("mixed", inputs)
    check(result, inputs)
    receipt = result.receipt
    assert receipt is not None
    told = (receipt.model, receipt.version, receipt.engine, receipt.requests, receipt.attempt)
    assert told == ("mixed", 1, "python", 1, 1)
    assert (receipt.batch_size, receipt.padding) == (2, 0)
    assert receipt.compute_ms >= 0
    assert len(result.request_id) == 36
    assert result.latency_ms > 0


def test_lists_and_numbers_take_the_models_dtype(asked: Asked) -> None:
    inputs = given()
    lists = {name: array.tolist() for name, array in inputs.items() if name != "wave"}
    check(asked.infer("mixed", {**lists, "wave": inputs["wave"]}), inputs)


def test_large_tensors_and_such_that_are_not_contiguous_come_back(asked: Asked) -> None:
    wide = np.random.default_rng(1).random((2, 40_000), np.float32)
    inputs = given(2, x=wide[:, :20_000:2], wave=np.asfortranarray(given()["wave"]))
    check(asked.infer("mixed", inputs), inputs)
    inputs = given(1, text=np.array(["ä" * 40_000], object))
    check(asked.infer("mixed", inputs), inputs)


def test_what_the_code_writes_to_its_inputs_is_not_seen_by_the_caller(asked: Asked) -> None:
    inputs = given(first=-9)
    before = inputs["x"].copy()
    asked.infer("mixed", inputs)
    np.testing.assert_array_equal(inputs["x"], before)


def test_an_output_of_the_other_byte_order_has_its_values(asked: Asked) -> None:
    inputs = given(first=-8)
    check(asked.infer("mixed", inputs), inputs)


def test_priority_and_deadline_are_taken(asked: Asked) -> None:
    inputs = given()
    check(asked.infer("mixed", inputs, priority=9, timeout_ms=60_000), inputs)


BAD: dict[str, tuple[type[InferqError], str, Any, dict[str, Any]]] = {
    "a model that nobody serves": (ModelNotFound, "nobody", given(), {}),
    "a name that no model can have": (ModelNotFound, "no model", given(), {}),
    "an input too few": (InvalidInput, "mixed", given(yes=None), {}),
    "an input too many": (InvalidInput, "mixed", given(more=np.zeros(2)), {}),
    "no mapping": (InvalidInput, "mixed", [1, 2], {}),
    "another dtype": (InvalidInput, "mixed", given(id=np.zeros(2, np.int32)), {}),
    "a dtype that cannot be sent": (InvalidInput, "mixed", given(id=np.zeros(2, "M8[s]")), {}),
    "a number that the dtype does not hold": (InvalidInput, "mixed", given(id=[1, 2**70]), {}),
    "a ragged list": (InvalidInput, "mixed", given(x=[[1.0], [1.0, 2.0]]), {}),
    "another number of dims": (InvalidInput, "mixed", given(id=np.zeros((2, 1), np.int64)), {}),
    "another size": (InvalidInput, "mixed", given(wave=np.zeros((2, 3), np.complex64)), {}),
    "rows that differ": (InvalidInput, "mixed", given(id=np.zeros(3, np.int64)), {}),
    "no rows": (InvalidInput, "mixed", given(0), {}),
    "text that is no text": (InvalidInput, "mixed", given(text=[1, 2]), {}),
    "bytes for text": (InvalidInput, "mixed", given(text=[b"a", "b"]), {}),
    "too much text": (PayloadTooLarge, "mixed", given(text=["a", "b" * MOST]), {}),
    "too many bytes": (PayloadTooLarge, "mixed", given(1, MOST // 4), {}),
    "a priority of 10": (InvalidInput, "mixed", given(), {"priority": 10}),
    "a deadline in the past": (InvalidInput, "mixed", given(), {"timeout_ms": -1}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_both_in_the_same_words(
    case: str, url: str, served: dict[str, FakeModel]
) -> None:
    kind, model, inputs, options = BAD[case]
    real = Asked(lambda: Client(url)).error(model, inputs, **options)
    assert type(real) is kind
    for new in (FakeClient, FakeAsyncClient):
        fake = Asked(lambda new=new: new(served)).error(model, inputs, **options)  # type: ignore[misc]
        assert (type(fake), fake.message, fake.detail) == (kind, real.message, real.detail)


def test_in_flight_is_checked(asked: Asked) -> None:
    with pytest.raises(InvalidInput, match="in_flight 0; expected"):
        asked.map("mixed", [given()], in_flight=0)


ANSWERS: dict[str, tuple[type[InferqError], float]] = {
    "an error of a request": (RequestError, -2),
    "an error of a row": (RequestError, -3),
    "another dtype": (EngineError, -4),
    "an output too few": (EngineError, -5),
    "another shape": (EngineError, -6),
    "no outputs": (EngineError, -7),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_what_the_code_answers_is_checked_by_both_in_the_same_words(
    case: str, url: str, served: dict[str, FakeModel]
) -> None:
    kind, first = ANSWERS[case]
    real = Asked(lambda: Client(url)).error("mixed", given(first=first))
    fake = Asked(lambda: FakeClient(served)).error("mixed", given(first=first))
    assert type(real) is kind
    assert (type(fake), fake.message, fake.detail) == (kind, real.message, real.detail)


def test_what_the_code_raises_is_an_engine_error(asked: Asked) -> None:
    with pytest.raises(EngineError, match=r"ValueError: five$"):
        asked.infer("mixed", given(first=-1))


def test_map_keeps_the_order_and_yields_errors_at_their_place(asked: Asked) -> None:
    items = [given(1 + n % ROWS, first=n) for n in range(60)]
    items[7] = given(first=-2)
    items[30] = given(0)
    items[40] = given(2 * ROWS + 1)  # more than a batch has: in parts
    found = asked.map("mixed", items, in_flight=8, return_errors=True)
    assert len(found) == 60
    assert type(found[7]) is RequestError
    assert type(found[30]) is InvalidInput
    for n in set(range(60)) - {7, 30}:
        check(found[n], items[n])


def test_map_raises_at_the_place_of_an_error(asked: Asked) -> None:
    with pytest.raises(RequestError, match="refused"):
        asked.map("mixed", [given(), given(first=-2), given()])


def test_map_of_nothing_yields_nothing(asked: Asked) -> None:
    assert asked.map("mixed", []) == []


def test_a_result_stays_and_cannot_be_cancelled(client: Client) -> None:
    inputs = given()
    pending = client.submit("mixed", inputs)
    check(pending.result(TIMEOUT_S), inputs)
    assert (pending.state, pending.done(), pending.model) == (State.DONE, True, "mixed")
    assert pending.get() is pending.result() is pending.outcome
    assert pending.cancel() is False


def test_an_error_stays(client: Client) -> None:
    pending = client.submit("mixed", given(first=-2))
    for _ in range(2):
        with pytest.raises(RequestError, match="refused"):
            pending.result(TIMEOUT_S)
    assert (pending.state, pending.cancel()) == (State.FAILED, False)


def test_a_closed_client_takes_nothing(client: Client) -> None:
    pending = client.submit("mixed", given())
    result = pending.result(TIMEOUT_S)
    client.close()
    client.close()
    assert pending.result() is result
    with pytest.raises(ClientClosed, match="nothing was sent"):
        client.infer("mixed", given())
    with pytest.raises(ClientClosed, match="nothing was sent"):
        next(client.map("mixed", [given()]))
