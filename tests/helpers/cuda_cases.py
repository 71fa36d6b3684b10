"""Cases of lanes on a CUDA device, each run as ``python -m helpers.cuda_cases NAME``.

Real PyCUDA on the fake driver (see fakecuda). In place of TensorRT a double of its execution
context computes with numpy on the "device" memory, which is the host's.
Each function without parameters is a case.
"""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Callable, Mapping

import numpy as np
import pytest
from pycuda import driver

from helpers.fakecuda.control import Control, on_device
from helpers.wait import until
from inferq.shared.errors import EngineError, FatalEngineError
from inferq.shared.schema import Array
from inferq.workers.cuda import calls, device
from inferq.workers.cuda.captures import CAPTURES
from inferq.workers.cuda.executor import Shape
from inferq.workers.cuda.graphs import Graph, Graphs
from inferq.workers.cuda.lane import KEPT_SHAPES, CudaLane
from inferq.workers.cuda.libcuda import current_context
from inferq.workers.cuda.splitting import RowLimit
from inferq.workers.models.engine import Batch, OutOfDeviceMemory

BUCKETS = (1, 2, 4, 8)
WIDTH = 6
CONTROL = Control()


class Doubler:
    """y = 2 x + k, for x float32[N, W] and k int8[N, 1]."""

    def __init__(self, us: float = -1.0) -> None:
        self.us = us
        self.addresses: dict[str, int] = {}
        self.shapes: Mapping[str, Shape] = {}
        self.set_count = 0
        #: Seconds until a kernel computes.
        self.late_s = 0.0
        #: The fewest and the most rows of a run.
        self.least, self.most = 1, 1 << 20
        #: Raised by the next runs of more rows than that.
        self.fails_above: tuple[float, Exception] | None = None

    def rows(self, shapes: Mapping[str, Shape]) -> int:
        return min(max(self.least, shapes["x"][0]), self.most)

    def set_shapes(self, shapes: Mapping[str, Shape]) -> Mapping[str, Shape]:
        assert self.least <= shapes["x"][0] <= self.most, "TensorRT would refuse it"
        self.shapes = dict(shapes)
        self.set_count += 1
        return {"y": shapes["x"]}

    def set_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def enqueue(self, stream: int) -> None:
        shapes, addresses = self.shapes, dict(self.addresses)
        if self.fails_above is not None and shapes["x"][0] > self.fails_above[0]:
            raise self.fails_above[1]

        def kernel() -> int:
            time.sleep(self.late_s)
            x = on_device(addresses["x"], shapes["x"], "f4")
            k = on_device(addresses["k"], shapes["k"], "i1")
            on_device(addresses["y"], shapes["x"], "f4")[...] = 2 * x + k
            return 0

        CONTROL.launch(stream, kernel, self.us)

    def capture(self, stream: int, work: Callable[[], None]) -> Graph:
        return Graph(stream, work)

    def close(self) -> None:
        self.addresses.clear()


def lane(
    gpu: device.Device,
    executor: Doubler,
    *,
    limit: RowLimit | None = None,
    rows: int = 8,
    width: int = WIDTH,
    graphs: Graphs | bool = True,
    spin: bool = False,
) -> CudaLane:
    return CudaLane(
        gpu,
        executor,
        {"x": "float32", "k": "int8"},
        {"y": "float32"},
        [{"x": (rows, width), "k": (rows, 1)}],
        limit or RowLimit(),
        buckets=BUCKETS,
        graphs=Graphs(graphs) if isinstance(graphs, bool) else graphs,
        spin=spin,
    )


def batch(*rows: int, bucket: int | None = None, width: int = WIDTH, seed: int = 0) -> Batch:
    """Requests of so many rows each."""
    rng = np.random.default_rng(seed)
    parts = [
        {
            "x": rng.standard_normal((n, width)).astype(np.float32),
            "k": rng.integers(-9, 9, (n, 1), np.int8),
        }
        for n in rows
    ]
    return Batch(parts, sum(rows), bucket or sum(rows))


