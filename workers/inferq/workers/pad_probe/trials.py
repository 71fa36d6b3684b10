"""Runs a model on inputs that it may reject, within a time limit."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

from inferq.shared.errors import FatalEngineError, InvalidInput
from inferq.shared.schema import Array, Tensors

logger = logging.getLogger(__name__)

#: Runs the model on the inputs of one request; raises whatever the engine raises.
Run = Callable[[Tensors], Mapping[str, Array]]


class Trials:
    """The constructor starts the clock: all runs together have `seconds`."""

    def __init__(self, run: Run, seconds: float) -> None:
        self._run = run
        self._began = time.monotonic()
        self._seconds = seconds
        self.runs = 0
        #: Why the last rejected inputs were rejected.
        self.reason = "the inputs would be too large"
        #: Whether the engine rejected sizes because it was not built for them.
        self.not_built = False

    def outputs(self, inputs: Tensors | None) -> Mapping[str, Array] | None:
        """The model's outputs; None if it rejects `inputs`. Raises FatalEngineError."""
        if inputs is None:
            return None
        self.runs += 1
        try:
            return self._run(inputs)
        except FatalEngineError:
            raise
        except Exception as problem:  # noqa: BLE001 - inputs that the model rejects show nothing
            self.reason = str(problem)
            self.not_built = self.not_built or isinstance(problem, InvalidInput)
            logger.debug("rejected: %s", problem)
            return None

    def within(self, share: float) -> bool:
        """Whether at most this share of the time has passed."""
        return time.monotonic() - self._began < share * self._seconds

    @property
    def took_s(self) -> float:
        return time.monotonic() - self._began
