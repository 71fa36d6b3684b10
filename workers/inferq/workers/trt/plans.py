"""The plan cache: one folder, with a file and a record for each plan, and TensorRT's own caches.

    <model>.<version>.<precision>.<key>.plan    what TensorRT built
    <model>.<version>.<precision>.<key>.json    its `Record`
    <name>.cache                                a timing or runtime cache, behind its SHA-256

A plan is executable code. So the folder must be ours alone to write, and nothing is handed to
TensorRT that is not, byte for byte, what was stored: a checksum finds what was cut off or altered
by accident, the folder's owner and mode keep others from doing it on purpose.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import msgspec

from inferq.shared.errors import ConfigError
from inferq.workers.ranges import InputRange

logger = logging.getLogger(__name__)

VARIABLE: Final = "INFERQ_PLANS"
#: Raised when the same model comes to be built otherwise: older plans do not match any more.
FORMAT: Final = 1
MAX_RECORD_BYTES: Final = 1 << 20
MAX_PLAN_BYTES: Final = 64 << 30
#: Of a timing or runtime cache.
MAX_CACHE_BYTES: Final = 1 << 30
_KEY_CHARS: Final = 32
_CHUNK: Final = 1 << 24


class PlanKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that a plan depends on: another value in any field is another plan."""

    #: SHA-256 of the model's file and of its external data.
    model: str
    flavour: str
    flavour_version: str
    #: Of the GPU that it was built for, as "9.0"; "any": bound to none.
    capability: str
    precision: str
    #: The shapes of all inputs, of each optimization profile.
    profiles: tuple[tuple[InputRange, ...], ...]
    format: int = FORMAT

    @property
    def digest(self) -> str:
        """SHA-256 of the key."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is known of a plan, kept beside it."""

    key: PlanKey
    model_name: str
    model_version: int
    #: Of the plan's file.
    bytes: int
    sha256: str
    #: Unix time.
    built_at: float
    #: That the build took.
    seconds: float
    #: Whether its answers were compared with ONNX Runtime's, and by how much they differ at most
    #: (see `verify`).
    verified: bool = False
    max_error: float | None = None
    #: SHA-256 of this record with this field empty.
    seal: str = ""

    def sealed(self) -> Record:
        """This record with its seal."""
        empty = msgspec.structs.replace(self, seal="")
        digest = hashlib.sha256(msgspec.json.encode(empty)).hexdigest()
        return msgspec.structs.replace(self, seal=digest)


@dataclass(frozen=True)
class Plan:
    """A plan in the cache."""

    path: Path
    record: Record
    #: Whether it was there already.
    from_cache: bool = False

    def load(self) -> bytes:
        """The plan, for `Flavour.deserialize`. ConfigError if it is not what was stored."""
        try:
            with _opened(self.path) as file:
                size = os.fstat(file).st_size
                if size != self.record.bytes:
                    raise _altered(self.path, f"{size} bytes instead of {self.record.bytes}")
                content = _read(file, size)
        except OSError as problem:
            raise ConfigError(f"plan {self.path} cannot be read: {problem.strerror}") from problem
        if hashlib.sha256(content).hexdigest() != self.record.sha256:
            raise _altered(self.path, "its SHA-256 is not that of its record")
        return content


def default_folder() -> Path:
    """INFERQ_PLANS, or else inferq/plans in the user's cache. ConfigError: there is no home."""
    if given := os.environ.get(VARIABLE):
        return _absolute(Path(given))
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    except RuntimeError as problem:
        raise ConfigError(f"no folder for plans: {problem}; expected {VARIABLE}") from problem
    return root / "inferq" / "plans"


def _absolute(path: Path) -> Path:
    """`path` with ``~`` expanded. ConfigError: it depends on where the process stands."""
    try:
        found = path.expanduser()
    except RuntimeError:
        found = path
    if not found.is_absolute():
        raise ConfigError(f"{VARIABLE} is {str(path)!r}; expected an absolute path")
    return found