#: One row's inputs.
ROW = batch(1).parts[0]


def answer(of: Batch) -> Array:
    x = np.concatenate([part["x"] for part in of.parts])
    k = np.concatenate([part["k"] for part in of.parts])
    joined: Array = 2 * x + k
    return joined


def check(on: CudaLane, of: Batch) -> None:
    np.testing.assert_array_equal(on.run(of)["y"], answer(of))


def every_request_gets_its_rows() -> None:
    """Requests of several rows, padding, shapes in turn; with graphs and without, twice each."""
    with_graphs = {}
    for graphs in (True, False):
        gpu = device.acquire()
        executor = Doubler()
        one = lane(gpu, executor, graphs=graphs)
        for seed in range(3):
            for rows, bucket in (((1,), 1), ((1, 1, 1), 4), ((2, 3, 1), 8), ((8,), 8), ((1, 1), 2)):
                check(one, batch(*rows, bucket=bucket, seed=seed))
        assert one.gpu_times is not None
        assert one.gpu_times.compute_ms >= 0
        with_graphs[graphs] = CONTROL.count("graph_launches")
        if graphs:
            # Eager twice for each of the four shapes; nothing is set for a graph.
            assert CONTROL.count("graph_launches") == 15 - 2 * 4
        one.close()
        device.release()
    assert with_graphs[False] == with_graphs[True]


def results_stay_as_they_were() -> None:
    """The lane does not write again to arrays that it handed out."""
    gpu = device.acquire()
    one = lane(gpu, Doubler())
    first = batch(2, 2, seed=1)
    got = one.run(first)["y"]
    for seed in range(5):
        one.run(batch(4, seed=seed))
    np.testing.assert_array_equal(got, answer(first))
    one.close()
    device.release()


def a_batch_is_one_launch_and_one_copy_each_way() -> None:
    gpu = device.acquire()
    one = lane(gpu, Doubler())
    for seed in range(3):
        check(one, batch(1, 2, bucket=4, seed=seed))
    names = ("graph_launches", "copies_h2d", "copies_d2h", "kernels")
    before = {name: CONTROL.count(name) for name in names}
    for seed in range(5):
        check(one, batch(1, 2, bucket=4, seed=seed))
    assert [CONTROL.count(name) - before[name] for name in names] == [5, 5, 5, 5]
    assert CONTROL.count("graph_uploads") == CONTROL.count("graph_execs") == 1
    one.close()
    device.release()


def times_of_a_graph_hold_no_pause_of_the_host() -> None:
    class Pausing(Doubler):
        def enqueue(self, stream: int) -> None:
            time.sleep(0.2)
            super().enqueue(stream)

    gpu = device.acquire()
    one = lane(gpu, Pausing(us=1000))
    check(one, batch(4))
    assert one.gpu_times is not None
    assert one.gpu_times.compute_ms >= 200, "submitted one by one, the card waits for the host"
    check(one, batch(4))
    check(one, batch(4))
    assert CONTROL.count("graph_launches") == 1
    assert 1 <= one.gpu_times.compute_ms < 200
    one.close()
    device.release()


def a_lane_sleeps_or_spins_until_its_run_has_ended() -> None:
    gpu = device.acquire()
    for spin, count in ((False, "blocking_waits"), (True, "spinning_waits")):
        one = lane(gpu, Doubler(), spin=spin)
        before = CONTROL.count(count)
        for _ in range(4):
            check(one, batch(2))
        assert CONTROL.count(count) == before + 4
        one.close()
    device.release()


def a_lane_waits_for_its_own_launch_and_not_for_the_one_before() -> None:
    gpu = device.acquire()
    executor = Doubler()
    one = lane(gpu, executor)
    executor.late_s = 0.05
    for seed in range(6):
        check(one, batch(4, seed=seed))
    assert CONTROL.count("graph_launches") == 4
    one.close()
    device.release()


