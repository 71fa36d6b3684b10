"""A lane that is a process: each batch is written into its memory and answered there.

The process may end at any time, or not answer in time: then its batch has failed, and is run again
in halves as any batch that fails (`data_plane.lanes`), each by a fresh process. A request that was
alone when it happened is tried once more, since somebody else may have killed the process.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Final

from inferq.shared.errors import (
    BY_CODE,
    ConfigError,
    EngineError,
    FatalEngineError,
    RequestError,
)
from inferq.shared.schema import DTYPES, Array
from inferq.workers.models.engine import Batch, Lane, PerhapsNoMemory, RowsDiffer, check_inputs
from inferq.workers.user_code.log_lines import tell
from inferq.workers.user_code.messages import Answered, Failed, Load, Loaded, Run
from inferq.workers.user_code.plan import Plan
from inferq.workers.user_code.process import CodeProcess, ProcessEnded
from inferq.workers.user_code.tensors import read_arrays, write_batch

logger = logging.getLogger(__name__)

#: Seconds before each attempt to start a fresh process; after the last one the lane gives up.
STARTS: Final = (0.0, 1.0, 3.0)


class ProcessLane(Lane):
    """One lane. `start` starts its process, `ready` waits for it."""

    def __init__(self, plan: Plan, number: int) -> None:
        self._plan = plan
        self._number = number
        self._process: CodeProcess | None = None
        self._dtypes: dict[str, str] = {}

    def start(self) -> None:
        """Have its process begin to load. ConfigError."""
        plan = self._plan
        process = CodeProcess(plan.model, self._number, plan.most, plan.environment)
        level = logger.getEffectiveLevel()
        load = Load(str(plan.path), process.mark, plan.device, plan.config, plan.most, level)
        try:
            process.start()
            self._process = process
            process.send(load, plan.load_timeout_s)
        except OSError as problem:
            raise ConfigError(f"no process can be started for it: {problem}") from problem
        except ProcessEnded as problem:
            self.end()
            raise self._not_loaded(problem) from problem

    def ready(self) -> None:
        """Wait until it has loaded. ConfigError: it has not."""
        process = self._process
        assert process is not None
        try:
            told = process.receive(self._plan.load_timeout_s)
        except ProcessEnded as problem:
            self.end()
            raise self._not_loaded(problem) from problem
        if isinstance(told, Loaded):
            self._dtypes = {spec.name: spec.dtype for spec in told.signature.inputs}
            return
        self.end()
        assert isinstance(told, Failed)
        self._tell_trace(told)
        raise ConfigError(told.message)

    def _not_loaded(self, problem: ProcessEnded) -> ConfigError:
        limit = " (load_timeout_s in [python] is the limit)" if problem.timed_out else ""
        return ConfigError(f"{self._plan.path}: its process {problem.how} while it loaded{limit}")

    def run(self, batch: Batch) -> Mapping[str, Array]:
        alone = len(batch.parts) == 1
        again = alone
        while True:
            process = self._at_work()
            try:
                return self._run(process, batch)
            except ProcessEnded as problem:
                self.end()
                self._tell_end(problem, batch)
                if not again or problem.timed_out:
                    raise self._error(problem, alone) from problem
                again = False

    def _run(self, process: CodeProcess, batch: Batch) -> Mapping[str, Array]:
        check_inputs(batch.parts[0], {name: DTYPES[dtype] for name, dtype in self._dtypes.items()})
        began = time.perf_counter()
        places, size = write_batch(process.given, batch, self._dtypes)
        batch.gather_ms = (time.perf_counter() - began) * 1000
        rows = batch.bucket if batch.batchable else None
        asked = Run(tuple(places), size, rows, len(batch.parts))
        told = process.ask(asked, self._plan.timeout_s)
        process.given.give_back(size)
        if isinstance(told, Failed):
            raise self._failure(told, alone=len(batch.parts) == 1)
        assert isinstance(told, Answered)
        outputs = read_arrays(process.answered, told.outputs, told.size, copy=True)
        process.answered.give_back(told.size)
        if told.errors:
            batch.errors = {
                row: _request_error(code, message) for row, (message, code) in told.errors.items()
            }
        if batch.batchable and batch.rows != batch.bucket:
            return {name: array[: batch.rows] for name, array in outputs.items()}
        return outputs

    def _failure(self, told: Failed, *, alone: bool) -> Exception:
        if told.kind == "request":
            return _request_error(told.code, told.message)
        if told.kind == "rows":
            return RowsDiffer(told.message)
        if alone:
            self._tell_trace(told)
        return (PerhapsNoMemory if told.kind == "memory" else EngineError)(told.message)

    def _error(self, problem: ProcessEnded, alone: bool) -> EngineError:
        which = "this request" if alone else "this batch"
        limit = ", timeout_s in [python]" if problem.timed_out else ""
        kind = PerhapsNoMemory if problem.killed else EngineError
        return kind(f"the process of lane {self._number} {problem.how}{limit} while it ran {which}")

    # --- its process ------------------------------------------------------------------------

    def _at_work(self) -> CodeProcess:
        """Its process, or a fresh one that has loaded. FatalEngineError: none loads."""
        if self._process is not None and not self._process.has_ended():
            return self._process
        if self._process is not None:  # and nobody has heard of its end
            self._tell(f"its process {self._process.ended().how}; a fresh one takes its place")
        self.end()
        reason = ""
        for pause in STARTS:
            time.sleep(pause)
            try:
                self.start()
                self.ready()
            except ConfigError as problem:
                reason = problem.message
                self._tell(f"a fresh process does not load: {reason}")
            else:
                assert self._process is not None
                return self._process
        raise FatalEngineError(
            f"model {self._plan.model}, lane {self._number}: {len(STARTS)} fresh processes in a "
            f"row did not load: {reason}"
        )

    def end(self) -> None:
        """End its process. Idempotent."""
        process, self._process = self._process, None
        if process is not None:
            process.end()

    # --- what is told -----------------------------------------------------------------------

    def _tell_end(self, problem: ProcessEnded, batch: Batch) -> None:
        requests = len(batch.parts)
        self._tell(
            f"its process {problem.how} while it ran {requests} requests; a fresh one takes its "
            "place"
        )

    def _tell_trace(self, told: Failed) -> None:
        if told.trace:
            self._tell(told.message, told.trace)

    def _tell(self, text: str, trace: str = "") -> None:
        tell(text, self._plan.model, self._number, trace)


def _request_error(code: str, message: str) -> RequestError:
    cls = BY_CODE.get(code, RequestError)
    return cls(message) if issubclass(cls, RequestError) else RequestError(message)


def open_lanes(plan: Plan, count: int) -> Sequence[ProcessLane]:
    """Lanes that have loaded, all at the same time. ConfigError: one has not; none is left."""
    lanes = [ProcessLane(plan, number) for number in range(count)]
    try:
        for lane in lanes:
            lane.start()
        for lane in lanes:
            lane.ready()
    except BaseException:
        close_lanes(lanes)
        raise
    return lanes


def close_lanes(lanes: Sequence[ProcessLane]) -> None:
    """End their processes. Idempotent."""
    for lane in lanes:
        lane.end()
