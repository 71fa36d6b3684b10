"""A request is a task like any other in a stock application's chains, groups, chords and links.

Each claim is tried with Celery untouched (JSON) and with one that is set up for msgpack.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis as redis_py
from helpers.repository import fake_model
from helpers.stock import CONTENTS, PlainWorker, Side
from helpers.stock_side import (
    WAIT_S,
    app,
    chain,
    chord,
    ending,
    group,
    infer,
    noted,
    plain,
    send,
    values,
)
from helpers.wait import until
from helpers.worker import Worker

from inferq.workers.engines.fake import FAULT_RAISE
from inferq.workers.process.embedded import EmbeddedRedis


@pytest.fixture(scope="module")
def url(redis_kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Redis with one worker that serves all models of this file."""
    models = tmp_path_factory.mktemp("models")
    fake_model(models, "echo", fake="faults = true")
    fake_model(models, "other")
    fake_model(models, "slow", knobs="max_batch_size = 1", fake="delay_ms = 100.0")
    with EmbeddedRedis(redis_kind) as server, Worker(server.url, models):
        yield server.url


@pytest.fixture(scope="module", params=CONTENTS)
def side(request: pytest.FixtureRequest, url: str) -> Iterator[Side]:
    """A stock producer, and a stock worker of its plain tasks."""
    with PlainWorker(url, request.param), Side(url, request.param) as side:
        yield side


@pytest.fixture
def store(url: str) -> Iterator[redis_py.Redis]:
    with redis_py.Redis.from_url(url) as client:
        yield client


# --- chains --------------------------------------------------------------------------------------


def test_a_chain_leads_into_a_plain_task(side: Side) -> None:
    def ask() -> object:
        return chain(infer("echo", 3), plain("total")).apply_async().get(timeout=WAIT_S)

    assert side(ask) == 12.0


def test_a_chain_leads_from_a_plain_task_to_a_request_and_on(side: Side) -> None:
    """What the plain task returns is the request's inputs."""

    def ask() -> object:
        steps = chain(plain("inputs", 2), infer("echo"), infer("other"), plain("total"))
        return steps.apply_async().get(timeout=WAIT_S)

    assert side(ask) == 8.0


def test_a_chain_that_ends_in_a_request_is_answered_in_its_own_serialiser(side: Side) -> None:
    def ask() -> object:
        result = chain(infer("echo", 4), infer("other")).apply_async()
        return [values(result.get(timeout=WAIT_S)), values(result.parent.get(timeout=WAIT_S))]

    assert side(ask) == [[4.0] * 4, [4.0] * 4]


def test_a_request_that_fails_fails_the_rest_of_its_chain(side: Side) -> None:
    def ask(fault: int) -> object:
        steps = chain(infer("echo", fault), plain("total"), plain("plus", 1))
        last = steps.apply_async()
        return [ending(last), ending(last.parent), ending(last.parent.parent)]

    endings = side(ask, FAULT_RAISE)
    assert [[state, name] for state, name, _ in endings] == [["FAILURE", "EngineError"]] * 3
    assert "asked to raise" in endings[0][2]


@pytest.mark.parametrize("side", ["json"], indirect=True)
def test_a_chain_forks_into_a_group_after_a_request(side: Side) -> None:
    """Not with msgpack, where Celery's own producer writes a group in a chain wrongly."""

    def ask() -> object:
        parts = group(plain("total"), infer("other") | plain("total"))
        return (infer("echo", 5) | parts).apply_async().get(timeout=WAIT_S)

    assert side(ask) == [20.0, 20.0]


# --- links ---------------------------------------------------------------------------------------


def test_links_are_given_the_outputs(side: Side) -> None:
    def ask() -> object:
        links = [plain("note", "first"), plain("note", "second")]
        send("echo", 6, link=links).get(timeout=WAIT_S)
        send("other", 7, link=plain("note", "third"), ignore_result=True)
        return [noted("first"), noted("second"), noted("third")]

    assert side(ask) == [24.0, 24.0, 28.0]


