"""Checks the environment for settings with misspelt names, which nobody reads."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Final

from inferq.shared.settings import ENV_PREFIX, Settings
from inferq.workers.doctor.finding import Finding, warning

#: Other variables that commands, Flower and docker-compose.yml read.
OTHERS: Final = frozenset(
    f"{ENV_PREFIX}{name}"
    for name in (
        "MODELS", "STRICT", "PLANS", "FLOWER_BASIC_AUTH", "FLOWER_HOSTS", "FLOWER_PASSWORD",
        "FLOWER_PUBLISH", "REDIS_PASSWORD", "PRODUCER_PASSWORD", "CANCELLER_PASSWORD",
        "WORKER_PASSWORD", "WATCHER_PASSWORD", "WORKER_MEMORY", "MODEL_REPOSITORY",
    )
)  # fmt: skip


def environment(variables: Mapping[str, str]) -> Iterator[Finding]:
    """One line for each of `variables` that looks like a setting of inferq and is none."""
    known = {f"{ENV_PREFIX}{field.upper()}" for field in Settings.model_fields} | OTHERS
    for name in sorted(variables):
        if name.startswith(ENV_PREFIX) and name not in known:
            near = difflib.get_close_matches(name, known, 1)
            todo = f"perhaps {near[0]} was meant" if near else "see docs/settings.md"
            yield warning("settings", f"{name} is set, and nothing reads it", todo)
