"""A client is closed while others use it: nobody waits for ever, and each is told what became."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import pytest
import redis as redis_py
from helpers.echo import QUEUE, SOON_S, x
from helpers.responder import Responder, advert, announce
from helpers.wait import until

from inferq.producer import Client, ClientClosed, InferqError, RedisUnavailable, Result
from inferq.producer.listener import Listener
from inferq.producer.pending import Pending
from inferq.producer.session import Session
from inferq.producer.window import Window
from inferq.producer.wire import Wire
from inferq.shared import codec
from inferq.workers.process.embedded import EmbeddedRedis


@pytest.fixture
def echo(redis: redis_py.Redis) -> redis_py.Redis:
    announce(redis, advert())
    return redis


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads that may be left waiting by what is tested: the test fails, and does not hang."""
    pool = ThreadPoolExecutor(32)
    yield pool
    pool.shutdown(wait=False)


def closes_at(session: Session, count: int = 1) -> None:
    """Have `session` closed between the look whether it is open and the entry into its table.

    So it is with request number `count` that is made from now on.
    """
    make, left = session.make, [count]

    def made_late(*args: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            session.close()
        return make(*args)

    session.make = made_late  # type: ignore[method-assign, assignment]


def closes_with_push(session: Session, *, before: bool) -> None:
    """Have `session` closed by another thread just before, or after, Redis takes a push."""
    call = session._call

    def closing(commands: Sequence[Any]) -> Any:
        pushes = any(command[0] == "LPUSH" for command in commands)
        if pushes and before:
            session.close()
        replies = call(commands)
        if pushes and not before:
            session.close()
        return replies

    session._call = closing  # type: ignore[method-assign]


def listeners() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "inferq-results"]


# --- threads ------------------------------------------------------------------------------------


def test_a_request_that_enters_a_client_being_closed_is_refused_and_nothing_is_sent(
    echo: redis_py.Redis, redis_url: str
) -> None:
    client = Client(redis_url)
    closes_at(client._session)
    with pytest.raises(ClientClosed, match="nothing was sent"):
        client.submit("echo", x()).result(SOON_S)
    assert echo.llen(QUEUE) == 0
    assert client._session.core.unresolved() == []


def test_infer_without_a_bound_on_a_client_being_closed_ends(
    echo: redis_py.Redis, redis_url: str, pool: ThreadPoolExecutor
) -> None:
    client = Client(redis_url)
    closes_at(client._session)
    with pytest.raises(ClientClosed, match="nothing was sent"):
        pool.submit(client.infer, "echo", x(), timeout=None).result(SOON_S)
    assert echo.llen(QUEUE) == 0


def test_map_on_a_client_being_closed_tells_of_each_request_what_became_of_it(
    echo: redis_py.Redis, redis_url: str, pool: ThreadPoolExecutor
) -> None:
    client = Client(redis_url)
    # Blocks of 4: the first is pushed, the second is being made.
    closes_at(client._session, 6)

    def collect() -> list[Result | InferqError]:
        items = [x(n) for n in range(10)]
        results = client.map("echo", items, in_flight=32, timeout=None, return_errors=True)
        return list(results)

    outcomes = pool.submit(collect).result(SOON_S)
    assert [type(each) for each in outcomes] == [ClientClosed] * 10
    told = ["goes on" if "goes on" in str(each) else "nothing was sent" for each in outcomes]
    pushed = echo.llen(QUEUE)
    assert pushed == 4
    assert told == ["goes on"] * 4 + ["nothing was sent"] * 6


def test_what_redis_takes_while_the_client_is_closed_goes_on_and_says_so(
    echo: redis_py.Redis, redis_url: str
) -> None:
    for before in (False, True):
        echo.delete(QUEUE)
        client = Client(redis_url)
        closes_with_push(client._session, before=before)
        pending = client.submit("echo", x())
        assert echo.llen(QUEUE) == 1
        with pytest.raises(ClientClosed, match="goes on"):
            pending.result(SOON_S)


def test_what_redis_refuses_while_the_client_is_closed_is_not_said_to_go_on(
    new_redis: Callable[..., EmbeddedRedis],
) -> None:
    server = new_redis()
    with redis_py.Redis.from_url(server.url) as redis:
        announce(redis, advert())
        client = Client(server.url)
        client.submit("echo", x())
        redis.config_set("maxmemory", "1mb")
        closes_with_push(client._session, before=True)
        (outcome,) = client.map("echo", [x()], return_errors=True)
    assert isinstance(outcome, RedisUnavailable)
    assert "refused the push: OOM" in outcome.message


def test_a_client_closed_while_it_connects_for_the_first_time_keeps_no_thread(
    echo: redis_py.Redis, redis_url: str
) -> None:
    client = Client(redis_url)
    wires = client._session._wires
    call = wires.call

    def closing(commands: Sequence[Any]) -> Any:
        wires.call = call  # type: ignore[method-assign]
        replies = call(commands)
        client.close()
        return replies

    wires.call = closing  # type: ignore[method-assign]
    with pytest.raises(ClientClosed, match="nothing was sent"):
        client.submit("echo", x())
    until(lambda: not listeners(), what="no thread reads results any more")


