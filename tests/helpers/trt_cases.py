"""Cases of TensorRT's lanes, each run as ``python -m helpers.trt_cases NAME``.

PyCUDA is real, on the fake driver (see fakecuda); the module tensorrt is a double (double_trt) that
computes on the fake device's memory. Each function without parameters is a case.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tensorrt

from helpers import onnx_models
from helpers.fakecuda.control import Control
from helpers.wait import until
from inferq.shared.errors import EngineError
from inferq.shared.schema import Array
from inferq.workers.cuda import device, memory_share
from inferq.workers.cuda.captures import CAPTURES
from inferq.workers.cuda.graphs import CaptureFailed
from inferq.workers.cuda.lane import KEPT_SHAPES, CudaLane
from inferq.workers.models.engine import Batch
from inferq.workers.models.ranges import InputRange
from inferq.workers.process import shares
from inferq.workers.trt.api import RTX, TENSORRT
from inferq.workers.trt.flavours import find_flavour
from inferq.workers.trt.lanes import Opened, opened
from inferq.workers.trt.network import build, parse

CONTROL = Control()
#: So often each size runs until the next run replays a graph.
EAGER_RUNS = 2


@contextmanager
def lanes(
    write: Callable[[Path], Path],
    profiles: Sequence[InputRange],
    *,
    count: int = 1,
    graphs: bool = True,
    own: bool = False,
    made: list[Opened] | None = None,
) -> Iterator[Sequence[CudaLane]]:
    """Lanes of the plan of the model that `write` writes, of one input.

    `own`: TensorRT-RTX captures graphs by itself. `made` gets what is opened.
    """
    flavour = find_flavour(RTX if own else TENSORRT)
    with tempfile.TemporaryDirectory() as folder:
        network = parse(flavour, write(Path(folder) / "model.onnx"))
        plan, _ = build(flavour, network, [[each] for each in profiles])
    with (
        device.acquired() as gpu,
        opened(
            gpu,
            flavour,
            plan,
            count=count,
            buckets=(),
            own_graphs=own,
            cuda_graphs=graphs and not own,
        ) as plan_on_gpu,
    ):
        if made is not None:
            made.append(plan_on_gpu)
        yield plan_on_gpu.lanes


def rows(count: int, seed: int, width: int = 3) -> Array:
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


def check(on: CudaLane, x: Array) -> None:
    np.testing.assert_array_equal(on.run(Batch([{"x": x}], len(x), len(x)))["y"], 2 * x)


def up_to(most: int, width: int = 3, least: int = 1) -> InputRange:
    return InputRange("x", (least, width), (most, width), (most, width))


def a_graph_answers_for_its_own_shapes_whatever_ran_since() -> None:
    """A → B → A, on a model that computes with its input's shape."""
    with lanes(onnx_models.reshaped, [up_to(8)]) as (lane,):
        for size in (8, 2):
            for seed in range(EAGER_RUNS + 1):
                check(lane, rows(size, seed))
        before = CONTROL.count("graph_launches")
        for seed, size in enumerate((8, 2, 2, 8, 5, 8, 2), 10):
            check(lane, rows(size, seed))
        assert CONTROL.count("graph_launches") == before + 6, "all but the 5 are replayed"


def graphs_of_several_profiles_answer_for_their_own_shapes() -> None:
    spans = [up_to(2), up_to(8)]
    with lanes(onnx_models.reshaped, spans) as (lane,):
        for seed in range(EAGER_RUNS + 2):
            for size in (1, 8, 2, 5, 4, 3):
                check(lane, rows(size, 10 * seed + size))


