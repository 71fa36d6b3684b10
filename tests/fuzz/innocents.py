"""Innocent requests beside an attack: so many a second, of a model of their own.

They are asked by a client of ours in a process of its own, so that only Redis and the worker can
hold them up:
``python -m fuzz.innocents URL`` asks until its input ends, and then prints one line of JSON, with
an `Answer` for each request.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from helpers.scoped import Scoped

from inferq.producer import AsyncClient
from inferq.shared.errors import InferqError, ResultTimeout

MODEL: Final = "innocent"
WIDTH: Final = 4
#: Requests a second.
RATE: Final = 50.0
#: Seconds after which one without an answer is lost.
LOST_S: Final = 30.0
ANSWERED: Final = "answered"
LOST: Final = "lost"
_STOP_S: Final = LOST_S + 30.0


@dataclass(frozen=True)
class Answer:
    """What became of one request."""

    #: time.monotonic() when it was sent.
    sent: float
    #: Milliseconds until the client had its answer.
    took_ms: float
    #: `ANSWERED`, `LOST`, "wrong outputs", or the name of an error's class.
    end: str


class Innocents(Scoped):
    """That process, as a context manager: it asks until `stop`."""

    def __init__(self, redis_url: str) -> None:
        self._redis_url = redis_url

    def _begin(self) -> None:
        path = os.pathsep.join(entry for entry in sys.path if entry)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fuzz.innocents", self._redis_url],
            env={**os.environ, "PYTHONPATH": path},
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _end(self) -> None:
        self._process.kill()
        self._process.communicate()

    def stop(self) -> list[Answer]:
        """Ask no more, wait for what is unanswered, and tell of all, in the order of sending."""
        told, _ = self._process.communicate(timeout=_STOP_S)
        if self._process.returncode:
            raise AssertionError(f"the innocents ended with status {self._process.returncode}")
        return [Answer(*each) for each in json.loads(told)]


def percentile_ms(answers: Sequence[Answer], share: float) -> float:
    """The time within which `share` of them were answered; of none it is 0."""
    took = sorted(each.took_ms for each in answers)
    return took[min(len(took) - 1, int(share * len(took)))] if took else 0.0


async def _ask(client: AsyncClient, number: int) -> Answer:
    x = np.full((1, WIDTH), number, np.float32)
    sent = time.monotonic()
    try:
        result = await client.infer(MODEL, {"x": x}, timeout=LOST_S)
        end = ANSWERED if np.array_equal(result.outputs["x"], x) else "wrong outputs"
    except ResultTimeout:
        end = LOST
    except InferqError as problem:
        end = type(problem).__name__
    return Answer(sent, (time.monotonic() - sent) * 1000, end)


async def _ask_on(redis_url: str) -> list[Answer]:
    asked: list[asyncio.Task[Answer]] = []
    over = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    began = time.monotonic()
    async with AsyncClient(redis_url) as client:
        while not over.done():
            asked.append(asyncio.create_task(_ask(client, len(asked))))
            await asyncio.sleep(max(0.0, began + len(asked) / RATE - time.monotonic()))
        return list(await asyncio.gather(*asked))


def main() -> None:
    answers = asyncio.run(_ask_on(sys.argv[1]))
    json.dump([[each.sent, each.took_ms, each.end] for each in answers], sys.stdout)


if __name__ == "__main__":
    main()