class InCapture(Doubler):
    """Does `meanwhile` while it is captured, once; it may raise."""

    def __init__(self, meanwhile: Callable[[], object]) -> None:
        super().__init__()
        self.meanwhile: Callable[[], object] | None = meanwhile
        self.captures = 0

    def capture(self, stream: int, work: Callable[[], None]) -> Graph:
        meanwhile, self.meanwhile = self.meanwhile, None
        self.captures += 1

        def both() -> None:
            work()
            if meanwhile is not None:
                meanwhile()

        return Graph(stream, both)


def _during_a_capture(gpu: device.Device, act: Callable[[], object]) -> None:
    """Have `act` done by another thread while a lane captures: the capture succeeds."""
    thread = threading.Thread(target=act)

    def meanwhile() -> None:
        thread.start()
        until(lambda: not thread.is_alive() or CAPTURES._changed._waiters)  # type: ignore

    executor = InCapture(meanwhile)
    one = lane(gpu, executor)
    for seed in range(4):
        check(one, batch(4, seed=seed))
    thread.join()
    assert executor.captures == 1
    assert CONTROL.count("graph_launches") == 2, "it was captured, whatever the other did meanwhile"
    one.close()


def an_error_that_is_judged_during_a_capture_spoils_nothing() -> None:
    gpu = device.acquire()
    executor = Doubler()
    other = lane(gpu, executor, graphs=False)
    executor.fails_above = (0, RuntimeError("an ordinary error of one batch"))
    raised: list[Exception] = []

    def act() -> None:
        try:
            other.run(batch(2))
        except Exception as problem:  # noqa: BLE001 - looked at below
            raised.append(problem)

    _during_a_capture(gpu, act)
    (problem,) = raised
    assert isinstance(problem, EngineError)
    assert not isinstance(problem, FatalEngineError), problem
    executor.fails_above = None
    check(other, batch(2))
    other.close()
    device.release()


def a_first_run_during_a_capture_spoils_nothing() -> None:
    """It waits for the whole context, as libraries do that load kernels or choose among them."""

    class Loading(Doubler):
        def set_shapes(self, shapes: Mapping[str, Shape]) -> Mapping[str, Shape]:
            driver.Context.synchronize()
            return super().set_shapes(shapes)

        def enqueue(self, stream: int) -> None:
            driver.Context.synchronize()
            super().enqueue(stream)

    gpu = device.acquire()
    raised: list[Exception] = []

    def act() -> None:
        try:
            other = lane(gpu, Loading(), graphs=False)
            for rows in (1, 2, 1):
                check(other, batch(rows))
            other.close()
        except Exception as problem:  # noqa: BLE001 - looked at below
            raised.append(problem)

    _during_a_capture(gpu, act)
    assert not raised
    device.release()


def what_somebody_elses_capture_answers_is_not_sticky() -> None:
    """TensorRT-RTX captures by itself, and so may what a user installs: nobody can wait for it."""
    gpu = device.acquire()
    executor = Doubler()
    one = lane(gpu, executor, graphs=False)
    with gpu:
        foreign = driver.Stream()
        calls.begin_capture(foreign.handle)
    executor.fails_above = (0, RuntimeError("an ordinary error of one batch"))
    with pytest.raises(EngineError, match="an ordinary error") as raised:
        one.run(batch(2))
    assert not isinstance(raised.value, FatalEngineError), raised.value
    executor.fails_above = None
    check(one, batch(2))
    with gpu:
        with pytest.raises(calls.DriverError, match="INVALIDATED"):
            calls.end_capture(foreign.handle)
        del foreign
    one.close()
    device.release()


