"""A trap in a worker's context: what its requests get, and when its successor serves."""

from __future__ import annotations

import re
import tempfile
import time
from pathlib import Path
from typing import Final

from helpers.worker import SupervisedWorker

from gpu.quick.busy import install_engine, pictures, write_model
from gpu.quick.path import MODEL, with_site
from gpu.quick.report import Report
from inferq.producer import Client
from inferq.workers.process.embedded import EmbeddedRedis

_BEFORE_S: Final = 1.0
#: The successor serves by then, or it is given up.
_SUCCESSOR_S: Final = 30.0
_AFTER: Final = 50


def run(report: Report) -> None:
    """SystemExit: no successor, or requests were lost."""
    with tempfile.TemporaryDirectory(prefix="inferq-quick-") as name:
        mark, models, site = (Path(name) / each for each in ("ends", "models", "site"))
        write_model(models, MODEL, f'max_batch_size = 8\n[busy]\nus = 200.0\nends_if = "{mark}"\n')
        install_engine(site)
        with (
            EmbeddedRedis() as redis,
            SupervisedWorker(redis.url, models, [MODEL], env={"PYTHONPATH": with_site(site)}) as w,
            Client(redis.url) as client,
        ):
            first = w.child()
            request = pictures(1, first=7).parts[0]
            served, failed, longest, after = 0, list[str](), 0.0, 0
            ended = False
            began = last = time.monotonic()
            while after < _AFTER and time.monotonic() - began < _BEFORE_S + _SUCCESSOR_S:
                if not ended and last - began > _BEFORE_S:
                    ended = True
                    mark.touch()
                try:
                    outputs = client.infer(MODEL, request, timeout=_SUCCESSOR_S).outputs
                except Exception as problem:  # noqa: BLE001 - counted
                    failed.append(str(problem)[:200])
                else:
                    served += 1
                    after += ended
                    if float(outputs["y"][0, 0]) != 7:
                        failed.append("another row's answer")
                now = time.monotonic()
                longest, last = max(longest, now - last), now
            report.add(served=served, failed=failed, nothing_served_s=longest)
            successor = w.child()
            said = [line for line in w.log.splitlines() if re.search("beyond use|status 70", line)]
            report.add(said_by_worker=said[-6:], replaced=successor != first)
    report.say(
        f"nothing served for {longest:.2f} s, {len(failed)} of {served + len(failed)} failed; "
        f"{'its successor serves' if successor != first else 'the process goes on'}"
    )
    if successor == first:
        raise SystemExit("the worker process was not replaced")