class PlanFolder:
    """A folder of plans. The constructor assigns; `open` makes and checks the folder."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or default_folder()

    def open(self) -> None:
        """Make the folder, for us alone, or check that nobody else may write it. ConfigError."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self.path.stat()
        except OSError as problem:
            raise ConfigError(
                f"{VARIABLE} is {str(self.path)!r}; expected a folder for plans "
                f"({problem.strerror})"
            ) from problem
        _check_ours(self.path, found, "the folder of the plans")

    def find(self, name: str, version: int, key: PlanKey) -> Plan | None:
        """The plan of `key` for this model, whole and unaltered; None: there is none.

        Raises ConfigError, naming the file to delete: it is altered, or others may write it.
        """
        path = self._path(name, version, key)
        record_path = path.with_suffix(".json")
        record = _read_record(record_path)
        if record is None or not path.exists():
            return None
        if record.key != key:
            raise _altered(record_path, "it is of another plan")
        plan = Plan(path, record, from_cache=True)
        plan.load()
        return plan

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
            # What a process left behind that was killed while it wrote; we have the lock.
            for left in self.path.glob(f".{path.stem}.*"):
                left.unlink(missing_ok=True)
            # A plan never stands beside the record of another one.
            path.with_suffix(".json").unlink(missing_ok=True)
            _write(path, content)
            _write(path.with_suffix(".json"), msgspec.json.encode(record))
        return Plan(path, record)

    def verified(self, plan: Plan, max_error: float) -> Plan:
        """Note that `plan` answers as ONNX Runtime does, but for `max_error`.

        What cannot be noted is logged: it will be verified again. ConfigError: it is altered.
        """
        record = msgspec.structs.replace(plan.record, verified=True, max_error=max_error).sealed()
        path = plan.path.with_suffix(".json")
        with self.lock(record.model_name, record.model_version, record.key) as writable:
            try:
                if not writable:
                    raise OSError(errno.EROFS, "the folder is read-only")
                # Otherwise it was built anew meanwhile, or deleted: what is there is not this one.
                if _read_record(path) == plan.record:
                    _write(path, msgspec.json.encode(record))
            except OSError as problem:
                logger.warning(
                    "%s cannot be written (%s): the plan is verified again next time",
                    path, problem.strerror,
                )  # fmt: skip
        return replace(plan, record=record)

    @contextmanager
    def lock(self, name: str, version: int, key: PlanKey) -> Iterator[bool]:
        """One process at a time builds a plan; the others wait, and find it.

        Gives False, and takes no lock, in a folder that is read-only: plans can be found there, and
        not built.
        """
        path = self._path(name, version, key).with_suffix(".lock")
        try:
            file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as problem:
            if problem.errno not in {errno.EROFS, errno.EACCES}:
                raise ConfigError(f"{path} cannot be written: {problem.strerror}") from problem
            yield False
            return
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("another process builds this plan; waiting for it")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield True
        finally:
            os.close(file)

    def read_cache(self, name: str) -> bytes | None:
        """What `write_cache` kept under `name`; None if there is nothing, or nothing whole."""
        path = self.path / f"{name}.cache"
        try:
            with _opened(path) as file:
                raw = _read(file, MAX_CACHE_BYTES + 1)
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
            _write(path, hashlib.sha256(content).digest() + content)
        except OSError as problem:
            logger.warning("%s cannot be written: %s", path, problem.strerror)

    def _path(self, name: str, version: int, key: PlanKey) -> Path:
        stem = f"{name}.{version}.{key.precision}.{key.digest[:_KEY_CHARS]}"
        return self.path / f"{stem}.plan"

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as problem:
            raise ConfigError(f"{path} cannot be written: {problem.strerror}") from problem


def new_record(key: PlanKey, name: str, version: int, seconds: float) -> Record:
    """The record of a plan that was built just now in `seconds`."""
    return Record(
        key=key,
        model_name=name,
        model_version=version,
        bytes=0,
        sha256="",
        built_at=time.time(),
        seconds=round(seconds, 3),
    )


