"""Put on a worker's path: INFERQ_POISON_AFTER_S after its first batch, its card has a sticky error.

Once for each folder of plans, or its successor would not serve either.
"""

import importlib.abc
import importlib.util
import os
import sys
import time
from pathlib import Path
from typing import Any

_MODULE = "inferq.workers.cuda.lane"


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):  # type: ignore[no-untyped-def]
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        loader = spec.loader
        assert loader is not None
        execute = loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            _patch(module.CudaLane)

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _patch(lane: Any) -> None:
    run, began = lane.run, list[float]()
    mark = Path(os.environ["INFERQ_PLANS"]) / "poisoned"

    def poisoned(self: Any, batch: Any) -> Any:
        began.append(time.monotonic())
        del began[2:]
        after = float(os.environ["INFERQ_POISON_AFTER_S"])
        if time.monotonic() - began[0] > after and not mark.exists():
            mark.touch()
            from gpu.sticky import poison  # noqa: PLC0415

            poison(self._device)
        return run(self, batch)

    lane.run = poisoned


if "INFERQ_POISON_AFTER_S" in os.environ:
    sys.meta_path.insert(0, _Finder())
