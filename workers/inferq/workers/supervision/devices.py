"""Where ``inferq worker`` serves: one worker process for each device."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from inferq.shared.errors import ConfigError
from inferq.workers.cuda.gpus import select
from inferq.workers.cuda.pinning import environment_of

#: What only the child of a chosen device may have.
_CHOICE: Final = ("INFERQ_DEVICE", "INFERQ_GPU")


@dataclass(frozen=True)
class Place:
    """Where one worker process serves."""

    #: What its node is called, if nothing else is said: ``gpu0``.
    label: str
    #: Set in its environment from the start.
    environment: Mapping[str, str]
    #: The GPU's number; None on the CPU.
    gpu: int | None = None

    def environment_from(self, given: Mapping[str, str]) -> dict[str, str]:
        """`given`, with this device chosen in place of what was chosen there."""
        kept = {name: value for name, value in given.items() if name not in _CHOICE}
        return {**kept, **self.environment}


def chosen_devices(gpu: str | None, cpu: bool) -> list[Place]:
    """What ``--gpu`` or ``--cpu`` says, or else INFERQ_GPU or INFERQ_DEVICE. ConfigError."""
    if gpu is not None and cpu:
        raise ConfigError("--cpu and --gpu are both given; expected one of them")
    if gpu is None and not cpu:
        gpu, cpu = os.environ.get("INFERQ_GPU") or None, os.environ.get("INFERQ_DEVICE") == "cpu"
        if gpu is not None and cpu:
            raise ConfigError(
                f"INFERQ_DEVICE is 'cpu' and INFERQ_GPU is {gpu!r}; expected one of them"
            )
    if gpu is not None:
        return [Place(f"gpu{g.index}", environment_of(g), g.index) for g in select(gpu)]
    # Several workers of one host serve on the CPU: they need names of their own.
    return [Place(f"cpu{os.getpid()}", {"INFERQ_DEVICE": "cpu"} if cpu else {})]
