"""The clients' core without any I/O: encoding, admission, the window of `map`, settling."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import pytest
from helpers import poison
from helpers.responder import DONE_AT, RECEIPT, advert

from inferq.producer.admission import ADVERT_AGE_S, DEPTH_AGE_S, Admission, ModelView
from inferq.producer.core import Core
from inferq.producer.outcome import MAX_ODD_BYTES
from inferq.producer.outgoing import INLINE_LIMIT, PAYLOAD_MARGIN_S, Push, arrays_of
from inferq.producer.pending import Pending, Result, State
from inferq.producer.window import Window
from inferq.shared import codec
from inferq.shared.errors import (
    Cancelled,
    ClientClosed,
    EngineError,
    InferqError,
    InvalidInput,
    ModelNotFound,
    QueueFull,
    RedisUnavailable,
    ResultExpired,
)
from inferq.shared.names import Names
from inferq.shared.resp import ReplyError
from inferq.shared.schema import Signature, TensorSpec
from inferq.shared.settings import Settings

X = np.arange(4, dtype=np.float32).reshape(1, 4)
HOUR_MS = 3_600_000.0


def new_core(**settings: Any) -> Core:
    return Core(Settings.load(redis_url="redis://127.0.0.1", **settings))


def replies(model: Any, *, serving: float | None = HOUR_MS, depth: int = 0) -> list[Any]:
    """What Redis says to `Admission.questions` at Redis time 0."""
    workers = [] if serving is None else [[b"w", serving]]
    announced = None if model is None else codec.encode_advert(model)
    return [[0, 0], announced, workers, depth, 0, 0, 0]


def view_of(core: Core, model: Any = None, **given: Any) -> ModelView:
    now = time.monotonic()
    return core.admission.learn("echo", replies(model or advert(), **given), now, now)


def submit(core: Core, x: Any = X, **given: Any) -> Pending:
    view = core.admission.current("echo", time.monotonic()) or view_of(core)
    options = {"priority": None, "timeout_ms": None, **given}
    return core.build(view, {"x": x}, make=lambda out, at: Pending(core, out, at, bool), **options)


# --- encoding -----------------------------------------------------------------------------------


def test_lists_take_the_models_dtype_and_arrays_keep_theirs() -> None:
    dtypes: dict[str, np.dtype[Any]] = {"x": np.dtype("float32"), "n": np.dtype("uint8")}
    arrays = arrays_of(dtypes, {"x": [[1, 2.5]], "n": 7})
    assert arrays["x"].dtype == np.float32
    assert arrays["n"].dtype == np.uint8
    assert arrays_of(dtypes, {"x": np.zeros(2)})["x"].dtype == np.float64


@pytest.mark.parametrize("value", [[1.5], [300], [-1], ["a"], [[1], [1, 2]], (1, 2.5), 2.5, -1])
def test_a_list_that_the_models_dtype_cannot_hold_is_refused_by_name(value: object) -> None:
    with pytest.raises(InvalidInput, match="input 'n'"):
        arrays_of({"n": np.dtype("uint8")}, {"n": value})  # type: ignore[dict-item]


def test_inputs_that_are_no_mapping_are_refused() -> None:
    with pytest.raises(InvalidInput, match="ndarray; expected a mapping"):
        arrays_of({}, X)  # type: ignore[arg-type]


def test_arrays_travel_contiguous_and_little_endian() -> None:
    big = np.arange(8, dtype=">f4").reshape(4, 2).T
    array = arrays_of({"x": np.dtype("float32")}, {"x": big})["x"]
    assert array.flags.c_contiguous
    assert array.dtype.str == "<f4"
    np.testing.assert_array_equal(array, big)


def test_ids_are_distinct_version_4_uuids() -> None:
    core = new_core()
    ids = [submit(core).request_id for _ in range(600)]
    assert len(set(ids)) == 600
    assert {(uuid.UUID(one).version, str(uuid.UUID(one)) == one) for one in ids} == {(4, True)}


def test_consecutive_small_requests_of_one_queue_share_one_lpush() -> None:
    core = new_core()
    pendings = [submit(core, priority=priority) for priority in (0, 0, 2, 9)]
    push = Push.of([one.outgoing for one in pendings if one.outgoing])
    assert [command[0] for command in push.commands] == ["LPUSH", "LPUSH"]
    assert [len(command) - 2 for command in push.commands] == [3, 1]
    assert push.commands[0][1] == Names().queue("echo", 0)
    assert push.commands[1][1] == Names().queue("echo", 9)


def test_a_large_tensor_stands_under_a_key_that_outlives_the_deadline_by_a_day() -> None:
    core = new_core()
    large = np.zeros((2, INLINE_LIMIT), np.uint8)
    spec = TensorSpec(name="x", dtype="uint8", shape=("batch", None))
    view_of(core, advert(signature=Signature(inputs=(spec,), outputs=(spec,))))
    pending = submit(core, large, timeout_ms=5_000)
    large[:] = 1  # the caller may: what was submitted stays as it was
    assert pending.outgoing is not None
    push = Push.of([pending.outgoing])
    assert [command[0] for command in push.commands] == ["MULTI", "SET", "LPUSH", "EXEC"]
    _, key, data, _, ttl = push.commands[1]
    assert key == Names().payload(pending.request_id, "x")
    assert data == bytes(2 * INLINE_LIMIT)
    assert ttl == PAYLOAD_MARGIN_S + 5
    assert len(pending.outgoing.message) < 2_000


def test_a_refused_command_is_told_for_the_requests_it_carried() -> None:
    core = new_core()
    one, two = submit(core), submit(core, priority=9)
    push = Push.of([p.outgoing for p in (one, two) if p.outgoing])
    refused = push.refused([1, ReplyError("OOM command not allowed")])
    assert list(refused) == [two.request_id]
    assert "OOM" in refused[two.request_id].message


@pytest.mark.parametrize("priority", [-1, 10, 1.0, True, "3"])
def test_a_priority_outside_0_to_9_is_refused(priority: Any) -> None:
    with pytest.raises(InvalidInput, match=r"priority .*; expected a whole number from 0"):
        submit(new_core(), priority=priority)


@pytest.mark.parametrize("timeout_ms", [0, -5, float("nan"), float("inf"), True, "3"])
def test_a_timeout_that_is_no_time_is_refused(timeout_ms: Any) -> None:
    with pytest.raises(InvalidInput, match="timeout_ms"):
        submit(new_core(), timeout_ms=timeout_ms)


def test_the_models_priority_and_timeout_apply_where_the_caller_names_none() -> None:
    core = new_core()
    view_of(core, advert(default_priority=6, default_timeout_ms=2_000))
    pending = submit(core)
    assert pending.outgoing is not None
    envelope = codec.decode_envelope(pending.outgoing.message)
    assert envelope.properties.priority == 6
    headers = envelope.headers
    assert headers.inferq_deadline_ms is not None
    assert headers.inferq_sent_ms is not None
    assert headers.inferq_deadline_ms - headers.inferq_sent_ms == pytest.approx(2_000, abs=0.01)


# --- admission ----------------------------------------------------------------------------------


def test_a_model_that_nobody_announces_is_not_found() -> None:
    with pytest.raises(ModelNotFound, match="'echo'"):
        Admission(Names()).learn("echo", replies(None), 0.0, 0.0)


@pytest.mark.parametrize("name", ["", "a b", ".x", "a/b", "x" * 101, "a\nb"])
def test_a_name_that_no_model_can_have_is_not_asked_for(name: str) -> None:
    with pytest.raises(ModelNotFound, match="letters"):
        Admission(Names()).questions(name)


def test_a_view_is_good_for_five_seconds_and_with_a_depth_limit_for_a_tenth() -> None:
    admission = Admission(Names())
    admission.learn("echo", replies(advert()), 100.0, 100.0)
    assert admission.current("echo", 100.0 + ADVERT_AGE_S) is not None
    assert admission.current("echo", 100.01 + ADVERT_AGE_S) is None
    admission.learn("echo", replies(advert(max_queue_depth=5)), 100.0, 100.0)
    assert admission.current("echo", 100.0 + DEPTH_AGE_S / 2) is not None
    assert admission.current("echo", 100.01 + DEPTH_AGE_S) is None


def test_the_queue_is_full_at_its_depth_plus_what_was_pushed_since() -> None:
    admission = Admission(Names())
    model = advert(max_queue_depth=10, seconds_per_row=0.5)
    view = admission.learn("echo", replies(model, depth=8), 100.0, 100.0)
    admission.admit(view, 1, 100.0)
    admission.admit(view, 1, 100.0)
    with pytest.raises(QueueFull) as caught:
        admission.admit(view, 1, 100.0)
    detail = caught.value.detail
    assert (detail["depth"], detail["limit"], detail["estimated_wait_s"]) == (10, 10, 5.0)


def test_an_estimate_that_nothing_is_known_for_is_none() -> None:
    admission = Admission(Names())
    model = advert(max_queue_depth=1, seconds_per_row=0.5)
    view = admission.learn("echo", replies(model, depth=1, serving=None), 100.0, 100.0)
    with pytest.raises(QueueFull) as caught:
        admission.admit(view, 1, 100.0)
    assert caught.value.detail["estimated_wait_s"] is None


def test_state_tells_a_lease_that_ran_out_from_one_that_runs() -> None:
    core = new_core()
    view_of(core, serving=-1.0)
    assert submit(core).state is State.QUEUED_NO_WORKER
    view_of(core, serving=HOUR_MS)
    assert submit(core).state is State.QUEUED


# --- settling -----------------------------------------------------------------------------------


def take(core: Core, pending: Pending, meta: bytes) -> Pending:
    core.take([pending.request_id], [meta])
    return pending


def test_a_stored_result_becomes_arrays_and_a_receipt() -> None:
    core = new_core()
    pending = submit(core)
    take(core, pending, codec.encode_success(pending.request_id, {"y": X}, RECEIPT, DONE_AT))
    result = pending.result(0)
    np.testing.assert_array_equal(result.outputs["y"], X)
    assert not result.outputs["y"].flags.writeable
    assert result.receipt is not None
    assert result.receipt.worker == "stand-in"
    assert result.request_id == pending.request_id
    assert result.latency_ms > 0
    assert pending.state is State.DONE
    assert core.unresolved() == []


def test_what_a_plain_celery_worker_stored_is_read_too() -> None:
    core = new_core()
    failed, revoked, odd = submit(core), submit(core), submit(core)
    wire = {"exc_type": "KeyError", "exc_message": ["'x'"], "exc_module": "builtins"}
    for pending, status, result in (
        (failed, "FAILURE", wire),
        (revoked, "REVOKED", {"exc_type": "TaskRevokedError", "exc_message": ["revoked"]}),
        (odd, "SUCCESS", 42),
    ):
        args = (status, pending.request_id, result, DONE_AT, codec.JSON, None, None)
        take(core, pending, codec.encode_meta(*args))
    with pytest.raises(EngineError, match="KeyError: 'x'"):
        failed.result(0)
    with pytest.raises(Cancelled):
        revoked.result(0)
    assert revoked.state is State.CANCELLED
    with pytest.raises(EngineError, match="unreadable result"):
        odd.result(0)
    assert odd.state is State.FAILED


@pytest.mark.parametrize(
    "tensor",
    [
        {"dtype": "<f4", "shape": [3], "data": b"1234"},
        {"dtype": "|O", "shape": [1], "data": b"12345678"},
        {"dtype": "<f4", "shape": [1] * 17, "data": b"1234"},
        {"dtype": "<f4", "shape": [-1], "data": b"1234"},
        {"dtype": "<f4", "shape": [1]},
    ],
)
def test_outputs_that_are_no_tensors_end_as_an_engine_error(tensor: dict[str, Any]) -> None:
    core = new_core()
    pending = submit(core)
    args = ("SUCCESS", pending.request_id, {"y": tensor}, DONE_AT, codec.MSGPACK, RECEIPT, None)
    with pytest.raises(EngineError, match=r"unreadable result: .*'y'"):
        take(core, pending, codec.encode_meta(*args)).result(0)


@pytest.mark.parametrize("raw", poison.RESULTS.values(), ids=poison.RESULTS)
def test_a_result_that_nobody_can_read_fails_its_own_request_and_no_other(raw: bytes) -> None:
    core = new_core()
    first, poisoned, last = submit(core), submit(core), submit(core)
    good = codec.encode_success("x", {"y": X}, RECEIPT, DONE_AT)
    core.take([each.request_id for each in (first, poisoned, last)], [good, raw, good])
    for each in (first, last):
        np.testing.assert_array_equal(each.result(0).outputs["y"], X)
    outcome = poisoned.outcome  # a result, where what is odd stands where nobody looks
    assert isinstance(outcome, Result | EngineError | InvalidInput)
    assert len(str(outcome)) < 3_000


@pytest.mark.parametrize("news", poison.NEWS, ids=lambda news: f"{news[:20]!r}")
def test_news_that_nobody_can_read_is_passed_over(news: bytes) -> None:
    core = new_core()
    submit(core)
    assert core.settled_ids([b"message", core.channel.encode(), news]) == []


def test_a_result_that_is_told_very_often_is_read_once() -> None:
    core = new_core()
    pending = submit(core)
    news = msgpack.packb([pending.request_id] * 10_000)
    assert core.settled_ids([b"message", core.channel.encode(), news]) == [pending.request_id]


def test_a_large_result_is_read_whatever_its_receipt_says_and_with_empty_outputs() -> None:
    """Another version's worker may tell less or else of itself."""
    core = new_core()
    pending = submit(core)
    outputs: dict[str, Any] = {
        "y": np.ones(MAX_ODD_BYTES, np.uint8),
        "none": np.empty((0, 3), np.float32),
    }
    take(core, pending, codec.encode_success("x", outputs, {"batch_size": "many"}, DONE_AT))
    result = pending.result(0)
    assert result.receipt is None
    assert result.outputs["none"].shape == (0, 3)
    np.testing.assert_array_equal(result.outputs["y"], outputs["y"])


