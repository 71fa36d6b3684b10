"""Text from the client through models and back: every string and every byte is what it was."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import redis as redis_py
from click.testing import CliRunner
from helpers import onnx_models
from helpers.python_models import python_model
from helpers.repository import text_model
from helpers.results import nothing_is_held
from helpers.stock import CONTENTS, Side
from helpers.stock_side import WAIT_S, app
from helpers.wait import until
from helpers.worker import Worker

from inferq.producer import AsyncClient, Client
from inferq.shared import codec
from inferq.shared.codec import JSON
from inferq.shared.errors import InvalidInput, PayloadTooLarge
from inferq.shared.names import Names, queue_of
from inferq.shared.schema import Array
from inferq.workers.cli import inferq
from inferq.workers.metrics.published import read_stats
from inferq.workers.process.embedded import EmbeddedRedis

TIMEOUT_S = 30
NAMES = Names()
TEXTS = ["a", "", "nul\0", "ü", "猫 😀", "\x1b[31m", "x" * 300]
BYTES = [b"a", b"", b"nul\0", b"\xff\xfe", bytes(range(256))]


CODE = """
import numpy as np
from inferq.model import Model

class Lengths(Model):
    inputs = {"text": "string[batch]"}
    outputs = {"upper": "string[batch]", "raw": "bytes[batch]", "length": "int64[batch]"}

    def run(self, inputs):
        text = inputs["text"]
        return {
            "upper": [each.upper() for each in text],
            "raw": [each.encode() for each in text],
            "length": np.array([len(each) for each in text]),
        }
"""


ECHO = """
from inferq.model import Model

class Echo(Model):
    inputs = {"x": "string[batch]"}
    outputs = {"y": "string[batch]"}

    def run(self, inputs):
        return {"y": inputs["x"]}
"""


@pytest.fixture(scope="module")
def url(redis_server: EmbeddedRedis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A worker that serves one model of each kind."""
    root = tmp_path_factory.mktemp("models")

    def file(model: str) -> Path:
        return root / model / "1" / "model.onnx"

    onnx_models.text_identity(file("id-str"))
    (root / "id-str" / "model.toml").write_text("audit_every = 1\n")
    onnx_models.text_labels(file("labels"))
    onnx_models.text_split(file("split"))
    text_model(root, "text")
    text_model(root, "blob", "bytes")
    text_model(root, "small", knobs="max_request_bytes = 100")
    text_model(root, "padded", shape='"batch", "words"', knobs="[pad.words]\nbuckets = [2, 4]\n")
    python_model(root, "code", CODE, knobs="lanes = 1\nbuckets = [8, 32]")
    python_model(root, "brim", ECHO, knobs="lanes = 1\nmax_batch_size = 1\nmax_request_bytes = 100")
    with Worker(redis_server.url, root):
        yield redis_server.url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Client]:
    with Client(url) as client:
        yield client


@pytest.fixture
def store(url: str) -> Iterator[redis_py.Redis]:
    with redis_py.Redis.from_url(url) as store:
        yield store


def _objects(rows: list[Any]) -> Array:
    array = np.empty(len(rows), object)
    array[:] = rows
    return array


def test_an_identity_of_strings_is_served_as_alone_and_batched(client: Client) -> None:
    """As lists, as NumPy's own strings and as objects."""
    items: list[list[list[str]]] = [
        [[f"{n} {TEXTS[(n + row) % len(TEXTS)]}", TEXTS[row], ""] for row in range(1 + n % 4)]
        for n in range(100)
    ]
    # NumPy's own strings end before a NUL.
    forms: list[Callable[[Any], Any]] = [lambda x: x, lambda x: np.array(x, object), np.array]
    given = [
        {"x": forms[n % 3 if "\0" not in str(item) else 0](item)} for n, item in enumerate(items)
    ]
    requests = 0
    for n, result in enumerate(client.map("id-str", given, in_flight=64)):
        expected = given[n]["x"]
        y = result.outputs["y"]
        assert y.dtype == object
        assert y.tolist() == (expected if isinstance(expected, list) else expected.tolist())
        assert result.receipt is not None
        requests = max(requests, result.receipt.requests)
    assert requests > 1