def contexts_of_graphs_that_are_dropped_are_used_again() -> None:
    """Dims that are not padded may have any size; as many graphs are kept as ever."""
    most = 2 * KEPT_SHAPES
    with lanes(onnx_models.reshaped, [up_to(most)]) as (lane,):
        sizes = [*range(1, most), 5, most - 1]
        for size in sizes:
            for seed in range(EAGER_RUNS):
                check(lane, rows(size, seed))
        assert CONTROL.count("graph_execs") == KEPT_SHAPES
        assert len(lane._executor._contexts) <= KEPT_SHAPES + 2  # type: ignore[attr-defined]
        for size in sizes[-KEPT_SHAPES // 2 :]:
            check(lane, rows(size, size))


def a_lanes_contexts_share_memory_that_no_other_lane_uses() -> None:
    """Of several profiles, and of graphs of several sizes."""
    before = CONTROL.count("device_bytes")
    with lanes(onnx_models.reshaped, [up_to(2), up_to(4), up_to(8)], count=2) as opened_lanes:
        for lane in opened_lanes:
            for size in (8, 4, 2, 1):
                for seed in range(EAGER_RUNS + 1):
                    check(lane, rows(size, seed))
        used = [
            {context._context._memory for context in lane._executor._contexts}  # type: ignore[attr-defined]
            for lane in opened_lanes
        ]
        assert all(len(each) == 1 for each in used)
        assert used[0] != used[1]
        taken = CONTROL.count("device_bytes") - before
        assert 2e6 <= taken < 2.1e6, "1 MB for each lane, and tensors"
    left = {name: CONTROL.count(name) for name in ("device_bytes", "streams", "graph_execs")}
    assert not any(left.values()), left


def what_was_captured_runs_on_when_graphs_are_turned_off() -> None:
    """A capture of another lane has failed: the context of a graph is nobody's to run any more."""
    with lanes(onnx_models.reshaped, [up_to(8)], count=2) as (lane, other):
        for seed in range(EAGER_RUNS):
            check(lane, rows(8, seed))
        lane._graphs.turn_off(CaptureFailed("on the other lane"))
        for size in (8, 8, 2, 8):
            check(lane, rows(size, size))
            check(other, rows(size, size))


def a_further_lane_that_is_closed_has_nothing_of_the_processs_share() -> None:
    """Warm-up opens lanes to see whether they gain; models that are loaded later want the rest."""
    total, made = 1 << 33, list[Opened]()
    shares.share_with(2)
    with lanes(onnx_models.reshaped, [up_to(8)], made=made) as (lane,):
        (opened_plan,) = made
        before = memory_share.left(total)
        for _ in range(3):
            further = opened_plan.another()
            check(further, rows(8, 1))
            assert memory_share.left(total) < before
            further.close()
            assert memory_share.left(total) == before
        check(lane, rows(8, 2))
    assert memory_share.left(total) == total // 2


def a_context_that_cannot_be_prepared_is_not_kept() -> None:
    """Each batch asks for one again, as long as that fails."""
    made = weakref.WeakSet[object]()
    make, prepare = tensorrt._Context.__init__, tensorrt._Context.set_device_memory

    def counted(this: object, *given: object) -> None:
        made.add(this)
        make(this, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensorrt._Context, "__init__", counted)
        with lanes(onnx_models.reshaped, [up_to(8)]) as (lane,):
            for seed in range(EAGER_RUNS):
                check(lane, rows(8, seed))
            kept = len(made)
            patch.setattr(
                tensorrt._Context, "set_device_memory", lambda this, *_: this._log("not this")
            )
            for _ in range(5):
                with pytest.raises(EngineError, match="refused the device memory"):
                    lane.run(Batch([{"x": rows(3, 1)}], 3, 3))
            gc.collect()
            assert len(made) == kept
            patch.setattr(tensorrt._Context, "set_device_memory", prepare)
            for size in (3, 8):
                check(lane, rows(size, size))


def a_batch_is_repeated_whatever_ran_before() -> None:
    """To tell what computing it takes: of graphs, and of single commands."""
    for graphs in (True, False):
        with lanes(onnx_models.reshaped, [up_to(8)], graphs=graphs) as (lane,):
            for size in (8, 8, 8, 2, 8):
                x = rows(size, size)
                assert lane.repeat(Batch([{"x": x}], size, size), 3) >= 0
                check(lane, x)


def rtx_captures_a_new_size_while_nobody_spoils_it() -> None:
    """It does so within the run, whenever a size is new."""
    import tensorrt_rtx  # noqa: PLC0415 - the double

    with lanes(onnx_models.reshaped, [up_to(8)], count=2, own=True) as (lane, other):
        threads: list[threading.Thread] = []
        captures = 0

        def meanwhile() -> None:
            nonlocal captures
            captures += 1
            judging = threading.Thread(target=other._device.judge, args=(RuntimeError("one"),))
            judging.start()
            threads.append(judging)
            until(lambda: not judging.is_alive() or CAPTURES._changed._waiters)  # type: ignore

        tensorrt_rtx.during_captures.append(meanwhile)
        for size in (8, 3, 8, 5, 3):
            check(lane, rows(size, size))
        assert captures == 3, "each size once"
        for thread in threads:
            thread.join()


def rtx_captures_though_others_never_stop() -> None:
    """A run cannot be put off, as a capture of a lane's own can: others that come later wait."""
    import tensorrt_rtx  # noqa: PLC0415 - the double

    with lanes(onnx_models.reshaped, [up_to(8)], own=True) as (lane,):
        stop = threading.Event()
        held = threading.Barrier(3)

        def hold() -> None:
            turns = 0
            while not stop.is_set():
                with CAPTURES.shared():
                    turns += 1
                    if turns == 1:
                        held.wait(10)
                    stop.wait(0.05)

        def alone() -> None:
            assert CAPTURES._others == 0

        others = [threading.Thread(target=hold) for _ in range(2)]
        for other in others:
            other.start()
        held.wait(10)
        tensorrt_rtx.during_captures.append(alone)
        for size in (8, 3, 5):
            check(lane, rows(size, size))
        stop.set()
        for other in others:
            other.join()


if __name__ == "__main__":
    globals()[sys.argv[1]]()
