"""The Lua scripts, each with its keys documented where it stands.

No payload passes through Lua, but for a result that somebody waits for on its own channel, what an
operator replays, and the next request of a queue whose age is asked for.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files


@cache
def source(name: str) -> str:
    """The text of ``<name>.lua``, without its comments: it is sent and hashed each time."""
    text = files(__name__).joinpath(f"{name}.lua").read_text(encoding="utf-8")
    return "".join(line for line in text.splitlines(True) if not line.startswith("--"))