def test_audits_of_strings_find_no_difference(client: Client, store: redis_py.Redis) -> None:
    def audited() -> Any:
        list(client.map("id-str", [{"x": [[str(n), *TEXTS[:2]]]} for n in range(64)]))
        told = [each for stats in read_stats(store, NAMES) for each in stats.models]
        return next(
            (each for each in told if each.model == "id-str" and any(each.audits.values())), None
        )

    audits = until(audited, timeout=TIMEOUT_S).audits
    assert {kind for kind, count in audits.items() if count} == {"same"}


def test_every_string_and_every_byte_comes_back(client: Client) -> None:
    got = client.infer("text", {"x": TEXTS}, timeout=TIMEOUT_S).outputs["x"]
    assert got.tolist() == TEXTS
    assert got.dtype == np.dtype(object)
    assert not got.flags.writeable
    got = client.infer("blob", {"x": _objects(BYTES)}, timeout=TIMEOUT_S).outputs["x"]
    assert got.tolist() == BYTES


def test_the_asyncio_client_does_the_same(url: str, client: Client) -> None:
    client.infer("blob", {"x": BYTES}, timeout=TIMEOUT_S)  # the worker is there

    async def ask() -> list[Any]:
        async with AsyncClient(url) as session:
            result = await session.infer("blob", {"x": BYTES}, timeout=TIMEOUT_S)
            return [result.outputs["x"].tolist()]

    assert asyncio.run(ask()) == [BYTES]


def test_labels_of_a_classifier_come_back_as_strings(client: Client) -> None:
    x = np.eye(3, dtype=np.float32)[[2, 0, 1, 1]]
    outputs = client.infer("labels", {"x": x}, timeout=TIMEOUT_S).outputs
    assert outputs["label"].tolist() == ["schön", "bad", "good", "good"]


def test_a_tokenizer_that_pads_to_the_longest_row_runs_request_by_request(client: Client) -> None:
    items = [{"x": [" ".join("abcdef"[: 1 + n % 6])]} for n in range(30)]
    for n, result in enumerate(client.map("split", items)):
        assert result.outputs["y"].tolist() == [list("abcdef"[: 1 + n % 6])]
        assert result.receipt is not None
        assert result.receipt.requests == 1


def test_long_strings_are_claim_checked_and_their_payloads_are_gone_afterwards(
    client: Client, store: redis_py.Redis
) -> None:
    rows = ["ü" * 200_000, "", "a" * 70_000]
    got = client.infer("text", {"x": rows}, timeout=TIMEOUT_S).outputs["x"]
    assert got.tolist() == rows
    until(lambda: not list(store.scan_iter(NAMES.payload("*", "x"))))


def test_padding_of_strings_is_cut_off_again(client: Client) -> None:
    items = [{"x": [[f"{n}", *"abc"[:more]]]} for n in range(20) for more in range(4)]
    for item, result in zip(items, client.map("padded", items), strict=True):
        assert result.outputs["x"].tolist() == item["x"]


def test_what_is_too_large_is_refused_by_client_and_worker(
    client: Client, store: redis_py.Redis
) -> None:
    assert client.infer("small", {"x": ["a" * 92]}, timeout=TIMEOUT_S).outputs["x"].size == 1
    with pytest.raises(PayloadTooLarge, match="are 101 bytes; expected at most 100"):
        client.infer("small", {"x": ["a" * 93]}, timeout=TIMEOUT_S)
    for n, content in enumerate(("inline", JSON, "payload")):
        request_id = f"large-{n}"
        x = codec.encode_tensor(_objects(["a" * 93]))
        if content == "payload":
            key = NAMES.payload(request_id, "x")
            store.set(key, x["data"], ex=600)
            x = codec.encode_reference(_objects(["a" * 93]), key, len(x["data"]))
        elif content == JSON:
            x = {"data": ["a" * 93]}
        encoder = codec.RequestEncoder(queue_of("small"), "test@here", None)
        raw = encoder.encode(
            request_id, "small", {"x": x}, shown="", priority=0, sent_ms=0.0, deadline_ms=None
        )
        store.lpush(NAMES.queue("small"), raw)
        meta = until(partial(store.get, NAMES.meta(request_id)))
        assert msgpack.unpackb(meta)["result"]["exc_type"] == "PayloadTooLarge"
    until(lambda: nothing_is_held(store))


