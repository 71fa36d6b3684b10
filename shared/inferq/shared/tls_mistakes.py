"""redis-py's TCP connections with errors that say in one line what is wrong with TLS.

A Redis without TLS takes a TLS handshake for the beginning of a command and waits for the rest: the
client sees a timeout. A TLS port closes the connection when it gets a command: the client sees a
reset. A server reports a missing client certificate only after the handshake, and the report is
lost if the client writes before it reads. So if a connection fails in one of these ways, the port
is probed to find out what it speaks. (Sentinels are not probed yet.)
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from contextlib import suppress
from typing import Any, Final, Protocol

import redis
import redis.asyncio

#: Seconds that each step of probing a port may take.
PROBE_S: Final = 1.0
#: Where the URL comes from; each message names it.
_URL: Final = "the URL (INFERQ_REDIS_URL)"
_WRONG_NAME: Final = ("Hostname mismatch", "IP address mismatch")
#: OpenSSL's names of the alerts by which a server asks for a client certificate, or another one.
_WANT_CERTIFICATE: Final = ("CERTIFICATE", "UNKNOWN_CA", "HANDSHAKE_FAILURE")


class WrongTls(redis.RedisError):
    """The server, or its certificate, does not fit the URL: a person must correct that.

    It is no ConnectionError, which redis-py would retry at once.
    """


class PlainConnection(redis.Connection):
    """Without TLS."""

    def connect_check_health(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().connect_check_health(*args, **kwargs)
        except redis.ConnectionError as problem:
            if why := _why_not_plain(self, problem):
                raise WrongTls(why) from problem
            raise


class TlsConnection(redis.SSLConnection):
    """With TLS."""

    def connect_check_health(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().connect_check_health(*args, **kwargs)
        except (redis.ConnectionError, redis.TimeoutError) as problem:
            if why := _why_not_tls(self, problem):
                raise WrongTls(why) from problem
            raise

    def _wrap_socket_with_ssl(self, sock: socket.socket) -> ssl.SSLSocket:
        # The handshake is part of connecting, as it is for asyncio.
        sock.settimeout(self.socket_connect_timeout)
        wrapped: ssl.SSLSocket = super()._wrap_socket_with_ssl(sock)  # type: ignore[no-untyped-call]
        wrapped.settimeout(self.socket_timeout)
        return wrapped


class AsyncPlainConnection(redis.asyncio.Connection):
    """The asyncio twin of `PlainConnection`."""

    async def connect_check_health(self, *args: Any, **kwargs: Any) -> None:
        try:
            await super().connect_check_health(*args, **kwargs)
        except redis.ConnectionError as problem:
            if why := await asyncio.to_thread(_why_not_plain, self, problem):
                raise WrongTls(why) from problem
            raise


class AsyncTlsConnection(redis.asyncio.SSLConnection):
    """The asyncio twin of `TlsConnection`."""

    async def connect_check_health(self, *args: Any, **kwargs: Any) -> None:
        try:
            await super().connect_check_health(*args, **kwargs)
        except (redis.ConnectionError, redis.TimeoutError) as problem:
            if why := await asyncio.to_thread(_why_not_tls, self, problem):
                raise WrongTls(why) from problem
            raise


class _Connection(Protocol):
    host: str
    port: int


def _why_not_plain(connection: _Connection, problem: Exception) -> str | None:
    """Why the server understood no command; None if TLS is not the reason."""
    if _is_away_or_refuses(problem) or _tls_there(connection) is None:
        return None
    return f"{connection.host}:{connection.port} speaks TLS; expected rediss:// in {_URL}"


def _why_not_tls(connection: _Connection, problem: Exception) -> str | None:
    """Why TLS with the server failed; None if the server is just not there."""
    at = f"{connection.host}:{connection.port}"
    unverified = _first(problem, ssl.SSLCertVerificationError)
    if isinstance(unverified, ssl.SSLCertVerificationError):
        return _why_not_verified(at, unverified.verify_message.rstrip("."))
    if _is_away_or_refuses(problem):
        return None
    if _redis_there(connection):
        return (
            f"{at} speaks no TLS; expected the port at which it does in {_URL}, or, if nobody else "
            "is on the way, redis://"
        )
    refusal = _tls_there(connection)
    if not refusal:
        return None
    if not any(each in refusal for each in _WANT_CERTIFICATE):
        return f"{at} refuses TLS connections from here: {refusal}; see its log"
    return (
        f"{at} does not accept this side's certificate, or its lack ({refusal}); expected "
        f"ssl_certfile and ssl_keyfile in {_URL}, of a certificate that it trusts"
    )


def _why_not_verified(at: str, reason: str) -> str:
    expected = f"one signed by a CA of this system, or by one of ssl_ca_certs=FILE in {_URL}"
    if reason.startswith(_WRONG_NAME):
        expected = f"one of this name; else another name, or ssl_check_hostname=false, in {_URL}"
    return f"the certificate of {at} is refused: {reason}; expected {expected}"


def _is_away_or_refuses(problem: Exception) -> bool:
    """Whether nothing listens there, or Redis itself has answered. Neither is a matter of TLS."""
    if isinstance(problem, redis.AuthenticationError):
        return True
    return _first(problem, ConnectionRefusedError, socket.gaierror) is not None


def _first(problem: BaseException | None, *kinds: type[BaseException]) -> BaseException | None:
    """The first of `kinds` among what led to `problem`."""
    while problem is not None and not isinstance(problem, kinds):
        problem = problem.__cause__ or problem.__context__
    return problem


def _tls_there(connection: _Connection) -> str | None:
    """What a TLS server there objects to: "" if to nothing; None if it speaks no TLS.

    Nothing is verified, since nothing is sent.
    """
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        if certificate := getattr(connection, "certfile", None):
            context.load_cert_chain(certificate, getattr(connection, "keyfile", None))
        with (
            socket.create_connection((connection.host, connection.port), PROBE_S) as sock,
            context.wrap_socket(sock, server_hostname=connection.host) as shaken,
        ):
            with suppress(TimeoutError):
                shaken.recv(1)  # where a certificate of ours is missed, it is said only now
            return ""
    except ssl.SSLError as problem:
        reason = problem.reason or ""
        return reason if "ALERT" in reason else None
    except (OSError, ValueError):
        return None


def _redis_there(connection: _Connection) -> bool:
    """Whether what listens there answers a PING without TLS."""
    try:
        with socket.create_connection((connection.host, connection.port), PROBE_S) as sock:
            sock.sendall(b"PING\r\n")
            return sock.recv(1) in (b"+", b"-")
    except OSError:
        return False
