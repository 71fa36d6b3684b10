"""The demo from end to end: repository, Redis, worker, requests, figures."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from inferq.producer.client import Client
from inferq.producer.pending import Result
from inferq.shared.connect import check_server, redact, redis_client
from inferq.shared.errors import ClientClosed, ConfigError, InferqError, ResultTimeout
from inferq.shared.schema import Tensors
from inferq.shared.settings import Settings
from inferq.workers.demo import models, report
from inferq.workers.demo.files import Files, find_files
from inferq.workers.demo.flower import NOT_INSTALLED, FlowerProcess, running_flower
from inferq.workers.demo.photos import Photos
from inferq.workers.demo.stats import Tally
from inferq.workers.demo.worker import WorkerProcess, running_worker, watched
from inferq.workers.process.embedded import EmbeddedRedis

#: Requests in flight: enough to keep every lane of a few cores busy.
IN_FLIGHT: Final = 64
#: Seconds without any result after which the demo gives up.
STALL_S: Final = 60.0
#: With `stay`: seconds between checks that the worker still runs.
STAY_POLL_S: Final = 0.25


@dataclass(frozen=True)
class Options:
    """What ``inferq demo`` was asked to do."""

    path: Path
    limit: int
    json_file: Path | None
    #: Kind of Redis to embed if `redis_url` is None.
    redis_kind: str
    redis_url: str | None
    #: Whether everything goes on running afterwards, until Ctrl-C or SIGTERM.
    stay: bool = False


class Feed(Protocol):
    """Requests for one model; takes their outcomes in the same order."""

    model: str

    @property
    def total(self) -> int: ...
    @property
    def done(self) -> int: ...
    def requests(self) -> Iterator[Tensors]: ...
    def take(self, outcome: Result | InferqError) -> None: ...


def run(options: Options, console: Console) -> bool:
    """Run the demo; True if every request succeeded and the four middles came out right.

    ConfigError, RedisUnavailable, WorkerFailed. Whatever was started is stopped at the end.
    """
    paths = find_files(options.path, options.limit)
    if not paths:
        raise ConfigError(f"no files below {options.path}; expected at least one")
    with ExitStack() as stack:
        repository = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="inferq-demo-")))
        models.prepare(repository)
        files, photos = Files(paths, models.read_labels(repository)), Photos()
        settings = stack.enter_context(_redis(options, console))
        flower = stack.enter_context(running_flower(settings.redis_url))
        began = time.monotonic()
        worker = stack.enter_context(running_worker(repository, settings.redis_url))
        with console.status("starting a worker, loading and measuring both models"):
            _await_models(worker, settings)
        console.print(f"worker  ready after {time.monotonic() - began:.1f} s")
        address = _announce(flower, console)
        client = stack.enter_context(Client(settings=settings))
        # A closed client ends every wait for a worker that will not answer any more.
        with watched(worker, client.close), _progress(console) as progress:
            tallies = {
                feed.model: _drive(client, feed, worker, progress) for feed in (files, photos)
            }
        parts = {model: tally.figures() for model, tally in tallies.items()}
        whole = Tally.of(list(tallies.values())).figures()
        for table in report.tables(files, photos, whole, parts):
            console.print()
            console.print(table)
        if options.json_file is not None:
            _write_json(options.json_file, report.as_json(files, photos, whole, parts))
        if options.stay:
            client.close()
            _stay(worker, settings, address, console)
        console.print("stopping")
    return whole.errors == 0 and photos.right


def _announce(flower: FlowerProcess | None, console: Console) -> str | None:
    """Print Flower's address and return it, or print why there is no Flower.

    The demo goes on then.
    """
    if flower is None:
        _say(console, f"flower  {NOT_INSTALLED}")
        return None
    with console.status("starting Flower"):
        problem = flower.await_answer()
    if problem is not None:
        _say(console, f"flower  did not start: {problem}")
        return None
    _say(console, f"flower  {flower.address}")
    return flower.address


def _stay(worker: WorkerProcess, settings: Settings, flower: str | None, console: Console) -> None:
    """Until Ctrl-C or SIGTERM. WorkerFailed if the worker ends before that."""
    url = redact(settings.redis_url)
    _say(console, f"\nredis   {url}")
    if flower is not None:
        _say(console, f"flower  {flower}")
    command = (
        "inferq"
        if shutil.which("inferq")
        else shlex.join([sys.executable, "-m", "inferq.workers.cli"])
    )
    _say(console, f"look    {command} queues --redis-url {url}")
    _say(console, "all of it runs on, until Ctrl-C")
    with suppress(KeyboardInterrupt, SystemExit):
        while not worker.ended:
            time.sleep(STAY_POLL_S)
        raise worker.failure("the worker ended")


@contextmanager
def _redis(options: Options, console: Console) -> Iterator[Settings]:
    """Settings with the given Redis, or with an embedded one that runs meanwhile."""
    if options.redis_url is not None:
        console.print(f"redis   {redact(options.redis_url)}")
        yield Settings.load(redis_url=options.redis_url)
        return
    with EmbeddedRedis(options.redis_kind) as server:
        console.print(f"redis   {server.url}, an embedded {server.kind}")
        yield Settings.load(redis_url=server.url)


def _await_models(worker: WorkerProcess, settings: Settings) -> None:
    with redis_client(settings.redis_url, sentinel_master=settings.sentinel_master) as client:
        check_server(client)
        worker.await_models(client, settings.names(), models.MODELS)


def _say(console: Console, line: str) -> None:
    """Print it as one unchanged line: addresses and commands will be copied."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        console=console,
    )


def _drive(client: Client, feed: Feed, worker: WorkerProcess, progress: Progress) -> Tally:
    """Push all of `feed` and take the outcomes."""
    tally = Tally()
    task = progress.add_task(feed.model, total=feed.total, rate="")
    began = time.monotonic()
    outcomes = client.map(
        feed.model, feed.requests(), in_flight=IN_FLIGHT, timeout=STALL_S, return_errors=True
    )
    for outcome in outcomes:
        if isinstance(outcome, ClientClosed):
            raise worker.failure("the worker ended while it had requests")
        if isinstance(outcome, ResultTimeout):
            raise worker.failure(f"no result for {STALL_S:g} s")
        tally.add(outcome)
        feed.take(outcome)
        tally.seconds = time.monotonic() - began
        rate = f"{tally.count / tally.seconds:6.0f}/s"
        progress.update(task, completed=feed.done, rate=rate)
    progress.update(task, completed=feed.done)
    return tally


def _write_json(path: Path, figures: dict[str, Any]) -> None:
    path.write_text(json.dumps(figures, indent=2) + "\n")