def after_a_capture_that_failed_all_lanes_of_the_model_go_on_without() -> None:
    """One run is thrown away, which TensorRT answers with the error that broke the capture."""

    class Remembering(InCapture):
        failed = False

        def enqueue(self, stream: int) -> None:
            if self.failed:
                self.failed = False
                raise RuntimeError("the last error")
            super().enqueue(stream)

    def broken() -> None:
        failing.failed = True
        raise RuntimeError("not this")

    gpu = device.acquire()
    graphs = Graphs(True)
    failing = Remembering(broken)
    one, other = lane(gpu, failing, graphs=graphs), lane(gpu, Doubler(), graphs=graphs)
    for seed in range(3):
        check(other, batch(8, seed=seed))
    assert CONTROL.count("graph_launches") == 1
    check(other, batch(4))
    for seed in range(6):
        check(one, batch(4, seed=seed))
        check(other, batch(4, seed=seed))
    check(other, batch(8))
    assert failing.captures == 1, "it is not tried again"
    # What was captured before: the other lane's for 8 rows, and nothing since.
    assert CONTROL.count("graph_launches") == 1
    for each in (one, other):
        each.close()
    device.release()


def graphs_that_are_turned_off_within_a_run_change_nothing_of_it() -> None:
    """By another lane, when this one has chosen to replay, and told the executor nothing."""

    class Within(Graphs):
        """Off once it was asked so often."""

        asked, most = 0, 1 << 20

        @property
        def on(self) -> bool:
            self.asked += 1
            return self.asked <= self.most

        @on.setter
        def on(self, _: bool) -> None:
            pass

    for most in range(1, 8):
        gpu = device.acquire()
        graphs = Within(True)
        one = lane(gpu, Doubler(), graphs=graphs)
        for seed in range(3):
            check(one, batch(8, seed=seed))
        check(one, batch(2))
        graphs.most = graphs.asked + most
        for rows in (8, 2, 8, 8):
            check(one, batch(rows, seed=rows + 10))
        one.close()
        device.release()


def graphs_and_single_commands_take_turns() -> None:
    """Each run has its own shapes and addresses, whatever ran before it."""
    gpu = device.acquire()
    one = lane(gpu, Doubler(), graphs=(graphs := Graphs(True)))
    for seed in range(3):
        check(one, batch(8, seed=seed))
    for rows in (2, 8, 3, 8, 2, 3, 1, 8):
        check(one, batch(rows, seed=rows))
    assert CONTROL.count("graph_launches") == 4
    graphs.on = False
    for rows in (8, 3, 8):
        check(one, batch(rows, seed=rows))
    assert CONTROL.count("graph_launches") == 4
    one.close()
    device.release()


def any_number_of_shapes_keeps_few_graphs() -> None:
    gpu = device.acquire()
    one = lane(gpu, Doubler(), width=3 * KEPT_SHAPES)
    for width in [*range(1, 2 * KEPT_SHAPES), 5, 2 * KEPT_SHAPES - 1]:
        for seed in range(2):
            check(one, batch(1, 1, width=width, seed=seed))
    assert CONTROL.count("graph_execs") == KEPT_SHAPES
    one.close()
    device.release()
    assert CONTROL.count("graph_execs") == 0


def _took(gpu: device.Device, count: int, copy: float) -> float:
    """How long `count` lanes are busy with batches, of each of which a copy takes `copy` as long
    as its computing; as a multiple of computing alone. In simulated time."""
    kernel_us, runs, rows, width = 20_000.0, 25, 8, 5_000
    CONTROL.set("ns_per_byte", copy * kernel_us * 1000 / (rows * width * 4))
    lanes = [lane(gpu, Doubler(kernel_us), rows=rows, width=width) for _ in range(count)]
    work = batch(*[1] * rows, width=width)
    ended: list[int] = []
    ending = threading.Lock()

    def drive(each: CudaLane) -> None:
        for _ in range(runs):
            each.run(work)
        with ending:
            ended.append(CONTROL.count("timeline_us"))
            CONTROL.set("hosts", count - len(ended))

    threads = [threading.Thread(target=drive, args=(each,)) for each in lanes]
    CONTROL.set("hosts", count)
    began = CONTROL.count("timeline_us")
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each in lanes:
        times = each.gpu_times
        assert times is not None
        assert times.h2d_ms >= 0.99 * copy * kernel_us / 1000
        assert times.compute_ms >= 0.99 * kernel_us / 1000
        assert times.d2h_ms >= 0.99 * copy * kernel_us / 1000
        each.close()
    # The first copy in and the last copy out have nothing to hide behind.
    return (ended[-1] - began - 2 * copy * kernel_us) / (count * runs * kernel_us)


