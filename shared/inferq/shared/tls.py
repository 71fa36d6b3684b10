"""Reads the TLS options of a ``rediss://`` URL once, for redis-py, kombu and Celery.

    ssl_cert_reqs=required|optional|none       redis-py's spelling; Celery's CERT_REQUIRED,
                                               CERT_OPTIONAL and CERT_NONE mean the same
    ssl_ca_certs=FILE                          trusted besides the CAs of the system
    ssl_certfile=FILE  ssl_keyfile=FILE        the client certificate and its key
    ssl_check_hostname=true|false              whether the server's certificate must name the host

By themselves they do not agree: for a bare ``rediss://`` URL redis-py verifies everything, kombu
nothing, and Celery's backend refuses it. So the options are taken out of the URL, and each is given
the same ones. By default the server's certificate must name the URL's host and be signed by a CA of
the system.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn
from urllib.parse import quote, unquote_plus

from inferq.shared.errors import ConfigError

_CERT_REQS: Final = {
    "required": ssl.CERT_REQUIRED,
    "optional": ssl.CERT_OPTIONAL,
    "none": ssl.CERT_NONE,
}
_SPELLINGS: Final = {**_CERT_REQS, **{mode.name: mode for mode in _CERT_REQS.values()}}
_BOOLEANS: Final = {
    **dict.fromkeys(("true", "1", "yes"), True),
    **dict.fromkeys(("false", "0", "no"), False),
}
_FILES: Final = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
OPTIONS: Final = ("ssl_cert_reqs", *_FILES, "ssl_check_hostname")


@dataclass(frozen=True)
class Tls:
    """How the server is verified, and the files of certificates and keys."""

    cert_reqs: ssl.VerifyMode = ssl.CERT_REQUIRED
    check_hostname: bool = True
    ca_certs: str | None = None
    certfile: str | None = None
    keyfile: str | None = None

    @property
    def verifies(self) -> bool:
        """Whether the server's certificate is verified. For a client, optional means required."""
        return self.cert_reqs is not ssl.CERT_NONE

    def options(self) -> dict[str, Any]:
        """Options of a redis-py connection; kombu and Celery's backend pass them on to it."""
        given = {
            "ssl_cert_reqs": self.cert_reqs,
            "ssl_check_hostname": self.check_hostname and self.verifies,
            "ssl_ca_certs": self.ca_certs,
            "ssl_certfile": self.certfile,
            "ssl_keyfile": self.keyfile,
        }
        return {name: value for name, value in given.items() if value is not None}


def split_tls(url: str) -> tuple[str, Tls | None]:
    """`url` without its TLS options, and these; None for a URL without TLS.

    ConfigError names an option that is unknown, is bad, or stands in a URL without TLS. Reads the
    files that the options name.
    """
    head, mark, query = url.partition("?")
    kept: list[str] = []
    given: dict[str, str] = {}
    for piece in query.split("&") if mark else ():
        name, _, value = piece.partition("=")
        name = unquote_plus(name)
        if not name.startswith("ssl_"):
            kept.append(piece)
        elif name not in OPTIONS:
            raise ConfigError(f"{name} in the Redis URL; expected one of {', '.join(OPTIONS)}")
        elif name in given:
            raise ConfigError(f"{name} stands twice in the Redis URL; expected it once")
        else:
            given[name] = unquote_plus(value)
    if not url.startswith("rediss://"):
        if given:
            raise ConfigError(
                f"{next(iter(given))} in a Redis URL that is spoken without TLS; expected "
                "rediss:// at its beginning, or no such option"
            )
        return url, None
    plain = f"{head}?{'&'.join(kept)}" if kept else head
    return plain, _read(given)


def with_tls(url: str, options: object) -> str:
    """`url` with `options` written into it, which Celery has in `broker_use_ssl`.

    Options unknown here are left out, and all of them if `options` is no mapping.
    """
    if not isinstance(options, Mapping) or not url.startswith(("redis://", "rediss://")):
        return url
    _, mark, query = url.partition("?")
    said = {piece.partition("=")[0] for piece in query.split("&")}
    added = [
        f"{name}={quote(_word(value))}"
        for name, value in options.items()
        if name in OPTIONS and name not in said and value is not None
    ]
    url = f"rediss://{url.partition('://')[2]}"
    return f"{url}{'&' if mark else '?'}{'&'.join(added)}" if added else url


def _word(value: object) -> str:
    return value.name if isinstance(value, ssl.VerifyMode) else str(value)


def _read(given: Mapping[str, str]) -> Tls:
    reqs = given.get("ssl_cert_reqs", "required")
    if reqs not in _SPELLINGS:
        expected = f"{', '.join(_CERT_REQS)} (or, as Celery writes them, CERT_REQUIRED, …)"
        raise ConfigError(f"ssl_cert_reqs in the Redis URL is {reqs!r}; expected {expected}")
    hostname = given.get("ssl_check_hostname", "true")
    if hostname.lower() not in _BOOLEANS:
        raise ConfigError(
            f"ssl_check_hostname in the Redis URL is {hostname!r}; expected true or false"
        )
    for name in _FILES:
        if given.get(name) == "":
            raise ConfigError(f"{name} in the Redis URL is empty; expected a file's name")
    tls = Tls(
        cert_reqs=_SPELLINGS[reqs],
        check_hostname=_BOOLEANS[hostname.lower()],
        ca_certs=given.get("ssl_ca_certs"),
        certfile=given.get("ssl_certfile"),
        keyfile=given.get("ssl_keyfile"),
    )
    _try_files(tls)
    return tls


def _try_files(tls: Tls) -> None:
    """ConfigError for a file that a connection could not use."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if tls.ca_certs is not None:
        try:
            context.load_verify_locations(tls.ca_certs)
        except (OSError, ValueError) as problem:
            raise _bad_file("ssl_ca_certs", tls.ca_certs, "CAs' certificates", problem) from None
    if tls.certfile is not None:
        try:
            context.load_cert_chain(tls.certfile, tls.keyfile, _no_passphrase)
        except (OSError, ValueError) as problem:
            name, path = _of_the_two(tls.certfile, tls.keyfile)
            holds = "a certificate and its key, without a passphrase"
            raise _bad_file(name, path, holds, problem) from None
    elif tls.keyfile is not None:
        raise ConfigError("ssl_keyfile in the Redis URL without ssl_certfile; expected both")


def _of_the_two(certfile: str, keyfile: str | None) -> tuple[str, str]:
    """The one of the two files that cannot be read; the certificate if both can."""
    if keyfile is not None:
        try:
            with open(certfile, "rb"):
                pass
            with open(keyfile, "rb"):
                pass
        except (OSError, ValueError) as problem:
            if getattr(problem, "filename", None) == keyfile:
                return "ssl_keyfile", keyfile
    return "ssl_certfile", certfile


def _bad_file(name: str, path: str, holds: str, problem: Exception) -> ConfigError:
    why = getattr(problem, "strerror", None) or str(problem)
    return ConfigError(
        f"{name} in the Redis URL is {path!r}; expected a file that holds {holds}, in PEM ({why})"
    )


def _no_passphrase() -> NoReturn:
    """Raises, since OpenSSL would ask for a passphrase at the terminal."""
    raise ValueError("the key has a passphrase")
