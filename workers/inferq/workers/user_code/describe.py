"""Asks a process of its own what the class of a model.py declares.

Importing it may hang, crash or take all memory. That costs a few seconds, and this model alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from inferq.shared.errors import ConfigError
from inferq.shared.schema import Signature
from inferq.workers.user_code.messages import Describe, Described, Failed
from inferq.workers.user_code.process import CodeProcess, ProcessEnded

#: Large libraries take ten seconds to import on a cold disk.
IMPORT_TIMEOUT_S: Final = 120.0


def describe(path: Path, timeout: float = IMPORT_TIMEOUT_S) -> Signature:
    """The signature that the class in `path` declares. ConfigError."""
    # As it stands in a repository: <name>/<version>/model.py.
    process = CodeProcess(path.parent.parent.name, None, 0, {"CUDA_VISIBLE_DEVICES": ""})
    try:
        process.start()
        told = process.ask(Describe(str(path), process.mark), timeout)
    except OSError as problem:
        raise ConfigError(f"{path}: no process can be started to import it: {problem}") from problem
    except ProcessEnded as problem:
        raise ConfigError(f"{path}: the process that imported it {problem.how}") from problem
    finally:
        process.end()
    if isinstance(told, Failed):
        raise ConfigError(told.message)
    assert isinstance(told, Described)
    return told.signature
