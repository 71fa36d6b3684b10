"""How inferq's Celery worker logs: as JSON lines if asked for, and without floods.

Text stays as Celery formats it, except that line breaks in what clients write are escaped.
"""

from __future__ import annotations

import logging
import os
from typing import Any, Final

from celery import signals

from inferq.workers.control_plane import celery_private
from inferq.workers.logs.flood import Flood
from inferq.workers.logs.json_lines import JsonLines
from inferq.workers.logs.one_line import OneLine
from inferq.workers.logs.stderr import write_json

#: Loggers of lines that anybody who may push a message can cause, one for each message.
CLIENT_CAUSED: Final = (
    "celery.app.base",
    "celery.app.trace",
    "celery.backends.redis",
    "celery.worker.consumer.consumer",
    "celery.worker.control",
    "celery.worker.request",
    "inferq.user_code",
    "celery.worker.strategy",
    "inferq.workers.canvas.publisher",
    "inferq.workers.control_plane.celery_private",
    "inferq.workers.control_plane.remote_control",
    "inferq.workers.control_plane.kombu_guard",
    "inferq.workers.data_plane.batch_log",
    "inferq.workers.data_plane.incarnation",
    "inferq.workers.data_plane.lanes",
    "inferq.workers.data_plane.observers",
    "inferq.workers.claims.fenced",
    "inferq.workers.claims.ledger",
    "inferq.workers.claims.link",
    "inferq.workers.canvas.patience",
    "inferq.workers.control_plane.mailbox",
    "inferq.workers.data_plane.plane",
    "inferq.workers.data_plane.receiver",
    "inferq.workers.data_plane.results",
    "inferq.workers.data_plane.settling",
)


def stand_by(log_format: str) -> None:
    """Make Celery's worker, if this process becomes one, log as `log_format` says."""
    if log_format == "json":
        formatter = JsonLines()

        def begin(sender: str, instance: Any, **_: object) -> None:
            celery_private.be_quiet(instance, lambda text: _write_at_once(formatter, text))
            write_json(formatter, sender)

        def adopt(logger: logging.Logger, **_: object) -> None:
            for each in (logger, logging.getLogger("multiprocessing")):
                for handler in each.handlers:
                    handler.setFormatter(formatter)

        signals.celeryd_init.connect(begin, weak=False)
        signals.after_setup_logger.connect(adopt, weak=False)
        signals.after_setup_task_logger.connect(adopt, weak=False)
    else:
        signals.celeryd_init.connect(_keep_to_lines, weak=False)
        signals.after_setup_logger.connect(_keep_all_to_lines, weak=False)
        signals.after_setup_task_logger.connect(_keep_all_to_lines, weak=False)
    signals.celeryd_init.connect(_dam, weak=False)


def _keep_to_lines(**_: object) -> None:
    # Added before `_dam`'s filter, which fills in the text of a line after it has dropped others.
    for name in CLIENT_CAUSED:
        logging.getLogger(name).addFilter(OneLine())


def _keep_all_to_lines(logger: logging.Logger, **_: object) -> None:
    """Escape line breaks in the lines of all loggers: any may quote what a client wrote."""
    for handler in logger.handlers:
        handler.addFilter(OneLine())


def _dam(**_: object) -> None:
    for name in CLIENT_CAUSED:
        logging.getLogger(name).addFilter(Flood())


def _write_at_once(formatter: JsonLines, text: str) -> None:
    """Write without logging's handlers: a signal handler may have interrupted one of them."""
    record = logging.LogRecord("celery.worker", logging.INFO, "", 0, text, (), None)
    os.write(2, formatter.format(record).encode() + b"\n")
