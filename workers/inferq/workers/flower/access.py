"""Decides who may see Flower: on loopback, users of this machine; elsewhere, who has the password.

`guard` handles what websites do through a browser on this machine.
"""

from __future__ import annotations

import ipaddress
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from inferq.shared.errors import ConfigError

VARIABLE: Final = "INFERQ_FLOWER_BASIC_AUTH"
HOSTS_VARIABLE: Final = "INFERQ_FLOWER_HOSTS"
LOOPBACK: Final = "127.0.0.1"
#: The user of a generated password.
USER: Final = "inferq"
_RANDOM_BYTES: Final = 18
#: A host as a browser writes it: a name or an address.
_NAME: Final = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?|\[[0-9a-f:.]+\]")


@dataclass(frozen=True)
class Access:
    """Flower's access options. `made`: the password was generated, so nobody knows it yet."""

    #: Each is "user:password"; empty: everybody may see Flower.
    basic_auth: tuple[str, ...]
    made: bool = False


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach `address`, a name or number to listen on."""
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address.strip("[]")).is_loopback
    except ValueError:
        return False


def decide(
    address: str, given: Sequence[str], variable: str | None, *, other_login: bool = False
) -> Access:
    """Decide who may see a Flower that listens on `address`.

    `given`: the value of Flower's own option. `variable`: the value of `VARIABLE`. `other_login`:
    Flower asks for an OAuth account. ConfigError if a value is no user:password.
    """
    credentials = tuple(given) or tuple((variable or "").split(",") if variable else ())
    for each in credentials:
        _check(each)
    if credentials or other_login or is_loopback(address):
        return Access(credentials)
    return Access((f"{USER}:{secrets.token_urlsafe(_RANDOM_BYTES)}",), made=True)


def hosts(given: str | None) -> frozenset[str]:
    """The comma-separated host names in `given`, in lower case. ConfigError if one is no name."""
    names = frozenset(given.lower().split(",")) if given else frozenset()
    if not all(_NAME.fullmatch(name) for name in names):
        raise ConfigError(
            f"--allow-host or {HOSTS_VARIABLE} is {given!r}; expected names such as "
            "flower.example.org, between commas, without http:// and without a port"
        )
    return names


def _check(credential: str) -> None:
    """ConfigError for credentials that Flower cannot compare. It does not show the password."""
    user, colon, password = credential.partition(":")
    if not (colon and user and password and credential.isascii() and credential.isprintable()):
        raise ConfigError(
            f"--basic-auth or {VARIABLE} is (hidden); expected user:password, or several of them "
            "between commas, of printable ASCII characters and no comma within"
        )
