"""TensorRT has one log for all that a process does: each error reaches whom it concerns."""

from __future__ import annotations

import threading
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from inferq.workers.trt.logs import CallErrors, is_out_of_memory, joined, make_logger


@pytest.fixture
def other() -> Iterator[ThreadPoolExecutor]:
    """One more thread, always the same."""
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.mark.parametrize(
    "error",
    [
        "2: [virtualMemoryBuffer.cpp::resizePhysical::160] Error Code 2: OutOfMemory "
        "(no further information)",
        "1: [defaultAllocator.cpp::nvinfer1::internal::DefaultAllocator::allocate::19] "
        "Error Code 1: Cuda Runtime (out of memory)",
        "[executionContext.cpp::ExecutionContext::470] Error Code 2: OutOfMemory (Requested size "
        "was 17920000000 bytes.)",
        "../rtSafe/safeRuntime.cpp (25) - Cuda Error in allocate: 2 (out of memory)",
        "FAILED_ALLOCATION: std::exception",
        "cudaMallocAsync: cudaErrorMemoryAllocation",
        "cuMemCreate failed: CUDA_ERROR_OUT_OF_MEMORY",
    ],
)
def test_memory_that_is_short_is_known_by_what_is_logged(error: str) -> None:
    assert is_out_of_memory([error])
    assert is_out_of_memory(["IExecutionContext::enqueueV3: Error Code 1", error])


@pytest.mark.parametrize(
    "error",
    [
        "IExecutionContext::enqueueV3: Error Code 1: Cuda Runtime (invalid resource handle)",
        "1: [checkMacros.cpp::catchCudaError::272] Error Code 1: Cuda Runtime (an illegal memory "
        "access was encountered)",
        "1: [convolutionRunner.cpp::execute::391] Error Code 1: Cask (Cask convolution execution)",
        "3: [executionContext.cpp::setInputShape::2020] Error Code 3: API Usage Error (Parameter "
        "check failed, condition: engineDims.d[i] == dims.d[i].)",
        "Error Code 1: Cuda Runtime (too many resources requested for launch)",
    ],
)
def test_other_errors_are_not_memory_that_is_short(error: str) -> None:
    assert not is_out_of_memory([error])
    assert not is_out_of_memory([])


def test_a_call_sees_its_own_errors_and_no_stale_ones(other: ThreadPoolExecutor) -> None:
    errors = CallErrors()

    def begin_and_fail(error: str) -> list[str]:
        mine = errors.begin()
        errors.add(error)
        return list(mine)

    mine = errors.begin()
    assert other.submit(begin_and_fail, "of the other").result() == ["of the other"]
    assert list(mine) == []
    errors.add("of this one")
    assert list(mine) == ["of this one"]
    assert other.submit(begin_and_fail, "its next").result() == ["its next"]
    assert list(errors.begin()) == []


def test_of_many_calls_at_once_each_sees_its_own_error() -> None:
    errors, calls = CallErrors(), 2000
    wrong: list[list[str]] = []

    def call(name: str) -> None:
        for n in range(calls):
            mine = errors.begin()
            errors.add(f"{name} {n}")
            if list(mine) != [f"{name} {n}"]:
                wrong.append(list(mine))

    threads = [threading.Thread(target=call, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_what_tensorrts_own_threads_log_belongs_to_what_is_loaded_meanwhile() -> None:
    errors = CallErrors()
    running = errors.begin()
    with errors.loading() as loading, ThreadPoolExecutor(1) as own:
        own.submit(errors.add, "of a worker of the builder").result()
        errors.add("of the builder")
        assert list(loading) == ["of a worker of the builder", "of the builder"]
    running = errors.begin()
    with ThreadPoolExecutor(1) as own:
        own.submit(errors.add, "too late").result()
    assert list(running) == []


def test_what_a_lane_logs_does_not_belong_to_what_is_loaded_meanwhile(
    other: ThreadPoolExecutor,
) -> None:
    errors = CallErrors()

    def run() -> list[str]:
        mine = errors.begin()
        errors.add("of the lane")
        return list(mine)

    with errors.loading() as loading:
        assert other.submit(run).result() == ["of the lane"]
        assert list(loading) == []


def test_few_errors_are_kept_and_the_message_is_short() -> None:
    errors = CallErrors()
    mine = errors.begin()
    for n in range(100):
        errors.add(f"{n} " * 200)
    assert len(mine) == 5
    assert mine[-1].startswith("99 ")
    assert len(joined(mine)) == 1001
    assert joined([]) == "it logged no reason"


def test_only_errors_of_the_log_are_errors() -> None:
    class Logger:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    log, errors = make_logger(types.SimpleNamespace(ILogger=Logger))
    mine: Any = errors.begin()
    for severity in range(5):
        log.log(severity, f"one\n of {severity}")
    assert list(mine) == ["one of 0", "one of 1"]
