"""Queues and results are named as kombu and Celery name them; our keys are told apart."""

from __future__ import annotations

from collections.abc import Iterator

import kombu
import pytest
from celery import Celery
from hypothesis import given
from hypothesis import strategies as st

from inferq.shared.names import ClaimName, Names, is_model_name, model_of, queue_of

ALL = [
    Names(),
    Names(prefix="app:", result_prefix="results:"),
    Names(priority_steps=(0, 2, 5), sep=":"),
]
MODEL = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,20}", fullmatch=True)


@pytest.fixture(params=ALL, ids=["default", "prefixed", "own steps"])
def names(request: pytest.FixtureRequest) -> Names:
    assert isinstance(request.param, Names)
    return request.param


@pytest.fixture
def app(names: Names, redis_url: str) -> Iterator[Celery]:
    app = Celery(broker=redis_url, backend=redis_url, set_as_current=False)
    app.conf.broker_transport_options = {
        "priority_steps": list(names.priority_steps),
        "sep": names.sep,
        "global_keyprefix": names.prefix,
    }
    app.conf.result_backend_transport_options = {"global_keyprefix": names.result_prefix}
    yield app
    app.close()


def test_queues_of_all_priorities_are_kombus(app: Celery, names: Names) -> None:
    with app.connection_for_write() as connection:
        channel = connection.default_channel
        for priority in range(-1, 12):
            step = channel.priority(priority)
            assert names.step(priority) == step
            ours = names.queue("m", priority)
            assert ours == names.prefix + channel._q_for_pri("inferq.m", step)


def test_a_message_lands_where_we_look_for_it(app: Celery, names: Names, redis_url: str) -> None:
    for priority in (0, 5, 9):
        app.send_task("inferq.infer", queue=queue_of("m"), priority=priority)
    with kombu.Connection(redis_url) as connection:
        client = connection.default_channel.client
        lengths = {step: client.llen(names.queue("m", step)) for step in names.priority_steps}
    assert sum(lengths.values()) == 3
    assert lengths[0] == 1


def test_results_stand_where_celery_looks_for_them(app: Celery, names: Names) -> None:
    key = app.backend.get_key_for_task("some-id")
    assert names.meta("some-id") == (key.decode() if isinstance(key, bytes) else key)


@given(MODEL, st.integers(0, 10**9), st.sampled_from([0, 3, 9]), st.sampled_from(ALL))
def test_a_claims_key_says_all_of_it(model: str, number: int, step: int, names: Names) -> None:
    key = names.claim("0123abcd", number, model, step)
    assert names.parse_claim(key) == ClaimName("0123abcd", number, model, step)


@pytest.mark.parametrize(
    "key",
    [
        "",
        "claim:i:1:m:0",
        "inferq:1:claim:i:1:m",
        "inferq:1:claim:i:x:m:0",
        "inferq:1:claim:i:1::0",
        "other:inferq:1:claim:i:1:m:0",
        "inferq:2:claim:i:1:m:0",
    ],
)
def test_another_key_is_no_claims(key: str) -> None:
    with pytest.raises(ValueError, match=r"claim|invalid literal"):
        Names().parse_claim(key)


def test_a_payload_belongs_to_the_request_whose_id_it_names_in_full() -> None:
    names = Names(prefix="app:")
    key = names.payload("id", "x")
    assert names.is_payload_of(key, "id")
    for other in ("i", "d", "id1", "", "id:x"):
        assert not names.is_payload_of(key, other)
    assert not Names().is_payload_of(key, "id")
    ids = ("a", "a:b", "a%3Ab", "a%b", "", ":")
    for request_id in ids:
        key = names.payload(request_id, "c:0")
        assert [each for each in ids if names.is_payload_of(key, each)] == [request_id]


@given(MODEL)
def test_a_models_queue_names_the_model(model: str) -> None:
    assert is_model_name(model)
    assert model_of(queue_of(model)) == model


@pytest.mark.parametrize(
    "name", ["", ".hidden", "-x", "a/b", "a:b", "a b", "ü", "a\n", "x" * 101, "../up", "a\x06\x16"]
)
def test_what_could_be_taken_for_something_else_is_no_model_name(name: str) -> None:
    assert not is_model_name(name)
    assert model_of("inferq." + name) is None


def test_a_foreign_queue_is_no_models() -> None:
    assert model_of("celery") is None
    assert model_of("inferq") is None
