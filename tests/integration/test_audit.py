"""A model whose answers depend on company is found out in service, said, and run one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from celery import Celery
from click.testing import CliRunner
from helpers import onnx_models
from helpers.crowd import Answer, ask
from helpers.flower import FlowerProcess
from helpers.metrics import metrics_url, scrape
from helpers.repository import numbered
from helpers.results import nothing_is_held
from helpers.wait import until
from helpers.worker import SupervisedWorker, Worker
from redis import Redis

from inferq.producer import Client
from inferq.shared.names import Names
from inferq.shared.schema import Array
from inferq.workers.cli import inferq
from inferq.workers.data_plane.counts import ModelStats
from inferq.workers.metrics.published import read_stats
from inferq.workers.process.embedded import EmbeddedRedis

ANY_PORT = {"INFERQ_METRICS": "127.0.0.1:0"}
WITHIN = 1_000
FOUND = "model company: answers depend on who shares their batch"
#: Two requests that are sent together share a batch, of the only lane.
PAIRS = """\
lanes = 1
batchable = true
max_batch_size = 2
max_queue_delay_ms = 2000
audit_every = 1
"""


def published(redis: Redis, model: str) -> ModelStats | None:
    """What the worker says of `model`."""
    told = [each for stats in read_stats(redis, Names()) for each in stats.models]
    return next((each for each in told if each.model == model), None)


def is_right(answer: Answer) -> bool:
    """Whether it is what ``company`` answers to it alone."""
    return bool(np.allclose(answer.outputs["y"], 1.05 * answer.x, rtol=1e-4, atol=1e-5))


def write_company(root: Path, toml: str = "") -> None:
    """A model called ``company``: y = x and 5 % of the batch's mean, declared to be batchable."""
    onnx_models.company(root / "company" / "1" / "model.onnx")
    (root / "company" / "model.toml").write_text(f"batchable = true\n{toml}")


def test_a_model_that_mixes_rows_is_found_within_1000_requests_and_right_from_then_on(
    redis_url: str, redis: Redis, tmp_path: Path
) -> None:
    write_company(tmp_path)
    with Worker(redis_url, tmp_path) as worker:
        before = ask(redis_url, "company", WITHIN)
        assert not all(is_right(answer) for answer in before), "or there was nothing to find"
        until(lambda: FOUND in worker.log)
        after = ask(redis_url, "company", 300)
        assert all(is_right(answer) for answer in after)
        assert {answer.receipt.requests for answer in after} == {1}
        stats = until(lambda: (said := published(redis, "company")) and said.unbatched and said)
        assert isinstance(stats, ModelStats)
        assert stats.mismatch is not None
        assert stats.mismatch.requests <= WITHIN
        assert worker.log.count(FOUND) == 1


def test_a_lane_that_never_idles_is_audited_all_the_same(
    redis_url: str, redis: Redis, tmp_path: Path
) -> None:
    write_company(tmp_path)
    with Worker(redis_url, tmp_path) as worker, Client(redis_url) as client:
        items = [{"x": np.full((1, 3), n % 7, np.float32)} for n in range(WITHIN)]
        for _ in client.map("company", items, in_flight=500):
            pass
        until(lambda: FOUND in worker.log)


def test_with_warn_a_model_that_mixes_rows_is_told_of_and_goes_on_in_batches(
    redis_url: str, redis: Redis, tmp_path: Path
) -> None:
    write_company(tmp_path, 'on_mismatch = "warn"')
    with Worker(redis_url, tmp_path) as worker:
        ask(redis_url, "company", WITHIN)
        until(lambda: "It goes on in batches" in worker.log)
        after = ask(redis_url, "company", 300)
        assert max(answer.receipt.requests for answer in after) > 1
        assert worker.log.count(FOUND) == 1


def test_a_model_of_independent_rows_keeps_its_batches(
    redis_url: str, redis: Redis, tmp_path: Path
) -> None:
    onnx_models.double(tmp_path / "double" / "1" / "model.onnx")
    with Worker(redis_url, tmp_path) as worker:
        ask(redis_url, "double", WITHIN)
        stats = until(
            lambda: (said := published(redis, "double")) and said.audits["same"] >= 3 and said
        )
        assert isinstance(stats, ModelStats)
        assert stats.audits["same"] == sum(stats.audits.values())
        assert (stats.mismatch, stats.unbatched) == (None, False)
        assert max(answer.receipt.requests for answer in ask(redis_url, "double", 300)) > 1
        assert "who shares their batch" not in worker.log


# --- who says so ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A worker that has found ``company`` out."""

    url: str
    worker: Worker


@pytest.fixture(scope="module")
def found(redis_kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Found]:
    root = tmp_path_factory.mktemp("models")
    write_company(root)
    with (
        EmbeddedRedis(redis_kind) as server,
        Worker(server.url, root, env=ANY_PORT) as worker,
        Redis.from_url(server.url) as redis,
    ):
        ask(server.url, "company", WITHIN)
        until(lambda: (said := published(redis, "company")) and said.unbatched, what="it is told")
        yield Found(server.url, worker)