def test_scalar_and_empty_outputs_arrive_as_they_are() -> None:
    core = new_core()
    pending = submit(core)
    outputs = {"s": np.array(3.5), "e": np.zeros((0, 2), np.int64), "b": np.array([True])}
    meta = codec.encode_success(pending.request_id, outputs, RECEIPT, DONE_AT)
    result = take(core, pending, meta).result(0)
    assert result.receipt is not None
    got = result.outputs
    for name, array in outputs.items():
        assert got[name].dtype == array.dtype
        np.testing.assert_array_equal(got[name], array)


def test_a_result_that_is_not_terminal_is_waited_on() -> None:
    core = new_core()
    pending = submit(core)
    args = ("STARTED", pending.request_id, None, DONE_AT, codec.JSON, None, None)
    take(core, pending, codec.encode_meta(*args))
    assert not pending.done()
    assert core.unresolved() == [pending.request_id]


def test_the_first_outcome_stays() -> None:
    core = new_core()
    pending = submit(core)
    meta = codec.encode_success(pending.request_id, {"y": X}, RECEIPT, DONE_AT)
    take(core, pending, meta)
    pending.resolve(EngineError("late"))
    assert isinstance(pending.outcome, Result)


def test_only_news_about_our_own_requests_is_heard() -> None:
    core = new_core()
    pending = submit(core)
    channel = core.channel.encode()
    ids = msgpack.packb([pending.request_id, "someone-else", 7, []])
    assert core.settled_ids([b"message", channel, ids]) == [pending.request_id]
    assert core.settled_ids([b"message", b"other", ids]) == []
    assert core.settled_ids([b"subscribe", channel, 1]) == []
    assert core.settled_ids([b"message", channel, b"\xc1"]) == []


