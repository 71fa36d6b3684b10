"""What websites that an operator visits can make of a Flower on his own machine: nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from http.client import HTTPConnection
from pathlib import Path

import pytest
from helpers.flower import FlowerProcess, Reply

from inferq.workers.flower import CONF
from inferq.workers.process.embedded import EmbeddedRedis

PAGES = [
    "/", "/workers", "/tasks", "/broker", "/inference", "/inference/data", "/metrics",
    "/inference/inference.js", "/static/css/flower.css", "/healthcheck", "/api/workers",
    "/api/tasks", "/api/queues/length", "/nowhere",
]  # fmt: skip
STRANGE = [
    "evil.example", "evil.example:{port}", "localhost.evil.example", "127.0.0.1.evil.example",
    "evil.example,localhost", "localhost@evil.example", "[::2]", "0.0.0.0:{port}", "localhost:x",
    "127.0.0.1:{port}:1", "",
]  # fmt: skip
OWN = ["localhost", "localhost:{port}", "LocalHost:1", "127.0.0.1", "127.8.9.1:{port}", "[::1]:80"]


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis() as server:
        yield server


@pytest.fixture(scope="module")
def flower(server: EmbeddedRedis) -> Iterator[FlowerProcess]:
    with FlowerProcess(server.url, prefix="/ops") as flower:
        yield flower


def ask(flower: FlowerProcess, path: str, headers: Mapping[str, str], method: str = "GET") -> Reply:
    """The answer to a request with these headers, in which {port} is Flower's."""
    prefix = flower.url.partition(str(flower.port))[2]
    connection = HTTPConnection("127.0.0.1", flower.port, timeout=15)
    try:
        connection.putrequest(method, f"{prefix}{path}", skip_host=True)
        for name, value in {"Host": "localhost", "Content-Length": "0", **headers}.items():
            connection.putheader(name, value.format(port=flower.port))
        connection.endheaders()
        reply = connection.getresponse()
        told = {name.lower(): value for name, value in reply.getheaders()}
        return Reply(reply.status, reply.read().decode(), told)
    finally:
        connection.close()


@pytest.mark.parametrize("path", PAGES)
def test_on_loopback_a_website_whose_name_was_pointed_here_reads_nothing(
    flower: FlowerProcess, path: str
) -> None:
    for host in STRANGE:
        refused = ask(flower, path, {"Host": host})
        assert refused.status in {400, 403}, host
        assert "<" not in refused.body
        if refused.status == 403:
            assert "expected localhost" in refused.body
            assert "--allow-host" in refused.body
            assert refused.headers["content-type"].startswith("text/plain")
    for host in OWN:
        assert ask(flower, path, {"Host": host}).status == (404 if path == "/nowhere" else 200)


@pytest.mark.parametrize("method", ["POST", "GET", "OPTIONS", "DELETE"])
def test_on_loopback_no_other_website_uses_the_api(flower: FlowerProcess, method: str) -> None:
    """Not even where it is open to all, and the browser says where the page is from."""
    path = "/api/task/revoke/some-id"
    for origin in ("http://evil.example", "https://localhost.evil.example:{port}", "null", "x"):
        refused = ask(flower, path, {"Origin": origin}, method)
        assert refused.status == 403, origin
        assert "access-control-allow-origin" not in refused.headers
    for own in ({}, {"Origin": "http://localhost:{port}"}, {"Origin": "http://[::1]"}):
        assert ask(flower, path, own, method).status != 403


def test_names_that_the_operator_gives_are_answered_too(server: EmbeddedRedis) -> None:
    args = ["--allow-host", "Flower.example.org,ops"]
    with FlowerProcess(server.url, args=args) as flower:
        for host in ("flower.example.org", "ops:8080", "localhost"):
            assert ask(flower, "/broker", {"Host": host, "Origin": f"https://{host}"}).status == 200
        for host in ("example.org", "a.flower.example.org"):
            assert ask(flower, "/broker", {"Host": host}).status == 403


def test_celerys_own_command_checks_them_as_well(server: EmbeddedRedis) -> None:
    env = {"INFERQ_FLOWER_HOSTS": "flower.example.org"}
    with FlowerProcess(server.url, celery=[f"--conf={CONF}"], env=env) as flower:
        assert ask(flower, "/broker", {"Host": "flower.example.org"}).status == 200
        assert ask(flower, "/broker", {"Host": "evil.example"}).status == 403


def test_a_newer_flower_checks_them_as_well(server: EmbeddedRedis, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import flower\nflower.__version__ = '2.3.0'\n")
    with FlowerProcess(server.url, folders=[tmp_path]) as flower:
        assert "was not tested" in flower.log
        assert ask(flower, "/broker", {"Host": "evil.example"}).status == 403
        assert "frame-ancestors" in flower.get("/broker").headers["content-security-policy"]


def test_where_a_password_is_asked_for_every_name_will_do(server: EmbeddedRedis) -> None:
    """As behind a proxy: a website does not know the password."""
    with FlowerProcess(server.url, env={"INFERQ_FLOWER_BASIC_AUTH": "a:b"}) as flower:
        assert ask(flower, "/broker", {"Host": "evil.example"}).status == 401
        known = {"Host": "flower.example.org", "Authorization": "Basic YTpi"}
        assert ask(flower, "/broker", known).status == 200


def test_no_page_is_shown_within_another_page(flower: FlowerProcess) -> None:
    for path in PAGES:
        for headers in ({}, {"Host": "evil.example"}):
            answer = ask(flower, path, headers)
            assert answer.headers["content-security-policy"] == "frame-ancestors 'none'"
            assert answer.headers["x-frame-options"] == "DENY"


def test_with_a_password_no_page_is_shown_within_another_page(server: EmbeddedRedis) -> None:
    with FlowerProcess(server.url, env={"INFERQ_FLOWER_BASIC_AUTH": "a:b"}) as flower:
        for credentials, status in ((None, 401), ("a:b", 200)):
            answer = flower.get("/broker", credentials)
            assert answer.status == status
            assert answer.headers["content-security-policy"] == "frame-ancestors 'none'"
            assert answer.headers["x-frame-options"] == "DENY"


@pytest.mark.parametrize(
    "bad", ["http://flower.example.org", "flower:80", "a,,b", "*", "a b", "\x1b[31m"]
)
def test_what_is_no_hosts_name_is_one_line(bad: str) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run(
        [sys.executable, "-m", "inferq.workers.cli", "flower", "--redis-url", "redis://h",
         "--allow-host", bad],
        env=env, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert run.returncode != 0
    assert re.match(r"Error: --allow-host or INFERQ_FLOWER_HOSTS is .*; expected names", run.stderr)
    assert "Traceback" not in run.stderr
    assert "\x1b" not in run.stderr


def test_a_flower_whose_requests_cannot_be_looked_at_needs_a_password(
    server: EmbeddedRedis, tmp_path: Path
) -> None:
    code = "import flower.command\nflower.command.Flower = lambda **options: None\n"
    (tmp_path / "sitecustomize.py").write_text(code)
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    run = subprocess.run(
        [sys.executable, "-m", "inferq.workers.cli", "flower", "--redis-url", server.url],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert run.returncode != 0
    assert "expected --basic-auth" in run.stderr
    assert "Traceback" not in run.stderr
