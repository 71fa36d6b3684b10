"""Warns of passwords on the command line: every user of the host sees them in the process list."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Final
from urllib.parse import urlsplit

from inferq.workers.logs.printing import say

_URL: Final = re.compile(r"[a-z+]+://[^;]+", re.IGNORECASE)
_IN_QUERY: Final = re.compile(r"(?i)\bpassword=[^&]")
#: Option → where else its value may be given.
_ELSEWHERE: Final = {
    "--redis-url": "INFERQ_REDIS_URL",
    "--broker": "CELERY_BROKER_URL",
    "-b": "CELERY_BROKER_URL",
    "--result-backend": "CELERY_RESULT_BACKEND",
    "--broker-api": "FLOWER_BROKER_API",
    "--broker_api": "FLOWER_BROKER_API",
}
#: Flower's secret options → where else each may be given.
_SECRETS: Final = {
    "--basic_auth": "INFERQ_FLOWER_BASIC_AUTH",
    "--cookie_secret": "FLOWER_COOKIE_SECRET",
    "--oauth2_secret": "FLOWER_OAUTH2_SECRET",
}


def visible_password(arguments: Sequence[str]) -> str | None:
    """The warning about a password among `arguments`; None if there is none."""
    before = ""
    for argument in arguments:
        name, _, value = argument.partition("=")
        option = name if value and name.startswith("--") else before
        if (found := _SECRETS.get(_spelt(option))) is not None:
            return _message(option, found)
        if any(map(_holds_password, _URL.findall(argument))):
            option = argument.partition("=")[0] if argument.startswith("--") else before
            if argument.startswith("-b"):
                option = "-b"
            elsewhere = _ELSEWHERE.get(option)
            return _message(option if elsewhere else "a URL", elsewhere or "INFERQ_REDIS_URL")
        before = argument
    return None


def _message(what: str, elsewhere: str) -> str:
    return (
        f"{what} holds a password, which every user of this host sees in the list of processes; "
        f"expected it in the environment: {elsewhere}"
    )


def _spelt(option: str) -> str:
    """An option as Flower spells it: it accepts dashes for underscores."""
    return "--" + option.removeprefix("--").replace("-", "_") if option[:2] == "--" else ""


def warn_of_visible_password() -> None:
    """Warn on stderr if there is a password on this process' command line."""
    if (told := visible_password(sys.argv[1:])) is not None:
        say(f"inferq: {told}", err=True)


def _holds_password(url: str) -> bool:
    try:
        parts = urlsplit(url)
        _ = parts.port  # ValueError: it is the beginning of a password with a / in it
        return bool(parts.password or _IN_QUERY.search(parts.query))
    except ValueError:
        return "@" in url
