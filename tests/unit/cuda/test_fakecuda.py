"""The fake CUDA driver behaves as a card does where lanes depend on it, under the real PyCUDA."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.fakecuda import run_python

#: What every test's process begins with; `ms` is the time from one event to another, waited for.
PROLOGUE = """
import ctypes, gc, threading, time
import numpy as np
import pycuda.driver as cuda
from helpers.fakecuda.control import Control

cuda.init()
control = Control()
context = cuda.Device(0).retain_primary_context()
context.push()

def pinned(size):
    return cuda.pagelocked_empty(size, np.uint8)

def event(stream):
    made = cuda.Event()
    made.record(stream)
    return made

def ms(begin, end):
    end.synchronize()
    return begin.time_till(end)

def fails(call, kind):
    try:
        call()
    except kind as problem:
        return str(problem)
    raise AssertionError('it did not fail')
"""
EPILOGUE = """
gc.collect()
context.pop()
context.detach()
"""

Run = Callable[..., str]


@pytest.fixture
def run(fake_driver: Path) -> Run:
    """``run(code, **settings)``: what `code` prints, with a context that ends after it."""
    return lambda code, **settings: run_python(PROLOGUE + code + EPILOGUE, fake_driver, **settings)


def test_copies_bring_back_what_a_kernel_made_of_them(run: Run) -> None:
    run("""
there, back = pinned(4096), pinned(4096)
there[:] = np.arange(4096) % 100
memory = cuda.mem_alloc(4096)
stream = cuda.Stream()

def double():
    array = np.ctypeslib.as_array((ctypes.c_uint8 * 4096).from_address(int(memory)))
    array *= 2

cuda.memcpy_htod_async(memory, there, stream)
assert control.launch(stream.handle, double) == 0
cuda.memcpy_dtoh_async(back, memory, stream)
stream.synchronize()
assert (back == 2 * there).all()
plain = np.zeros(4096, np.uint8)
cuda.memcpy_dtoh(plain, memory)
assert (plain == back).all()
cuda.memset_d8(memory, 7, 4096)
cuda.memcpy_dtoh(plain, memory)
assert (plain == 7).all()
""")


def test_nothing_has_happened_before_somebody_waits(run: Run) -> None:
    run("""
stream, memory, back = cuda.Stream(), cuda.mem_alloc(8), pinned(8)
back[:] = 1
control.launch(stream.handle, us=200_000)
cuda.memset_d8_async(memory, 5, 8, stream)
cuda.memcpy_dtoh_async(back, memory, stream)
end = event(stream)
assert not end.query() and not stream.is_done()
assert (back == 1).all()
end.synchronize()
assert end.query() and (back == 5).all()
""")


def test_a_stream_waits_for_an_event_of_another(run: Run) -> None:
    run("""
one, other = cuda.Stream(), cuda.Stream()
ran = []
begin = event(one)
control.launch(one.handle, lambda: ran.append('first'), 100_000)
control.launch(one.handle, lambda: ran.append('second'), 0)
other.wait_for_event(event(one))
cuda.memcpy_htod_async(memory := cuda.mem_alloc(8), pinned(8), other)
assert ms(begin, event(other)) >= 100
assert ran == ['first', 'second']
""")


@pytest.mark.parametrize(
    ("left", "right", "expected_ms"),
    [
        ("compute", "h2d", 100),
        ("compute", "d2h", 100),
        ("h2d", "d2h", 100),
        ("compute", "compute", 200),
        ("h2d", "h2d", 200),
    ],
)
def test_two_streams_overlap_where_they_need_different_engines(
    run: Run, left: str, right: str, expected_ms: int
) -> None:
    said = run(
        f"""
left, right = {left!r}, {right!r}
size = 100_000
memory = [cuda.mem_alloc(size) for _ in range(2)]
host = [pinned(size) for _ in range(2)]
streams = [cuda.Stream() for _ in range(2)]
begin = event(streams[0])
for n, what in enumerate((left, right)):
    if what == 'compute':
        control.launch(streams[n].handle)
    elif what == 'h2d':
        cuda.memcpy_htod_async(memory[n], host[n], streams[n])
    else:
        cuda.memcpy_dtoh_async(host[n], memory[n], streams[n])
