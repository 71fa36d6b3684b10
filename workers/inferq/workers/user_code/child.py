"""The process of one lane: ``python -m inferq.workers.user_code.child LABEL SOCKET IN OUT``.

It loads one model and answers one batch at a time, until its worker closes the socket. The label is
for whoever lists processes; the numbers are descriptors that it inherits.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal

from inferq.model import Context, Model
from inferq.model.answers import WrongRows, read_answer
from inferq.model.declared import signature_of
from inferq.shared.errors import (
    MAX_MESSAGE_CHARS,
    ConfigError,
    EngineError,
    RequestError,
)
from inferq.shared.schema import Signature
from inferq.workers.logs import traces
from inferq.workers.user_code.log_lines import Marked
from inferq.workers.user_code.memory import Shared
from inferq.workers.user_code.messages import (
    Answered,
    Asked,
    Channel,
    Describe,
    Described,
    Failed,
    Gone,
    Load,
    Loaded,
    Run,
    Told,
)
from inferq.workers.user_code.source import load_class, told
from inferq.workers.user_code.tensors import read_arrays, write_arrays

#: Where the kernel wants memory it ends such a process before its worker.
_OOM_SCORE: Final = b"800"
_MAX_TRACE_CHARS: Final = 8_000
_MODULE: Final = "model"


def main() -> None:
    """Serve the worker at the other end of the socket."""
    log = _settle_in()
    _, _, control, given, answered = sys.argv
    channel: Channel[Asked] = Channel(socket.socket(fileno=int(control)), Asked)
    server = _Server(int(given), int(answered), log)
    try:
        while True:
            channel.send(server.answer(channel.receive()))
    except (Gone, OSError):
        # Its worker is gone, or wants it to be. What the code has begun besides is not waited for.
        os._exit(0)


class _Server:
    def __init__(self, given: int, answered: int, log: Marked) -> None:
        self._log = log
        self._given, self._answered = Shared(given, 0), answered
        self._path = Path()
        self._model: Model | None = None
        self._signature = Signature((), ())
        self._dtypes: dict[str, str] = {}
        self._out = Shared(answered, 0)

    def answer(self, asked: Asked) -> Told:
        try:
            if isinstance(asked, Run):
                return self._run(asked)
            self._log.mark = asked.mark
            if isinstance(asked, Load):
                return self._load(asked)
            return self._describe(asked)
        except SystemExit:
            raise  # it says that this process is of no further use
        except ConfigError as problem:
            named = str(self._path) in problem.message
            return Failed(problem.message if named else f"{self._path}: {problem.message}")
        except BaseException as problem:  # noqa: BLE001 - of users' code, which may raise anything
            kind: Literal["raised", "memory"] = "raised"
            if isinstance(problem, MemoryError):
                kind = "memory"
            return Failed(told(problem, self._path), kind=kind, trace=_trace(problem))

    def _describe(self, asked: Describe) -> Described:
        return Described(signature_of(self._class(asked.path)))

    def _class(self, path: str) -> type[Model]:
        self._path = Path(path)
        # As a script has it: what lies beside model.py can be imported.
        sys.path.insert(0, str(self._path.parent))
        return load_class(self._path, _MODULE)

    def _load(self, asked: Load) -> Loaded:
        logging.getLogger().setLevel(asked.level)
        cls = self._class(asked.path)
        self._signature = signature_of(cls)
        self._dtypes = {spec.name: spec.dtype for spec in self._signature.outputs}
        self._out = Shared(self._answered, asked.most)
        model = cls()
        model.load(Context(self._path.parent, asked.device, asked.config))
        self._model = model
        return Loaded(self._signature)

    def _run(self, asked: Run) -> Told:
        assert self._model is not None
        inputs = dict(read_arrays(self._given, asked.inputs, asked.size, copy=False))
        try:
            answer = self._model.run(dict(inputs))
            outputs, errors = read_answer(answer, self._signature, inputs, asked.rows)
            places, size = write_arrays(self._out, outputs, self._dtypes)
        except RequestError as problem:
            if asked.requests > 1:
                return Failed(*_coded(problem), kind="request")
            places, size, errors = [], 0, dict.fromkeys(range(asked.rows or 1), problem)
        except EngineError as problem:
            kind: Literal["rows", "answer"] = "rows" if isinstance(problem, WrongRows) else "answer"
            return Failed(problem.message, kind=kind)
        return Answered(tuple(places), size, {row: _coded(each) for row, each in errors.items()})


def _coded(problem: RequestError) -> tuple[str, str]:
    """Its message, which may be anything that the code gave it, and its code."""
    return str(problem.message)[:MAX_MESSAGE_CHARS], problem.code


def _trace(problem: BaseException) -> str:
    """Of the code's own frames, not of ours."""
    tb = problem.__traceback__
    while tb is not None and tb.tb_next is not None and tb.tb_frame.f_code.co_filename == __file__:
        tb = tb.tb_next
    text = traces.format_traceback((type(problem), problem, tb))
    return text if len(text) <= _MAX_TRACE_CHARS else "…" + text[-_MAX_TRACE_CHARS:]


def _settle_in() -> Marked:
    """What becomes of it before any code of others is imported; what it logs with."""
    faulthandler.enable()  # where in the code it crashed is told in the worker's log
    # A model's folder may be read-only, and is what was copied there.
    sys.dont_write_bytecode = True
    log = Marked(sys.stderr)
    logging.basicConfig(handlers=[log])
    logging.captureWarnings(True)
    with suppress(OSError), open("/proc/self/oom_score_adj", "wb") as file:
        file.write(_OOM_SCORE)
    # A service manager tells all processes of a worker to end. This one is needed until the worker
    # has finished, and is ended by it.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _ignore)
    os.register_at_fork(after_in_child=_as_others)
    return log


def _ignore(*_: object) -> None:
    """A handler: SIG_IGN would be handed on to what the code starts."""


def _as_others() -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


if __name__ == "__main__":
    main()