def test_a_request_is_expired_only_after_a_gap_longer_than_results_live() -> None:
    core = new_core(result_expires_s=1)
    old = submit(core)
    asked = [old.request_id]
    core.swept(asked, old.submitted_at + 0.9)
    core.swept(asked, old.submitted_at + 1.8)
    assert not old.done()
    core.swept(asked, old.submitted_at + 3.0)
    with pytest.raises(ResultExpired, match="out of reach"):
        old.result(0)


def test_a_restarted_redis_makes_everything_unresolved_suspect() -> None:
    core = new_core()
    first, second = b"redis_version:7.4.0\r\nrun_id:a\r\n", b"redis_version:7.4.0\r\nrun_id:b\r\n"
    core.greeted([first, b"cluster_enabled:0\r\n"])
    settled, open_ = submit(core), submit(core)
    core.greeted([first, b"cluster_enabled:0\r\n"])
    assert core.lost() == []
    core.greeted([second, b"cluster_enabled:0\r\n"])
    take(core, settled, codec.encode_revoked(settled.request_id, "revoked", DONE_AT))
    assert [one.request_id for one in core.lost()] == [open_.request_id]
    core.pushed_again()
    assert core.lost() == []


def test_a_server_that_refuses_to_say_what_it_is_is_unavailable() -> None:
    with pytest.raises(RedisUnavailable, match="NOAUTH"):
        new_core().greeted([ReplyError("NOAUTH"), ReplyError("NOAUTH")])


