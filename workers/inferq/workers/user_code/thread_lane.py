"""A lane of user code in the worker's own process: for code that releases the GIL.

It costs no copies and no message, and whatever ends the process, or hangs, ends or holds the
worker.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from inferq.model import Context, Model
from inferq.model.answers import WrongRows, read_answer
from inferq.model.declared import signature_of
from inferq.shared.errors import ConfigError, EngineError, RequestError
from inferq.shared.schema import DTYPES, Array, Signature
from inferq.workers.models.engine import Batch, Lane, RowsDiffer, check_inputs, gather
from inferq.workers.user_code.plan import Plan
from inferq.workers.user_code.source import load_class, told

_MODULE: Final = "inferq_model_"


class ThreadLane(Lane):
    """Runs one object of the class, on whichever thread calls it."""

    def __init__(self, plan: Plan, model: Model, signature: Signature) -> None:
        self._plan = plan
        self._model = model
        self._signature = signature
        self._dtypes = {spec.name: DTYPES[spec.dtype] for spec in signature.inputs}

    def run(self, batch: Batch) -> Mapping[str, Array]:
        inputs = gather(batch)
        check_inputs(inputs, self._dtypes)
        rows = batch.bucket if batch.batchable else None
        try:
            if len(batch.parts) == 1 and batch.rows == batch.bucket:  # what a request has sent
                inputs = {name: array.copy() for name, array in inputs.items()}
            answer = self._model.run(dict(inputs))
            outputs, errors = read_answer(answer, self._signature, inputs, rows)
        except RequestError as problem:
            if len(batch.parts) > 1:
                raise
            outputs, errors = {}, dict.fromkeys(range(rows or 1), problem)
        except WrongRows as problem:
            raise RowsDiffer(problem.message) from problem
        except EngineError as problem:
            raise EngineError(problem.message) from problem  # none that would end the worker
        except SystemExit as problem:
            raise EngineError(told(problem, self._plan.path)) from problem
        if errors:
            batch.errors = dict(errors)
        limit = batch.rows if batch.batchable else None
        return {
            name: np.array(array[:limit] if array.ndim else array)
            for name, array in outputs.items()
        }


def open_thread_lanes(plan: Plan, count: int) -> Sequence[ThreadLane]:
    """Lanes that have loaded. ConfigError."""
    cls = load_class(plan.path, f"{_MODULE}{plan.model}")
    signature = signature_of(cls)
    lanes = []
    for _ in range(count):
        try:
            model = cls()
            model.load(Context(plan.path.parent, plan.device, plan.config))
        except ConfigError:
            raise
        except (Exception, SystemExit) as problem:
            raise ConfigError(told(problem, plan.path)) from problem
        lanes.append(ThreadLane(plan, model, signature))
    return lanes
