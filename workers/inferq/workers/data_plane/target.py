"""The batch size that one model's batches aim at, and how it is refined while they run."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

from inferq.workers.batching.policy import Knobs
from inferq.workers.claims.runs import Finished
from inferq.workers.logs.fields import about
from inferq.workers.warmup.fit import row_elements
from inferq.workers.warmup.learning import Learner
from inferq.workers.warmup.prepare import Prepared

logger = logging.getLogger(__name__)

#: From batches that take less than SHORT_S, only one in so many is learnt, since learning takes 3
#: µs.
SHORT_S = 0.01
LEARN_OF = 16


class Target:
    """Owned by the data plane's thread; any thread may read `size`."""

    def __init__(self, model: str, knobs: Knobs, prepared: Prepared, *, fixed: bool) -> None:
        """`fixed`: model.toml gives the size, so it is not the one that warm-up measured."""
        self._model = model
        self._prepared = prepared
        #: None: nothing was measured that could be refined.
        self._learner: Learner | None = None
        tuning = prepared.tuning
        if tuning is not None and knobs.batchable and not fixed:
            knobs = replace(knobs, preferred_batch_sizes=(tuning.best,))
            if len(tuning.sizes) > 1:
                self._learner = Learner(tuning, tuning.best)
        #: The knobs of batches for free lanes, and of those that are formed ahead.
        self.knobs = knobs
        self.ahead = _ahead(knobs)
        #: Batches that have ended, while there is something to learn.
        self._ended = 0

    @property
    def size(self) -> int:
        """Rows that a batch aims at."""
        return self.knobs.target

    def unbatch(self) -> None:
        """An audit found that answers depend on their batch: form no more batches."""
        self._aim_with(replace(self.knobs, batchable=False, preferred_batch_sizes=(1,)))

    def learn(self, finished: Finished, *, busy: bool) -> None:
        """Refine the size by how long this batch took. `busy`: all lanes were busy meanwhile."""
        learner, outcomes = self._learner, finished.outcomes
        if learner is None:
            return
        self._ended += 1
        if finished.ended - finished.began < SHORT_S and self._ended % LEARN_OF:
            return
        if not outcomes or not busy:
            return
        run = outcomes[0].run
        if run is None or run.requests != len(outcomes):  # it was run in parts
            return
        if row_elements(outcomes[0].item.inputs) != self._prepared.row_elements:
            return  # rows are longer or shorter than those that were measured
        before = learner.target
        if learner.ran(run.rows + run.padding, (run.ended_mono_ms - run.started_mono_ms) / 1000):
            logger.info(
                "model %s: batches of %d in place of %d from now on, as its batches ran since",
                self._model,
                learner.target,
                before,
                extra=about(model=self._model),
            )
            self._aim_with(replace(self.knobs, preferred_batch_sizes=(learner.target,)))

    def keep(self) -> None:
        """Keep what was learnt for the next start, and learn no more."""
        learner, self._learner = self._learner, None
        if learner is not None and learner.has_learnt:
            self._prepared.keep(learner.learnt())

    def _aim_with(self, knobs: Knobs) -> None:
        self.knobs, self.ahead = knobs, _ahead(knobs)


def _ahead(knobs: Knobs) -> Knobs:
    """The knobs of batches for which no lane waits: only full ones leave."""
    return replace(knobs, preferred_batch_sizes=(knobs.target,), max_queue_delay_ms=math.inf)