ends = [event(stream) for stream in streams]
print(max(ms(begin, end) for end in ends))
""",
        ns_per_byte=1000,
        kernel_us=100_000,
    )
    assert expected_ms <= float(said) < expected_ms + 50


def test_lanes_hide_their_copies_behind_the_kernels_of_others(run: Run) -> None:
    """Times are kept on the driver's own timeline, so that a busy machine does not stretch them."""
    said = run(
        """
size, batches = 10_000, 24
def lane():
    return cuda.Stream(), cuda.mem_alloc(size), pinned(size), pinned(size)
def timed(lanes):
    begin = event(lanes[0][0])
    for n in range(batches):
        stream, memory, there, back = lanes[n % len(lanes)]
        cuda.memcpy_htod_async(memory, there, stream)
        control.launch(stream.handle)
        cuda.memcpy_dtoh_async(back, memory, stream)
    return max(ms(begin, event(stream)) for stream, *_ in lanes)
lanes = [lane() for _ in range(2)]
print(timed(lanes[:1]), timed(lanes))
""",
        ns_per_byte=500,
        kernel_us=10_000,
    )
    alone, together = map(float, said.split())
    assert alone >= 24 * 20
    # One kernel after the other, and the first copy in and the last one out.
    assert 24 * 10 + 10 <= together < (24 * 10 + 10) * 1.15


def test_pageable_memory_is_copied_while_the_caller_waits(run: Run) -> None:
    run(
        """
stream, memory = cuda.Stream(), cuda.mem_alloc(1000)
for host, at_least, counted in ((np.zeros(1000, np.uint8), 0.1, 1), (pinned(1000), 0, 1)):
    began = time.monotonic()
    cuda.memcpy_htod_async(memory, host, stream)
    took = time.monotonic() - began
    assert (took >= 0.1) == bool(at_least), took
    assert control.count('pageable_copies') == counted
stream.synchronize()
""",
        ns_per_byte=100_000,
    )


def test_the_null_stream_and_blocking_streams_wait_for_each_other(run: Run) -> None:
    run("""
ran = []
stream = cuda.Stream()
control.launch(stream.handle, lambda: ran.append(1), 50_000)
control.launch(0, lambda: ran.append(2), 50_000)
control.launch(stream.handle, lambda: ran.append(3))
stream.synchronize()
assert ran == [1, 2, 3]
""")


def test_memory_beyond_the_cards_is_refused_and_nothing_is_left_behind(
    run: Run, tmp_path: Path
) -> None:
    stats = tmp_path / "stats.json"
    run(
        """
assert cuda.mem_get_info() == (64 << 20, 64 << 20)
held = cuda.mem_alloc(60 << 20)
assert cuda.mem_get_info()[0] == 4 << 20
assert 'out of memory' in fails(lambda: cuda.mem_alloc(5 << 20), cuda.MemoryError)
more = cuda.mem_alloc(4 << 20)
host = pinned(1 << 20)
assert control.count('pinned_bytes') == 1 << 20
assert control.count('device_allocations') == 2
held.free()
assert cuda.mem_get_info()[0] == 60 << 20
control.set('memory_mb', 4)
fails(lambda: cuda.mem_alloc(1), cuda.MemoryError)
del held, more, host
""",
        memory_mb=64,
        stats=stats,
    )
    counts = json.loads(stats.read_text())
    left = {name: counts[name] for name in ("device_bytes", "pinned_bytes", "contexts", "streams")}
    assert set(left.values()) == {0}
    assert counts["peak_device_bytes"] == 64 << 20


def test_a_copy_outside_of_any_allocation_is_refused(run: Run) -> None:
    run("""
memory, host = cuda.mem_alloc(100), pinned(200)
assert 'invalid argument' in fails(lambda: cuda.memcpy_htod(memory, host), cuda.LogicError)
""")


def test_memory_freed_while_a_copy_uses_it_is_counted(run: Run) -> None:
    run("""
stream, memory, host = cuda.Stream(), cuda.mem_alloc(100), pinned(100)
control.launch(stream.handle, us=100_000)
cuda.memcpy_htod_async(memory, host, stream)
memory.free()
stream.synchronize()
assert control.count('frees_while_busy') == 1
""")


