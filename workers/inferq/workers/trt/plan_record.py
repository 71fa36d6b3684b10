"""What is known of a plan, and kept beside it: all that it depends on, and what was built."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Final

import msgspec

from inferq.shared.errors import ConfigError
from inferq.workers.models.ranges import InputRange
from inferq.workers.process import trusted_files

#: Raised when the same model comes to be built otherwise: older plans do not match any more.
FORMAT: Final = 1
MAX_RECORD_BYTES: Final = 1 << 20


class PlanKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that a plan depends on: another value in any field is another plan."""

    #: SHA-256 of the model's file and of its external data.
    model: str
    flavour: str
    flavour_version: str
    #: Of the GPU that it was built for, as "9.0"; "any": bound to none.
    capability: str
    #: The kind of that GPU: kernels are chosen by measuring them. "any": bound to none.
    gpu: str
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


def read_record(path: Path) -> Record | None:
    """The record in the file `path`; None: there is none. ConfigError: it is altered."""
    try:
        with trusted_files.opened(path) as file:
            raw = trusted_files.read(file, MAX_RECORD_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as problem:
        raise ConfigError(f"{path} cannot be read: {problem.strerror}") from problem
    return _decode(path, raw)


def _decode(path: Path, raw: bytes) -> Record:
    if len(raw) > MAX_RECORD_BYTES:
        raise altered(path, f"more than {MAX_RECORD_BYTES} bytes")
    try:
        record = msgspec.json.decode(raw, type=Record)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as problem:
        raise altered(path, str(problem)) from problem
    if record.sealed() != record:
        raise altered(path, "its seal does not fit")
    return record


def altered(path: Path, how: str) -> ConfigError:
    """What to raise for a plan or record that is not what was stored."""
    return ConfigError(
        f"{path} is not what was stored ({how}), so it is not loaded; expected it unchanged: "
        f"delete {path.with_suffix('.plan')} and {path.with_suffix('.json').name}, "
        "and it is built anew"
    )
