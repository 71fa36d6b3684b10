"""Models as people bring them: each is served as by ONNX Runtime alone, or refused with why."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from helpers import real_models
from helpers.envelopes import body, envelope, tensor
from helpers.results import meta_of, outputs_of
from helpers.worker import Worker
from redis import Redis

from inferq.producer import AsyncClient, Client, Result
from inferq.shared.errors import DeadlineExceeded, InvalidInput
from inferq.shared.names import Names
from inferq.shared.schema import Array
from inferq.workers.process.embedded import EmbeddedRedis

TIMEOUT_S = 30
#: By model: what is in its model.toml.
TOMLS = {
    "past-concat": "max_queue_delay_ms = 20",
    "scalar-out": 'outputs = ["y"]',
    "seqout": 'outputs = ["y"]',
    "lstm": "batch_axis = { h0 = 1, c0 = 1, hn = 1, cn = 1 }\nmax_queue_delay_ms = 20",
    "casts": 'cast = "safe"',
    "fixed8": "max_queue_delay_ms = 200",
    "default-input": "max_queue_delay_ms = 20",
}
#: Those that need no words of their own: requests of one row and of three, in company.
PLAIN = {
    "argpeaks": False,
    "conf-filter": False,
    "company5": False,
    "mixed-dtypes": True,
    "param1": False,
    "scalar-param": False,
    "nan": True,
    "in66": True,
    "out66": True,
    "in512out512": True,
    "names-tf": True,
    "names-space": True,
    "names-reserved": True,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name in (*real_models.TEXTS, *real_models.OTHERS):
        real_models.write(root, name, TOMLS.get(name, ""))
    return root


@pytest.fixture(scope="module")
def client(redis_server: EmbeddedRedis, root: Path) -> Iterator[Client]:
    with Worker(redis_server.url, root), Client(redis_server.url) as client:
        yield client


@pytest.fixture
def queues(redis_server: EmbeddedRedis) -> Iterator[Redis]:
    """The server as it is, with what the worker announces."""
    with Redis.from_url(redis_server.url) as redis:
        yield redis


@pytest.fixture
def alone(root: Path, request: pytest.FixtureRequest) -> ort.InferenceSession:
    """The model that the test is about, in a session of its own."""
    return ort.InferenceSession(str(root / request.param / "1" / "model.onnx"))


_DTYPES = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(bool)": np.bool_}


def _inputs(session: ort.InferenceSession, rows: int, seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    made = {}
    for each in session.get_inputs():
        dims = [
            rows if dim == "batch" else dim if isinstance(dim, int) else 5 for dim in each.shape
        ]
        dtype = _DTYPES.get(each.type) or np.dtype(each.type[7:-1])
        made[each.name] = np.asarray(10 * rng.random(dims), dtype)
    return made


@pytest.mark.parametrize(
    ("alone", "model", "shares"),
    [(model, model, shares) for model, shares in PLAIN.items()],
    indirect=["alone"],
)
def test_each_request_is_answered_as_it_is_alone(
    client: Client, alone: ort.InferenceSession, model: str, shares: bool
) -> None:
    requests = [_inputs(alone, 1 + 2 * (n % 2), n) for n in range(12)]
    names = [output.name for output in alone.get_outputs()]
    most = 0
    for inputs, result in zip(requests, client.map(model, requests), strict=True):
        for name, expected in zip(names, alone.run(names, inputs), strict=True):
            np.testing.assert_allclose(result.outputs[name], expected, rtol=1e-5)
        assert result.receipt is not None
        most = max(most, result.receipt.requests)
    assert shares or most == 1


@pytest.mark.parametrize("alone", ["past-concat"], indirect=True)
def test_the_first_step_of_a_decoder_has_a_past_of_no_length(
    client: Client, alone: ort.InferenceSession
) -> None:
    """And shares batches with other first steps, while later steps have theirs."""
    requests = [
        {"x": np.full((1, 1), n, "f4"), "past": np.full((1, 2, n % 2, 4), n, "f4")}
        for n in range(16)
    ]
    together = 0
    for inputs, result in zip(requests, client.map("past-concat", requests), strict=True):
        present, y = alone.run(["present", "y"], inputs)
        np.testing.assert_array_equal(result.outputs["present"], present)
        np.testing.assert_allclose(result.outputs["y"], y)
        assert result.receipt is not None
        together = max(together, result.receipt.requests)
    assert together > 1
    nothing = {"x": np.zeros((0, 1), "f4"), "past": np.zeros((0, 2, 1, 4), "f4")}
    with pytest.raises(InvalidInput, match=r"dim 0 of shape .* is 0; expected at least 1"):
        client.infer("past-concat", nothing, timeout=TIMEOUT_S)


def _together(results: Iterable[Result]) -> int:
    """Most requests that shared a batch."""
    return max(result.receipt.requests for result in results if result.receipt is not None)


@pytest.mark.parametrize("model", ["scalar-out", "seqout"])
def test_a_model_with_an_odd_output_is_batched_once_that_is_left_out(
    client: Client, model: str
) -> None:
    requests = [{"x": np.full((1 + n % 3, 4), n - 8, "f4")} for n in range(32)]
    results = list(client.map(model, requests))
    for inputs, result in zip(requests, results, strict=True):
        assert list(result.outputs) == ["y"]
        np.testing.assert_array_equal(result.outputs["y"], np.maximum(inputs["x"], 0))
    assert _together(results) > 1
    with pytest.raises(InvalidInput, match="outputs has 'mean'; expected names of outputs"):
        client.infer(model, requests[0], outputs=["mean"])


def test_a_request_gets_the_outputs_that_it_asks_for_whoever_it_runs_with(client: Client) -> None:
    requests = [{"x0": np.full((1, 2), n, "f4")} for n in range(24)]
    ways: list[list[str] | None] = [["y65", "y2"], None, ["y1"]]
    pending = [
        client.submit("out66", inputs, outputs=ways[n % 3]) for n, inputs in enumerate(requests)
    ]
    for n, each in enumerate(pending):
        outputs = each.result(TIMEOUT_S).outputs
        assert sorted(outputs) == sorted(ways[n % 3] or [f"y{i}" for i in range(66)])
        for name, array in outputs.items():
            np.testing.assert_array_equal(array, [[n * (-1) ** int(name[1:])] * 2])
    for wrong in ([], ["z"], "y1", [3]):
        with pytest.raises(InvalidInput, match=r"outputs .*; expected"):
            client.submit("out66", requests[0], outputs=wrong)  # type: ignore[arg-type]


def test_an_initialiser_may_be_given_and_is_its_own_requests_alone(client: Client) -> None:
    """Those that give equal ones share batches; so do those that give none."""
    requests = []
    for n in range(48):
        inputs = {"x": np.full((1 + n % 2, 2), n, "f4")}
        if n % 3:
            inputs["scale"] = np.array([n % 3, 10], "f4")
        requests.append(inputs)
    results = list(client.map("default-input", requests))
    for inputs, result in zip(requests, results, strict=True):
        scale = inputs.get("scale", np.array([2, 3], "f4"))
        np.testing.assert_array_equal(result.outputs["y"], inputs["x"] * scale)
    assert _together(results) > 1
    assert _together(results[1::3]) > 1
    with pytest.raises(InvalidInput, match=r"'scales'; expected .*scale: float32\[2\] \(opt"):
        client.infer("default-input", {"x": np.ones((1, 2), "f4"), "scales": np.ones(2, "f4")})
    with pytest.raises(InvalidInput, match=r"input 'scale' of model .* 3 at dim 0; expected 2"):
        client.infer("default-input", {"x": np.ones((1, 2), "f4"), "scale": np.ones(3, "f4")})


def test_the_maps_of_a_classifier_are_one_tensor_of_probabilities(client: Client) -> None:
    requests = [{"x": np.eye(3, dtype="f4")[[n % 3]] * 5} for n in range(16)]
    results = list(client.map("zipmap", requests))
    for n, result in enumerate(results):
        assert result.outputs["output_label"].tolist() == [n % 3]
        probabilities = result.outputs["output_probability"]
        expected = np.exp(requests[n]["x"])
        np.testing.assert_allclose(probabilities, expected / expected.sum(), rtol=1e-5)
    assert _together(results) > 1


@pytest.mark.parametrize("alone", ["lstm"], indirect=True)
def test_states_whose_rows_are_dim_1_share_batches(
    client: Client, alone: ort.InferenceSession
) -> None:
    rng = np.random.default_rng(0)
    requests = []
    for n in range(32):
        rows, state = 1 + n % 3, (1, 1 + n % 3, 3)
        requests.append(
            {
                "x": rng.standard_normal((rows, 4 + n % 2, 2)).astype("f4"),
                "h0": rng.standard_normal(state).astype("f4"),
                "c0": rng.standard_normal(state).astype("f4"),
            }
        )
    results = list(client.map("lstm", requests))
    for inputs, result in zip(requests, results, strict=True):
        for name, expected in zip(("y", "hn", "cn"), alone.run(None, inputs), strict=True):
            assert result.outputs[name].shape == expected.shape
            np.testing.assert_allclose(result.outputs[name], expected, atol=1e-5)
    assert _together(results) > 1
    with pytest.raises(InvalidInput, match=r"'h0' of .* dim 1 .batch. is 2; expected 1"):
        client.infer("lstm", {**requests[0], "h0": np.zeros((1, 2, 3), "f4")})


def test_a_fixed_batch_of_eight_is_filled_with_requests_or_padded(client: Client) -> None:
    requests = [{"x": np.full((1, 3), n, "f4")} for n in range(24)]
    results = list(client.map("fixed8", requests))
    for n, result in enumerate(results):
        np.testing.assert_array_equal(result.outputs["y"], np.full((1, 3), 2 * n))
    assert _together(results) == 8
    result = client.infer("fixed8", {"x": np.full((3, 3), 7, "f4")})
    np.testing.assert_array_equal(result.outputs["y"], np.full((3, 3), 14))
    assert result.receipt is not None
    assert (result.receipt.batch_size, result.receipt.padding) == (3, 5)


def test_a_fixed_batch_whose_rows_depend_on_each_other_takes_no_fewer(client: Client) -> None:
    x = np.arange(32, dtype="f4").reshape(8, 4)
    result = client.infer("fixed8-mixed", {"x": x})
    np.testing.assert_allclose(result.outputs["y"].sum(axis=0), np.ones(4), rtol=1e-5)
    with pytest.raises(InvalidInput, match="1 at dim 0; expected 8"):
        client.infer("fixed8-mixed", {"x": x[:1]})


def test_more_rows_than_a_batch_may_have_are_split_and_joined(client: Client) -> None:
    x = np.arange(400, dtype="f4").reshape(100, 4) - 200
    result = client.infer("scalar-out", {"x": x}, timeout=TIMEOUT_S)
    np.testing.assert_array_equal(result.outputs["y"], np.maximum(x, 0))
    requests = [{"x": x[: 1 + 33 * (n % 4)] + n} for n in range(12)]
    for inputs, each in zip(requests, client.map("scalar-out", requests), strict=True):
        np.testing.assert_array_equal(each.outputs["y"], np.maximum(inputs["x"], 0))
    rng = np.random.default_rng(0)
    states = {name: rng.standard_normal((1, 70, 3)).astype("f4") for name in ("h0", "c0")}
    inputs = {"x": rng.standard_normal((70, 4, 2)).astype("f4"), **states}
    joined = client.infer("lstm", inputs, timeout=TIMEOUT_S).outputs
    assert {name: array.shape for name, array in joined.items()} == {
        "y": (70, 4, 3),
        "hn": (1, 70, 3),
        "cn": (1, 70, 3),
    }
    last = {"x": inputs["x"][69:], **{name: each[:, 69:] for name, each in states.items()}}
    alone = client.infer("lstm", last, timeout=TIMEOUT_S).outputs
    np.testing.assert_allclose(joined["hn"][:, 69:], alone["hn"], atol=1e-5)


def test_a_split_request_is_one_pending_that_fails_as_its_first_part(client: Client) -> None:
    pending = client.submit("scalar-out", {"x": np.zeros((90, 4), "f4")}, timeout_ms=0.001)
    with pytest.raises(DeadlineExceeded):
        pending.result(TIMEOUT_S)
    pending = client.submit("scalar-out", {"x": np.zeros((90, 4), "f4")})
    cancelled = pending.cancel()
    if cancelled:
        assert pending.state == "cancelled"
    else:
        assert len(pending.result(TIMEOUT_S).outputs["y"]) == 90


async def _split(url: str) -> Array:
    async with AsyncClient(url) as client:
        x = np.arange(400, dtype="f4").reshape(100, 4)
        return (await client.infer("scalar-out", {"x": x}, timeout=TIMEOUT_S)).outputs["y"]


def test_the_asyncio_client_splits_and_joins_alike(
    client: Client, redis_server: EmbeddedRedis
) -> None:
    y = asyncio.run(_split(redis_server.url))
    np.testing.assert_array_equal(y, np.arange(400, dtype="f4").reshape(100, 4))


def test_integers_of_another_dtype_are_taken_where_the_model_says_so(
    client: Client, queues: Redis
) -> None:
    for ids in (np.array([1, 3], np.int32), np.array([1, 3], np.uint8), [1, 3], np.array([1, 3])):
        assert client.infer("casts", {"ids": ids}).outputs["y"].tolist() == [[2, 3], [6, 7]]
    with pytest.raises(InvalidInput, match="dtype float64; expected int64"):
        client.infer("casts", {"ids": np.array([1.0])})
    # As a program sends it that has not asked what the model takes.
    raw = body({"inputs": {"ids": tensor(np.array([2], np.int16))}})
    request_id = str(uuid.uuid4())
    queues.lpush(Names().queue("casts"), envelope(raw, request_id=request_id))
    assert outputs_of(queues, request_id)["y"].tolist() == [[4, 5]]


def test_the_largest_of_each_row_have_their_labels(client: Client) -> None:
    x = np.log(np.array([[1, 2, 5], [6, 1, 1]], "f4"))
    result = client.infer("zipmap", {"x": x})
    assert result.labels == ("cat", "dog", "owl")
    first, second = result.top(2)
    assert [label for label, _ in first] == ["owl", "dog"]
    assert first[0][1] == pytest.approx(5 / 8)
    assert second[0][0] == "cat"
    assert second[0][1] == pytest.approx(6 / 8)
    with pytest.raises(ValueError, match="expected one with a column for each of 3 labels"):
        result.top(1, "output_label")
    with pytest.raises(ValueError, match="the model tells no labels"):
        client.infer("nan", {"x": np.ones((1, 4), "f4")}).top()


@pytest.mark.usefixtures("client")
def test_another_program_names_the_outputs_that_it_wants(queues: Redis) -> None:
    inputs = {"x0": tensor(np.ones((1, 2), "f4"))}
    request_id, wrong = str(uuid.uuid4()), str(uuid.uuid4())
    queue = Names().queue("out66")
    queues.lpush(
        queue, envelope(body({"inputs": inputs, "outputs": ["y1"]}), request_id=request_id)
    )
    assert list(outputs_of(queues, request_id)) == ["y1"]
    queues.lpush(queue, envelope(body({"inputs": inputs, "outputs": "y1"}), request_id=wrong))
    assert "outputs is 'y1'; expected a list of names" in str(meta_of(queues, wrong)["result"])
