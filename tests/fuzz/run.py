"""`make fuzz MESSAGES=100000 SEED=1`: messages that mean harm or are broken, to a real worker.

They are pushed raw by a Redis user that may do nothing else (payloads by a producer), good ones
among them, beside innocent requests of another model (see innocents.py). The worker has 1 GiB. What
holds, and is checked for every message:

- A good one is answered with the right outputs.
- One that names an id has a result under that id (the first, if several name it), or is a dead
  letter with its very bytes, or is kept until its ETA; unless it asks that its result be ignored.
- All others are dead letters with their very bytes (the first 64 KB of them), and nothing else is.
- No worker dies; nothing stays in queues, claims or kombu's unacked; nobody else's keys change;
  the worker's memory grows by no more than `MAX_GROWTH_MB` after it has warmed up, and never
  reaches 1 GiB; Redis has no more keys without a TTL than before.
- Every innocent request is answered rightly. Of a long run: 99 of 100 within `MAX_SLOWER` times
  what it took before the attack.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgpack
import numpy as np
import redis as redis_py
from helpers import onnx_models
from helpers.acl import Users
from helpers.capped import CappedProcess, capped
from helpers.process import memory_mb
from helpers.repository import fake_model
from helpers.results import nothing_is_held
from helpers.wait import until
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fuzz import innocents
from fuzz.footprint import Lasting, lasting
from fuzz.innocents import Answer, Innocents, percentile_ms
from fuzz.mutations import LINKS_QUEUE, NAMES, WIDTHS, Message, Messages
from inferq.shared import codec
from inferq.shared.names import TASK
from inferq.workers.data_plane.results import MAX_QUARANTINED_BYTES
from inferq.workers.process.embedded import EmbeddedRedis

MAX_GROWTH_MB: Final = 50.0
#: The worker's memory, in MB (2^20 bytes).
LIMIT_MB: Final = 1024
#: How much slower the slowest of 100 innocent requests may be than before the attack.
MAX_SLOWER: Final = 3.0
#: Seconds for which the innocents ask alone in a long run; before that they warm up.
ALONE_S: Final = 30.0
WARM_S: Final = 3.0
#: Of fewer innocent requests a percentile is chance, and not judged.
ENOUGH: Final = 1_000
#: Messages after which the worker counts as warm; in a short run a third of all.
WARM_AFTER: Final = 5_000
#: Messages that are all accounted for before the next are pushed, and how many are pushed at once.
CHUNK: Final = 250
PIECE: Final = 25
#: Messages a second, at most: ten times as many as innocent ones. More would show how fast the
#: worker is, and not whether one model's harm stays its own.
RATE: Final = 500.0
#: Longest that one chunk may take, in s.
CHUNK_TIMEOUT_S: Final = 60.0
#: Results live so long, in s.
EXPIRES_S: Final = 600
#: Others are refused: a queue that nobody reads keeps what it is sent.
LINK_QUEUES: Final = f"{LINKS_QUEUE},celery"
#: What is kept of a message that is a dead letter, and how long it was: some begin alike.
Buried = tuple[bytes, int]
SECRETS: Final = {"celery-task-meta-other": b"secret", "unrelated": b"secret"}
_POLL_S: Final = 0.02
_SHOWN: Final = 5


@dataclass
class Sums:
    """How the messages ended. `ends` counts them by their kind of end."""

    sent: int = 0
    good: int = 0
    deaths: int = 0
    #: Good ones with other outputs than they should have, or answered otherwise than by success.
    wrong: int = 0
    #: Messages that were not accounted for in time.
    unanswered: int = 0
    #: What stayed behind, or was changed, that should not have.
    left: list[str] = field(default_factory=list)
    rss_growth_mb: float = 0.0
    #: The most memory that the worker ever had, and what limited it.
    peak_mb: float = 0.0
    limit: str = ""
    #: Innocent requests: how others than `ANSWERED` ended; within what 99 of 100 were answered.
    innocent: Counter[str] = field(default_factory=Counter)
    alone: int = 0
    alone_p99_ms: float = 0.0
    beside: int = 0
    beside_p99_ms: float = 0.0
    #: Keys without TTL of which there are more than before.
    lasting: list[str] = field(default_factory=list)
    seconds: float = 0.0
    ends: Counter[str] = field(default_factory=Counter)
    #: Messages that broke a rule, for a look at them.
    culprits: list[tuple[str, bytes]] = field(default_factory=list)

    @property
    def slower(self) -> float:
        """The 99th percentile of innocent requests beside the attack, in that before it."""
        return self.beside_p99_ms / self.alone_p99_ms if self.alone_p99_ms else 0.0

    @property
    def passed(self) -> bool:
        faults = self.deaths or self.unanswered or self.wrong or self.left or self.lasting
        slow = min(self.alone, self.beside) >= ENOUGH and self.slower > MAX_SLOWER
        large = self.rss_growth_mb > MAX_GROWTH_MB or self.peak_mb >= LIMIT_MB
        return not (faults or slow or large or self.innocent or not self.beside)

    def __str__(self) -> str:
        lost = self.innocent[innocents.LOST]
        return (
            f"deaths {self.deaths} unanswered {self.unanswered} wrong {self.wrong} "
            f"left {len(self.left)} rss_growth_mb {self.rss_growth_mb:.1f} "
            f"peak_mb {self.peak_mb:.0f} of {LIMIT_MB}, {self.limit}, "
            f"innocent {self.alone} + {self.beside} lost {lost} "
            f"failed {self.innocent.total() - lost} p99_ms {self.alone_p99_ms:.1f} alone "
            f"{self.beside_p99_ms:.1f} beside ({self.slower:.1f} times) "
            f"lasting_keys {len(self.lasting)}"
        )


def read_id(raw: bytes) -> tuple[str | None, bool, bool]:
    """What a lenient reader makes of a message: its id, whether it is ours, whether it is silent.

    None: it names nobody, and so must be a dead letter.
    """
    try:
        tree = json.loads(raw.decode(errors="replace"), strict=False)
        headers = tree["headers"]
        request_id, task = headers["id"], headers["task"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None, True, False
    if not isinstance(request_id, str) or not request_id or not isinstance(task, str):
        return None, True, False
    return request_id, task == TASK, headers.get("ignore_result") is True


class Campaign:
    """One run against one worker. `redis` is the operator's, who looks on and tidies up."""

    def __init__(
        self, redis: redis_py.Redis, users: Users, worker: CappedProcess, seed: int
    ) -> None:
        self._redis = redis
        self._attacker = users.push_only()
        self._producer = users.connect("producer")
        self._worker = worker
        self._messages = Messages(seed)
        self.sums = Sums()

    def run(self, count: int, told: Callable[[int], None]) -> None:
        """Send `count` messages; `told` hears how many were accounted for."""
        began, warm = time.monotonic(), 0.0
        pid = self._worker.pid
        self._redis.mset(SECRETS)
        sums = self.sums
        while sums.sent < count and not sums.deaths and not sums.unanswered:
            chunk = [self._messages.next() for _ in range(min(CHUNK, count - sums.sent))]
            self._push(chunk)
            self._account(chunk)
            self._tidy(chunk)
            sums.sent += len(chunk)
            told(len(chunk))
            if not warm and sums.sent >= min(WARM_AFTER, count // 3):
                warm = memory_mb(pid)
        sums.seconds = time.monotonic() - began
        if not sums.deaths:
            sums.rss_growth_mb = memory_mb(pid) - warm
            sums.peak_mb = memory_mb(pid, "VmHWM")

    def _push(self, chunk: Sequence[Message]) -> None:
        began = time.monotonic()
        for start in range(0, len(chunk), PIECE):
            piece = chunk[start : start + PIECE]
            time.sleep(max(0.0, began + start / RATE - time.monotonic()))
            with self._producer.pipeline(transaction=False) as pipe:
                for each in piece:
                    if each.payload is not None:
                        pipe.set(*each.payload, ex=EXPIRES_S)
                pipe.execute()
            with self._attacker.pipeline(transaction=False) as pipe:
                for each in piece:
                    pipe.lpush(NAMES.queue(each.model, each.step), each.raw)
                pipe.execute()

    def _account(self, chunk: Sequence[Message]) -> None:  # noqa: C901 - one loop, judged as a whole
        """Wait until every message of `chunk` has come to its end, and judge that."""
        sums = self.sums
        dead: Counter[Buried] = Counter()
        kept: Counter[bytes] = Counter()
        open_ = [(each, *read_id(each.raw)) for each in chunk]
        deadline = time.monotonic() + CHUNK_TIMEOUT_S
        while True:
            # Asked first: whatever is over by then can be seen below. Nothing is looked at before,
            # or looking would cost more than the attack.
            while not (quiet := self._quiet()) and self._worker.alive:
                if time.monotonic() > deadline:
                    break
                time.sleep(_POLL_S)
            dead.update(self._dead_letters())
            kept.update(self._kept())
            with self._redis.pipeline(transaction=False) as pipe:
                for _, request_id, _, _ in open_:
                    pipe.get(NAMES.meta(request_id or ""))
                metas = pipe.execute(raise_on_error=False)
            still = []
            for entry, meta in zip(open_, metas, strict=True):
                end = self._end(entry, meta, dead, kept, quiet)
                if end is None:
                    still.append(entry)
                else:
                    sums.ends[end] += 1
            open_ = still
            if quiet and not open_:
                break
            if not self._worker.alive:
                sums.deaths += 1
                sums.culprits += [(f"the worker died: {each.kind}", each.raw) for each, *_ in open_]
                return
            if time.monotonic() > deadline:
                sums.unanswered += len(open_)
                sums.culprits += [
                    (f"not accounted for: {each.kind}", each.raw) for each, *_ in open_
                ]
                if not open_:
                    sums.left.append("the worker is not quiet")
                    sums.unanswered += 1
                return
            time.sleep(_POLL_S)
        if surplus := dead.total():
            sums.left.append(f"{surplus} dead letters of messages that ended otherwise")

    def _end(
        self,
        entry: tuple[Message, str | None, bool, bool],
        meta: object,
        dead: Counter[Buried],
        kept: Counter[bytes],
        quiet: bool,
    ) -> str | None:
        """How a message ended, as far as can be seen by now."""
        message, request_id, _, silent = entry
        if message.good_id is not None:
            if not isinstance(meta, bytes):
                return None
            self.sums.good += 1
            if not _right(message, meta):
                self.sums.wrong += 1
                self.sums.culprits.append((f"wrong: {meta[:300]!r}", message.raw))
            return "good"
        buried = message.raw[:MAX_QUARANTINED_BYTES], len(message.raw)
        if dead[buried] > 0:
            dead[buried] -= 1
            return "dead letter"
        if request_id is None:
            return None
        if kept[message.raw] > 0:
            kept[message.raw] -= 1
            return "kept for later"
        if silent:
            return "ignored" if quiet else None
        # Its dead letter, if it has one besides, is counted before it is let go.
        return _status(meta) if isinstance(meta, bytes) and quiet else None

    def _quiet(self) -> bool:
        """Whether nothing is queued, held by the worker, or in Celery's hands."""
        with self._redis.pipeline(transaction=True) as pipe:
            for model in WIDTHS:
                for step in NAMES.priority_steps:
                    pipe.llen(NAMES.queue(model, step))
            busy = any(pipe.execute())
        return not busy and not self._celery_is_busy() and not self._is_held()

    def _is_held(self) -> bool:
        """Whether the worker holds a claim on a model under attack, or computes for one."""
        leases: Any = self._redis.zrange(NAMES.leases, 0, -1)
        with self._redis.pipeline(transaction=True) as pipe:
            for incarnation in leases:
                pipe.hkeys(NAMES.claims(incarnation.decode()))
                pipe.smembers(NAMES.running(incarnation.decode()))
            told = pipe.execute()
        models = {NAMES.parse_claim(key.decode()).model for claims in told[::2] for key in claims}
        models |= {member.partition(b"/")[0].decode() for each in told[1::2] for member in each}
        return not models.isdisjoint(WIDTHS)

    def _celery_is_busy(self) -> bool:
        """Whether Celery holds another task: it is given none."""
        return bool(self._redis.exists("unacked", "unacked_index"))

    def _dead_letters(self) -> list[Buried]:
        found: list[Buried] = []
        for model in WIDTHS:
            popped: Any = self._redis.rpop(NAMES.dead(model), 10_000)
            letters = map(msgpack.unpackb, popped or ())
            found += [(letter["message"], letter["size"]) for letter in letters]
        return found

    def _kept(self) -> list[bytes]:
        found: list[bytes] = []
        places: Any = self._redis.zrange(NAMES.scheduled, 0, -1)
        for place in places:
            key = NAMES.scheduled_message(place.decode())
            messages: Any = self._redis.lrange(key, 0, -1)
            found += messages
            with self._redis.pipeline(transaction=True) as pipe:
                pipe.delete(key)
                pipe.zrem(NAMES.scheduled, place)
                pipe.execute()
        return found

    def _tidy(self, chunk: Sequence[Message]) -> None:
        """Drop what links were published, which nobody reads, and the results of `chunk`.

        A result that was stored long ago might expire just while a later message of the same id,
        which it answers too, is looked for.
        """
        ids = [request_id for each in chunk if (request_id := read_id(each.raw)[0]) is not None]
        metas = {NAMES.meta(request_id) for request_id in ids}.difference(SECRETS)
        self._redis.unlink(LINKS_QUEUE, "celery", *metas)

    def look_for_what_is_left(self, before: Lasting) -> None:
        """Once nobody asks any more; `before` is what there was before the first message."""
        left = self.sums.left
        until(self._quiet, what="nothing is queued or held")
        until(lambda: nothing_is_held(self._redis), what="nothing of the innocents is held")
        for pattern in ("inferq:1:claim*", "inferq:1:running:*", "inferq:1:attempts:*"):
            left += [repr(key) for key in self._redis.scan_iter(pattern)]
        if not self._quiet():
            left.append("queues, claims or unacked are not empty")
        left += [key for key, value in SECRETS.items() if self._redis.get(key) != value]
        self._redis.unlink(*SECRETS)
        self.sums.lasting += lasting(self._redis).growth_since(before)


def _right(message: Message, meta: bytes) -> bool:
    read = codec.decode_meta(meta)
    if read["status"] != "SUCCESS" or message.expected is None:
        return False
    (got,) = codec.decode_outputs(read["result"]).values()
    return np.array_equal(got, message.expected)


def _status(meta: bytes) -> str:
    read = codec.decode_meta(meta)
    result = read["result"]
    failed = isinstance(result, dict) and read["status"] != "SUCCESS"
    return str(result.get("exc_type")) if failed else str(read["status"])


def campaign(
    messages: int,
    seed: int,
    told: Callable[[int], None] = lambda _: None,
    kind: str = "valkey",
    alone_s: float = WARM_S,
) -> Sums:
    """Send `messages` messages to a worker of its own on a Redis of its own.

    Before that innocent requests are alone for `alone_s`.
    """
    with tempfile.TemporaryDirectory(prefix="inferq-fuzz-") as folder, ExitStack() as opened:
        models = Path(folder)
        for model in ("echo", innocents.MODEL):
            fake_model(models, model, knobs="warm_up = false", width=WIDTHS["echo"])
        onnx_models.double(models / "double" / "1" / "model.onnx", ("batch", WIDTHS["double"]))
        server = opened.enter_context(EmbeddedRedis(kind))
        client = opened.enter_context(redis_py.Redis.from_url(server.url, socket_timeout=30.0))
        users = opened.enter_context(Users(server.url))
        # Where no cgroup can be made, the most that it ever had is looked at in the end.
        cap = opened.enter_context(capped(LIMIT_MB))
        worker = opened.enter_context(
            CappedProcess(
                cap if cap.folder else None,
                server.url,
                models,
                env={"INFERQ_RESULT_EXPIRES_S": str(EXPIRES_S), "INFERQ_LINK_QUEUES": LINK_QUEUES},
                args=("--loglevel", "CRITICAL"),
            )
        )
        beside = opened.enter_context(Innocents(users.url("producer")))
        time.sleep(WARM_S)
        began_alone = time.monotonic()
        time.sleep(alone_s)
        before, began = lasting(client), time.monotonic()
        running = Campaign(client, users, worker, seed)
        running.sums.limit = "by a cgroup" if cap.folder else "not limited: no cgroup"
        running.run(messages, told)
        ended = time.monotonic()
        _judge(running.sums, beside.stop(), began_alone, began, ended)
        if worker.alive:
            running.look_for_what_is_left(before)
        if not running.sums.passed:
            sys.stderr.write(worker.log[-6000:])
        return running.sums


def _judge(
    sums: Sums, answers: Sequence[Answer], began_alone: float, began: float, ended: float
) -> None:
    """What became of innocent requests."""
    alone = [each for each in answers if began_alone <= each.sent < began]
    beside = [each for each in answers if began <= each.sent < ended]
    sums.innocent.update(each.end for each in answers if each.end != innocents.ANSWERED)
    sums.alone, sums.alone_p99_ms = len(alone), percentile_ms(alone, 0.99)
    sums.beside, sums.beside_p99_ms = len(beside), percentile_ms(beside, 0.99)


def main() -> None:
    parser = argparse.ArgumentParser(prog="fuzz.run", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    console = Console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("messages", total=args.messages)
        sums = campaign(
            args.messages, args.seed, lambda count: progress.advance(task, count), alone_s=ALONE_S
        )
    table = Table("how they ended", "messages")
    for end, count in sums.ends.most_common():
        table.add_row(end, str(count))
    table.add_row("all", str(sums.sent), end_section=True)
    console.print(table)
    console.print(f"{sums.seconds:.0f} s, {sums.sent / sums.seconds:.0f} messages a second")
    for line in sums.left:
        console.print(f"left: {line}", markup=False)
    for line in sums.lasting:
        console.print(line, markup=False)
    for why, raw in sums.culprits[:_SHOWN]:
        console.print(f"{why}: {raw[:2000]!r}", markup=False, highlight=False)
    console.print(str(sums), highlight=False, soft_wrap=True)
    raise SystemExit(0 if sums.passed else 1)


if __name__ == "__main__":
    main()