def test_a_link_error_finds_the_error_stored(side: Side) -> None:
    """The engine's, and one that is found before the engine runs."""

    def ask(fault: int) -> object:
        send("echo", fault, link_error=plain("note_error", "engine"), link=plain("note", "never"))
        request = infer("echo").clone(args=[{"y": [[1]]}])
        request.apply_async(link_error=plain("note_error", "input"))
        return [noted("engine"), noted("input"), app.backend.client.exists("never")]

    assert side(ask, FAULT_RAISE) == [["FAILURE", "EngineError"], ["FAILURE", "InvalidInput"], 0]


def test_links_that_cannot_be_published_fail_the_request_and_hold_up_no_other(
    side: Side, store: redis_py.Redis
) -> None:
    def ask(broken: str) -> object:
        link = plain("note", "never").set(queue=broken)
        failed = send("echo", 1, link=link)
        served = chain(infer("echo", 2), plain("total")).apply_async()
        return [served.get(timeout=WAIT_S), ending(failed)]

    # A link into what is no list: Redis refuses it each time.
    store.set("no-list", 1)
    served, (state, name, message) = side(ask, "no-list")
    assert (served, state, name) == (8.0, "FAILURE", "EngineError")
    assert "WRONGTYPE" in message
    assert store.get("no-list") == b"1"


# --- groups and chords ---------------------------------------------------------------------------


def test_a_group_of_requests_is_answered_in_order(side: Side) -> None:
    def ask() -> object:
        result = group(infer("echo", n) for n in range(1, 40)).apply_async()
        return [values(outputs)[0] for outputs in result.get(timeout=WAIT_S)]

    assert side(ask) == list(range(1, 40))


def test_a_chord_of_requests_calls_its_body_with_all_outputs(side: Side) -> None:
    def ask() -> object:
        header = [infer("echo", n) for n in range(1, 6)]
        return chord(header)(plain("totals")).get(timeout=WAIT_S)

    assert side(ask) == [4.0, 8.0, 12.0, 16.0, 20.0]


def test_a_chord_mixes_requests_and_plain_tasks(side: Side) -> None:
    def ask() -> object:
        header = [infer("echo", 1), plain("plus", 2, 3), infer("slow", 4), plain("plus", 5, 6)]
        return chord(header)(plain("totals")).get(timeout=WAIT_S)

    assert side(ask) == [4.0, 5, 16.0, 11]


def test_a_chords_body_leads_on_to_a_request(side: Side) -> None:
    def ask() -> object:
        steps = chain(group(infer("echo", 1), infer("other", 2)), plain("merge"), infer("echo"))
        return values(steps.apply_async().get(timeout=WAIT_S))

    assert side(ask) == [12.0] * 4


def test_the_body_of_a_chord_may_be_a_request(side: Side) -> None:
    """It is given a list, which is no inputs: and is told so in its own serialiser."""

    def ask() -> object:
        return ending(chord([plain("plus", 1, 2), infer("echo", 1)])(infer("other")))

    state, name, message = side(ask)
    assert (state, name) == ("FAILURE", "InvalidInput")
    assert "list" in message


@pytest.mark.parametrize("part", ["request", "plain"])
def test_a_part_that_fails_fails_the_body_and_calls_its_errback(side: Side, part: str) -> None:
    def ask(part: str, fault: int) -> object:
        failing = infer("echo", fault) if part == "request" else plain("fail")
        body = plain("totals").on_error(plain("note_error", f"chord {part}"))
        result = chord([infer("echo", 1), failing, plain("plus", 1, 2)])(body)
        noted(f"chord {part}")
        return ending(result)

    state, name, message = side(ask, part, FAULT_RAISE)
    assert (state, name) == ("FAILURE", "ChordError")
    assert ("EngineError" if part == "request" else "ValueError") in message


