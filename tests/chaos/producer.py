"""A producer process: the real client, a closed loop at a pace, and a book of what it saw.

The book has one JSON object a line. ``a``: accepted (submit returned); ``r``: resolved, with the
outcome and a digest of what Redis had stored just then; ``x``: refused; ``e``: anything else.
It runs until the file ``stop`` stands in its folder and everything is resolved, or time is up.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from chaos.content import SUCCESS, Request, request
from inferq.producer import Client
from inferq.producer.pending import Pending, Result
from inferq.shared.errors import InferqError
from inferq.shared.names import Names
from inferq.shared.settings import Settings

THREADS = 6
#: Seconds between two looks at what is unresolved.
LOOK_S = 0.01
#: Seconds after a refusal.
PAUSE_S = 0.1
ABSENT, UNREAD = "absent", "unread"


class Producer:
    """`pace`: requests a second at most; `window`: requests unresolved at most."""

    def __init__(
        self, client: Client, stored: redis.Redis, book: Path, number: int, seed: int
    ) -> None:
        self._client = client
        self._stored = stored
        self._names = Names()
        self._number = number
        self._seed = seed
        self._book = book.open("a", buffering=1)
        self._lock = threading.Lock()
        self._next = 0
        self._due = time.monotonic()
        self._pending: dict[str, tuple[Pending, Request, int]] = {}
        self._stop = threading.Event()

    def run(self, pace: float, window: int, stop: Path, settle_s: float) -> int:
        """Until `stop` exists; then up to `settle_s` seconds more. How many stay unresolved."""
        slots = threading.Semaphore(window)
        threads = [
            threading.Thread(target=self._submit, args=(1.0 / pace, slots), daemon=True)
            for _ in range(THREADS)
        ]
        for thread in threads:
            thread.start()
        until: float | None = None
        while until is None or (self._pending and time.monotonic() < until):
            for _ in range(self._collect()):
                slots.release()
            time.sleep(LOOK_S)
            if until is None and stop.exists():
                self._stop.set()
                slots.release(THREADS)
                until = time.monotonic() + settle_s
                for thread in threads:
                    thread.join(max(0.0, until - time.monotonic()))
        return len(self._pending)

    def _submit(self, every_s: float, slots: threading.Semaphore) -> None:
        while not self._stop.is_set():
            with self._lock:
                now = time.monotonic()
                self._due = max(self._due + every_s, now - 1.0)
                wait_s, number = self._due - now, self._next
                self._next += 1
            if wait_s > 0:
                self._stop.wait(wait_s)
            slots.acquire()
            if self._stop.is_set():
                return
            asked = request(self._seed, self._number, number)
            try:
                pending = self._client.submit(asked.model, {"x": asked.x}, priority=asked.priority)
            except InferqError as problem:
                self._write(k="x", n=number, w=type(problem).__name__, m=str(problem)[:200])
                slots.release()
                self._stop.wait(PAUSE_S)
            except Exception as problem:  # noqa: BLE001  the judge hears of it
                self._write(k="e", n=number, m=repr(problem)[:500])
                slots.release()
            else:
                self._write(k="a", id=pending.request_id, p=self._number, n=number)
                self._pending[pending.request_id] = (pending, asked, number)

    def _collect(self) -> int:
        done = [(one, asked) for one, asked, _ in list(self._pending.values()) if one.done()]
        if not done:
            return 0
        resolved_at = time.monotonic()
        digests = self._digests([pending.request_id for pending, _ in done])
        read_at = time.monotonic()
        for (pending, asked), digest in zip(done, digests, strict=True):
            outcome = outcome_of(pending.outcome, asked)
            self._write(
                k="r",
                id=pending.request_id,
                at=resolved_at,
                o=outcome,
                d=digest,
                read=read_at,
                w=settled_by(pending.outcome),
            )
            del self._pending[pending.request_id]
        return len(done)

    def _digests(self, ids: list[str]) -> list[str]:
        try:
            found: Any = self._stored.mget([self._names.meta(one) for one in ids])
        except redis.RedisError:
            return [UNREAD] * len(ids)
        return [digest_of(raw) for raw in found]

    def _write(self, **line: object) -> None:
        line.setdefault("at", time.monotonic())
        self._book.write(json.dumps(line) + "\n")


def settled_by(outcome: object) -> str:
    """The worker that computed it, as the crew calls it; empty if the result does not say."""
    receipt = outcome.receipt if isinstance(outcome, Result) else None
    return "" if receipt is None else receipt.worker.partition("@")[0]


def digest_of(raw: bytes | None) -> str:
    """A short digest of a stored result, or ABSENT."""
    return ABSENT if raw is None else hashlib.sha1(raw, usedforsecurity=False).hexdigest()


def outcome_of(outcome: object, asked: Request) -> str:
    """SUCCESS only if the outputs are what was asked back, bit by bit; else what it is."""
    if not isinstance(outcome, Result):
        return type(outcome).__name__
    outputs = outcome.outputs
    same = outputs.keys() == {"x"} and _equal(outputs["x"], asked)
    return SUCCESS if same else "other outputs"


def _equal(found: Any, asked: Request) -> bool:
    return found.dtype == asked.x.dtype and bool(np.array_equal(found, asked.x))


def main() -> None:
    parser = argparse.ArgumentParser(prog="chaos.producer", description=__doc__)
    parser.add_argument("url")
    parser.add_argument("direct", help="Redis past the proxy")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--number", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--pace", type=float, required=True, help="requests a second")
    parser.add_argument("--window", type=int, required=True, help="unresolved requests")
    parser.add_argument("--settle", type=float, required=True, help="seconds")
    args = parser.parse_args()
    settings = Settings.load(redis_url=args.url)
    retry = Retry(NoBackoff(), 1)
    stored = redis.Redis.from_url(args.direct, socket_timeout=5.0, retry=retry)
    book = args.folder / f"p{args.number}.jsonl"
    with Client(settings=settings) as client, stored:
        producer = Producer(client, stored, book, args.number, args.seed)
        left = producer.run(args.pace, args.window, args.folder / "stop", args.settle)
        print(f"{left} requests unresolved")


if __name__ == "__main__":
    main()
