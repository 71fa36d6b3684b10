"""`make chaos`: many requests, faults of every kind, and a ledger that must balance.

`python -m chaos.run [--requests 20000] [--seed 1]`. The seed fixes the schedule of faults and what
is asked. Workers and producers are Redis users who may do no more than they need
(deploy/redis/users.acl). Exit status 0 only if nothing was refused to them, nothing was lost,
changed or wrong, every fault of the schedule was done, every recovery took at most 15 s, and
nothing is left in Redis.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
from helpers.wait import until
from rich.console import Console

from chaos.burst import Beside
from chaos.clock import Clock
from chaos.content import BESIDE, MODELS, TOML, Request, request
from chaos.crew import RESULT_EXPIRES_S, Worker
from chaos.faults import OnNetwork, OnRedis
from chaos.judge import judge, judge_beside, leftovers, read_ends, recoveries, whereabouts
from chaos.ledger import Accepted, Books, Ledger, executions
from chaos.proxy import Proxy
from chaos.record import Record
from chaos.report import Display, Outcome
from chaos.schedule import (
    ON_NETWORK,
    ON_REDIS,
    PRODUCERS,
    WORKERS,
    Fault,
    Quotas,
    generate,
)
from chaos.store import Store
from inferq.shared.names import Names
from inferq.workers.process.children import end_child, start_child

#: Seconds.
READY_S = 60.0
SETTLE_S = 60.0
#: Requests that one producer has unresolved at most.
WINDOW = 32
#: How much faster than the schedule the producers go, so that they are done in time.
HASTE = 1.08
#: A run that takes so much longer than its schedule is given up.
PATIENCE = 1.5
#: Random bytes at the end of an incarnation's name, in hexadecimal.
INCARNATION_BYTES = 8
#: How Redis, and redis-py, say that a user may not do something.
REFUSED = ("NOPERM", "no permissions", "No permissions", "NoPermission")
#: Columns in a log file.
LOG_WIDTH = 110


@dataclass(frozen=True)
class Scene:
    """Redis, the proxy before it and the workers, with the threads that do their faults."""

    clock: Clock
    record: Record
    store: Store
    beside: Beside
    proxy: Proxy
    crew: list[Worker]
    on_redis: OnRedis
    on_network: OnNetwork

    @property
    def pending(self) -> int:
        """How many faults are still to come."""
        in_crew = sum(worker.pending for worker in self.crew)
        return in_crew + self.on_redis.pending + self.on_network.pending

    @property
    def states(self) -> list[str]:
        return [worker.state for worker in self.crew]


@contextmanager
def open_scene(faults: list[Fault], seed: int, folder: Path) -> Iterator[Scene]:
    """Everything runs and serves; no fault is done before the clock is started."""
    clock, record, store = Clock(), Record(), Store()
    beside = Beside(store, seed)
    on_redis = OnRedis(store, beside, [f for f in faults if f.kind in ON_REDIS], clock, record)
    places = [f"w{n}" for n in range(WORKERS)]
    clients = [*places, *[f"p{n}" for n in range(PRODUCERS)]]
    with ExitStack() as opened:
        opened.callback(store.stop)
        opened.callback(on_redis.over.set)
        on_redis.start()
        until(lambda: on_redis.started.is_set() or record.troubles, READY_S, "Redis runs")
        proxy = opened.enter_context(Proxy(store.server.port, clients))
        on_redis.proxy = proxy
        in_crew = [f for f in faults if f.kind not in (*ON_REDIS, *ON_NETWORK)]
        crew = [
            Worker(
                place,
                store.as_user("worker", proxy.url(place)),
                folder,
                store,
                [f for f in in_crew if f.targets == (place,)],
                clock,
                record,
            )
            for place in places
        ]
        for worker in crew:
            opened.callback(worker.end)
            worker.start()
        on_network = OnNetwork(
            proxy, crew, store, [f for f in faults if f.kind in ON_NETWORK], clock, record
        )
        opened.callback(on_network.over.set)
        on_network.start()
        until(lambda: all(one.state == "up" for one in crew), READY_S, "all workers serve")
        yield Scene(clock, record, store, beside, proxy, crew, on_redis, on_network)


def run(requests: int, seed: int, quotas: Quotas, folder: Path, display: Display) -> Outcome:
    """One run, its logs in `folder`."""
    faults = generate(quotas, seed)
    duration_s = max(quotas.duration_s, faults[-1].at_s if faults else 0.0)
    pace = HASTE * requests / duration_s / PRODUCERS
    _write_models(folder / "models")
    ledger = Ledger()
    books = Books(folder, ledger)

    def asked(accepted: Accepted) -> Request:
        return request(seed, accepted.producer, accepted.number)

    with open_scene(faults, seed, folder) as scene, ExitStack() as opened:
        store, record, beside = scene.store, scene.record, scene.beside
        producers = [
            opened.enter_context(
                _Producer(
                    n,
                    store.as_user("producer", scene.proxy.url(f"p{n}")),
                    store.as_user("producer"),
                    folder,
                    seed,
                    pace,
                )
            )
            for n in range(PRODUCERS)
        ]
        scene.clock.start()
        began = time.monotonic()
        while time.monotonic() < began + PATIENCE * duration_s + 120.0:
            time.sleep(0.2)
            books.read()
            display.show(ledger, record, scene.states, time.monotonic() - began)
            record.troubles += [one.trouble for one in producers if one.trouble]
            if record.troubles or ledger.troubles:
                break
            if not scene.pending and len(ledger.accepted) >= requests:
                break
        faults_s = time.monotonic() - began
        if not scene.on_redis.well:
            raise RuntimeError(f"the run cannot go on: {'; '.join(record.troubles)}")
        (folder / "stop").touch()
        for producer in producers:
            producer.wait(SETTLE_S + 30.0)
        books.read()
        with store.client() as client:
            settled = _settles(client, scene.crew)
            found_in = whereabouts(client, ledger.unresolved)
            for worker in scene.crew:
                worker.end()
            ends = read_ends(client, {one: asked(of) for one, of in ledger.accepted.items()})
            ends_beside = read_ends(client, beside.asked)
            left = leftovers(client)
    verdict = judge(ledger, ends, lambda one: asked(one).expected, store.restarts, record.away)
    for request_id in ledger.unresolved:
        verdict.lost[request_id] += f"; in Redis: {found_in.get(request_id, 'nowhere')}"
    judge_beside(beside.asked, ends_beside, verdict)
    record.troubles += refusals(folder)
    runs = executions(folder)
    (folder / "record.json").write_text(record.dump(began, store.restarts))
    return Outcome(
        requests=requests,
        seed=seed,
        quotas=quotas,
        faults_s=faults_s,
        record=record,
        ledger=ledger,
        restarts=store.restarts,
        verdict=verdict,
        recoveries=recoveries(ledger, record, store.restarts),
        recovered=sum(worker.recovered() for worker in scene.crew),
        runs=[runs[a.producer, a.number] for a in ledger.accepted.values()],
        beside=len(beside.asked),
        forgotten=beside.forgotten,
        cut_while_catching_up=scene.proxy.cut_while_catching_up,
        left=left if settled else ["(not settled in time)", *left],
    )


class _Producer:
    def __init__(
        self, number: int, url: str, direct: str, folder: Path, seed: int, pace: float
    ) -> None:
        command = [
            sys.executable, "-m", "chaos.producer", url, direct, str(folder),
            "--number", str(number), "--seed", str(seed), "--pace", f"{pace:.3f}",
            "--window", str(WINDOW), "--settle", str(SETTLE_S),
        ]  # fmt: skip
        env = {
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "INFERQ_RESULT_EXPIRES_S": RESULT_EXPIRES_S,
        }
        with (folder / f"p{number}.log").open("wb") as log:
            self._process = start_child(command, log, env=env)

    def __enter__(self) -> _Producer:
        return self

    def __exit__(self, *_: object) -> None:
        end_child(self._process, 5.0)

    @property
    def trouble(self) -> str:
        """What is the matter if it ended before it was told to; else empty."""
        status = self._process.poll()
        return "" if status is None else f"a producer ended with status {status} by itself"

    def wait(self, seconds: float) -> None:
        self._process.wait(seconds)


def refusals(folder: Path) -> list[str]:
    """The first line of each log that tells of a command that Redis refused to its user."""
    told = []
    for log in sorted(folder.glob("*.log")):
        lines = log.read_text(errors="replace").splitlines()
        refused = [line for line in lines if any(word in line for word in REFUSED)]
        if refused:
            told.append(f"{log.stem} was refused {len(refused)} times: {refused[0][:200]}")
    return told


def _settles(client: redis.Redis, crew: list[Worker]) -> bool:
    """Wait until the dead are recovered and nothing is held or queued; False if that is late."""
    names = Names()
    patterns = (f"{names.root}claim:*", f"{names.root}running:*", "inferq.*")

    def is_settled() -> bool:
        leases: Any = client.zrange(names.leases, 0, -1)
        # One that lost its lease has its former incarnation recovered once more.
        of = sorted(lease.decode()[: -2 * INCARNATION_BYTES] for lease in leases)
        if of != sorted(worker.prefix for worker in crew):
            return False
        return not any(True for pattern in patterns for _ in client.scan_iter(pattern, count=5000))

    try:
        until(is_settled, SETTLE_S / 2, "nothing is held or queued")
    except AssertionError:
        return False
    return True


def _write_models(root: Path) -> None:
    for name, (delay_ms, per_row_ms, rows, _) in {**MODELS, **BESIDE}.items():
        (root / name).mkdir(parents=True)
        text = TOML.format(rows=rows, delay_ms=delay_ms, per_row_ms=per_row_ms)
        (root / name / "model.toml").write_text(text)


def main() -> int:
    """One run, its figures shown and written to build/chaos.json."""
    parser = argparse.ArgumentParser(prog="chaos.run", description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="keep the logs in any case")
    parser.add_argument("--out", type=Path, default=Path("build"), help="folder to write into")
    args = parser.parse_args()
    if args.requests < 1:
        parser.error(f"--requests {args.requests}; expected at least 1")
    console = Console()
    if not console.is_terminal:
        console = Console(width=LOG_WIDTH)
    folder = Path(tempfile.mkdtemp(prefix="inferq-chaos-"))
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    quotas = Quotas.scaled(args.requests)
    try:
        with Display(console, args.requests, quotas) as display:
            outcome = run(args.requests, args.seed, quotas, folder, display)
    except BaseException:
        console.print(f"logs and books: {folder}")
        raise
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "chaos.json").write_text(json.dumps(outcome.figures(), indent=2) + "\n")
    if outcome.failures() or args.keep:
        console.print(f"logs and books: {folder}")
    else:
        shutil.rmtree(folder)
    outcome.print(console)
    return 1 if outcome.failures() else 0


if __name__ == "__main__":
    sys.exit(main())
