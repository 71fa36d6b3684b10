"""The Lua scripts. Each documents its keys in its own head.

No payload passes through Lua, with three exceptions: a result that somebody awaits on its own
channel, a dead letter that an operator replays, and the next request of a queue whose age is asked
for.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files


@cache
def source(name: str) -> str:
    """The text of ``<name>.lua``, without its comments: it is sent and hashed each time."""
    text = files(__name__).joinpath(f"{name}.lua").read_text(encoding="utf-8")
    return "".join(line for line in text.splitlines(True) if not line.startswith("--"))
