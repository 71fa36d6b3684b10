"""The folder of this user's caches."""

from __future__ import annotations

import os
from pathlib import Path

from inferq.shared.errors import ConfigError


def user_cache() -> Path:
    """inferq in XDG_CACHE_HOME, or else in ~/.cache. ConfigError: there is no home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    except RuntimeError as problem:
        raise ConfigError(f"no folder for caches: {problem}; expected XDG_CACHE_HOME") from problem
    return root / "inferq"
