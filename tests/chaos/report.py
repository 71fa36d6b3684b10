"""How a run is shown: while it goes on, and what came of it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from chaos.judge import Recovery, Verdict
from chaos.ledger import Ledger
from chaos.record import POISONED, Record
from chaos.schedule import Kind, Quotas
from chaos.store import Restart

#: Seconds: what a worker's death is promised to cost a request at most.
BOUND_S = 15.0
#: Seconds between two lines where there is no terminal.
LINE_S = 30.0
_SHOWN = 12


class Display:
    """A progress bar on a terminal, the faults below it; elsewhere a line now and then."""

    def __init__(self, console: Console, requests: int, quotas: Quotas) -> None:
        self._console = console
        self._quotas = quotas
        self._line_at = 0.0
        self._progress = Progress(
            TextColumn("requests"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=console,
        )
        self._task = self._progress.add_task("", total=requests)
        self._live = Live(console=console, refresh_per_second=4)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def show(self, ledger: Ledger, record: Record, states: list[str], elapsed_s: float) -> None:
        """How far the run is."""
        done = Counter(fault.kind for _, fault in list(record.done))
        faults = ", ".join(
            f"{kind.name.lower()} {done[kind]}/{count}"
            for kind, count in self._quotas.counts.items()
        )
        text = f"{states.count('up')} workers up, {len(ledger.unresolved)} in flight"
        self._progress.update(self._task, completed=len(ledger.accepted), description=text)
        if self._console.is_terminal:
            self._live.update(Group(self._progress, faults))
        elif time.monotonic() - self._line_at >= LINE_S:
            self._line_at = time.monotonic()
            accepted = f"{elapsed_s:5.0f} s: {len(ledger.accepted)} accepted"
            self._console.print(f"{accepted}, {text}; {faults}")


@dataclass(frozen=True)
class Outcome:
    """All that a run came to."""

    requests: int
    seed: int
    quotas: Quotas
    #: Seconds during which there were faults.
    faults_s: float
    record: Record
    ledger: Ledger
    restarts: list[Restart]
    verdict: Verdict
    recoveries: list[Recovery]
    #: Requests that workers gave back to their queues for dead ones.
    recovered: int
    #: Of each accepted request, how often an engine began it.
    runs: list[int]
    #: Keys that should be gone.
    left: list[str]
    #: Requests of bursts, which are not among the accepted ones.
    beside: int = 0
    #: See Beside.forgotten.
    forgotten: Sequence[tuple[int, int]] = ()
    #: Connections that were cut while their worker settled again.
    cut_while_catching_up: int = 0

    @property
    def done(self) -> dict[str, int]:
        """Faults that were done, by kind."""
        done = Counter(str(fault.kind) for _, fault in self.record.done)
        poisoned = sum(hit.what == POISONED for hit in self.record.hits)
        return {**{kind: done[kind] for kind in Kind}, POISONED: poisoned}

    @property
    def slow(self) -> list[Recovery]:
        """Recoveries that took too long, slowest first."""
        late = [one for one in self.recoveries if one.seconds > BOUND_S]
        return sorted(late, key=lambda one: -one.seconds)

    def failures(self) -> list[str]:
        """Why the run fails; empty if it does not."""
        found = [f"{len(ids)} {kind}" for kind, ids in self._judged().items() if ids]
        found += [
            f"{kind} was done {self.done[kind]} times; expected {count}"
            for kind, count in self.quotas.counts.items()
            if self.done[kind] < count
        ]
        if len(self.ledger.accepted) < self.requests:
            found.append(f"{len(self.ledger.accepted)} accepted; expected {self.requests}")
        if self.slow:
            found.append(f"{len(self.slow)} recoveries took more than {BOUND_S:g} s")
        if self.left:
            found.append(f"left in Redis: {', '.join(self.left[:_SHOWN])}")
        return found + self.record.troubles + self.ledger.troubles

    def _judged(self) -> dict[str, dict[str, str]]:
        verdict = self.verdict
        return {"lost": verdict.lost, "changed": verdict.changed, "wrong": verdict.wrong}

    def figures(self) -> dict[str, Any]:
        """Everything measured, in plain types."""
        times = [one.seconds for one in self.recoveries]
        ledger = self.ledger
        waited = [one.at - ledger.accepted[each].at for each, one in ledger.resolved.items()]
        return {
            "requests": self.requests,
            "seed": self.seed,
            "faults_s": round(self.faults_s, 1),
            "faults": self.done,
            "accepted": len(self.ledger.accepted),
            "refused_submits": dict(self.ledger.refused),
            "outcomes": dict(Counter(one.outcome for one in self.ledger.resolved.values())),
            "redeliveries": self.recovered,
            "bursts": {
                "asked": self.beside,
                "results_forgotten": [count for count, _ in self.forgotten],
                "of_claims_settled_in_part": [count for _, count in self.forgotten],
            },
            "cut_while_catching_up": self.cut_while_catching_up,
            "executions": {
                "mean": round(float(np.mean(self.runs)), 4) if self.runs else 0,
                "max": max(self.runs, default=0),
                "histogram": {str(n): count for n, count in sorted(Counter(self.runs).items())},
            },
            "recovery_s": {"timed": len(times), **_percentiles(times)},
            "answered_after_s": _percentiles(waited),
            "lost": len(self.verdict.lost),
            "changed": len(self.verdict.changed),
            "wrong": len(self.verdict.wrong),
            "gone": len(self.verdict.gone),
            "left": self.left,
            "failures": self.failures(),
        }

    def print(self, console: Console) -> None:
        """A table, and one line last."""
        figures = self.figures()
        table = Table(title=f"{self.requests} requests, seed {self.seed}", show_header=False)
        for kind, count in figures["faults"].items():
            table.add_row(kind, str(count))
        table.add_section()
        executions, recovery = figures["executions"], figures["recovery_s"]
        waited, bursts = figures["answered_after_s"], figures["bursts"]
        histogram = ", ".join(f"{n}: {count}" for n, count in executions["histogram"].items())
        rows = {
            "seconds with faults": figures["faults_s"],
            "accepted": figures["accepted"],
            "outcomes": figures["outcomes"],
            "refused submits": figures["refused_submits"] or 0,
            "redeliveries": figures["redeliveries"],
            "asked in bursts": bursts["asked"],
            "results that Redis forgot": bursts["results_forgotten"],
            "of claims settled in part": bursts["of_claims_settled_in_part"],
            "cut while told again": figures["cut_while_catching_up"],
            "executions a request": f"mean {executions['mean']}, max {executions['max']}",
            "executions: requests": histogram,
            "recovery, s": f"p50 {recovery['p50']}, p99 {recovery['p99']}, "
            f"max {recovery['max']} of {recovery['timed']}",
            "answered after, s": f"p50 {waited['p50']}, p99 {waited['p99']}, max {waited['max']}",
        }
        for name, value in rows.items():
            table.add_row(name, str(value))
        console.print(table)
        for kind, ids in self._judged().items():
            for request_id, matter in list(ids.items())[:_SHOWN]:
                console.print(f"{kind}: {request_id} {self._of(request_id)}: {matter}")
        for one in self.slow[:_SHOWN]:
            console.print(
                f"recovered after {one.seconds:.1f} s: {one.request_id} "
                f"{self._of(one.request_id)}, held by {one.worker} ({one.what})"
            )
        for matter in self.failures():
            console.print(f"failed: {matter[:300]}")
        console.print(
            f"lost {figures['lost']} changed {figures['changed']} wrong {figures['wrong']} of "
            f"{figures['accepted']} accepted; gone with their worker {figures['gone']}; "
            f"recovery max {recovery['max']} s"
        )

    def _of(self, request_id: str) -> str:
        accepted = self.ledger.accepted.get(request_id)
        return f"(p{accepted.producer} number {accepted.number})" if accepted else ""


def _percentiles(seconds: list[float]) -> dict[str, float]:
    if not seconds:
        return {"p50": 0.0, "p99": 0.0, "max": 0.0}
    p50, p99, most = np.percentile(seconds, (50, 99, 100))
    return {"p50": round(float(p50), 2), "p99": round(float(p99), 2), "max": round(float(most), 2)}