def test_an_ended_core_lets_nothing_in_and_leaves_nobody_waiting() -> None:
    core = new_core()
    pending = submit(core)
    assert core.pushed([pending], {}) == []
    core.end("the client was closed")
    with pytest.raises(ClientClosed):
        pending.result(0)
    with pytest.raises(ClientClosed):
        submit(core)


# --- the window of map --------------------------------------------------------------------------


def entered(core: Core, window: Window[Pending], count: int) -> list[Pending]:
    pendings = [submit(core) for _ in range(count)]
    for pending in pendings:
        window.enter(pending)
    return pendings


def resolve(core: Core, pending: Pending, error: InferqError | None = None) -> None:
    core.drop(pending, error or EngineError("x"))


@pytest.mark.parametrize("in_flight", [0, -1, 1.5, True])
def test_a_window_holds_at_least_one(in_flight: Any) -> None:
    with pytest.raises(InvalidInput, match="in_flight"):
        Window(in_flight)


def test_a_window_has_room_for_what_is_resolved_out_of_order() -> None:
    core, window = new_core(), Window[Pending](16)
    pendings = entered(core, window, 16)
    assert window.room == 0
    assert not window.wants_block()
    for pending in pendings[4:8]:
        resolve(core, pending)
    assert window.room == 4
    assert window.wants_block()
    assert not window.head_ready()


def test_a_window_bounds_what_finished_behind_a_slow_request() -> None:
    core, window = new_core(), Window[Pending](2)
    slow = entered(core, window, 1)[0]
    for pending in entered(core, window, 7):
        resolve(core, pending)
    assert window.room == 0
    resolve(core, slow)
    window.pop()
    assert window.room == 1


def armed(window: Window[Pending], *, more: bool) -> tuple[list[int], Callable[[], bool]]:
    woken: list[int] = []
    return woken, lambda: window.arm(lambda: woken.append(1), more=more)


def test_a_window_wakes_for_its_head_or_a_blocks_worth_of_room() -> None:
    core, window = new_core(), Window[Pending](16)
    assert window.block == 2
    pendings = entered(core, window, 16)
    woken, arm = armed(window, more=True)
    assert arm()
    resolve(core, pendings[5])
    assert not woken
    resolve(core, pendings[6])
    assert woken == [1]
    assert not arm()  # there is room already
    woken, arm = armed(window, more=False)
    assert arm()
    resolve(core, pendings[7])
    resolve(core, pendings[8])
    assert not woken
    resolve(core, pendings[0])
    assert woken == [1]