def test_user_code_is_given_strings_and_gives_back_strings_and_bytes(client: Client) -> None:
    items = [{"text": [f"{n}", *TEXTS[: n % 8]]} for n in range(60)]
    for item, result in zip(items, client.map("code", items), strict=True):
        text = item["text"]
        assert result.outputs["upper"].tolist() == [each.upper() for each in text]
        assert result.outputs["raw"].tolist() == [each.encode() for each in text]
        assert result.outputs["length"].tolist() == [len(each) for each in text]


def test_user_code_takes_all_that_its_limit_lets_pass(client: Client) -> None:
    outputs = client.infer("brim", {"x": ["a" * 92]}, timeout=TIMEOUT_S).outputs
    assert outputs["y"].tolist() == ["a" * 92]
    with pytest.raises(PayloadTooLarge):
        client.infer("brim", {"x": ["a" * 93]}, timeout=TIMEOUT_S)


def test_elements_that_are_no_text_are_named(client: Client) -> None:
    with pytest.raises(InvalidInput, match="input 'x' of model 'text': element 1 is NoneType"):
        client.infer("text", {"x": np.array(["a", None], object)}, timeout=TIMEOUT_S)
    with pytest.raises(InvalidInput, match="input 'x': element 0 is bytes; expected str"):
        client.infer("text", {"x": [b"a"]}, timeout=TIMEOUT_S)


@pytest.fixture(scope="module", params=CONTENTS)
def side(request: pytest.FixtureRequest, url: str) -> Iterator[Side]:
    with Side(url, request.param) as side:
        yield side


def test_stock_celery_sends_and_gets_plain_strings(side: Side) -> None:
    def ask() -> object:
        kwargs = {"inputs": {"x": ["a", "", "ü 😀"]}}
        found = app.send_task("inferq.infer", kwargs=kwargs, queue="inferq.text").get(
            timeout=WAIT_S
        )
        return found["x"]["dtype"], found["x"]["shape"], str(found["x"]["data"])

    dtype, shape, data = side(ask)
    assert (dtype, shape) == ("string", [3])
    if side.content == "json":
        assert data == "['a', '', 'ü 😀']"


def test_stock_celery_sends_base64_of_bytes_and_chains_the_answer(side: Side) -> None:
    def ask() -> object:
        first = app.signature(
            "inferq.infer", kwargs={"inputs": {"x": ["/wA=", ""]}}, queue="inferq.blob"
        )
        second = app.signature("inferq.infer", queue="inferq.blob")
        found = (first | second).apply_async().get(timeout=WAIT_S)
        return found["x"]["dtype"], found["x"]["shape"], str(found["x"]["data"])

    dtype, shape, data = side(ask)
    assert (dtype, shape) == ("bytes", [2])
    if side.content == "json":
        assert data == "['/wA=', '']"


def test_the_command_infer_takes_lines_of_text_and_writes_what_numpy_can_hold(
    url: str, client: Client, tmp_path: Path
) -> None:
    client.infer("text", {"x": TEXTS}, timeout=TIMEOUT_S)
    lines = tmp_path / "x.txt"
    lines.write_text("good\r\n\n\x1b[31mü\n")
    out = tmp_path / "out.npz"
    base = ["infer", "--redis-url", url]
    run = CliRunner().invoke(inferq, [*base, "text", "-i", f"x={lines}", "-o", str(out)])
    assert (run.exit_code, run.stderr) == (0, "")
    assert run.stdout.splitlines()[0] == 'x: string[3] "good" "" "\\u001b[31mü"'
    with np.load(out) as found:
        assert found["x"].tolist() == ["good", "", "\x1b[31mü"]
    run = CliRunner().invoke(inferq, [*base, "text", str(out), "--json"])
    told = json.loads(run.stdout)["outputs"]["x"]
    assert told == {"dtype": "string", "shape": [3], "data": ["good", "", "\x1b[31mü"]}
    np.savez(tmp_path / "in.npz", x=np.array([b"\xff", b"ab"]))
    run = CliRunner().invoke(inferq, [*base, "blob", str(tmp_path / "in.npz"), "--json"])
    told = json.loads(run.stdout)["outputs"]["x"]
    assert told == {"dtype": "bytes", "shape": [2], "data": ["/w==", "YWI="]}
