"""The producer processes of a run, as the command sees them."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import IO, Final, Self

from inferq.shared.errors import InferqError
from inferq.workers.bench import messages
from inferq.workers.bench.messages import Failed, FromProcess, Ready, Setup, Step, Stop
from inferq.workers.process.children import safe_environment

#: Seconds.
START_S: Final = 60.0
STOP_S: Final = 5.0


class CrewFailed(InferqError):
    """A producer process cannot go on; the message says why."""

    code = "crew_failed"


class Crew:
    """Processes of `child`, one per setup. They end when this process does, since stdin does."""

    def __init__(self, setups: Sequence[Setup]) -> None:
        self._setups = setups
        self._processes: list[subprocess.Popen[bytes]] = []
        self._said: list[IO[bytes]] = []
        self._reports: queue.SimpleQueue[tuple[int, FromProcess | None]] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._setups)

    def _start(self) -> None:
        for place, _ in enumerate(self._setups):
            said = tempfile.TemporaryFile(prefix="inferq-bench-")  # noqa: SIM115 (`close` does)
            self._said.append(said)
            process = subprocess.Popen(
                [sys.executable, "-m", "inferq.workers.bench.child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                env=safe_environment(os.environ),
                # Ctrl-C in the terminal does not reach it: the command decides.
                start_new_session=True,
            )
            self._processes.append(process)
            reader = threading.Thread(target=self._read, args=(place, process), daemon=True)
            reader.start()
        for place, setup in enumerate(self._setups):
            self._tell(place, setup)
        ready: set[int] = set()
        while len(ready) < len(self):
            place, report = self.receive(START_S)
            if isinstance(report, Ready):
                ready.add(place)

    def _read(self, place: int, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        while True:
            report = messages.read_report(process.stdout)
            self._reports.put((place, report))
            if report is None:
                return

    def _tell(self, place: int, order: Setup | Step | Stop) -> None:
        stdin = self._processes[place].stdin
        assert stdin is not None
        try:
            messages.write(stdin, order)
        except OSError:
            return  # it has ended, and `receive` says why

    def tell(self, order: Step | Stop) -> None:
        """Give all processes an order."""
        for place in range(len(self)):
            self._tell(place, order)

    def receive(self, timeout: float) -> tuple[int, FromProcess]:
        """The next report, and which process sent it. CrewFailed: one failed or none came."""
        try:
            place, report = self._reports.get(timeout=max(0.0, timeout))
        except queue.Empty:
            raise CrewFailed(f"a producer process has said nothing for {timeout:.0f} s") from None
        if isinstance(report, Failed):
            raise CrewFailed(report.message)
        if report is None:
            raise CrewFailed(f"a producer process ended: {self._last_words(place)}")
        return place, report

    def _last_words(self, place: int) -> str:
        said = self._said[place]
        said.seek(max(0, said.seek(0, os.SEEK_END) - 4000))
        lines = said.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def close(self) -> None:
        """End all processes. Idempotent."""
        for process in self._processes:
            if process.stdin is not None:
                try:
                    process.stdin.close()
                except OSError:
                    continue
        for process in self._processes:
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for said in self._said:
            said.close()
