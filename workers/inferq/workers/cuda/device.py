"""The one GPU of this process: its primary context, and what an error of it means.

TensorRT, torch and PyCUDA share the primary context. Each thread makes it current around what it
does, and no longer: PyCUDA aborts a process whose thread ends with a context still pushed.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from pycuda import driver

from inferq.shared.errors import ConfigError, EngineError, FatalEngineError
from inferq.workers.cuda import calls
from inferq.workers.cuda.captures import CAPTURES
from inferq.workers.cuda.libcuda import GpuKind, current_context, pop_context
from inferq.workers.models.engine import OutOfDeviceMemory

logger = logging.getLogger(__name__)


class Device:
    """The device that is visible as number 0. `with device:` makes its context current, nested too.

    ConfigError: there is no usable device.
    """

    def __init__(self) -> None:
        try:
            driver.init()
            self._device = driver.Device(0)
            self._context = self._device.retain_primary_context()
            self.name: Final[str] = self._device.name()
            major, minor = self._device.compute_capability()
            processors = self._device.get_attribute(driver.device_attribute.MULTIPROCESSOR_COUNT)
        except driver.Error as problem:
            raise ConfigError(
                f"no CUDA device could be used ({problem}); expected a GPU and its driver "
                "(`inferq worker --cpu` serves on the CPU)"
            ) from problem
        self._handle: Final[int] = self._context.handle
        #: Why CUDA is beyond use, once it is.
        self.lost: FatalEngineError | None = None
        #: As "9.0".
        self.capability: Final = f"{major}.{minor}"
        self.kind: Final = GpuKind(self.name, self.capability, processors)

    def __enter__(self) -> None:
        if self.lost is not None:
            raise self.lost
        try:
            self._context.push()
        except driver.Error as problem:
            raise self._lose(problem) from problem

    def __exit__(self, _kind: object, problem: BaseException | None, _trace: object) -> None:
        try:
            driver.Context.pop()
        except driver.Error as sticky:
            fatal = self._lose(sticky)
            if not isinstance(problem, FatalEngineError):
                raise fatal from sticky

    def entered(self) -> _Entered:
        """The context is current, for what makes and frees nothing of PyCUDA's.

        FatalEngineError: CUDA is beyond use. Either call may be answered by an error of what was
        launched before. PyCUDA would keep the context on its own stack then, and abort the process
        when the thread ends.
        """
        return _Entered(self)

    def _push(self) -> None:
        if self.lost is not None:
            raise self.lost
        try:
            calls.push_context(self._handle)
        except calls.DriverError as problem:
            raise self._lose(problem) from problem

    def _pop(self) -> None:
        try:
            calls.pop_context()
        except calls.DriverError as sticky:
            raise self._lose(sticky) from sticky

    def _lose(self, sticky: object) -> FatalEngineError:
        """From now on nothing is asked of CUDA, and nothing of it is freed."""
        if self.lost is None:
            self.lost = FatalEngineError(f"CUDA is beyond use: {sticky}")
        return self.lost

    def keep_for_good(self, owner: object) -> None:
        """Nothing that `owner` holds is freed, not even when the interpreter ends."""
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(owner))

    def memory(self) -> tuple[int, int]:
        """Free bytes, and all."""
        with self:
            free, total = driver.mem_get_info()
        return free, total

    def judge(self, problem: Exception) -> EngineError | FatalEngineError:
        """What `problem`, raised by CUDA or by what runs on it, means for the batch, and beyond.

        A sticky error (an illegal address, an assert, ECC) is answered to every call from then on,
        until the process ends: so the context is asked, while no lane captures. What it says of
        captures is of no meaning for its health: somebody else's may be under way.
        """
        if self.lost is not None:
            return self.lost
        if isinstance(problem, FatalEngineError):
            return problem
        try:
            with CAPTURES.shared(), self.entered():
                # What was submitted before it failed ends, too.
                code = calls.synchronize_context()
                if code and code not in calls.OF_CAPTURES:
                    self._lose(calls.DriverError("cuCtxSynchronize", code))
        except FatalEngineError as fatal:
            return fatal
        if self.lost is not None:
            return self.lost
        if isinstance(problem, driver.MemoryError | OutOfDeviceMemory) or (
            isinstance(problem, calls.DriverError) and problem.code == calls.OUT_OF_MEMORY
        ):
            return OutOfDeviceMemory(f"the GPU's memory is full: {problem}")
        return EngineError(f"on the GPU: {problem}")

    def judge_loading(self, problem: Exception) -> Exception:
        """The same of what went wrong while a model was loaded; `problem` itself, if CUDA is well
        and did not raise it.
        """
        judged = self.judge(problem)
        by_cuda = isinstance(problem, driver.Error | calls.DriverError) or isinstance(
            judged, FatalEngineError
        )
        return judged if by_cuda else problem

    def release(self) -> None:
        """Let go of the context. All that was made in it is gone by then; or it is beyond use."""
        if self.lost is not None:
            self.keep_for_good(self)
            return
        before = current_context()
        # PyCUDA lets go of one that another thread made only if it is current, and leaves it so.
        self._context.push()
        self._context.detach()
        if current_context() != before:
            pop_context()


class _Entered:
    """`Device.entered`: for each batch, so it is no generator."""

    __slots__ = ("_device",)

    def __init__(self, device: Device) -> None:
        self._device = device

    def __enter__(self) -> None:
        self._device._push()

    def __exit__(self, _kind: object, problem: BaseException | None, _trace: object) -> None:
        if isinstance(problem, FatalEngineError):
            with suppress(calls.DriverError):
                calls.pop_context()
        else:
            self._device._pop()


class _Shared:
    """One `Device` for all models of the process, as long as one of them is loaded."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._device: Device | None = None
        self._users = 0

    def acquire(self) -> Device:
        with self._lock:
            if self._device is None:
                self._device = Device()
                logger.info(
                    "GPU: %s, compute capability %s", self._device.name, self._device.capability
                )
            self._users += 1
            return self._device

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0 and self._device is not None:
                self._device.release()
                self._device = None


_shared = _Shared()


def acquire() -> Device:
    """The process's device; to be followed by one `release`. ConfigError: it cannot be used."""
    return _shared.acquire()


def release() -> None:
    """Undo one `acquire`."""
    _shared.release()


@contextmanager
def acquired() -> Iterator[Device]:
    """The process's device, to load a model on, until the end. ConfigError: it cannot be used.

    What CUDA raises within is judged: see `Device.judge_loading`.
    """
    gpu = acquire()
    try:
        yield gpu
    except Exception as problem:
        judged = gpu.judge_loading(problem)
        if judged is problem:
            raise
        raise judged from problem
    finally:
        release()