def test_metrics_tell_what_audits_came_to_and_that_batches_have_ended(found: Found) -> None:
    seen = scrape(metrics_url(found.worker))
    assert seen("inferq_audits_total", model="company", result="different") == 1
    assert seen("inferq_audit_seconds_total", model="company") > 0
    assert seen("inferq_model_unbatched", model="company") == 1
    assert seen("inferq_batch_target_rows", model="company") == 1


def test_doctor_names_the_model_and_what_to_write(
    found: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFERQ_REDIS_URL", found.url)
    run = CliRunner().invoke(inferq, ["doctor"])
    (line,) = (line for line in run.stdout.splitlines() if "model company" in line)
    assert line.startswith("warning")
    assert "answers depend on their batch: output 'y' differs by" in line
    assert "runs request by request now → write batchable = false into its model.toml" in line


def test_flowers_page_tells_it(found: Found) -> None:
    with FlowerProcess(found.url) as flower:

        def told() -> bool:
            models = flower.get("/inference/data").json()["models"]
            row = next((each for each in models if each["model"] == "company"), None)
            return bool(row and row["unbatched"] and "output 'y' differs" in row["mismatch"])

        until(told, 30, "the page tells it")


def test_inspect_stats_tells_it(found: Found) -> None:
    with Celery(broker=found.url) as app:
        (stats,) = app.control.inspect(timeout=5, limit=1).stats().values()
    assert stats["inferq_audits"].startswith("company: answers depend on their batch: output 'y'")


# --- audits that go wrong ------------------------------------------------------------------------


def in_pairs(redis_url: str, model: str, pairs: int, value: float) -> list[Array]:
    """The answers to so many pairs of requests, each of which shares a batch."""
    answers: list[Array] = []
    with Client(redis_url) as client:
        for _ in range(pairs):
            items = [{"x": np.full((1, 3), value, np.float32)}] * 2
            results = list(client.map(model, items, in_flight=2))
            assert [result.receipt and result.receipt.requests for result in results] == [2, 2]
            answers += [result.outputs["y"] for result in results]
    return answers


def test_a_random_model_is_told_of_once_and_keeps_its_batches(
    redis_url: str, redis: Redis, tmp_path: Path
) -> None:
    onnx_models.noise(tmp_path / "noise" / "1" / "model.onnx")
    (tmp_path / "noise" / "model.toml").write_text(PAIRS)
    with Worker(redis_url, tmp_path) as worker:
        in_pairs(redis_url, "noise", 10, 1)
        until(lambda: "model noise answers the same run in two ways" in worker.log)
        in_pairs(redis_url, "noise", 10, 1)
        assert worker.log.count("model noise answers") == 1
        stats = until(
            lambda: (said := published(redis, "noise")) and said.audits["random"] and said
        )
        assert isinstance(stats, ModelStats)
        assert sum(stats.audits.values()) == 1


def test_an_engine_that_fails_in_an_audit_fails_no_request(
    redis_url: str, redis: Redis, tmp_path: Path
) -> None:
    onnx_models.fails_alone(tmp_path / "fails" / "1" / "model.onnx")
    (tmp_path / "fails" / "model.toml").write_text(PAIRS)
    with Worker(redis_url, tmp_path) as worker:
        answers = in_pairs(redis_url, "fails", 10, onnx_models.ODD_ABOVE + 1)
        assert {float(each[0, 0]) for each in answers} == {onnx_models.ODD_ABOVE + 1}
        until(lambda: "model fails is audited no more" in worker.log)
        stats = until(
            lambda: (said := published(redis, "fails")) and said.audits["failed"] and said
        )
        assert isinstance(stats, ModelStats)
        assert (stats.audits["failed"], stats.outcomes["failure"]) == (3, 0)


def test_a_child_whose_audit_never_ends_is_replaced_and_no_request_is_lost(
    redis_url: str, redis: Redis, tmp_path: Path
) -> None:
    onnx_models.stalls_alone(tmp_path / "stalls" / "1" / "model.onnx")
    (tmp_path / "stalls" / "model.toml").write_text(PAIRS + "max_run_seconds = 1.0")
    with SupervisedWorker(redis_url, tmp_path, ["stalls"]) as worker:
        first = worker.child()
        in_pairs(redis_url, "stalls", 1, onnx_models.ODD_ABOVE + 1)
        with Client(redis_url) as client:  # its only lane audits
            pending = [client.submit("stalls", {"x": numbered(n, 3)}) for n in range(5)]
            until(lambda: "a batch computes for longer than max_run_seconds" in worker.log, 30)
            for n, each in enumerate(pending):
                np.testing.assert_array_equal(each.result(60).outputs["y"], numbered(n, 3))
        assert worker.child() != first
        until(partial(nothing_is_held, redis), 30)


def test_a_worker_stops_in_time_though_an_audit_runs(
    redis_url: str, redis: Redis, tmp_path: Path
) -> None:
    onnx_models.stalls_alone(tmp_path / "stalls" / "1" / "model.onnx")
    (tmp_path / "stalls" / "model.toml").write_text(PAIRS)
    with Worker(redis_url, tmp_path) as worker:
        in_pairs(redis_url, "stalls", 1, onnx_models.ODD_ABOVE + 1)
        until(partial(nothing_is_held, redis), 30, "the results do not wait for the audit")
        assert worker.stop(15) == 0
    assert redis.zcard(Names().leases) == 0