@pytest.mark.parametrize("cause", ["at once", "by a kernel", "at a call", "at a kernel"])
def test_an_error_of_the_device_stays(run: Run, cause: str) -> None:
    settings = {"at a call": {"fail_call": 12}, "at a kernel": {"fail_kernel": 2}}.get(cause, {})
    run(
        f"""
cause = {cause!r}
stream, memory, host = cuda.Stream(), cuda.mem_alloc(100), pinned(100)
def use():
    control.launch(stream.handle, (lambda: 700) if cause == 'by a kernel' else None)
    stream.synchronize()
if cause == 'at once':
    control.fail(700)
if cause == 'at a kernel':
    use()
if cause == 'at a call':
    while control.count('calls') < 11:
        stream.is_done()
for call in (use, use, lambda: cuda.mem_alloc(1), lambda: cuda.memcpy_htod(memory, host),
             cuda.Stream, cuda.Event, cuda.Context.synchronize):
    assert 'an illegal memory access' in fails(call, cuda.Error)
control.fail(0)
use = None
cuda.memcpy_htod(memory, host)
""",
        **settings,
    )


def test_a_kernel_that_raises_fails_the_device(run: Run) -> None:
    run("""
stream = cuda.Stream()
control.launch(stream.handle, lambda: 1 // 0)
assert 'unspecified launch failure' in fails(stream.synchronize, cuda.Error)
control.fail(0)
""")


def test_each_thread_has_its_own_stack_of_contexts(run: Run) -> None:
    run("""
problems = []
def work():
    problems.append(fails(cuda.Stream, cuda.Error))
    context.push()
    try:
        cuda.Stream().synchronize()
    finally:
        context.pop()
thread = threading.Thread(target=work)
thread.start()
thread.join()
assert 'invalid device context' in problems[0], problems
assert control.count('primary_retains') == 1
""")


def test_visible_devices_are_counted_as_the_driver_does(
    fake_driver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import os; os.environ['CUDA_VISIBLE_DEVICES'] = {!r}\n"
        "import pycuda.driver as cuda; cuda.init()\n"
        "print([cuda.Device(n).pci_bus_id() for n in range(cuda.Device.count())])"
    )
    ids = run_python(code.format("2,0"), fake_driver, devices=4)
    assert ids.split("'")[1::2] == ["0000:03:00.0", "0000:01:00.0"]
    with pytest.raises(AssertionError, match="no CUDA-capable device"):
        run_python(code.format(""), fake_driver, devices=4)


def test_a_graph_replays_what_its_stream_captured(run: Run) -> None:
    run("""
from inferq.workers.cuda import calls

stream, memory, there, back = cuda.Stream(), cuda.mem_alloc(8), pinned(8), pinned(8)
back[:] = 0

def double():
    np.ctypeslib.as_array((ctypes.c_uint8 * 8).from_address(int(memory)))[:] *= 2

def record():
    cuda.memcpy_htod_async(memory, there, stream)
    control.launch(stream.handle, double)
    cuda.memcpy_dtoh_async(back, memory, stream)

calls.begin_capture(stream.handle)
record()
graph = calls.end_capture(stream.handle)
assert (back == 0).all() and control.count('kernels') == 0
ready = calls.instantiate(graph)
calls.destroy_graph(graph)
for value in (3, 4):
    there[:] = value
    calls.launch(ready, stream.handle)
    stream.synchronize()
    assert (back == 2 * value).all()
calls.destroy_executable(ready)
assert control.count('graphs') == control.count('graph_execs') == 0

# What waits or allocates breaks a capture; another stream may be waited for.
other = cuda.Stream()
for call, breaks in (
    (lambda: cuda.mem_alloc(8), True),
    (lambda: cuda.memcpy_htod(memory, there), True),
    (lambda: cuda.memcpy_htod_async(memory, np.zeros(8, np.uint8), stream), True),
    (lambda: event(other).query(), True),
    (stream.synchronize, True),
    (cuda.Context.synchronize, True),
    (other.synchronize, False),
    (lambda: event(other).synchronize(), False),
):
    calls.begin_capture(stream.handle)
    record()
    if breaks:
        fails(call, cuda.Error)
        fails(lambda: calls.end_capture(stream.handle), calls.DriverError)
    else:
        call()
        calls.destroy_graph(calls.end_capture(stream.handle))
record()
stream.synchronize()
assert control.count('graphs') == 0
""")


