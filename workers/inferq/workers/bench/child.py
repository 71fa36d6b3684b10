"""One producer process: reads orders from stdin, writes reports to stdout, ends with its stdin."""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
from typing import IO

from inferq.shared.errors import InferqError
from inferq.workers.bench import messages
from inferq.workers.bench.messages import Failed, Ready, Setup, Step, Stop
from inferq.workers.bench.sender import Brake, Sender


class _Orders:
    """Steps in order; a stop reaches the step that runs at once."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._steps: queue.SimpleQueue[tuple[Step, Brake]] = queue.SimpleQueue()
        self._brake = Brake()

    def read(self) -> None:
        """Runs in a thread. The process ends when the orders end."""
        while True:
            order = messages.read_order(self._stream)
            if order is None:
                os._exit(0)
            elif isinstance(order, Step):
                self._brake = Brake()
                self._steps.put((order, self._brake))
            elif isinstance(order, Stop):
                self._brake.stop(order.drain_s)

    def next(self) -> tuple[Step, Brake]:
        """Wait for the next step, until the command ends at most."""
        return self._steps.get()


def main() -> None:
    """Until stdin ends, or Redis is gone."""
    # What the client logs about connections is reported as this process' failure instead.
    logging.getLogger("inferq").setLevel(logging.CRITICAL)
    reports = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    orders = sys.stdin.buffer
    setup = messages.read_order(orders)
    if not isinstance(setup, Setup):
        return
    try:
        sender = Sender(setup)
        sender.ask()
        messages.write(reports, Ready())
        incoming = _Orders(orders)
        threading.Thread(target=incoming.read, name="inferq-bench-orders", daemon=True).start()
        while True:
            step, brake = incoming.next()
            done = sender.run(step, brake, lambda window: messages.write(reports, window))
            messages.write(reports, done)
    except InferqError as problem:
        messages.write(reports, Failed(problem.message))
    except BrokenPipeError:
        return


if __name__ == "__main__":
    main()
