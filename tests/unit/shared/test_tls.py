"""What a ``rediss://`` URL says of TLS is read once, for redis-py, kombu and Celery alike."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from celery import Celery
from helpers.tls import Authority
from kombu.utils.url import parse_url

from inferq.shared.celery_app import make_app
from inferq.shared.connect import async_redis_client, redis_client
from inferq.shared.errors import ConfigError
from inferq.shared.settings import Settings
from inferq.shared.tls import Tls, split_tls, with_tls
from inferq.workers.celery_command import _settings

BARE = "rediss://h:1/0"


def told(connection: Any) -> dict[str, Any]:
    """What a connection of redis-py's has been told of TLS."""
    return {
        "ssl_cert_reqs": connection.cert_reqs,
        "ssl_check_hostname": connection.check_hostname,
        "ssl_ca_certs": connection.ca_certs,
        "ssl_certfile": connection.certfile,
        "ssl_keyfile": connection.keyfile,
    }


def of_celery(url: str) -> Celery:
    return make_app(Settings.load(redis_url=url))


def of_halves(url: str) -> list[dict[str, Any]]:
    """That of both clients, and of Celery's broker (to read, to write) and result backend."""
    app = of_celery(url)
    pools = [redis_client(url), async_redis_client(url), app.backend.client]
    made = [
        pool.connection_class(**pool.connection_kwargs)
        for pool in (client.connection_pool for client in pools)
    ]
    for connection in (app.connection_for_write(), app.connection_for_read()):
        made.append(connection.transport.Channel.connection_class_ssl(**connection.ssl))
    return [told(each) for each in made]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


DEFAULT = {
    "ssl_cert_reqs": ssl.CERT_REQUIRED,
    "ssl_check_hostname": True,
    "ssl_ca_certs": None,
    "ssl_certfile": None,
    "ssl_keyfile": None,
}


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("", {}),
        ("?ssl_cert_reqs=required", {}),
        ("?ssl_cert_reqs=CERT_REQUIRED", {}),
        ("?ssl_cert_reqs=optional", {"ssl_cert_reqs": ssl.CERT_OPTIONAL}),
        ("?ssl_cert_reqs=CERT_OPTIONAL", {"ssl_cert_reqs": ssl.CERT_OPTIONAL}),
        ("?ssl_cert_reqs=none", {"ssl_cert_reqs": ssl.CERT_NONE, "ssl_check_hostname": False}),
        ("?ssl_cert_reqs=CERT_NONE", {"ssl_cert_reqs": ssl.CERT_NONE, "ssl_check_hostname": False}),
        ("?ssl_check_hostname=false", {"ssl_check_hostname": False}),
        ("?ssl_check_hostname=0", {"ssl_check_hostname": False}),
        ("?ssl_check_hostname=True&ssl_cert_reqs=required", {}),
    ],
)
def test_every_half_verifies_alike(query: str, said: dict[str, Any]) -> None:
    url = BARE + query
    assert of_halves(url) == [{**DEFAULT, **said}] * 5


def test_every_half_is_given_the_files(authority: Authority, tmp_path: Path) -> None:
    shown = authority.issue("DNS:client")
    odd = tmp_path / "a CA+100%41.pem"
    odd.write_bytes(authority.ca.read_bytes())
    url = (
        f"{BARE}?ssl_ca_certs={quote(str(odd))}"
        f"&ssl_certfile={shown.certificate}&ssl_keyfile={shown.key}"
    )
    files = {
        "ssl_ca_certs": str(odd),
        "ssl_certfile": str(shown.certificate),
        "ssl_keyfile": str(shown.key),
    }
    assert of_halves(url) == [{**DEFAULT, **files}] * 5


