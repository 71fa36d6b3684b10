"""A worker's endpoint answers Prometheus, whatever else is connected to it."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from http.client import HTTPConnection, HTTPResponse
from queue import Queue
from urllib.parse import urlsplit

import pytest
from helpers.wait import until
from prometheus_client import CollectorRegistry, Gauge

from inferq.shared.errors import ConfigError
from inferq.shared.settings import Settings, split_address
from inferq.workers.metrics import endpoint
from inferq.workers.metrics.endpoint import MAX_REQUEST_BYTES, Endpoint
from inferq.workers.metrics.visitors import MAX_CONNECTIONS, MAX_PER_ADDRESS, Visitors

Ask = Callable[..., tuple[HTTPResponse, str]]


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    Gauge("answer", "All that there is.", registry=registry).set(42)
    return registry


@pytest.fixture
def problems() -> list[str]:
    """What keeps the worker from serving: nothing as long as it is empty."""
    return []


@pytest.fixture
def served(registry: CollectorRegistry, problems: list[str]) -> Iterator[Endpoint]:
    served = Endpoint("127.0.0.1:0", registry, lambda: problems[0] if problems else None)
    served.start()
    yield served
    served.stop()


@pytest.fixture
def at(served: Endpoint) -> tuple[str, int]:
    parts = urlsplit(served.url)
    assert parts.hostname is not None
    assert parts.port is not None
    return parts.hostname, parts.port


@pytest.fixture
def ask(at: tuple[str, int]) -> Ask:
    def ask(path: str, method: str = "GET", **headers: str) -> tuple[HTTPResponse, str]:
        connection = HTTPConnection(*at, timeout=10)
        try:
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            return answer, answer.read().decode()
        finally:
            connection.close()

    return ask


def connected(at: tuple[str, int], stack: ExitStack, source: str = "127.0.0.1") -> socket.socket:
    """A connection from an address of this machine's, closed with `stack`."""
    peer = socket.create_connection(at, timeout=10, source_address=(source, 0))
    return stack.enter_context(peer)


def tells(peer: socket.socket, what: bytes) -> bool:
    """Whether the other side takes `what`."""
    try:
        peer.sendall(what)
    except ConnectionError:
        return False
    return True


def answers(peer: socket.socket, rest: bytes = b"GET /healthz HTTP/1.1\r\n\r\n") -> bool:
    """Whether a request that ends with `rest` is answered."""
    try:
        peer.sendall(rest)
        return peer.recv(100).startswith(b"HTTP/1.1 200 ")
    except ConnectionError:
        return False


def is_closed(peer: socket.socket) -> bool:
    """By the other side, which has said nothing."""
    peer.setblocking(False)
    try:
        return peer.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True
    finally:
        peer.settimeout(10)


def test_metrics_are_told_in_either_format(ask: Ask) -> None:
    answer, text = ask("/metrics")
    assert (answer.status, text.splitlines()[-1]) == (200, "answer 42.0")
    assert answer.headers["Content-Type"].startswith("text/plain; version=")
    answer, text = ask("/metrics?name[]=all", Accept="application/openmetrics-text; version=1.0.0")
    assert text.endswith("# EOF\n")
    assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
    answer, text = ask("/metrics", "HEAD")
    assert (answer.status, text) == (200, "")
    assert int(answer.headers["Content-Length"]) > 0


@pytest.mark.parametrize("version", ["x", "1.x", "\u00b2.0.0", "2.\nX-Made-Up: 1", "99"])
@pytest.mark.parametrize("kind", ["application/openmetrics-text", "text/plain"])
def test_a_format_that_nobody_knows_is_answered_in_some_format(
    at: tuple[str, int], kind: str, version: str
) -> None:
    with socket.create_connection(at, timeout=10) as odd, odd.makefile("rb") as answers:
        asked = f"GET /metrics HTTP/1.1\r\nAccept: {kind};version={version}\r\n\r\n"
        odd.sendall(asked.encode("latin-1"))
        answer = answers.read().decode()
    assert answer.startswith("HTTP/1.1 200 OK\r\n")
    assert "answer 42.0" in answer
    assert "\nX-Made-Up" not in answer