def test_a_part_that_is_revoked_or_expires_fails_the_body(side: Side) -> None:
    def ask() -> object:
        backlog = [send("slow", n) for n in range(3)]
        revoked = chord([infer("echo", 1), infer("slow", 98)])(plain("totals"))
        app.control.revoke(revoked.parent.results[1].id)
        expired = chord([infer("slow", 99).set(expires=0.05), infer("echo", 1)])(plain("totals"))
        for result in backlog:
            result.get(timeout=WAIT_S)
        return [ending(revoked), ending(expired)]

    for (state, name, message), reason in zip(side(ask), ("revoked", "expired"), strict=True):
        assert (state, name) == ("FAILURE", "ChordError")
        assert f"TaskRevokedError('{reason}" in message


def test_groups_in_a_chord_are_unrolled_as_celery_does(side: Side) -> None:
    def ask() -> object:
        inner = group(infer("echo", 1), infer("slow", 2))
        header = [inner, infer("echo", 3), group(plain("plus", 7, 9), infer("other", 5))]
        requests = chord(header)(plain("totals"))
        inner = group(plain("plus", 4, 0), plain("plus", 8, 0))
        header = [inner, plain("plus", 12, 0), group(plain("plus", 7, 9), plain("plus", 20, 0))]
        plains = chord(header)(plain("totals"))
        return [requests.get(timeout=WAIT_S), plains.get(timeout=WAIT_S)]

    requests, plains = side(ask)
    assert sorted(requests) == [4, 8, 12, 16, 20]
    assert requests == plains


@pytest.mark.parametrize("side", ["json"], indirect=True)
def test_groups_at_the_end_of_a_chords_parts_are_lists_of_results(side: Side) -> None:
    """Whoever ends last, a request or a plain task. Not with msgpack, as above."""

    def ask() -> object:
        both = []
        for request, last in (("slow", infer("echo", 6)), ("echo", infer("slow", 6))):
            inner = [infer(request, 1).set(immutable=True), plain("plus", 2, 3).set(immutable=True)]
            longest = last if request == "slow" else last | plain("total")
            header = [plain("plus", 0, 9), infer("other", 4) | group(inner), longest]
            both.append(chord(header)(plain("totals")).get(timeout=WAIT_S))
        return both

    assert side(ask) == [[9, [4.0, 5], 24.0]] * 2


@pytest.mark.parametrize("side", ["json"], indirect=True)
def test_a_part_that_fails_in_a_group_at_the_end_of_another_fails_the_body(side: Side) -> None:
    def ask(fault: int) -> object:
        inner = group(each.set(immutable=True) for each in (infer("echo", fault), infer("slow", 1)))
        body = plain("totals").on_error(plain("note_error", "deep chord"))
        result = chord([infer("other", 2) | inner, infer("echo", 1)])(body)
        noted("deep chord")
        return ending(result)

    state, name, message = side(ask, FAULT_RAISE)
    assert (state, name) == ("FAILURE", "ChordError")
    assert "asked to raise" in message


def test_chords_nest(side: Side) -> None:
    def ask() -> object:
        inner = chord([infer("echo", 1), infer("other", 2)], plain("totals"))
        return chord([inner, infer("slow", 3)])(plain("totals")).get(timeout=WAIT_S)

    assert side(ask) == [[4.0, 8.0], 12.0]


def test_a_failed_step_fails_a_chord_that_a_chain_is_part_of(side: Side) -> None:
    def ask(fault: int) -> object:
        part = chain(infer("echo", fault), plain("total"), plain("plus", 1))
        return ending(chord([part, infer("echo", 1)])(plain("totals")))

    state, name, message = side(ask, FAULT_RAISE)
    assert (state, name) == ("FAILURE", "ChordError")
    assert "EngineError" in message


def test_nothing_of_all_this_is_left_in_redis(side: Side, store: redis_py.Redis) -> None:
    """Neither claims nor a chord's counters outlive what they are for."""

    def ask() -> object:
        return chord([infer("echo", 1), infer("other", 2)])(plain("totals")).get(timeout=WAIT_S)

    assert side(ask) == [4.0, 8.0]
    until(lambda: not [key for key in store.keys("inferq:1:claim*") if store.exists(key)])
    assert not [key for key in store.keys("*-meta-*") if store.ttl(key) == -1]