def copies_hide_behind_compute() -> None:
    """Two lanes take 5 % more than the larger of copying and computing at most."""
    gpu = device.acquire()
    for count, copy, most in ((2, 0.45, 1.0), (2, 0.75, 1.5), (3, 0.9, 1.0)):
        took = _took(gpu, count, copy)
        print(f"{count} lanes, copies of {copy} each way: {took:.3f} of computing alone")
        assert took <= 1.05 * most
    assert _took(gpu, 1, 0.45) >= 1.85, "one lane hides nothing"
    device.release()


def a_sticky_error_is_fatal_and_another_is_not() -> None:
    gpu = device.acquire()
    executor = Doubler()
    one = lane(gpu, executor, graphs=False)
    executor.fails_above = (3, RuntimeError("execute_async_v3 said no"))
    with pytest.raises(EngineError, match="execute_async_v3 said no") as raised:
        one.run(batch(4))
    assert not isinstance(raised.value, FatalEngineError), "the context is well"
    check(one, batch(2))
    CONTROL.fail(700)
    for _ in range(2):
        with pytest.raises(FatalEngineError, match="beyond use"):
            one.run(batch(2))
    one.close()


def a_sticky_error_is_fatal_wherever_it_is_told() -> None:
    """By the push of the context, or first by what the lane waits for and then by the pop. The
    thread ends as any other, and nothing is freed, nor asked of CUDA."""
    names = ("calls", "streams", "events", "device_bytes", "pinned_bytes", "contexts")

    def counts() -> list[int]:
        return [CONTROL.count(name) for name in names]

    before = _lose(counts)
    gc.collect()
    assert counts() == before
    assert CONTROL.count("pinned_bytes") > 0


def _lose(counts: Callable[[], list[int]]) -> list[int]:
    """What was counted when CUDA was found to be beyond use, before all is closed."""
    CONTROL.set("switch_fails", 1)
    gpu = device.acquire()
    executor = Doubler()
    one, other = lane(gpu, executor, graphs=False), lane(gpu, Doubler())
    check(one, batch(2))
    check(other, batch(2))
    original = executor.enqueue
    raised: list[BaseException] = []

    def enqueue(stream: int) -> None:
        original(stream)
        CONTROL.fail(700)

    def work() -> None:
        executor.enqueue = enqueue  # type: ignore[method-assign]
        for each in (one, one, other):
            try:
                each.run(batch(2))
            except BaseException as problem:  # noqa: BLE001 - looked at below
                raised.append(problem)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [type(problem) for problem in raised] == [FatalEngineError] * 3, raised
    before = counts()
    one.close()
    other.close()
    device.release()
    return before


def a_sticky_error_that_closing_meets_frees_nothing_more() -> None:
    gpu = device.acquire()
    one = lane(gpu, Doubler())
    for _ in range(3):
        check(one, batch(2))
    pinned = CONTROL.count("pinned_bytes")
    CONTROL.fail(700)
    one.close()
    assert gpu.lost is not None
    before = CONTROL.count("calls")
    one.close()
    device.release()
    assert CONTROL.count("calls") == before
    assert CONTROL.count("pinned_bytes") == pinned


def an_error_that_only_the_events_tell_is_judged_too() -> None:
    gpu = device.acquire()
    one = lane(gpu, Doubler(), graphs=False)

    def ms_since(this: calls.Event, earlier: calls.Event) -> float:
        CONTROL.fail(700)
        return original(this, earlier)

    original, calls.Event.ms_since = calls.Event.ms_since, ms_since  # type: ignore
    with pytest.raises(FatalEngineError, match="beyond use"):
        one.run(batch(2))
    one.close()


