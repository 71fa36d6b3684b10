"""How each way in which a request ends is settled: success, failure, dead letter."""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np
import pytest
from helpers.settlements import RESULTS

from inferq.shared import codec
from inferq.shared.errors import EngineError
from inferq.shared.schema import Ticket
from inferq.workers.batching.waiting import Waiting
from inferq.workers.claims.claim import Claim, Slot
from inferq.workers.claims.runs import Outcome, Run
from inferq.workers.claims.verdicts import Quarantined

# --- how requests end ----------------------------------------------------------------------------


def outcome(claim: Claim, ticket: Ticket, **given: Any) -> Outcome:
    item = Waiting(
        ticket=ticket,
        inputs={},
        slot=Slot(claim, 0),
        compatible=None,
        arrived_mono_ms=100.0,
        claimed_redis_ms=5_000.0,
        rows=2,
        alone=False,
        padded={"n": 3},
    )
    outputs = {"y": np.arange(8, dtype=np.float32).reshape(2, 4)}
    return Outcome(item, **{"outputs": outputs, "run": Run(130.0, 150.0, 6, 2, 3), **given})


def test_a_success_has_its_own_size_back_and_says_where_the_time_went(claim: Claim) -> None:
    ticket = Ticket("id", "m", codec.MSGPACK, sent_ms=4_990.0, attempts=1, reply="channel")
    done = RESULTS.computed(outcome(claim, ticket))
    meta = codec.decode_meta(done.outcome)
    np.testing.assert_array_equal(codec.decode_outputs(meta["result"])["y"], [[0, 1, 2], [4, 5, 6]])
    receipt = meta["receipt"]
    assert receipt.pop("settle_ms") > 0
    assert receipt == {
        "queue_ms": 10.0, "form_ms": 30.0, "compute_ms": 20.0, "batch_size": 6, "padding": 2,
        "requests": 3, "worker": "worker@host", "engine": "fake", "model": "m", "version": 3,
        "attempt": 2,
    }  # fmt: skip
    assert (done.running, done.attempts, done.reply) == (True, 1, "channel")


def test_without_our_timestamp_the_receipt_does_not_guess(claim: Claim) -> None:
    meta = codec.decode_meta(
        RESULTS.computed(outcome(claim, Ticket("id", "m", codec.JSON))).outcome
    )
    assert meta["receipt"]["queue_ms"] is None


def test_a_result_that_is_too_large_says_so(claim: Claim, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "MAX_MESSAGE_BYTES", 100)
    done = RESULTS.computed(outcome(claim, Ticket("id", "m", codec.MSGPACK)))
    meta = codec.decode_meta(done.outcome)
    assert meta["result"]["exc_type"] == "PayloadTooLarge"
    assert done.running


@pytest.mark.parametrize("outputs", [{"y": np.array([object()])}, {"y": "no array"}])
def test_outputs_that_cannot_be_encoded_fail_their_request_only(claim: Claim, outputs: Any) -> None:
    for kind in (codec.MSGPACK, codec.JSON):
        done = RESULTS.computed(outcome(claim, Ticket("id", "m", kind), outputs=outputs))
        assert codec.decode_meta(done.outcome)["status"] == "FAILURE"


def test_a_failed_run_is_settled_as_what_the_engine_raised(claim: Claim) -> None:
    given = outcome(
        claim, Ticket("id", "m", codec.JSON), outputs=None, run=None, error=EngineError("broken")
    )
    done = RESULTS.computed(given)
    meta = codec.decode_meta(done.outcome)
    assert (meta["status"], meta["result"]["exc_message"]) == ("FAILURE", ["broken"])
    assert done.running


def test_bytes_that_name_nobody_are_kept_and_not_answered(claim: Claim) -> None:
    done = RESULTS.quarantined(Quarantined(Slot(claim, 0), b"\xff", "why"), 7.0)
    assert (done.outcome, done.request_id) == (b"", None)
    assert done.dead_letter is not None
    letter = msgpack.unpackb(done.dead_letter)
    assert (letter["id"], letter["message"], letter["reason"], letter["at_ms"]) == (
        None,
        b"\xff",
        "why",
        7.0,
    )


def test_a_dead_letter_holds_no_more_than_redis_takes(
    claim: Claim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inferq.workers.data_plane.results.MAX_LETTER_BYTES", 10)
    done = RESULTS.quarantined(Quarantined(Slot(claim, 0), b"x" * 11, "why"), 7.0)
    letter = msgpack.unpackb(done.dead_letter or b"")
    assert (letter["message"], letter["size"]) == (b"x" * 10, 11)


@pytest.mark.parametrize(
    ("message", "request_id", "kind"),
    [
        (b'{"body": "x", "headers": {"root_id": "no", "id": "yes"}}', "yes", codec.JSON),
        (b'{"headers":{"id":"yes"},"content-type":"application/x-msgpack"}', "yes", codec.MSGPACK),
        (b'{"body": "{\\"id\\": \\"no\\"}", "headers": {}}', None, None),
        (b"\xff", None, None),
    ],
)
def test_what_was_given_up_is_answered_if_the_bytes_name_who_asked(
    claim: Claim, message: bytes, request_id: str | None, kind: str | None
) -> None:
    done = RESULTS.undecodable(Slot(claim, 0), message, "#hash", 3, 7.0)
    assert (done.request_id, done.attempts_field) == (request_id, "#hash")
    assert done.dead_letter is not None
    letter = msgpack.unpackb(done.dead_letter)
    assert (letter["id"], letter["message"]) == (request_id, message)
    if request_id is not None:
        meta = codec.decode_meta(done.outcome)
        assert meta["result"]["detail"]["attempts"] == 3
        assert (done.outcome[:1] == b"{") == (kind == codec.JSON)
