"""Audits: now and then one request of a batch that has just run is run again alone.

No probe at load proves that an answer never depends on the other requests of its batch. An audit
runs after the batch's results were handed over, while its lane would idle. Audits take a small
share of the time that lanes compute (see `budget`). A mismatch is logged once; the model then runs
request by request, unless its model.toml says otherwise (`on_mismatch`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from inferq.shared.schema import Array
from inferq.workers.audit.budget import AuditBudget
from inferq.workers.audit.evidence import Evidence, Result, examine, has_company
from inferq.workers.batching.policy import Knobs
from inferq.workers.logs.fields import about
from inferq.workers.models.engine import Batch, Lane, answers

if TYPE_CHECKING:
    from inferq.workers.claims.runs import Finished, Outcome

logger = logging.getLogger(__name__)

#: Answers that another number of rows changed: so many, and so large a share of all, are proof.
UNCLEAR, UNCLEAR_PART = 3, 0.25
#: Requests that alone got another number of rows than they have: so many prove that the model does
#: so.
ODD_REQUESTS: Final = 3
#: After so many failed audits in a row there are no more.
FAILURES: Final = 3
#: Step by which audits choose places in a batch: its last request, its first, then in between.
_GOLDEN: Final = 0.618034


class Mismatch(msgspec.Struct, frozen=True):
    """An answer that depended on who shared its batch."""

    #: Output, and by how much it differs.
    what: str
    #: Rows of the batch.
    rows: int
    #: Requests answered until then, since the worker's start.
    requests: int

    def __str__(self) -> str:
        """``answers depend on their batch: output 'y' differs … in one of 32 rows``."""
        return f"answers depend on their batch: {self.what} in one of {self.rows} rows"


class OddRows:
    """What one job's runs showed of outputs with another number of rows than the inputs."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget it all."""
        #: What was wrong with the first batch that had odd rows and more than one request, or
        #: padding.
        self.together = ""
        #: Rows of it.
        self.rows = 0
        #: Requests that had odd rows alone and without padding.
        self.alone = 0
        #: What was wrong with the last of them.
        self.what = ""

    def note(self, what: str, rows: int, together: bool) -> None:
        """A run of `rows` rows had odd rows; `together`: it was not of one request alone."""
        if not together:
            self.alone += 1
            self.what = what
        elif not self.together:
            self.together, self.rows = what, rows