def short_memory_splits_the_batch_and_those_after_it() -> None:
    gpu = device.acquire()
    limit, executors = RowLimit(), [Doubler(), Doubler()]
    one, other = (lane(gpu, each, limit=limit, graphs=False) for each in executors)
    for each in executors:
        each.fails_above = (4, OutOfDeviceMemory("cuMemAlloc failed"))
    check(one, batch(1, 2, 1, 1, 2, bucket=8))
    assert limit.rows(ROW) == 4
    before = executors[1].set_count
    check(other, batch(8))
    assert executors[1].set_count == before + 1, "it did not try 8 rows first"
    for each in executors:
        each.fails_above = (1, OutOfDeviceMemory("cuMemAlloc failed"))
    check(one, batch(8))  # of one request, which nobody else could split
    assert limit.rows(ROW) == 1
    for each in executors:
        each.fails_above = (0, OutOfDeviceMemory("cuMemAlloc failed"))
    with pytest.raises(OutOfDeviceMemory):
        one.run(batch(8))
    for opened in (one, other):
        opened.close()
    device.release()


def memory_that_is_short_when_a_graph_is_launched_splits_the_batch() -> None:
    gpu = device.acquire()
    limit = RowLimit()
    one = lane(gpu, Doubler(), limit=limit)
    for rows in (8, 4, 2):
        for seed in range(3):
            check(one, batch(rows, seed=seed))
    CONTROL.set("graph_bytes", 400)  # eight rows copy 456 both ways, four 356
    launches = CONTROL.count("graph_launches")
    check(one, batch(3, 3, 2, seed=9))
    assert limit.rows(ROW) == 4
    assert CONTROL.count("graph_launches") == launches + 2
    one.close()
    device.release()


def short_memory_for_large_rows_does_not_split_small_ones() -> None:
    gpu = device.acquire()
    executor, limit = Doubler(), RowLimit()
    one = lane(gpu, executor, limit=limit, width=100, graphs=False)
    executor.fails_above = (4, OutOfDeviceMemory("cuMemAlloc failed"))
    check(one, batch(8, width=100))
    assert limit.rows(batch(1, width=100).parts[0]) == 4
    executor.fails_above = None
    before = executor.set_count
    check(one, batch(8, width=49))
    assert executor.set_count == before + 1, "it is as large as what was found to fit"
    check(one, batch(8, width=60))
    assert executor.set_count == before + 2, "in two pieces of the same bucket, 4"
    assert limit.rows(batch(1, width=4000).parts[0]) == 1
    one.close()
    device.release()


def short_memory_counts_the_rows_that_are_run() -> None:
    """Padding included: a bucket that does not fit is not tried again for fewer requests."""
    gpu = device.acquire()
    executor, limit = Doubler(), RowLimit()
    one = lane(gpu, executor, limit=limit, graphs=False)
    executor.fails_above = (4, OutOfDeviceMemory("cuMemAlloc failed"))
    check(one, batch(1, bucket=8))
    assert limit.rows(ROW) == 4
    before = executor.set_count
    check(one, batch(2, 1, bucket=8))
    assert executor.set_count == before + 1, "it did not try 8 rows first"
    gpu_of_others = executor.set_shapes

    def another_lane_is_short_meanwhile(shapes: Mapping[str, Shape]) -> Mapping[str, Shape]:
        limit.lower(ROW, 4)
        return gpu_of_others(shapes)

    one._splitter._limit = limit = RowLimit()
    executor.set_shapes = another_lane_is_short_meanwhile  # type: ignore
    check(one, batch(7, bucket=8))
    assert limit.rows(ROW) == 4
    one.close()
    device.release()


def a_batch_that_no_run_holds_is_padded_or_split() -> None:
    """Each request gets its rows, whichever sizes of a batch the executor takes."""
    gpu = device.acquire()
    executor = Doubler()
    executor.least, executor.most = 3, 5
    one = lane(gpu, executor, rows=5)
    for seed in range(2):
        check(one, batch(1, bucket=1, seed=seed))
        check(one, batch(1, 4, seed=seed))
        check(one, batch(3, 3, 1, bucket=8, seed=seed))
        check(one, batch(4, bucket=8, seed=seed))
    one.close()
    device.release()


