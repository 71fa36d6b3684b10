"""No batch is run that is larger than what fits: it is run in parts, and answers are the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from inferq.shared.errors import EngineError
from inferq.shared.schema import Array, Ticket
from inferq.workers.batching.policy import Knobs
from inferq.workers.batching.waiting import Waiting
from inferq.workers.claims.runs import Outcome
from inferq.workers.data_plane.lanes import execute
from inferq.workers.models.engine import Batch, Lane, OutOfDeviceMemory, gather
from inferq.workers.warmup.cache import Cache
from inferq.workers.warmup.fit import Fit, lacks_memory
from inferq.workers.warmup.notes import Note, Notes


class Small(Lane):
    """Doubles its input, and has no memory for more than `most` elements."""

    def __init__(self, most: int = 1 << 30) -> None:
        self.most = most
        self.ran: list[int] = []

    def run(self, batch: Batch) -> Mapping[str, Array]:
        x = gather(batch)["x"]
        if x.size > self.most:
            raise EngineError("onnxruntime: std::bad_alloc")
        self.ran.append(batch.bucket)
        return {"y": 2 * x[: batch.rows]}


def _item(rows: int, width: int = 2) -> Waiting:
    return Waiting(
        ticket=Ticket(str(rows), "m", ""),
        inputs={"x": np.random.rand(rows, width)},
        slot=None,
        compatible=None,
        arrived_mono_ms=0.0,
        claimed_redis_ms=0.0,
        rows=rows,
        alone=False,
    )


def _check(outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        assert outcome.error is None
        assert outcome.outputs is not None
        np.testing.assert_array_equal(outcome.outputs["y"], 2 * outcome.item.inputs["x"])


def _run(lane: Lane, items: list[Waiting], fit: Fit, **knobs: Any) -> list[Outcome]:
    outcomes = execute(lane, items, Knobs(max_batch_size=32, **knobs), fit=fit)
    assert [outcome.item for outcome in outcomes] == items
    return outcomes


def test_a_request_of_more_rows_than_fit_is_run_in_pieces() -> None:
    lane = Small()
    outcomes = _run(lane, [_item(11)], Fit("m", elements=8))
    _check(outcomes)
    assert lane.ran == [4, 4, 3]
    assert outcomes[0].run is not None
    assert outcomes[0].run.rows == 11


def test_pieces_have_the_size_of_a_bucket() -> None:
    lane = Small()
    _check(_run(lane, [_item(11)], Fit("m", elements=10), buckets=(1, 4, 16)))
    assert lane.ran == [4, 4, 4]


def test_a_batch_of_several_requests_is_run_in_parts() -> None:
    lane = Small()
    _check(_run(lane, [_item(3), _item(1), _item(6)], Fit("m", elements=8)))
    assert max(lane.ran) <= 4
    assert sum(lane.ran) == 10


def test_of_small_rows_more_fit_than_of_large_ones() -> None:
    lane = Small()
    fit = Fit("m", elements=8)
    _check(_run(lane, [_item(8, width=1)], fit))
    _check(_run(lane, [_item(2, width=100)], fit))
    assert lane.ran == [8, 1, 1]


def test_where_memory_is_refused_the_batch_runs_in_parts_and_so_do_those_after_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lane, fit = Small(most=8), Fit("m")
    _check(_run(lane, [_item(11)], fit))
    assert fit.elements <= 10
    assert max(lane.ran) <= 4
    lane.most = 1 << 30
    lane.ran.clear()
    _check(_run(lane, [_item(3), _item(5)], fit))
    assert max(lane.ran) <= 5
    assert "model m: there is no memory for a batch of 11 rows" in caplog.text


def test_one_row_for_which_memory_is_refused_fails() -> None:
    (outcome,) = _run(Small(most=1), [_item(1)], Fit("m"))
    assert isinstance(outcome.error, EngineError)


def test_a_refusal_of_memory_is_told_from_other_errors() -> None:
    assert lacks_memory(MemoryError())
    assert lacks_memory(OutOfDeviceMemory("x"))
    assert lacks_memory(RuntimeError("bfc_arena.cc:376 Failed to allocate memory for requested"))
    wrapped = EngineError("torch: failed")
    wrapped.__cause__ = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")
    assert lacks_memory(wrapped)
    assert not lacks_memory(ValueError("bad row"))


def test_what_was_survived_before_is_not_looked_at_again(tmp_path: Path) -> None:
    notes = Notes(Cache(tmp_path), "m", 0)
    notes.open()
    (path,) = tmp_path.glob("*.trying")
    noted: list[int] = []

    class Telling(Small):
        def run(self, batch: Batch) -> Mapping[str, Array]:
            trying = msgspec.json.decode(path.read_bytes(), type=Note).trying
            noted.append(trying.rows if trying is not None else 0)
            return super().run(batch)

    lane, fit = Telling(), Fit("m", notes, row=2)
    for rows in (1, 4, 3, 8, 8, 5):
        _check(_run(lane, [_item(rows)], fit))
    assert noted == [0, 4, 0, 8, 0, 0]
    assert fit.free == 8
    fit.lower({"x": np.zeros((1, 2))}, 8)
    assert fit.free == 4
    notes.close()