def test_health_is_told_with_its_reason(ask: Ask, problems: list[str]) -> None:
    answer, text = ask("/healthz")
    assert (answer.status, text) == (200, "ok\n")
    problems.append("it is loading")
    answer, text = ask("/healthz")
    assert (answer.status, text) == (503, "it is loading\n")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 404), ("GET", "/metrics/x", 404), ("POST", "/metrics", 405)],
)
def test_all_else_is_refused(ask: Ask, method: str, path: str, status: int) -> None:
    assert ask(path, method)[0].status == status


@pytest.mark.parametrize(
    "request_",
    [b"GET\r\n\r\n", b"\r\n\r\n", b"\xff\xfe\x00 \r\n\r\n", b"GET /" + b"x" * (3 << 20)],
    ids=["one word", "nothing", "bytes", "too much"],
)
def test_what_is_no_request_is_answered_or_cut_off(
    at: tuple[str, int], request_: bytes, ask: Ask
) -> None:
    with socket.create_connection(at, timeout=10) as peer:
        try:
            peer.sendall(request_)
            got = peer.recv(100)
        except ConnectionError:
            got = b""
    assert got == b"" or got.startswith(b"HTTP/1.1 400 ")
    if len(request_) < MAX_REQUEST_BYTES:
        assert got, "what is short is told what is wrong with it"
    assert ask("/metrics")[0].status == 200


def test_scrapers_that_hang_are_dropped_in_time(
    at: tuple[str, int], ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "ANSWER_WITHIN_S", 1.0)
    with ExitStack() as stack:
        hanging = [connected(at, stack) for _ in range(MAX_PER_ADDRESS - 1)]
        for peer in hanging:
            peer.sendall(b"GET /metrics HTTP/1.1\r\n")
        assert ask("/metrics")[0].status == 200, "there is room for one more"
        for peer in hanging:
            assert peer.recv(1) == b"", "each is dropped in time"
        assert ask("/metrics")[0].status == 200


def test_a_request_that_comes_byte_by_byte_has_no_more_time_than_others(
    at: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "ANSWER_WITHIN_S", 1.0)
    with ExitStack() as stack:
        peer = connected(at, stack)
        peer.sendall(b"GET /metrics HTTP/1.1\r\nX-Slow: ")
        until(lambda: not tells(peer, b"x"), 20, "it is dropped")


def test_connections_that_say_nothing_keep_nobody_out(at: tuple[str, int], ask: Ask) -> None:
    with ExitStack() as stack:
        for count in range(1, 65):
            connected(at, stack)
            if count in {16, 32, 33, 64}:
                assert ask("/healthz")[0].status == 200
                assert ask("/metrics")[0].status == 200


def test_scrapers_that_do_not_read_keep_nobody_out(
    registry: CollectorRegistry, at: tuple[str, int], ask: Ask
) -> None:
    large = Gauge("large", "x" * 8_000_000, registry=registry)
    with ExitStack() as stack:
        for _ in range(MAX_PER_ADDRESS + 2):
            peer = connected(at, stack)
            peer.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
            assert peer.recv(12) == b"HTTP/1.1 200"
        assert ask("/healthz")[0].status == 200
        registry.unregister(large)
        assert ask("/metrics")[0].status == 200


def test_the_oldest_that_says_nothing_makes_room_for_a_new_one(at: tuple[str, int]) -> None:
    with ExitStack() as stack:
        hanging = [connected(at, stack) for _ in range(MAX_PER_ADDRESS)]
        assert answers(hanging[0]), "there was room for all of them"
        hanging[0] = connected(at, stack)
        newest = connected(at, stack)
        until(lambda: is_closed(hanging[1]), what="the oldest is closed")
        for peer in (*hanging[2:], hanging[0], newest):
            assert answers(peer), "and no other"


def test_one_address_takes_no_room_from_another(at: tuple[str, int]) -> None:
    with ExitStack() as stack:
        slow = connected(at, stack, "127.0.0.2")
        slow.sendall(b"GET /metrics HTTP/1.1\r\n")
        for _ in range(MAX_CONNECTIONS + 8):
            connected(at, stack, "127.0.0.3")
        assert answers(connected(at, stack, "127.0.0.4")), "all before it were taken"
        assert answers(slow, b"\r\n")


