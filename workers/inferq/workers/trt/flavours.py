"""TensorRT's two flavours, ``tensorrt`` and ``tensorrt-rtx``, behind one class.

Neither flavour is imported before `find_flavour` is asked for it. `network` builds plans, `running`
runs them, `api` lists what is used of TensorRT's API.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any, Final

from inferq.shared.errors import ConfigError
from inferq.workers.trt.api import DTYPES, MODULES, RTX, TENSORRT
from inferq.workers.trt.logs import joined, make_logger

AUTO: Final = "auto"

#: The compute capability of a plan that is bound to none (TensorRT-RTX compiles it when it loads).
ANY_GPU: Final = "any"


class Flavour:
    """One flavour as imported. Get it from `find_flavour`; it lives as long as the process."""

    def __init__(self, name: str, module: Any) -> None:
        self.name = name
        self.version = str(module.__version__)
        #: The module; and what its builders and runtimes log to, which collects `errors`.
        self.trt = module
        self.logger, self.errors = make_logger(module)
        self._dtypes = {getattr(module.DataType, ours): name for ours, name in DTYPES.items()}

    def __repr__(self) -> str:
        return f"<{self.name} {self.version}>"

    @property
    def builds_anywhere(self) -> bool:
        """Whether plans can be built without a GPU, for any GPU."""
        return self.name == RTX

    @property
    def has_timing_cache(self) -> bool:
        """Whether what a build measured shortens the next one."""
        return self.name == TENSORRT

    @property
    def has_runtime_cache(self) -> bool:
        """Whether what an engine compiled when it was loaded shortens its next load."""
        return self.name == RTX

    @property
    def has_own_graphs(self) -> bool:
        """Whether an execution context captures CUDA graphs by itself (`Loaded.context`)."""
        return self.name == RTX

    @functools.cached_property
    def runtime(self) -> Any:
        """What loads plans; loaded plans need it for as long as they live."""
        return self.trt.Runtime(self.logger)

    def dtype_name(self, tensor: str, dtype: Any) -> str:
        """NumPy's name of TensorRT's `dtype`. ConfigError naming `tensor` if it has none."""
        name = self._dtypes.get(dtype)
        if name is None:
            raise ConfigError(f"{tensor!r} is {dtype}; expected one of {', '.join(DTYPES)}")
        return name

    def failed(self, what: str, errors: Sequence[str]) -> str:
        """The message of a call that failed with these `errors`."""
        return f"{self.name} {self.version} {what}: {joined(errors)}"


def find_flavour(name: str = AUTO) -> Flavour:
    """The flavour `name`, or with "auto" the first that is installed. ConfigError if none is."""
    if name != AUTO and name not in MODULES:
        raise ConfigError(f"flavour is {name!r}; expected auto, {', '.join(MODULES)}")
    problems: list[str] = []
    for each in MODULES if name == AUTO else [name]:
        try:
            return _import(each)
        # Its own libraries are loaded meanwhile, and each way to fail raises something else.
        except Exception as problem:  # noqa: BLE001
            problems.append(f"{each}: {' '.join(str(problem).split())[:200]}")
    wanted = list(MODULES) if name == AUTO else [name]
    install = " or ".join(f"'inferq[{each}]'" for each in wanted)
    if RTX in wanted:
        install += "; to build without a GPU pip install tensorrt-rtx-cu13 will do"
    raise ConfigError(
        f"flavour {name!r} cannot be imported ({'; '.join(problems)}); "
        f"to install it: pip install {install}"
    )


@functools.cache
def _import(name: str) -> Flavour:
    return Flavour(name, importlib.import_module(MODULES[name]))
