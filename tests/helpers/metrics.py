"""What Prometheus sees of a worker, and what the docs say that it sees."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from helpers.wait import until
from helpers.worker import Worker

_DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"
_ROW = re.compile(r"\| `(\w+)` \| (\w+) \| ([^|]*)\| [^|]*\| ([^|]*) \|")
_TIMEOUT_S = 10.0
#: A metric's type and labels.
Described = tuple[str, frozenset[str]]


class Scraped:
    """One scrape: families by the name that they are documented by."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self.families = {
            f"{each.name}_total" if each.type == "counter" else each.name: each for each in families
        }

    @classmethod
    def of(cls, text: str) -> Scraped:
        return cls(text_string_to_metric_families(text))

    def __call__(self, sample: str, **labels: str) -> float:
        """The value of the only `sample` that has these labels, whatever others it has."""
        found = [
            each.value
            for family in self.families.values()
            for each in family.samples
            if each.name == sample and labels.items() <= each.labels.items()
        ]
        assert len(found) == 1, f"{sample}{labels}: {found}"
        return float(found[0])

    def described(self) -> dict[str, Described]:
        """Type and labels of each family, as far as its samples show them."""
        return {
            name: (
                each.type,
                frozenset(label for sample in each.samples for label in sample.labels) - {"le"},
            )
            for name, each in self.families.items()
        }


def scrape(url: str, **headers: str) -> Scraped:
    """What is told at ``…/metrics``."""
    return Scraped.of(read(url, headers))


def read(url: str, headers: Mapping[str, str] | None = None) -> str:
    with urlopen(Request(url, headers=dict(headers or {})), timeout=_TIMEOUT_S) as answer:
        text: str = answer.read().decode()
        return text


def metrics_url(worker: Worker) -> str:
    """Where a worker with INFERQ_METRICS says that its metrics are, waited for."""

    def told() -> str | None:
        found: list[Any] = re.findall(r"metrics at (http://\S+)", worker.log)
        return found[-1] if found else None

    return until(told, 60, "the worker tells where its metrics are") or ""


def documented(where: str) -> dict[str, Described]:
    """What docs/metrics.md says is exposed there: type and labels by name."""
    rows = [row for line in _DOCS.read_text().splitlines() if (row := _ROW.match(line))]
    assert len(rows) > 40
    return {
        name: (kind, frozenset(re.findall(r"\w+", labels)))
        for name, kind, labels, places in (row.groups() for row in rows)
        if where in re.split(r", ", places)
    }


def free_ports(count: int) -> int:
    """The first of `count` ports in a row that nobody has."""
    for _ in range(100):
        with ExitStack() as stack:
            first = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            port: int = first.getsockname()[1]
            try:
                for n in range(1, count):
                    stack.enter_context(socket.create_server(("127.0.0.1", port + n)))
            except (OSError, OverflowError):
                continue
            return port
    raise AssertionError(f"no {count} free ports in a row")
