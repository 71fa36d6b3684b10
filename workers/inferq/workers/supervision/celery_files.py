"""Files that Celery's options name: each worker process has its own, called after its node.

Of two that keep one state file, the later one to end writes over what the other has kept. Of two
with one pid file, the second one ends at its start.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from inferq.shared.errors import ConfigError

#: How each may be written.
_OPTIONS: Final = {"--statedb": "--statedb", "-S": "--statedb", "--pidfile": "--pidfile"}
_NODE: Final = "%n"


def check(options: Sequence[str], count: int) -> None:
    """ConfigError if `count` worker processes with these options would have a file in common."""
    if count == 1:
        return
    before = ""
    for option in options:
        name, _, value = option.partition("=")
        if before in _OPTIONS:
            name, value = before, option
        elif option.startswith("-S") and option != "-S":
            name, value = "-S", option.removeprefix("-S")
        if name in _OPTIONS and value and _NODE not in value:
            raise ConfigError(
                f"{_OPTIONS[name]} is {value!r}; expected %n in it, the node's name without its "
                f"host, since {count} worker processes have a file each"
            )
        before = option


def options_of(options: Sequence[str], node: str) -> list[str]:
    """`options` for the worker `node`. Celery does this for some of them only."""
    name = node.partition("@")[0]
    return [option.replace(_NODE, name) for option in options]
