"""Settings and URLs: what is taken, from where, and how a bad value is named."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import partial

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from redis.sentinel import SentinelConnectionPool

from inferq.shared.connect import async_redis_client, judge_server, redact, redis_client
from inferq.shared.errors import ConfigError
from inferq.shared.settings import ENV_PREFIX, Settings

URL = "redis://127.0.0.1:6379/0"


def test_the_url_comes_from_the_argument_then_inferqs_then_celerys_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://celery")
    assert Settings.load().redis_url == "redis://celery"
    monkeypatch.setenv("INFERQ_REDIS_URL", "redis://inferq")
    assert Settings.load().redis_url == "redis://inferq"
    assert Settings.load(redis_url="redis://given").redis_url == "redis://given"


def test_without_a_url_the_error_says_which_variables_to_set() -> None:
    with pytest.raises(ConfigError, match="INFERQ_REDIS_URL or CELERY_BROKER_URL"):
        Settings.load()


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("INFERQ_LEASE_S", "soon", "valid number"),
        ("INFERQ_RESULT_EXPIRES_S", "0", "greater than or equal to 1"),
        ("INFERQ_PRIORITY_STEPS", "3,0", "ascending"),
        ("INFERQ_PRIORITY_STEPS", "a", "integer"),
        ("INFERQ_LEASE_S", "nan", "finite"),
        ("INFERQ_LEASE_S", "inf", "finite"),
        ("INFERQ_GRACE_S", "1e300", "less than or equal to"),
        ("INFERQ_RESULT_EXPIRES_S", "9" * 30, "less than or equal to"),
    ],
)
def test_a_bad_value_is_named_with_its_variable_and_what_was_expected(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, expected: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError) as caught:
        Settings.load(redis_url=URL)
    for part in (variable, value, expected):
        assert part in caught.value.message


def test_an_empty_list_of_queues_opens_none_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other empty variables stand for the default, which here is all queues."""
    monkeypatch.setenv("INFERQ_LINK_QUEUES", "")
    with pytest.raises(ConfigError, match="INFERQ_LINK_QUEUES is empty; expected patterns"):
        Settings.load(redis_url="redis://h")
    assert Settings.load(redis_url="redis://h", link_queues=("a",)).link_queues == ("a",)


def test_a_setting_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'lease' is 3; expected one of .*lease_s"):
        Settings.load(redis_url=URL, lease=3)


def test_the_settings_of_kombu_reach_the_key_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERQ_GLOBAL_KEYPREFIX", "app:")
    monkeypatch.setenv("INFERQ_PRIORITY_STEPS", "0, 5")
    monkeypatch.setenv("INFERQ_PRIORITY_SEP", "/")
    names = Settings.load(redis_url=URL).names()
    assert names.queue("m", 9) == "app:inferq.m/5"
    assert names.model("m") == "app:inferq:1:model:m"


@pytest.mark.parametrize(
    "url",
    [
        "amqp://user:geheim@host",
        "user:geheim@host",
        "redis://:geheim@host:port",
        "redis://:ge/geheim@host",
        "redis://host?socket_timeout=x&password=geheim",
        "sentinel://host:x;sentinel://:geheim@host2",
    ],
)
def test_a_url_that_cannot_be_used_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        redis_client(url)
    assert "geheim" not in str(caught.value)
    assert "geheim" not in redact(url)
    assert "geheim" not in repr(Settings.load(redis_url=url))


def test_celerys_sentinel_url_asks_all_sentinels_for_the_named_master() -> None:
    client = redis_client(
        "sentinel://:p%40ss@one:1001/2;sentinel://two;sentinel://three:1003",
        sentinel_master="primary",
    )
    pool = client.connection_pool
    assert isinstance(pool, SentinelConnectionPool)
    assert pool.service_name == "primary"
    assert pool.connection_kwargs["db"] == 2
    assert pool.connection_kwargs["password"] == "p@ss"
    ends = [one.connection_pool.connection_kwargs for one in pool.sentinel_manager.sentinels]
    assert [(end["host"], end["port"]) for end in ends] == [
        ("one", 1001),
        ("two", 26379),
        ("three", 1003),
    ]


def test_kombus_socket_url_is_a_unix_socket() -> None:
    pool = redis_client("redis+socket:///run/redis.sock?db=3").connection_pool
    assert pool.connection_class is redis.UnixDomainSocketConnection
    assert pool.connection_kwargs["path"] == "/run/redis.sock"
    assert pool.connection_kwargs["db"] == 3


def test_a_cluster_and_an_old_redis_are_refused() -> None:
    assert judge_server({"redis_version": "6.2.0", "run_id": "a"}, {}).version == (6, 2, 0)
    with pytest.raises(ConfigError, match="cluster mode"):
        judge_server({"redis_version": "8.0.0"}, {"cluster_enabled": 1})
    with pytest.raises(ConfigError, match=r"version 6\.0\.20; expected 6\.2"):
        judge_server({"redis_version": "6.0.20"}, {"cluster_enabled": 0})


VARIABLES = [f"{ENV_PREFIX}{field.upper()}" for field in Settings.model_fields]
#: As a shell may hand it over: bytes that are no UTF-8 become half surrogates.
TEXT = st.binary(max_size=20).map(
    lambda raw: os.fsdecode(raw.replace(b"\0", b""))
) | st.sampled_from(
    ["0", "1", "-1", "nan", "inf", "1e400", "9" * 5000, "0,3", ",", "0," * 1000, "٣", "true", "a:b"]
)


@given(st.dictionaries(st.sampled_from(VARIABLES), TEXT))
def test_any_environment_is_read_or_refused_by_a_name_that_it_holds(
    environment: dict[str, str],
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in environment.items():
            patch.setenv(variable, value)
        patch.setenv("CELERY_BROKER_URL", URL)
        try:
            names = Settings.load().names()
        except ConfigError as problem:
            message = problem.message
        else:
            for key in (names.leases, names.meta("a"), *map(partial(names.queue, "m"), range(10))):
                key.encode()
            return
    assert any(variable in message for variable in environment)
    message.encode()


@given(
    st.text(max_size=40)
    | st.tuples(
        st.sampled_from(["redis://", "rediss://", "unix://", "sentinel://", "redis+socket://"]),
        st.text(alphabet="ab:@/;?=&[]%0123456789٣\x00", max_size=30),
    ).map("".join)
)
def test_any_url_makes_a_client_or_is_refused(url: str) -> None:
    for make in (redis_client, async_redis_client):
        with suppress(ConfigError):
            make(url)
    assert isinstance(redact(url), str)