def pieces_are_padded_up_to_the_smallest_run() -> None:
    """Memory that is short splits a batch, whose pieces may have fewer rows than a run takes."""
    gpu = device.acquire()
    executor, limit = Doubler(), RowLimit()
    executor.least = 3
    one = lane(gpu, executor, limit=limit, graphs=False)
    executor.fails_above = (4, OutOfDeviceMemory("cuMemAlloc failed"))
    check(one, batch(2, 3, bucket=5))
    assert limit.rows(ROW) == 3
    check(one, batch(1, 2, 1, 3, 1, bucket=8))
    executor.fails_above = (2, OutOfDeviceMemory("cuMemAlloc failed"))
    one._splitter._limit = limit = RowLimit()
    with pytest.raises(OutOfDeviceMemory):
        one.run(batch(2, bucket=4))
    assert limit.rows(ROW) == 3, "less cannot be asked of it"
    executor.fails_above = None
    limit.lower(ROW, 2)  # found out by a lane whose runs may be of two rows
    check(one, batch(8))
    one.close()
    device.release()


def any_of_the_largest_shapes_has_room() -> None:
    """A tall one and a wide one: neither holds the other."""
    gpu = device.acquire()
    executor = Doubler()
    shapes = [{"x": (32, 2), "k": (32, 1)}, {"x": (2, 100), "k": (2, 1)}]
    one = CudaLane(
        gpu,
        executor,
        {"x": "float32", "k": "int8"},
        {"y": "float32"},
        shapes,
        RowLimit(),
        buckets=(),
        graphs=Graphs(True),
    )
    assert CONTROL.count("device_bytes") >= 2 * 200 * 4 + 32
    for seed in range(3):
        check(one, batch(16, 16, width=2, seed=seed))
        check(one, batch(1, 1, width=100, seed=seed))
    one.close()
    device.release()


def an_output_with_other_rows_is_refused() -> None:
    """Or what is missing, or belongs to another request, would go unseen where padding is cut."""
    gpu = device.acquire()
    executor = Doubler()
    one = lane(gpu, executor, graphs=False)
    original = executor.set_shapes
    for rows, shown in (((2, WIDTH), "2 rows"), ((), "no rows")):
        executor.set_shapes = lambda shapes, y=rows: {**original(shapes), "y": y}  # type: ignore
        one._bound.clear()
        with pytest.raises(EngineError, match=f"output 'y' has {shown}; expected 4"):
            one.run(batch(1, 2, bucket=4))
    one.close()
    device.release()


def memory_that_is_short_at_the_start_is_said() -> None:
    gpu = device.acquire()
    free, _ = gpu.memory()
    executor = Doubler()
    with pytest.raises(driver.MemoryError) as error:
        lane(gpu, executor, width=free // 33)  # x fits, y does not
    names = ("streams", "events", "device_bytes", "pinned_bytes")
    left = {name: CONTROL.count(name) for name in names}
    assert not any(left.values()), f"{error} keeps {left}"
    assert not executor.addresses, "it is closed"
    check(lane(gpu, Doubler()), batch(3))


def a_lane_that_gets_no_stream_closes_its_executor() -> None:
    gpu = device.acquire()
    executor = Doubler()
    executor.set_address("x", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "Stream", _full)
        with pytest.raises(driver.MemoryError):
            lane(gpu, executor)
    assert not executor.addresses, "it is closed"
    check(lane(gpu, Doubler()), batch(3))


def _full(*_: object) -> None:
    raise driver.MemoryError("cuStreamCreate failed: out of memory")


def what_cannot_be_freed_keeps_nothing_else() -> None:
    """A graph, an event, the executor: each refuses in turn, by an error that is not sticky."""
    names = ("streams", "events", "device_bytes", "pinned_bytes", "graph_execs")
    for owner, name, left in (
        (Graph, "close", {"graph_execs": 2}),
        (calls.Event, "close", {"events": 5}),
        (Doubler, "close", {}),
    ):
        gpu = device.acquire()
        executor = Doubler()
        one = lane(gpu, executor)
        for rows in (2, 4, 2, 4):
            check(one, batch(rows))
        original = getattr(owner, name)
        refused: list[object] = []

        def refuses(this: object, refused: list[object] = refused) -> None:
            refused.append(this)
            raise calls.DriverError("it", 1)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, refuses)
            one.close()
        assert {name: CONTROL.count(name) for name in names} == dict.fromkeys(names, 0) | left
        assert executor.addresses == {} or owner is Doubler, "it is closed, too"
        with gpu:
            for each in refused:
                original(each)
        device.release()