def test_where_many_addresses_come_those_with_the_most_connections_make_room(
    at: tuple[str, int],
) -> None:
    with ExitStack() as stack:
        slow = connected(at, stack, "127.0.0.2")
        slow.sendall(b"GET /metrics HTTP/1.1\r\n")
        for number in range(2 * MAX_CONNECTIONS):
            connected(at, stack, f"127.0.1.{number // 2 % 20}")
        assert answers(connected(at, stack, "127.0.0.4")), "all before it were taken"
        assert answers(slow, b"\r\n")


def test_health_is_told_while_others_do_their_worst(at: tuple[str, int], ask: Ask) -> None:
    ending = threading.Event()

    def knock(first: bytes) -> None:
        while not ending.is_set():
            with suppress(OSError), socket.create_connection(at, timeout=10) as peer:
                peer.sendall(first)

    threads = [
        threading.Thread(target=knock, args=(first,))
        for first in (b"", b"GET /met", b"GET /metrics HTTP/1.1\r\n\r\n", b"x" * 9000)
    ]
    for thread in threads:
        thread.start()
    try:
        for _ in range(50):
            assert ask("/healthz")[1] == "ok\n"
    finally:
        ending.set()
        for thread in threads:
            thread.join()


def test_a_scraper_that_does_not_read_is_dropped(
    registry: CollectorRegistry, at: tuple[str, int], ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "ANSWER_WITHIN_S", 1.0)
    large = Gauge("large", "x" * 20_000_000, registry=registry)
    with socket.create_connection(at, timeout=10) as peer:
        peer.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert peer.recv(12) == b"HTTP/1.1 200"
        registry.unregister(large)
        assert ask("/metrics")[0].status == 200

        until(lambda: not tells(peer, b"x"), 20, "it is dropped")


def test_its_end_waits_for_nobody_and_says_nothing(
    registry: CollectorRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    served = Endpoint("127.0.0.1:0", registry, lambda: None)
    served.start()
    parts = urlsplit(served.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=10) as peer:
        peer.sendall(b"GET /met")
        served.stop()
        assert not any(thread.name == "inferq-metrics" for thread in threading.enumerate())
        served.stop()
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    again = Endpoint(f"127.0.0.1:{parts.port}", registry, lambda: None)
    again.start()
    again.stop()


def test_a_listening_socket_that_breaks_ends_the_turn_and_is_not_asked_for_ever() -> None:
    met: Queue[BaseException] = Queue()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        listening.shutdown(socket.SHUT_RDWR)  # accept answers EINVAL from now on

        def turn() -> None:
            try:
                asyncio.run(endpoint._receive(listening, Visitors(lambda _: b"", 1, 1.0)))
            except OSError as problem:
                met.put(problem)

        threading.Thread(target=turn, daemon=True).start()
        assert isinstance(met.get(timeout=10), OSError)


def test_an_address_that_cannot_be_had_is_one_line(
    served: Endpoint, registry: CollectorRegistry
) -> None:
    taken = urlsplit(served.url).netloc
    for address, reason in ((taken, "Address already in use"), ("192.0.2.1:9100", "")):
        with pytest.raises(ConfigError) as caught:
            Endpoint(address, registry, lambda: None).start()
        expected = f"INFERQ_METRICS is '{address}'; expected a HOST:PORT that is free here: "
        assert caught.value.message.startswith(expected + reason)


def test_addresses() -> None:
    assert split_address("127.0.0.1:9100") == ("127.0.0.1", 9100)
    assert split_address("metrics.local:0") == ("metrics.local", 0)
    assert split_address("[::1]:65535") == ("::1", 65535)


@pytest.mark.parametrize(
    "bad", ["9100", ":9100", "::1:9100", "h:", "h:x", "h:-1", "h:65536", "h:²"]
)
def test_what_is_no_address_is_named(bad: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings.load(redis_url="redis://localhost", metrics=bad)
    expected = f"setting 'metrics' is {bad!r}; expected HOST:PORT, PORT from 0 to 65535"
    assert caught.value.message == expected
