"""Where ``inferq worker`` serves: one worker process for each device, or several."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from inferq.shared.errors import ConfigError
from inferq.shared.settings import MAX_PORT, MAX_PROCESSES
from inferq.workers.cuda import mps
from inferq.workers.cuda.gpus import select
from inferq.workers.cuda.pinning import environment_of

logger = logging.getLogger(__name__)

PROCESSES: Final = "INFERQ_PROCESSES"
ON_HOST: Final = "INFERQ_PROCESSES_ON_HOST"
#: What only the child of a chosen device may have.
_CHOICE: Final = ("INFERQ_DEVICE", "INFERQ_GPU", PROCESSES, ON_HOST)


@dataclass(frozen=True)
class Place:
    """Where one worker process serves."""

    #: What its node is called, if nothing else is said: ``gpu0``, or ``gpu0-1`` of several there.
    label: str
    #: Set in its environment from the start.
    environment: Mapping[str, str]
    #: The GPU's number; None on the CPU.
    gpu: int | None = None
    #: Its number among those of the device, from 1.
    process: int = 1

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


def count_of(given: str | None) -> int | None:
    """The number that ``--processes`` names; None: it was not given. ConfigError."""
    if given is None:
        return None
    is_number = given.isascii() and given.isdigit() and len(given) < 10
    if not is_number or not 1 <= int(given) <= MAX_PROCESSES:
        raise ConfigError(
            f"--processes is {given!r}; expected a whole number from 1 to {MAX_PROCESSES}, of "
            "worker processes on each device: leave it out for one"
        )
    return int(given)


def shared_out(devices: Sequence[Place], processes: int) -> list[Place]:
    """`devices`, each served by so many worker processes, which share it."""
    count = len(devices) * processes
    if count == 1:
        return list(devices)
    told = {ON_HOST: str(count)}
    if processes == 1:
        return [replace(each, environment={**each.environment, **told}) for each in devices]
    told[PROCESSES] = str(processes)
    return [
        replace(
            device,
            label=f"{device.label}-{process}",
            environment={**device.environment, **told},
            process=process,
        )
        for device in devices
        for process in range(1, processes + 1)
    ]


def log_sharing(places: Sequence[Place], environment: Mapping[str, str]) -> None:
    """Say it if several worker processes share a device, and whether their kernels take turns."""
    count = max(place.process for place in places)
    if count == 1:
        return
    if places[0].gpu is None:
        logger.info("%d worker processes share this host's cores", count)
        return
    found = mps.noticed(environment)
    how = f"MPS is noticed ({found})" if found else "no MPS is noticed: their kernels take turns"
    logger.info("%d worker processes share each GPU, and its memory; %s", count, how)


def nodes(name: str | None, places: Sequence[Place]) -> list[str]:
    """The node name of each. ConfigError if they would not differ, or name no file."""
    if name and "/" in name:
        raise ConfigError(f"-n is {name!r}; expected no /: a file is called so, too")
    gpus = {place.gpu for place in places}
    if name and len(gpus) > 1 and "%i" not in name:
        raise ConfigError(
            f"-n is {name!r}; expected %i in it, the GPU's number, since {len(gpus)} GPUs are "
            "served by a worker process each"
        )
    if name and len(places) > len(gpus) and "%p" not in name:
        raise ConfigError(
            f"-n is {name!r}; expected %p in it, the process's number, since "
            f"{len(places) // len(gpus)} worker processes serve on each device"
        )
    found = []
    for place in places:
        node = (name or f"{place.label}@%h").replace("%h", socket.gethostname())
        node = node.replace("%p", str(place.process))
        found.append(node if place.gpu is None else node.replace("%i", str(place.gpu)))
    return found


def addresses(address: str | None, count: int) -> list[str | None]:
    """Where each of `count` workers tells Prometheus of itself. ConfigError: too few ports."""
    if address is None:
        return [None] * count
    host, _, first = address.rpartition(":")
    if int(first) + count - 1 > MAX_PORT:
        raise ConfigError(
            f"--metrics is {address!r}; expected a port of at most {MAX_PORT - count + 1}, since "
            f"{count} workers have one each"
        )
    ports = range(int(first), int(first) + count) if int(first) else [0] * count
    return [f"{host}:{port}" for port in ports]
