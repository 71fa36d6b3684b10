"""Checks whether somebody on the way to Redis could read along, or pose as Redis."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import urlsplit

from inferq.shared.errors import ConfigError
from inferq.shared.tls import split_tls
from inferq.workers.doctor.finding import Finding, ok, warning
from inferq.workers.flower.access import is_loopback


def network(url: str) -> Iterator[Finding]:
    """Findings about the connection to `url`; none for a Unix socket or loopback.

    ConfigError if its TLS options are bad.
    """
    plain, tls = split_tls(url)
    hosts = _hosts(plain)
    if tls is None:
        far = [host for host in hosts if not is_loopback(host)]
        if far:
            yield warning(
                "network",
                f"requests, results and the password go to {', '.join(far)} as they "
                "are: whoever is on the way reads and changes them",
                "use TLS: rediss:// in the URL",
            )
    elif not tls.verifies:
        yield warning(
            "network",
            "TLS without verification: ssl_cert_reqs is none, so that whoever is on "
            "the way may stand in for Redis",
            "take it out of the URL; name a CA of your own by ssl_ca_certs=FILE",
        )
    elif not tls.check_hostname:
        yield warning(
            "network",
            "TLS without the host's name: whoever has any certificate that is trusted "
            "may stand in for Redis",
            "take ssl_check_hostname out of the URL, and name the host as its certificate does",
        )
    else:
        yield ok("network", f"TLS, and the certificate must be of {', '.join(hosts)}")


def _hosts(url: str) -> list[str]:
    """The hosts of the URL that are reached over a network."""
    if not re.match(r"(rediss?|sentinel)://", url):
        return []
    try:
        return [urlsplit(part).hostname or "localhost" for part in url.split(";") if part]
    except ValueError:
        raise ConfigError("the Redis URL cannot be read") from None
