"""Pages of documentation whose blocks are run as they are printed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
_BLOCK: Final = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
#: No part of a clone.
_NOT_CLONED: Final = (
    ".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "build", "dist", "models", "shared",
)  # fmt: skip


@dataclass(frozen=True)
class Block:
    """One block of code; `language` is ``sh`` or ``python``."""

    language: str
    text: str

    @property
    def as_shell(self) -> str:
        """What runs it in a shell, as who copies it would."""
        if self.language == "sh":
            return self.text
        assert self.language == "python", self.language
        return f"python - <<'END_OF_BLOCK'\n{self.text}END_OF_BLOCK\n"


def blocks(page: Path) -> list[Block]:
    """The blocks of `page` that say in what language they are, in order."""
    found = [Block(*each) for each in _BLOCK.findall(page.read_text())]
    return [block for block in found if block.language in {"sh", "python"}]


def clone(to: Path) -> Path:
    """What a clone of this repository holds, as far as the blocks may use it."""
    shutil.copytree(ROOT, to, ignore=shutil.ignore_patterns(*_NOT_CLONED))
    return to


def run(script: str, folder: Path, env: Mapping[str, str], timeout_s: float) -> tuple[int, str]:
    """Status and output of one shell that runs `script`; what it leaves running ends with it."""
    log = folder.parent / "output"
    environment = {**os.environ, **env}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    with log.open("wb") as output:
        shell = subprocess.Popen(
            ["bash", "-e", "-c", script],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = shell.wait(timeout_s)
        except subprocess.TimeoutExpired:
            status = -signal.SIGKILL
        finally:
            with suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
            shell.wait()
    return status, log.read_text(errors="replace")