class Audit:
    """The audits of one model. Lanes' threads run them, one at a time; any thread may read."""

    def __init__(
        self,
        model: str,
        every: int,
        knobs: Knobs,
        *,
        unbatch: bool,
        computed_s: Callable[[], float] = lambda: 0.0,
        answered: Callable[[], int] = lambda: 0,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        """`computed_s` returns the lanes' seconds of compute, `answered` the requests answered.

        `wake` is called when an audit ends while `hold` is in force.
        """
        self._model = model
        self._knobs = knobs
        self._exact = knobs.spread
        self._unbatch = unbatch
        self._computed_s, self._answered, self._wake = computed_s, answered, wake
        self.budget = AuditBudget(every)
        if not knobs.batchable or (knobs.max_batch_size == 1 and not knobs.buckets):
            self.budget.end()  # no request ever shares a batch
        #: Held by the lane that audits.
        self._lock = threading.Lock()
        self._telling = threading.Lock()
        self._odd_requests = 0
        self._failures = 0
        #: The worker is about to end: no audit begins.
        self._stopped = False
        #: A request that may end the process computes, or is about to: no audit begins.
        self.held = False
        #: When the audit that runs now began (monotonic s); None: none runs.
        self.since: float | None = None
        #: Result → number of audits that ended with it.
        self.results = dict.fromkeys(Result, 0)
        #: Seconds that audits have taken.
        self.took_s = 0.0
        self.mismatch: Mismatch | None = None
        #: Whether the model is to run request by request, since a mismatch was found.
        self.unbatched = False

    def summary(self) -> str:
        """In words, for people: ``12 of 12 answers as alone``. For any thread."""
        done = sum(self.results.values())
        if self.mismatch is None:
            return f"{self.results[Result.SAME]} of {done} answers as alone" if done else "none yet"
        goes_on = "runs request by request" if self.unbatched else "goes on in batches"
        return f"{self.mismatch}; {goes_on}"

    def stop(self) -> None:
        """No further audit begins."""
        self._stopped = True

    def hold(self) -> bool:
        """Let no audit begin until `release`.

        True: one runs now, and `wake` is called when it ends.
        """
        self.held = True
        return self.since is not None

    def release(self) -> None:
        self.held = False

    # --- lanes' threads ---------------------------------------------------------------------

    def is_due(self, finished: Finished, idle: bool) -> bool:
        """Whether to audit the batch that a lane has just ended, which has no other left.

        `idle`: nothing waits for the lane.
        """
        if self.held or self._stopped:
            return False
        took_s = finished.ended - finished.began
        return self.budget.allows(took_s, self._computed_s(), idle)

    def run(self, lane: Lane, outcomes: Sequence[Outcome]) -> None:
        """Audit one of `outcomes` on `lane`, if one can be compared. Raises FatalEngineError."""
        place = self._place(outcomes)
        if place is None or not self._lock.acquire(blocking=False):
            return
        try:
            # First set this, then look at `held`: `hold` does the two in the other order.
            self.since = time.monotonic()
            if not self.held and not self._stopped and self.budget.left <= 0:
                self._run(lane, outcomes, place)
        finally:
            self.since = None
            self._lock.release()
            if self.held:
                self._wake()

    def _place(self, outcomes: Sequence[Outcome]) -> int | None:
        """The place of the outcome to audit; None: it was an error, or its request ran alone."""
        if not outcomes:
            return None
        turn = sum(self.results.values())
        inside = int(turn * _GOLDEN % 1 * len(outcomes))
        place = (len(outcomes) - 1, 0, inside)[turn % 3]
        chosen = outcomes[place]
        told = chosen.outputs is not None and not chosen.item.alone
        return place if told and has_company(chosen, self._exact) else None

    def _run(self, lane: Lane, outcomes: Sequence[Outcome], place: int) -> None:
        def run(batch: Batch) -> Mapping[str, Array]:
            self.since = time.monotonic()  # max_run_seconds is that of one run
            return answers(lane, batch)  # it had one before

        began = time.monotonic()
        chosen = outcomes[place]
        assert chosen.run is not None
        bucket = self._knobs.bucket(chosen.item.rows)
        found = examine(run, outcomes, place, self._exact, bucket)
        took_s = time.monotonic() - began
        self.results[found.result] += 1
        self.took_s += took_s
        self.budget.spent(took_s)
        self._judge(found, chosen.run.rows, len(outcomes))

    def _judge(self, found: Evidence, rows: int, requests: int) -> None:
        results = self.results
        self._failures = self._failures + 1 if found.result is Result.FAILED else 0
        told = about(model=self._model)
        if found.result is Result.DIFFERENT:
            self._tell(found.what, rows, requests)
        elif found.result is Result.UNCLEAR:
            unclear = results[Result.UNCLEAR]
            if unclear >= max(UNCLEAR, UNCLEAR_PART * sum(results.values())):
                self._tell(found.what, rows, requests)
        elif found.result is Result.RANDOM:
            self.budget.end()
            logger.warning(
                "model %s answers the same run in two ways (%s): its answers are audited no more",
                self._model,
                found.what,
                extra=told,
            )
        elif self._failures == FAILURES:
            self.budget.end()
            logger.warning(
                "model %s is audited no more, since its engine fails on requests alone that it "
                "answers in batches: %s",
                self._model,
                found.what,
                extra=told,
            )

    def odd_rows(self, odd: OddRows, failed: bool) -> None:
        """A job has ended, and some of its runs had odd rows.

        `failed`: one of its requests failed, too.

        A batch that has odd rows although none of its requests has is proof. One request that has
        them alone may be at fault itself; several show that the model does not answer row by row.
        """
        self._odd_requests += odd.alone
        if odd.together and not failed:
            self._tell(odd.together, odd.rows, 0)
        elif self._odd_requests >= ODD_REQUESTS:
            self._tell(odd.what, 1, 0)

    def _tell(self, what: str, rows: int, requests: int) -> None:
        """`requests` of this batch were handed over; they may not be counted yet."""
        with self._telling:
            if self.mismatch is not None:
                return
            answered = max(self._answered(), requests)
            self.mismatch = Mismatch(what, rows, answered)
        if self._unbatch:
            self.unbatched = True
            self.budget.end()
            goes_on = "It runs request by request from now on, in this process. To keep it so,"
            other = 'to have batches nevertheless, on_mismatch = "warn"'
        else:
            goes_on = 'It goes on in batches, as on_mismatch = "warn" says. For right answers,'
            other = "audit_every = 0 ends these audits"
        logger.error(
            "model %s: answers depend on who shares their batch: of a batch of %d rows, %s. %s "
            "write batchable = false into its model.toml; %s. %d requests were answered before",
            self._model,
            rows,
            what,
            goes_on,
            other,
            answered,
            extra=about(model=self._model),
        )