def model_digest(path: Path) -> str:
    """SHA-256 of the ONNX file `path` and of the external data that it names.

    Raises ConfigError: a file is missing or unreadable, or lies outside the model's folder.
    """
    total = hashlib.sha256()
    for each in [path, *_external_files(path)]:
        try:
            with each.open("rb") as file:
                part = hashlib.file_digest(file, "sha256")
        except OSError as problem:
            raise ConfigError(f"{each} cannot be read: {problem.strerror}") from problem
        total.update(part.digest())
    return total.hexdigest()


def _external_files(path: Path) -> list[Path]:
    import onnx  # noqa: PLC0415 (heavy)

    try:
        model = onnx.load(path, load_external_data=False)
    # Whatever protobuf or onnx raise for a file that is no model.
    except Exception as problem:
        reason = " ".join(str(problem).split())[:200]
        raise ConfigError(f"{path} cannot be read as ONNX: {reason}") from problem
    folder = path.parent.resolve()
    found: dict[str, Path] = {}
    for tensor in _tensors(model.graph, model.functions):
        for entry in tensor.external_data:
            if entry.key == "location" and entry.value not in found:
                place = (folder / entry.value).resolve()
                if not place.is_relative_to(folder):
                    raise ConfigError(
                        f"{path} keeps data in {entry.value!r}; expected a file in its folder"
                    )
                found[entry.value] = place
    return [found[name] for name in sorted(found)]


def _tensors(graph: Any, functions: Any = ()) -> Iterator[Any]:
    """All constants of `graph`, whose data may be external."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    nodes = [*graph.node, *(node for function in functions for node in function.node)]
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)


def _check_ours(path: Path, found: os.stat_result, what: str) -> None:
    """ConfigError unless what `found` tells of `path` is ours, and ours alone to write."""
    if found.st_uid != os.geteuid():
        raise ConfigError(
            f"{path} belongs to user {found.st_uid}; expected {what} to be yours "
            f"(user {os.geteuid()}), since plans are code: set {VARIABLE}"
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(
            f"{path} has mode {stat.S_IMODE(found.st_mode):o}; expected {what} to be writable by "
            f"you alone, since plans are code: chmod go-w {path}"
        )


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A plain file of ours, opened to read. ConfigError if it is none; OSError."""
    # A named pipe would wait for a writer.
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            raise ConfigError(f"{path} is no file; expected one: delete it")
        _check_ours(path, found, "what is kept with the plans")
        yield file
    finally:
        os.close(file)


def _read(file: int, most: int) -> bytes:
    """All of `file`, but no more than `most` bytes."""
    with os.fdopen(os.dup(file), "rb") as reader:
        return reader.read(most)


def _read_record(path: Path) -> Record | None:
    """The record in the file `path`; None: there is none. ConfigError: it is altered."""
    try:
        with _opened(path) as file:
            raw = _read(file, MAX_RECORD_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as problem:
        raise ConfigError(f"{path} cannot be read: {problem.strerror}") from problem
    return _decode(path, raw)


def _decode(path: Path, raw: bytes) -> Record:
    if len(raw) > MAX_RECORD_BYTES:
        raise _altered(path, f"more than {MAX_RECORD_BYTES} bytes")
    try:
        record = msgspec.json.decode(raw, type=Record)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as problem:
        raise _altered(path, str(problem)) from problem
    if record.sealed() != record:
        raise _altered(path, "its seal does not fit")
    return record


def _altered(path: Path, how: str) -> ConfigError:
    return ConfigError(
        f"{path} is not what was stored ({how}), so it is not loaded; expected it unchanged: "
        f"delete {path.with_suffix('.plan')} and {path.with_suffix('.json').name}, "
        "and it is built anew"
    )


def _write(path: Path, content: bytes) -> None:
    """Replace `path` by a file of `content` in one step that outlives a power cut. OSError."""
    # Not the process' number: those of two containers with one folder may be equal.
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        file = os.open(
            new, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
        )
        with os.fdopen(file, "wb") as writer:
            view = memoryview(content)
            for start in range(0, len(view), _CHUNK):
                writer.write(view[start : start + _CHUNK])
            writer.flush()
            os.fsync(writer.fileno())
        new.replace(path)
    except BaseException:
        with suppress(OSError):
            new.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
