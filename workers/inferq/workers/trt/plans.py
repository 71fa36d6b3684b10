"""The plan cache: one folder, with a file and a record for each plan, and TensorRT's own caches.

    <model>.<version>.<precision>.<key>.plan    what TensorRT built
    <model>.<version>.<precision>.<key>.json    its `Record`
    <model>.<version>.<precision>.<key>.lock    who builds it (see `plan_lock`)
    <name>.cache                                a timing or runtime cache, behind its SHA-256

A plan is executable code. So nobody but us and root may write the folder (see `trusted_files`), and
nothing is handed to TensorRT that is not, byte for byte, what was stored: a checksum finds what was
cut off or altered by accident, owners and modes keep others from doing it on purpose.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import msgspec

from inferq.shared.errors import ConfigError
from inferq.workers.cuda.libcuda import GpuKind
from inferq.workers.process import trusted_files
from inferq.workers.process.user_cache import user_cache
from inferq.workers.trt import plan_lock
from inferq.workers.trt.phases import Progress
from inferq.workers.trt.plan_record import PlanKey, Record, altered, read_record

logger = logging.getLogger(__name__)

VARIABLE: Final = "INFERQ_PLANS"
MAX_PLAN_BYTES: Final = 64 << 30
#: Of a timing or runtime cache.
MAX_CACHE_BYTES: Final = 1 << 30
#: The longest wait to note that a plan was verified: it is served all the same.
NOTE_WAIT_S: Final = 10.0
_KEY_CHARS: Final = 32


@dataclass
class Plan:
    """A plan in the cache."""

    path: Path
    record: Record
    #: Whether it was there already.
    from_cache: bool = False
    #: As read or built; None: `load` has given it away.
    _content: bytes | None = field(default=None, repr=False, compare=False)

    def load(self) -> bytes:
        """The plan, for `Flavour.deserialize`: what was read, or built, while it was locked.

        It is not kept: a second call reads the file. ConfigError if that is not what was stored.
        """
        content, self._content = self._content, None
        if content is not None:
            return content
        with _reading(self.path) as file:
            return _whole(self.path, file, self.record)


def default_folder() -> Path:
    """INFERQ_PLANS, or else inferq/plans in the user's cache. ConfigError: there is no home."""
    if given := os.environ.get(VARIABLE):
        return _absolute(Path(given))
    try:
        return user_cache() / "plans"
    except ConfigError as problem:
        raise ConfigError(f"{problem.message} or {VARIABLE}") from problem


def _absolute(path: Path) -> Path:
    """`path` with ``~`` expanded. ConfigError: it depends on where the process stands."""
    try:
        found = path.expanduser()
    except RuntimeError:
        found = path
    if not found.is_absolute():
        raise ConfigError(f"{VARIABLE} is {str(path)!r}; expected an absolute path")
    return found


def timing_cache_name(key: PlanKey) -> str:
    """What the timing cache of builds like that of `key` is called, for `read_cache`."""
    gpu = _in_file_name(f"{key.capability} {key.gpu}")
    return f"timing.{key.flavour}.{key.flavour_version}.{gpu}"


def runtime_cache_name(plan: Path, gpu: GpuKind) -> str:
    """What the runtime cache of the plan in the file `plan` is called on `gpu`, for `read_cache`.

    A plan that is bound to no GPU is compiled for each kind of them.
    """
    return f"runtime.{plan.stem}.{_in_file_name(str(gpu))}"


def _in_file_name(text: str) -> str:
    return re.sub(r"[^\w.]+", "-", text, flags=re.ASCII)


def runtime_caches(plan: Path) -> list[Path]:
    """The files of all runtime caches of the plan in the file `plan`."""
    return list(plan.parent.glob(f"runtime.{glob.escape(plan.stem)}.*.cache"))


