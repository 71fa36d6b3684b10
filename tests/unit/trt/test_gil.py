"""TensorRT logs into Python with its locks held: no thread waits for them with the GIL."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from helpers.wait import until

from inferq.workers.trt.gil import Calls
from inferq.workers.trt.logs import CallErrors
from inferq.workers.trt.running import Context, Loaded

TIMEOUT_S = 15.0
#: How long one waits for the other until they are taken for stuck.
STUCK_S = 1.0


class _Bindings:
    """What TensorRT's bindings do with the GIL, and TensorRT with a lock of a plan's."""

    def __init__(self) -> None:
        self._gil, self._lock = threading.Lock(), threading.Lock()
        #: A run has begun, which logs once it `goes_on`; somebody keeps the GIL.
        self.runs, self.goes_on, self.kept = (threading.Event() for _ in range(3))
        self.stuck: list[str] = []

    def run(self) -> None:
        with self._lock:
            self.runs.set()
            assert self.goes_on.wait(TIMEOUT_S)
            with self._taken(self._gil, "who logs waits for the GIL"):
                pass

    def keep(self) -> None:
        with self._gil:
            self.kept.set()
            with self._taken(self._lock, "who keeps the GIL waits for TensorRT's lock"):
                pass

    @contextmanager
    def _taken(self, lock: threading.Lock, what: str) -> Iterator[None]:
        if lock.acquire(timeout=STUCK_S):
            yield
            lock.release()
        else:
            self.stuck.append(what)
            yield


class _Execution:
    """An execution context of theirs."""

    def __init__(self, bindings: _Bindings) -> None:
        self._bindings = bindings

    def execute_async_v3(self, _stream: int) -> bool:
        self._bindings.run()
        return True

    def infer_shapes(self) -> list[str]:
        self._bindings.run()
        return []

    def get_tensor_shape(self, _name: str) -> tuple[int, ...]:
        self._bindings.keep()
        return (1,)

    def __getattr__(self, name: str) -> Callable[..., bool]:
        if not name.startswith("set_"):
            raise AttributeError(name)

        def call(*_: object) -> bool:
            self._bindings.keep()
            return True

        return call

    def __del__(self) -> None:
        self._bindings.keep()


class _Engine:
    """An engine of theirs, without tensors."""

    num_io_tensors = num_optimization_profiles = device_memory_size_v2 = num_aux_streams = 0

    def __init__(self, bindings: _Bindings) -> None:
        self._bindings = bindings

    def create_runtime_config(self) -> Any:
        return types.SimpleNamespace(set_execution_context_allocation_strategy=lambda _: None)

    def create_execution_context(self, _config: object) -> _Execution:
        if not self._bindings.runs.is_set():  # the one that another thread makes meanwhile
            self._bindings.run()
        return _Execution(self._bindings)


@pytest.fixture
def bindings() -> _Bindings:
    return _Bindings()


@pytest.fixture
def loaded(bindings: _Bindings) -> Loaded:
    strategies = types.SimpleNamespace(USER_MANAGED="ours")
    flavour: Any = types.SimpleNamespace(
        name="tensorrt",
        errors=CallErrors(),
        has_runtime_cache=False,
        has_own_graphs=False,
        trt=types.SimpleNamespace(ExecutionContextAllocationStrategy=strategies),
    )
    return Loaded(flavour, _Engine(bindings))


KEEPING: list[Callable[[Context], object]] = [
    lambda context: context.set_shape("x", (1,)),
    lambda context: context.shape("y"),
    lambda context: context.set_address("x", 256),
    lambda context: context.set_profile(1, 7),
    lambda context: context.set_memory(256, 256),
    lambda context: context.set_aux_streams([8]),
    lambda context: context.close(),
]


@pytest.mark.parametrize("keeping", KEEPING)
@pytest.mark.parametrize(
    "logging",
    [
        lambda loaded, context: context.execute(7),
        lambda loaded, context: context.infer_shapes(),
        lambda loaded, context: loaded.context(),
    ],
    ids=["execute", "infer_shapes", "create"],
)
def test_who_logs_and_who_keeps_the_gil_do_not_wait_for_each_other(
    bindings: _Bindings,
    loaded: Loaded,
    logging: Callable[[Loaded, Context], object],
    keeping: Callable[[Context], object],
) -> None:
    """As one lane that compiles while another takes a new shape, or is closed."""
    flavour = loaded._flavour
    one, other = (Context(flavour, loaded, _Execution(bindings), None) for _ in range(2))
    logs = threading.Thread(target=logging, args=(loaded, one))
    keeps = threading.Thread(target=keeping, args=(other,))
    logs.start()
    assert bindings.runs.wait(TIMEOUT_S)
    keeps.start()
    until(lambda: bindings.kept.is_set() or loaded.calls.waiting, TIMEOUT_S)
    bindings.goes_on.set()
    for thread in (logs, keeps):
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()
    assert bindings.kept.is_set()
    assert bindings.stuck == []


def test_calls_that_give_the_gil_up_run_beside_each_other() -> None:
    """Or one lane would wait while another enqueues."""
    calls = Calls()
    together = threading.Barrier(3)

    def run() -> None:
        with calls.giving_up_the_gil:
            together.wait(TIMEOUT_S)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert not together.broken


def test_a_call_that_keeps_the_gil_gets_its_turn_between_any_number_of_others() -> None:
    calls = Calls()
    ended = threading.Event()
    begun = threading.Barrier(3)

    def enqueue() -> None:
        with calls.giving_up_the_gil:
            begun.wait(TIMEOUT_S)
        while not ended.is_set():
            with calls.giving_up_the_gil:
                pass

    threads = [threading.Thread(target=enqueue, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    begun.wait(TIMEOUT_S)

    def keep() -> None:
        for _ in range(100):
            with calls.keeping_the_gil:
                assert not calls.beside
        ended.set()

    threading.Thread(target=keep, daemon=True).start()
    assert ended.wait(TIMEOUT_S)
    for thread in threads:
        thread.join(TIMEOUT_S)


def test_a_call_that_fails_lets_the_others_go_on() -> None:
    calls = Calls()
    for turn in (calls.giving_up_the_gil, calls.keeping_the_gil) * 2:
        with pytest.raises(ValueError, match="it failed"), turn:
            raise ValueError("it failed")