@pytest.mark.parametrize("mode", ["global", "thread_local", "relaxed"])
def test_what_another_thread_does_breaks_a_capture_as_its_mode_says(run: Run, mode: str) -> None:
    run(f"""
library = ctypes.CDLL('libcuda.so.1')
modes = {{'global': 0, 'thread_local': 1, 'relaxed': 2}}
stream, other, graph = cuda.Stream(1), cuda.Stream(1), ctypes.c_void_p()
handle = ctypes.c_void_p(stream.handle)

def in_a_thread(call):
    said = []
    def work():
        context.push()
        try:
            call()
        except cuda.Error as problem:
            said.append(str(problem))
        context.pop()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return said

for call, breaks in (
    (cuda.Context.synchronize, True),
    (lambda: cuda.mem_alloc(8), {mode!r} == 'global'),
    (lambda: event(other).query(), {mode!r} == 'global'),
    (lambda: event(other).synchronize(), False),
):
    assert library.cuStreamBeginCapture_v2(handle, modes[{mode!r}]) == 0
    said = in_a_thread(call)
    answer = library.cuStreamEndCapture(handle, ctypes.byref(graph))
    assert answer == (901 if breaks else 0), (call, said, answer)
    assert bool(said) == breaks
    assert not said or 'not permitted when stream is capturing' in said[0]
    if graph:
        library.cuGraphDestroy(graph)
cuda.Context.synchronize()
""")


def test_an_event_that_a_graph_records_says_nothing_of_a_launch_before_its_node(run: Run) -> None:
    run("""
library = ctypes.CDLL('libcuda.so.1')
stream, recorded, end = cuda.Stream(), ctypes.c_void_p(), cuda.Event()
handle, graph, ready = ctypes.c_void_p(stream.handle), ctypes.c_void_p(), ctypes.c_void_p()
ran, go = [], threading.Event()

def kernel():
    assert go.wait(60)
    go.clear()
    ran.append(1)

assert library.cuEventCreate(ctypes.byref(recorded), 0) == 0
assert library.cuStreamBeginCapture_v2(handle, 1) == 0
control.launch(stream.handle, kernel)
assert library.cuEventRecordWithFlags(recorded, handle, 1) == 0
assert library.cuStreamEndCapture(handle, ctypes.byref(graph)) == 0
assert library.cuGraphInstantiateWithFlags(ctypes.byref(ready), graph, ctypes.c_ulonglong(0)) == 0
for launch in (1, 2):
    assert library.cuGraphLaunch(ready, handle) == 0
    assert library.cuEventSynchronize(recorded) == 0
    assert len(ran) < launch, 'it was waited for'
    go.set()
    end.record(stream)
    end.synchronize()
    assert len(ran) == launch
""")


def test_a_thousand_contexts_leave_nothing_behind(fake_driver: Path, tmp_path: Path) -> None:
    stats = tmp_path / "stats.json"
    code = """
import numpy as np
import pycuda.driver as cuda
cuda.init()
for n in range(1000):
    context = cuda.Device(0).retain_primary_context()
    context.push()
    stream, event = cuda.Stream(), cuda.Event()
    memory, host = cuda.mem_alloc(1000), cuda.pagelocked_empty(1000, np.uint8)
    cuda.memcpy_htod_async(memory, host, stream)
    event.record(stream)
    event.synchronize()
    del stream, event, memory, host
    context.pop()
    context.detach()
"""
    run_python(code, fake_driver, stats=stats)
    counts = json.loads(stats.read_text())
    assert counts["copies_h2d"] == 1000
    for name in (
        "contexts",
        "primary_retains",
        "streams",
        "events",
        "device_bytes",
        "pinned_bytes",
    ):
        assert counts[name] == 0, name
