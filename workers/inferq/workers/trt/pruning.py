"""Deletes a model's plans that are not asked for any more, but never one that is in use."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from inferq.shared.errors import ConfigError
from inferq.workers.trt.builder import BuildRequest
from inferq.workers.trt.plan_lock import StillLocked, locked
from inferq.workers.trt.plan_record import PlanKey, read_record
from inferq.workers.trt.plans import Plan, PlanFolder, runtime_caches

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Other:
    """A plan of the same model that is not asked for any more."""

    path: Path
    bytes: int
    #: It was left, since a process has it loaded, or locked.
    in_use: bool


def prune(folder: PlanFolder, order: BuildRequest, keep: Plan) -> list[Other]:
    """Delete all plans of the model of `order` but `keep`, which is the one asked for.

    Those of other flavours and of other GPUs are left: this machine does not know what is asked of
    them. ConfigError: the folder cannot be written.
    """
    gpus = {_gpu(keep.record.key)}
    if order.gpu is not None:
        gpus.add((order.gpu.capability, str(order.gpu)))
    found: list[Other] = []
    for path in _plans_of(folder.path, order.spec.name):
        if path == keep.path:
            continue
        try:
            record = read_record(path.with_suffix(".json"))
        except ConfigError as problem:
            logger.warning("%s", problem.message)
            continue
        # Without its record nobody can use it.
        if record is None or (
            record.key.flavour == order.flavour.name and _gpu(record.key) in gpus
        ):
            found.append(_delete(folder, path))
    return found


def _gpu(key: PlanKey) -> tuple[str, str]:
    return key.capability, key.gpu


def _plans_of(folder: Path, model: str) -> Iterator[Path]:
    """Where the plans of `model` are, or were: one of each two files may be missing."""
    files = [*folder.glob(f"{model}.*.plan"), *folder.glob(f"{model}.*.json")]
    for path in sorted({each.with_suffix(".plan") for each in files}):
        # <model>.<version>.<precision>.<key>.plan, and the model's name may have dots.
        if path.name.rsplit(".", 4)[0] == model:
            yield path


def _delete(folder: PlanFolder, path: Path) -> Other:
    """Delete the plan in `path`, unless somebody uses it. ConfigError."""
    lock = path.with_suffix(".lock")
    try:
        size = path.lstat().st_size if os.path.lexists(path) else 0
        with locked(lock, wait_s=0) as writable:
            if not writable:
                raise ConfigError(
                    f"{folder.path} cannot be written; expected to delete plans in it"
                )
            if _is_used(path):
                return Other(path, size, in_use=True)
            # The record first: a plan without one is none.
            for each in (path.with_suffix(".json"), path, *runtime_caches(path), lock):
                each.unlink(missing_ok=True)
    except StillLocked:
        return Other(path, size, in_use=True)
    except OSError as problem:
        raise ConfigError(f"{path} cannot be deleted: {problem.strerror}") from problem
    return Other(path, size, in_use=False)


def _is_used(path: Path) -> bool:
    """Whether a process holds the plan in `path`, as `PlanFolder` does until it is closed."""
    try:
        file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as problem:
        if problem.errno in {errno.ENOENT, errno.ELOOP}:  # a link: nobody loads such
            return False
        raise
    try:
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
        return True
    finally:
        os.close(file)