class PlanFolder:
    """A folder of plans. The constructor assigns; `open` makes and checks the folder."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or default_folder()
        #: Open files of the plans that were found or stored here: `prune` leaves them.
        self._used: list[int] = []

    def open(self) -> None:
        """Make the folder, for us alone, or check that nobody else may write it. ConfigError."""
        try:
            trusted_files.make_folder(self.path)
            self.path = trusted_files.trusted_folder(
                self.path, f"set {VARIABLE} to another folder (mkdir -m 700)"
            )
        except OSError as problem:
            raise ConfigError(
                f"{VARIABLE} is {str(self.path)!r}; expected a folder for plans "
                f"({problem.strerror})"
            ) from problem

    def close(self) -> None:
        """The plans that were found or stored here are not in use any more. Idempotent."""
        while self._used:
            os.close(self._used.pop())

    def find(self, name: str, version: int, key: PlanKey) -> Plan | None:
        """The plan of `key` for this model, whole and unaltered; None: there is none.

        It counts as in use until `close`. Raises ConfigError, naming the file to delete: it is
        altered, or others may write it.
        """
        path = self._path(name, version, key)
        record_path = path.with_suffix(".json")
        record = read_record(record_path)
        if record is None or not path.exists():
            return None
        if record.key != key:
            raise altered(record_path, "it is of another plan")
        with _reading(path) as file:
            content = _whole(path, file, record)
            self._use(file)
        return Plan(path, record, from_cache=True, _content=content)

    def store(self, record: Record, content: bytes) -> Plan:
        """Keep `content` under the key of `record`, whose size and SHA-256 are filled in.

        The caller holds the `lock`. ConfigError: it cannot be written.
        """
        if not 0 < len(content) <= MAX_PLAN_BYTES:
            raise ConfigError(f"the plan has {len(content)} bytes; expected 1 to {MAX_PLAN_BYTES}")
        record = msgspec.structs.replace(
            record, bytes=len(content), sha256=hashlib.sha256(content).hexdigest()
        ).sealed()
        path = self._path(record.model_name, record.model_version, record.key)
        with self._writing(path):
            # A plan never stands beside the record of another one.
            path.with_suffix(".json").unlink(missing_ok=True)
            trusted_files.write(path, content)
            trusted_files.write(path.with_suffix(".json"), msgspec.json.encode(record))
        with _reading(path) as file:
            self._use(file)
        return Plan(path, record, _content=content)

    def verified(self, plan: Plan, max_error: float) -> Plan:
        """Note that `plan` answers as ONNX Runtime does, but for `max_error`.

        What cannot be noted is logged: it will be verified again. ConfigError: it is altered.
        """
        record = msgspec.structs.replace(plan.record, verified=True, max_error=max_error).sealed()
        path = plan.path.with_suffix(".json")
        try:
            with plan_lock.locked(plan.path.with_suffix(".lock"), wait_s=NOTE_WAIT_S) as writable:
                if not writable:
                    raise OSError(errno.EROFS, "the folder is read-only")
                # Otherwise it was built anew meanwhile, or deleted: what is there is not this one.
                if read_record(path) == plan.record:
                    trusted_files.write(path, msgspec.json.encode(record))
        except (OSError, plan_lock.StillLocked) as problem:
            logger.warning(
                "%s cannot be written (%s): the plan is verified again next time",
                path,
                getattr(problem, "strerror", problem),
            )
        return replace(plan, record=record)

    @contextmanager
    def lock(
        self, name: str, version: int, key: PlanKey, *, progress: Progress | None = None
    ) -> Iterator[bool]:
        """One process at a time builds a plan; the others wait, and find it.

        Gives False, and takes no lock, in a folder that is read-only: plans can be found there, and
        not built. Raises what `plan_lock.locked` raises.
        """
        path = self._path(name, version, key)
        with plan_lock.locked(path.with_suffix(".lock"), progress=progress) as writable:
            if writable:
                trusted_files.sweep(self.path, f".{path.stem}.")
            yield writable

    def read_cache(self, name: str) -> bytes | None:
        """What `write_cache` kept under `name`; None if there is nothing, or nothing whole."""
        path = self.path / f"{name}.cache"
        try:
            with trusted_files.opened(path) as file:
                raw = trusted_files.read(file, MAX_CACHE_BYTES + 1)
        except FileNotFoundError:
            return None
        except OSError as problem:
            logger.warning("%s cannot be read: %s", path, problem.strerror)
            return None
        digest, content = raw[:32], raw[32:]
        if len(raw) > MAX_CACHE_BYTES or hashlib.sha256(content).digest() != digest:
            logger.warning("%s is not what was stored there; starting a new one", path)
            return None
        return content

    def write_cache(self, name: str, content: bytes) -> None:
        """Keep `content` for `read_cache`. What cannot be kept is logged: it only costs time."""
        path = self.path / f"{name}.cache"
        if len(content) + 32 > MAX_CACHE_BYTES:
            logger.warning("%s would have %d bytes; not kept", path, len(content))
            return
        try:
            trusted_files.write(path, hashlib.sha256(content).digest() + content)
        except OSError as problem:
            logger.warning("%s cannot be written: %s", path, problem.strerror)

    def _use(self, file: int) -> None:
        """Until `close`, and as long as this process lives, the plan in `file` is in use."""
        used = os.dup(file)
        try:
            fcntl.flock(used, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:  # it is being deleted, or there are no locks on this file system
            os.close(used)
        else:
            self._used.append(used)

    def _path(self, name: str, version: int, key: PlanKey) -> Path:
        stem = f"{name}.{version}.{key.precision}.{key.digest[:_KEY_CHARS]}"
        return self.path / f"{stem}.plan"

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as problem:
            raise ConfigError(f"{path} cannot be written: {problem.strerror}") from problem


@contextmanager
def _reading(path: Path) -> Iterator[int]:
    try:
        with trusted_files.opened(path) as file:
            yield file
    except OSError as problem:
        raise ConfigError(f"plan {path} cannot be read: {problem.strerror}") from problem


def _whole(path: Path, file: int, record: Record) -> bytes:
    """The plan of `record` in `file`. ConfigError if it is not what was stored; OSError."""
    size = os.fstat(file).st_size
    if size != record.bytes:
        raise altered(path, f"{size} bytes instead of {record.bytes}")
    content = trusted_files.read(file, size)
    if hashlib.sha256(content).hexdigest() != record.sha256:
        raise altered(path, "its SHA-256 is not that of its record")
    return content