@pytest.mark.parametrize("variable", ["CELERY_BROKER_URL", "INFERQ_REDIS_URL"])
def test_the_environments_own_url_of_celery_is_read_as_ours_is(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv("CELERY_BROKER_URL", f"{BARE}?ssl_check_hostname=0")
    monkeypatch.setenv(variable, f"{BARE}?ssl_check_hostname=0")
    app = make_app(Settings.load())
    for connection in (app.connection_for_read(), app.connection_for_write(), app.connection()):
        assert connection.ssl["ssl_check_hostname"] is False
        assert connection.ssl["ssl_cert_reqs"] is ssl.CERT_REQUIRED


def test_other_options_of_the_url_stay() -> None:
    plain, tls = split_tls("rediss://u:p%40@h:1/2?x=%26a&ssl_cert_reqs=none&client_name=b+c")
    assert plain == "rediss://u:p%40@h:1/2?x=%26a&client_name=b+c"
    assert tls == Tls(cert_reqs=ssl.CERT_NONE)
    assert split_tls("redis://h:1/2?x=1") == ("redis://h:1/2?x=1", None)
    assert split_tls(f"{BARE}?ssl_cert_reqs=none")[0] == BARE


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (f"{BARE}?ssl_cert_reqs=maybe", "ssl_cert_reqs in the Redis URL is 'maybe'; expected requ"),
        (f"{BARE}?ssl_cert_reqs=", "ssl_cert_reqs in the Redis URL is ''; expected required"),
        (f"{BARE}?ssl_check_hostname=2", "ssl_check_hostname in the Redis URL is '2'; expected tr"),
        (f"{BARE}?ssl_cert_req=none", "ssl_cert_req in the Redis URL; expected one of ssl_cert_re"),
        (f"{BARE}?ssl_cert_reqs=none&ssl_cert_reqs=required", "ssl_cert_reqs stands twice"),
        (f"{BARE}?ssl_ca_certs=/no/such", "ssl_ca_certs in the Redis URL is '/no/such'; expected"),
        (f"{BARE}?ssl_ca_certs=", "ssl_ca_certs in the Redis URL is empty; expected a file's name"),
        (f"{BARE}?ssl_certfile=/no/such", "ssl_certfile in the Redis URL is '/no/such'; expected"),
        (f"{BARE}?ssl_keyfile=/no/such", "ssl_keyfile in the Redis URL without ssl_certfile"),
        ("redis://h:1/0?ssl_cert_reqs=none", "ssl_cert_reqs in a Redis URL that is spoken without"),
        ("unix:///r.sock?ssl_ca_certs=/x", "ssl_ca_certs in a Redis URL that is spoken without"),
        ("sentinel://h:1/0?ssl_cert_reqs=none", "ssl_cert_reqs in a Redis URL that is spoken with"),
        (f"{BARE}?ssl%5Fcert_reqs=maybe", "ssl_cert_reqs in the Redis URL is 'maybe'"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_every_half_and_named(url: str, message: str) -> None:
    url = url.replace("://", "://:geheim@")
    for make in (redis_client, async_redis_client, of_celery):
        with pytest.raises(ConfigError) as caught:
            make(url)
        assert caught.value.message.startswith(message)
        assert "geheim" not in str(caught.value)


def test_a_file_that_holds_something_else_is_named(authority: Authority, tmp_path: Path) -> None:
    shown = authority.issue("DNS:client")
    text, locked, missing = tmp_path / "text", tmp_path / "locked.key", tmp_path / "missing"
    text.write_text("no PEM")
    encrypted = ["openssl", "ec", "-aes128", "-passout", "pass:x", "-in", str(shown.key)]
    subprocess.run([*encrypted, "-out", str(locked)], check=True, capture_output=True)
    for name, options in {
        "ssl_ca_certs": f"ssl_ca_certs={text}",
        "ssl_certfile": f"ssl_certfile={text}",
        "ssl_keyfile": f"ssl_certfile={shown.certificate}&ssl_keyfile={missing}",
    }.items():
        with pytest.raises(ConfigError, match=f"^{name} in the Redis URL is"):
            redis_client(f"{BARE}?{options}")
    with pytest.raises(ConfigError, match="without a passphrase"):
        redis_client(f"{BARE}?ssl_certfile={shown.certificate}&ssl_keyfile={locked}")


@pytest.mark.parametrize(
    ("url", "options", "found"),
    [
        ("redis://h:1/0", {"ssl_cert_reqs": ssl.CERT_REQUIRED}, Tls()),
        ("rediss://h:1/0", {"ssl_cert_reqs": "none"}, Tls(cert_reqs=ssl.CERT_NONE)),
        ("rediss://h:1/0?x=1", {"ssl_check_hostname": False}, Tls(check_hostname=False)),
        ("rediss://h:1/0?ssl_cert_reqs=CERT_REQUIRED", None, Tls()),
        ("redis://h:1/0", None, None),
        ("redis://h:1/0", False, None),
        ("rediss://h:1/0", {"ssl_ca_path": "/x", "ssl_certfile": None}, Tls()),
    ],
)
def test_what_a_celery_app_says_beside_its_url_is_found(
    url: str, options: object, found: Tls | None
) -> None:
    app = Celery(broker=url, set_as_current=False)
    app.conf.broker_use_ssl = options
    ours = _settings(app.conf)["INFERQ_REDIS_URL"]
    assert split_tls(ours)[1] == found
    assert ours == with_tls(url, options)


def test_kombu_itself_takes_our_spelling_of_a_url_for_the_same() -> None:
    """So that one URL serves a stock app and us."""
    for spelt in ("required", "CERT_REQUIRED"):
        parsed = parse_url(f"{BARE}?ssl_cert_reqs={spelt}&ssl_check_hostname=false")
        assert parsed["ssl"]["ssl_cert_reqs"] is ssl.CERT_REQUIRED
        assert parsed["ssl"]["ssl_check_hostname"] is False