def test_each_refusal_is_an_error_of_its_own(redis_url: str) -> None:
    """One that is raised again and again would keep every caller's frames alive."""
    client = Client(redis_url)
    client.close()
    raised = []
    for _ in range(2):
        with pytest.raises(ClientClosed) as caught:
            client.submit("echo", x())
        raised.append(caught.value)
    assert raised[0] is not raised[1]


@pytest.mark.parametrize("turn", range(5))
def test_threads_that_use_a_client_while_it_is_closed_all_end(  # noqa: C901 - a thread for each use
    echo: redis_py.Redis, redis_url: str, pool: ThreadPoolExecutor, turn: int
) -> None:
    client = Client(redis_url)
    pushed: list[str] = []

    def infer(n: int) -> int:
        done = 0
        while True:
            try:
                client.infer("echo", x(n), timeout=None)
            except ClientClosed:
                return done
            done += 1

    def submit(n: int) -> int:
        done = 0
        while True:
            try:
                pending = client.submit("echo", x(n))
                pushed.append(pending.request_id)
                pending.result(None)
            except ClientClosed:
                return done
            done += 1

    def stream(n: int) -> int:
        done = 0
        try:
            for _ in client.map("echo", iter(lambda: x(n), None), in_flight=8, timeout=None):
                done += 1
        except ClientClosed:
            return done
        raise AssertionError("an endless map ended")

    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with Responder(redis_url):
            work = [pool.submit(job, n) for n in range(6) for job in (infer, submit, stream)]
            until(lambda: len(pushed) > 50 + 10 * turn, what="it is in full swing")
            closers = [pool.submit(client.close) for _ in range(2)]
            done, left = wait(work, SOON_S)
            for closer in closers:
                closer.result(SOON_S)
    finally:
        sys.setswitchinterval(switching)
    assert not left, f"{len(left)} threads wait for ever"
    assert sum(each.result() for each in done) > 0
    assert client._session.core.unresolved() == []


class Contested(Pending):
    """A request that another thread resolves just as this one has found it unresolved."""

    meanwhile: Callable[[], None] | None = None
    kept: Any = None

    @property
    def _outcome(self) -> Any:
        return self.kept

    @_outcome.setter
    def _outcome(self, outcome: Any) -> None:
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()
        self.kept = outcome


def test_a_request_that_two_threads_resolve_wakes_its_waiters_once(redis_url: str) -> None:
    client = Client(redis_url)
    core = client._session.core
    answers = [[0, 0], codec.encode_advert(advert()), [], 0, 0, 0, 0]
    view = core.admission.learn("echo", answers, 0.0, 0.0)
    pending = core.build(
        view, x(), None, None, lambda outgoing, now: Contested(core, outgoing, now, bool)
    )
    pending.accepted = True
    woken: list[str] = []
    pending._waiters.append(lambda: woken.append("woken"))
    pending.meanwhile = lambda: core.drop(pending, ClientClosed("the second"))
    core.drop(pending, RedisUnavailable("the first"))
    assert woken == ["woken"]
    with pytest.raises(RedisUnavailable, match="the first"):
        pending.result(0)


# --- the thread that reads results --------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_death_of_the_thread_that_reads_results_ends_every_wait(
    echo: redis_py.Redis,
    redis_url: str,
    pool: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dying = threading.Event()

    def dies(self: Any, wire: Any) -> None:
        dying.wait(SOON_S)
        raise SystemExit

    monkeypatch.setattr(Listener, "_serve", dies)
    client = Client(redis_url)
    waiting = pool.submit(client.submit("echo", x()).result, None)
    dying.set()
    with pytest.raises(ClientClosed, match=r"reads results.*goes on"):
        waiting.result(SOON_S)
    with pytest.raises(ClientClosed, match="nothing was sent"):
        client.submit("echo", x())


def test_the_thread_that_reads_results_outlives_a_lack_of_memory(
    echo: redis_py.Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [MemoryError(), MemoryError()]

    def scarce(*args: Any) -> Any:
        if failures:
            raise failures.pop()
        return Wire(*args)

    monkeypatch.setattr("inferq.producer.listener.Wire", scarce)
    with Responder(redis_url), Client(redis_url) as client:
        assert client.infer("echo", x(3), timeout=SOON_S).outputs["x"][0, 0] == 3
    assert not failures


def test_a_wait_in_an_exit_handler_ends_when_the_client_has_ended(
    echo: redis_py.Redis, redis_url: str
) -> None:
    script = f"""
        import atexit
        import numpy as np
        held = []
        def last_look():  # runs after what closes the client, which registers later
            try:
                held[0].result(None)
            except Exception as problem:
                print(type(problem).__name__, problem)
        atexit.register(last_look)
        from inferq.producer import Client
        client = Client({redis_url!r})
        held.append(client.submit("echo", {{"x": np.zeros((1, 4), np.float32)}}))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stderr
    assert "ClientClosed" in done.stdout
    assert "goes on" in done.stdout


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_while_another_thread_counts_a_result_does_not_hang_the_child(
    echo: redis_py.Redis, redis_url: str
) -> None:
    with Client(redis_url) as client:
        pending = client.submit("echo", x())
        window: Window[Any] = Window(8)
        window.enter(pending)
        with window._counting:  # as the thread that reads results may
            child = multiprocessing.get_context("fork").Process(target=window.head_ready)
            child.start()
        try:
            child.join(SOON_S)
            assert child.exitcode == 0, "the child hangs since its fork"
        finally:
            child.kill()