def inputs_that_have_no_room_are_refused() -> None:
    """Where nobody has looked at their shapes before: nothing is copied beyond a lane's memory."""
    gpu = device.acquire()
    one = lane(gpu, Doubler(), rows=4)
    for rows, width in ((5, WIDTH), (4, 40), (1, 400)):
        for _ in range(3):
            with pytest.raises(EngineError, match=r"inputs of \d+ bytes; expected at most 260"):
                one.run(batch(rows, width=width))
        check(one, batch(4))
    one.close()
    device.release()


def memory_that_is_short_at_any_call_leaves_nothing() -> None:
    """At each allocation of a lane, one after the other."""
    names = ("streams", "events", "device_bytes", "pinned_bytes", "graph_execs")
    gpu = device.acquire()
    places = [(driver, "Stream"), (driver, "pagelocked_empty"), (driver, "mem_alloc")]
    places += [(calls, "timing_event"), (calls, "waiting_event")]
    failed = 0
    for owner, name in places:
        original = getattr(owner, name)
        for nth in range(8):
            count = 0

            def counted(*given: object, **named: object) -> object:
                nonlocal count
                count += 1
                if count > nth:  # noqa: B023 - called before the next turn
                    raise driver.MemoryError("out of memory")
                return original(*given, **named)  # noqa: B023

            executor = Doubler()
            executor.set_address("x", 1)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(owner, name, counted)
                try:
                    lane(gpu, executor).close()
                except driver.MemoryError:
                    failed += 1
            left = {name: CONTROL.count(name) for name in names}
            assert not any(left.values()), (name, nth, left)
            assert not executor.addresses, "it is closed"
    assert failed == 1 + 2 + 2 + 4 + 1
    check(lane(gpu, Doubler()), batch(3))


def nothing_is_left_after_a_thousand_lanes() -> None:
    """Opened and run by threads that end, closed by another."""
    names = ("contexts", "streams", "events", "device_bytes", "pinned_bytes", "graph_execs")
    for _ in range(100):
        gpu = device.acquire()
        lanes: list[CudaLane] = []

        def work(into: list[CudaLane], on: device.Device) -> None:
            for n in range(2):
                one = lane(on, Doubler())
                for seed in range(2):
                    check(one, batch(1 + n, 2, seed=seed))
                into.append(one)

        threads = [threading.Thread(target=work, args=(lanes, gpu)) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(lanes) == 10
        for one in lanes:
            one.close()
            one.close()
        device.release()
    left = {name: CONTROL.count(name) for name in names}
    assert not any(left.values()), left
    assert CONTROL.count("frees_while_busy") == 0
    assert current_context() is None, "a released context is not left current"


def a_thread_that_did_not_make_the_context_leaves_nothing_either() -> None:
    """As a worker's main thread when it stops: another one has loaded the models."""
    opened: list[CudaLane] = []

    def load() -> None:
        one = lane(device.acquire(), Doubler())
        for rows in (1, 2, 4):
            check(one, batch(rows))
        opened.append(one)

    thread = threading.Thread(target=load)
    thread.start()
    thread.join()
    opened[0].close()
    assert CONTROL.count("pinned_bytes") == CONTROL.count("device_bytes") == 0
    device.release()
    assert CONTROL.count("contexts") == 0


if __name__ == "__main__":
    globals()[sys.argv[1]]()
