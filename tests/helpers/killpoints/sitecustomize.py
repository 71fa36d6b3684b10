"""Ends a process at a named place: put this folder first on its PYTHONPATH.

A comment line ``# kill point: <name>`` in a module of inferq.workers is compiled as a call, which
sends SIGKILL to the process when it is reached the n-th time, as INFERQ_TEST_KILL_AT=<name>[:n]
says (n is 1 by default). Without this folder, a comment is a comment.
"""

from __future__ import annotations

import builtins
import os
import re
import signal
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from itertools import count
from types import CodeType, ModuleType

PACKAGE = "inferq.workers."
MARK = re.compile(rb"^( *)# kill point: ([a-z-]+)$", re.MULTILINE)
#: What such a line becomes a call of.
HOOK = "inferq_kill_point"


class Loader(SourceFileLoader):
    """Compiles kill points, and reads no bytecode of another's making."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        source = MARK.sub(rb'\1%s("\2")' % HOOK.encode(), self.get_data(path))
        code: CodeType = self.source_to_code(source, path)
        return code


class Finder(MetaPathFinder):
    """Finds inferq.workers.* where everybody does."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(PACKAGE):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = Loader(spec.loader.name, spec.loader.path)
        return spec


def _install(place: str) -> None:
    name, _, number = place.partition(":")
    last = int(number or 1)
    reached = count(1)  # lanes, the data plane and recovery are threads

    def hook(here: str) -> None:
        if here == name and next(reached) == last:
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(builtins, HOOK, hook)
    sys.meta_path.insert(0, Finder())


if "INFERQ_TEST_KILL_AT" in os.environ:
    _install(os.environ["INFERQ_TEST_KILL_AT"])
