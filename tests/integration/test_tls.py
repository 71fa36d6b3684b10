"""All halves reach Redis over TLS alike, and say in one line what is wrong with it.

Redis stands behind a proxy that ends TLS (see `helpers.tls`): the embedded server has none.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import redis as redis_py
from click.testing import CliRunner
from helpers.flower import FlowerProcess
from helpers.repository import fake_model, numbered
from helpers.stock import let_go
from helpers.tls import Authority, Certificate, TlsProxy
from helpers.wait import until
from helpers.worker import SupervisedWorker, Worker
from kombu import pools

from inferq.producer import AsyncClient, Client, RedisUnavailable
from inferq.shared.celery_app import make_app
from inferq.shared.connect import CONNECT_TIMEOUT_S, check_server, redis_client
from inferq.shared.errors import ConfigError
from inferq.shared.settings import Settings
from inferq.shared.tls_mistakes import PROBE_S
from inferq.workers.cli import inferq
from inferq.workers.process.embedded import EmbeddedRedis

#: What one line about TLS takes at most: shaking hands in vain, then finding out why.
TOLD_S = CONNECT_TIMEOUT_S + 3 * PROBE_S
#: What no client and no command may take, also on a busy machine.
SOON_S = 4 * TOLD_S

Url = Callable[[], str]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def good(authority: Authority) -> Certificate:
    return authority.issue("DNS:localhost", "IP:127.0.0.1")


@pytest.fixture
def port(redis_server: EmbeddedRedis, redis_url: str) -> int:
    """Of a Redis whose database is empty."""
    return redis_server.port


@pytest.fixture
def proxy(port: int, good: Certificate) -> Iterator[TlsProxy]:
    with TlsProxy(port, good) as proxy:
        yield proxy


@pytest.fixture
def models(tmp_path: Path) -> Path:
    fake_model(tmp_path / "models", "m")
    fake_model(tmp_path / "models", "wide", width=200_000)
    return tmp_path / "models"


@pytest.mark.parametrize("spelling", ["", "ssl_cert_reqs=CERT_REQUIRED", "ssl_cert_reqs=required"])
def test_every_half_works_over_tls_that_is_verified_both_ways(
    redis_url: str, port: int, authority: Authority, good: Certificate, models: Path, spelling: str
) -> None:
    ours = authority.issue("DNS:client")
    files = [
        f"ssl_ca_certs={authority.ca}",
        f"ssl_certfile={ours.certificate}",
        f"ssl_keyfile={ours.key}",
        *([spelling] if spelling else []),
    ]
    with TlsProxy(port, good, clients=authority.ca) as proxy:
        url = proxy.url(*files)
        env = {"INFERQ_REDIS_URL": url}
        with Worker(redis_url, models, name="tls", env=env) as worker:
            _ask_all(url)
            with FlowerProcess(url) as flower:
                until(lambda: "tls@" in flower.get("/inference/data").body, 30, "Flower reads")
                until(lambda: "tls@" in flower.get("/workers?json=1").body, 30, "Flower hears")
            run = CliRunner().invoke(inferq, ["doctor", "--json", "--redis-url", url])
            found = {each["check"]: each for each in json.loads(run.stdout)}
            assert found["redis"]["level"] == "ok"
            assert any(check.startswith("worker tls@") for check in found), found
            assert "tls" not in found, "nothing to warn of"
            proxy.cut()  # and it comes back
            pools.reset()
            _ask_all(url)
            assert "Traceback" not in worker.log
            assert "insecure" not in worker.log, "what kombu says of a URL that verifies nothing"


def _ask_all(url: str) -> None:
    """Both clients, a tensor that goes beside its message, a link, remote control."""
    wide = np.arange(200_000, dtype=np.float32)[None]
    with Client(url) as client:
        outputs = client.infer("wide", {"x": wide}, timeout=60).outputs
        np.testing.assert_array_equal(outputs["x"], wide)
        each = client.map("m", ({"x": numbered(n)} for n in range(50)))
        assert [result.outputs["x"][0, 0] for result in each] == [*range(50)]

    async def ask() -> float:
        async with AsyncClient(url) as client:
            result = await client.infer("m", {"x": numbered(7)}, timeout=60)
            return float(result.outputs["x"][0, 0])

    assert asyncio.run(ask()) == 7
    app = make_app(Settings.load(redis_url=url))
    try:
        request = app.signature(
            "inferq.infer",
            kwargs={"model": "m", "inputs": {"x": numbered(3).tolist()}},
            queue="inferq.m",
        )
        linked = app.signature("inferq.infer", kwargs={"model": "m"}, queue="inferq.m")
        told = (request | linked).apply_async()
        assert told.get(timeout=60)["x"]["data"] == numbered(3).tolist()
        assert until(lambda: app.control.ping(timeout=5, limit=1), 60, "remote control answers")
    finally:
        let_go(app)


def test_a_bare_url_trusts_what_the_system_trusts_and_nothing_else(
    redis_url: str, proxy: TlsProxy, authority: Authority, models: Path
) -> None:
    trusting = {"INFERQ_REDIS_URL": proxy.url(), "SSL_CERT_FILE": str(authority.ca)}
    with Worker(redis_url, models, ["m"], name="bare", env=trusting):
        code = (
            "import numpy as np; from inferq.producer import Client\n"
            "x = {'x': np.zeros((1, 4), np.float32)}\n"
            "print(Client().infer('m', x, timeout=60).outputs['x'])"
        )
        done = _python(["-c", code], trusting)
        assert done.stdout == "[[0. 0. 0. 0.]]\n", done.stderr
        doubting = {"INFERQ_REDIS_URL": proxy.url()}
        done = _python(["-c", code], doubting)
        assert "RedisUnavailable: Redis cannot be reached: the certificate of" in done.stderr


@pytest.fixture
def mistakes(
    port: int, authority: Authority, good: Certificate, tmp_path: Path
) -> Iterator[dict[str, tuple[str, str]]]:
    """URLs with something wrong about TLS, by what it is, and what is said of each."""
    (tmp_path / "other").mkdir()
    other = Authority(tmp_path / "other").issue("IP:127.0.0.1")
    ca = f"ssl_ca_certs={authority.ca}"
    with (
        TlsProxy(port, good) as fine,
        TlsProxy(port, authority.issue("DNS:redis.example")) as elsewhere,
        TlsProxy(port, authority.issue("IP:127.0.0.1", expired=True)) as old,
        TlsProxy(port, other) as strange,
        TlsProxy(port, good, clients=authority.ca) as asking,
    ):
        yield {
            "unknown CA": (fine.url(), "ssl_ca_certs=FILE in the URL (INFERQ_REDIS_URL)"),
            "another CA": (strange.url(ca), "ssl_ca_certs=FILE in the URL (INFERQ_REDIS_URL)"),
            "another name": (elsewhere.url(ca), "another name, or ssl_check_hostname=false, in"),
            "expired": (old.url(ca), "is refused: certificate has expired; expected"),
            "no certificate of ours": (asking.url(ca), "expected ssl_certfile and ssl_keyfile"),
            "TLS to a plain port": (
                f"rediss://127.0.0.1:{port}/0",
                f"127.0.0.1:{port} speaks no TLS; expected the po",
            ),
            "no TLS to its port": (
                f"redis://127.0.0.1:{fine.port}/0",
                f"127.0.0.1:{fine.port} speaks TLS; expected rediss:// in the URL (INFERQ_",
            ),
            "no TLS to its port, with a password": (
                f"redis://:geheim@127.0.0.1:{fine.port}/0",
                f"127.0.0.1:{fine.port} speaks TLS; exp",
            ),
            "unknown value": (fine.url("ssl_cert_reqs=no"), "ssl_cert_reqs in the Redis URL is"),
        }


MISTAKES = [
    "unknown CA", "another CA", "another name", "expired", "no certificate of ours",
    "TLS to a plain port", "no TLS to its port", "no TLS to its port, with a password",
    "unknown value",
]  # fmt: skip


#: For what takes seconds to start.
SOME = [
    "another name",
    "no certificate of ours",
    "TLS to a plain port",
    "no TLS to its port, with a password",
    "unknown value",
]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_client_names_what_is_wrong_with_tls(
    mistakes: dict[str, tuple[str, str]], mistake: str
) -> None:
    url, message = mistakes[mistake]
    before = time.monotonic()
    with pytest.raises((RedisUnavailable, ConfigError)) as caught, Client(url) as client:
        client.infer("m", {"x": numbered(1)}, timeout=60)
    assert message in str(caught.value)
    assert "geheim" not in str(caught.value)

    async def ask() -> None:
        async with AsyncClient(url) as client:
            await client.infer("m", {"x": numbered(1)}, timeout=60)

    with pytest.raises((RedisUnavailable, ConfigError)) as caught:
        asyncio.run(ask())
    assert message in str(caught.value)
    assert time.monotonic() - before < 2 * SOON_S


@pytest.mark.parametrize("mistake", MISTAKES)
def test_commands_name_what_is_wrong_with_tls(
    mistakes: dict[str, tuple[str, str]], mistake: str
) -> None:
    url, message = mistakes[mistake]
    for command in (["queues"], ["dead", "list"]):
        run = CliRunner(env={"INFERQ_REDIS_URL": url}).invoke(inferq, command)
        assert run.exit_code == 1, command
        (line,) = run.stderr.splitlines()
        assert message in line, command
        assert "geheim" not in line, command
    run = CliRunner(env={"INFERQ_REDIS_URL": url}).invoke(inferq, ["doctor", "--json"])
    (found,) = (each["found"] for each in json.loads(run.stdout) if each["level"] == "error")
    assert message in found
    assert "geheim" not in run.stdout


@pytest.mark.parametrize("mistake", SOME)
def test_flower_ends_and_names_what_is_wrong_with_tls(
    mistakes: dict[str, tuple[str, str]], mistake: str
) -> None:
    url, message = mistakes[mistake]
    command = ["-m", "inferq.workers.cli", "flower", "--port", "0"]
    done = _python(command, {"INFERQ_REDIS_URL": url})
    assert done.returncode
    (line,) = done.stderr.splitlines()
    assert message in line
    assert "geheim" not in line


@pytest.mark.parametrize("mistake", SOME)
def test_a_worker_that_is_started_ends_and_names_what_is_wrong_with_tls(
    redis_url: str, models: Path, mistakes: dict[str, tuple[str, str]], mistake: str
) -> None:
    url, message = mistakes[mistake]
    with closing(
        SupervisedWorker(redis_url, models, ["m"], name="wrong", env={"INFERQ_REDIS_URL": url})
    ) as worker:
        worker.start()
        worker.process.wait(60)
        told = [line for line in worker.log.splitlines() if message in line]
        # By the worker that ends; the supervisor may find out, too, that nothing can be put back.
        assert sum("supervisor" not in line for line in told) == 1, worker.log
        assert len(told) <= 2, worker.log
        assert "Traceback" not in worker.log
        assert "geheim" not in worker.log


def test_a_worker_whose_redis_shows_another_certificate_says_so_and_goes_on_once_it_is_right(
    redis_url: str, proxy: TlsProxy, authority: Authority, good: Certificate, models: Path
) -> None:
    url = proxy.url(f"ssl_ca_certs={authority.ca}")
    with Worker(redis_url, models, ["m"], name="renew", env={"INFERQ_REDIS_URL": url}) as worker:
        proxy.show(authority.issue("IP:127.0.0.1", expired=True))
        proxy.cut()
        told = "is refused: certificate has expired"
        until(lambda: told in worker.log, 30, "the worker says so")
        assert worker.alive
        proxy.show(good)
        with Client(url) as client:
            client.infer("m", {"x": numbered(1)}, timeout=60)


def test_a_redis_that_is_just_away_is_not_blamed_on_tls(good: Certificate, port: int) -> None:
    with TlsProxy(port, good) as proxy:
        urls = [proxy.url(), f"redis://127.0.0.1:{proxy.port}/0"]
    for url in urls:
        with redis_client(url) as client, pytest.raises(redis_py.ConnectionError, match="refused"):
            client.ping()
        with redis_client(url) as client, pytest.raises(RedisUnavailable):
            check_server(client)


def test_a_password_that_is_refused_is_not_blamed_on_tls(
    new_redis: Callable[..., EmbeddedRedis], good: Certificate, authority: Authority
) -> None:
    server = new_redis()
    with redis_py.Redis.from_url(server.url) as redis:
        redis.config_set("requirepass", "geheim")
    with TlsProxy(server.port, good) as proxy:
        for url in (
            proxy.url(f"ssl_ca_certs={authority.ca}", user=":falsch@"),
            f"redis://:falsch@127.0.0.1:{server.port}/0",
        ):
            with redis_client(url) as client, pytest.raises(redis_py.AuthenticationError):
                client.ping()


def _python(args: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, sys.path))
    return subprocess.run(
        [sys.executable, *args],
        env={**os.environ, "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
        timeout=60,
    )
