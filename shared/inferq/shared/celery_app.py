"""The Celery application: workers use it, and producers may."""

from __future__ import annotations

from typing import Final
from urllib.parse import parse_qsl, urlsplit

from celery import Celery

from inferq.shared.connect import socket_limits
from inferq.shared.settings import Settings
from inferq.shared.tls import split_tls, with_tls

#: Seconds between PINGs on connections that only listen (remote control, events, waiting for
#: results). kombu gives up a connection that has not answered two of them. So remote control is
#: back within four such intervals after a network lost its connection.
PING_S: Final = 5


def make_app(settings: Settings) -> Celery:
    """A Celery app with inferq's settings: one Redis for queues and results, solo pool.

    Pickle and yaml are never accepted. Broker and result backend must be the same database, since a
    request is settled in one transaction. Every wait on its sockets has a timeout.
    """
    limits = socket_limits(settings.redis_url)
    transport: dict[str, object] = {
        **limits,
        "health_check_interval": PING_S,
        "priority_steps": list(settings.priority_steps),
        "sep": settings.priority_sep,
    }
    if settings.global_keyprefix:
        transport["global_keyprefix"] = settings.global_keyprefix
    if settings.redis_url.startswith("sentinel://"):
        transport["master_name"] = settings.sentinel_master
    backend: dict[str, object] = {}
    if settings.result_keyprefix:
        backend["global_keyprefix"] = settings.result_keyprefix
    if settings.redis_url.startswith("sentinel://"):
        backend["master_name"] = settings.sentinel_master
        backend["sentinel_kwargs"] = limits  # without them it waits for Sentinels for ever
    plain, tls = split_tls(settings.redis_url)
    backend_url = _celery_url(plain)
    # In its URL, too: kombu warns of any rediss:// URL without options, even if it only shows it.
    url = with_tls(backend_url, tls.options()) if tls else backend_url
    # No fix-ups: for a Django project, Celery would import from the current folder first.
    app = Celery("inferq", broker=url, backend=backend_url, set_as_current=False, fixups=[])
    app.conf.update(
        accept_content=["json", "msgpack"],
        # Celery's own side also waits where Redis answers with an error, as a full Redis does.
        broker_channel_error_retry=True,
        broker_connection_retry_on_startup=True,
        # Else CELERY_BROKER_URL would win, which may differ from our URL and is read in another
        # way.
        broker_read_url=url,
        broker_write_url=url,
        broker_transport_options=transport,
        redis_backend_health_check_interval=PING_S,
        redis_socket_connect_timeout=limits["socket_connect_timeout"],
        redis_socket_keepalive=limits.get("socket_keepalive", False),
        redis_socket_timeout=limits["socket_timeout"],
        result_backend_transport_options=backend,
        result_expires=settings.result_expires_s,
        task_create_missing_queues=True,
        worker_pool="solo",
        worker_prefetch_multiplier=1,
    )
    if tls is not None:
        app.conf.update(broker_use_ssl=tls.options(), redis_backend_use_ssl=tls.options())
    return app


def _celery_url(url: str) -> str:
    """`url` as Celery writes it, which has its own scheme for Unix sockets."""
    parts = urlsplit(url)
    if parts.scheme != "unix":
        return url
    db = dict(parse_qsl(parts.query)).get("db", "0")
    return f"redis+socket://{parts.netloc}{parts.path}?virtual_host={db}"
