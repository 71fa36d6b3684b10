"""Sets Flower's options and changes its pages; `flowerconfig.py` calls it."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any, Final

import flower
import redis
from prometheus_client import REGISTRY
from redis.exceptions import RedisError
from tornado.options import options

from inferq.shared.connect import redis_client
from inferq.shared.errors import ConfigError
from inferq.shared.settings import Settings
from inferq.shared.tls_mistakes import WrongTls
from inferq.workers.flower import access, flower_private, guard
from inferq.workers.flower.readings import CONNECT_TIMEOUT_S, SOCKET_TIMEOUT_S, Readings
from inferq.workers.logs.printing import plain_lines
from inferq.workers.metrics.prometheus import DepthCollector
from inferq.workers.process import shelves
from inferq.workers.process.trusted_files import make_folder
from inferq.workers.process.user_cache import user_cache
from inferq.workers.process.visible_passwords import visible_password

logger = logging.getLogger(__name__)

#: The file of stock Flower's tasks, in the working directory.
_STOCK_DB: Final = "flower"


def configure() -> None:
    """Configure the Flower that is starting in this process. SystemExit: a setting is bad."""
    if (told := visible_password(sys.argv[1:])) is not None:
        logger.warning("%s", told)
    try:
        _decide_access(options)
        _keep_tasks_apart(options)
        settings = Settings.load()
        client = redis_client(
            settings.redis_url,
            sentinel_master=settings.sentinel_master,
            socket_connect_timeout=CONNECT_TIMEOUT_S,
            socket_timeout=SOCKET_TIMEOUT_S,
        )
        _check_tls(client)
    except ConfigError as problem:
        raise SystemExit(f"inferq: {plain_lines(problem.message)}") from None
    if not flower_private.is_tested(flower.__version__):
        logger.warning(
            "Flower %s was not tested with this inferq, which knows %s.x: its own pages are shown, "
            "without depths of queues that no worker consumes and without the page Inference",
            flower.__version__,
            flower_private.TESTED,
        )
        return
    names = settings.names()
    try:
        flower_private.install(Readings(client, names), settings.redis_url)
    except flower_private.Changed as problem:
        logger.warning("Flower %s: %s; its own pages are shown", flower.__version__, problem)
        return
    REGISTRY.register(DepthCollector(client, names))


def _check_tls(client: redis.Redis) -> None:
    """ConfigError for TLS errors that Flower would otherwise meet and log again and again."""
    try:
        client.ping()
    except WrongTls as problem:
        raise ConfigError(f"Redis cannot be reached: {problem}") from None
    except RedisError as problem:  # Redis may come; until then the pages say so
        logger.warning("Redis does not answer yet: %s", problem)


def _decide_access(options: Any) -> None:
    if not options.address:  # stock Flower would listen on all of them
        options.address = access.LOOPBACK
    # Only users of this machine reach a Unix socket.
    address = access.LOOPBACK if options.unix_socket else options.address
    given = options.basic_auth or []
    decided = access.decide(
        address, given, os.environ.get(access.VARIABLE), other_login=bool(options.auth)
    )
    if decided.made:
        user, _, password = decided.basic_auth[0].partition(":")
        sys.stderr.write(
            f"inferq: Flower listens on {address}, and no --basic-auth or {access.VARIABLE} "
            "is set.\n"
            f"inferq: until it ends, the user is {user} and the password {password}\n"
        )
        sys.stderr.flush()
    if decided.basic_auth:
        options.basic_auth = list(decided.basic_auth)
    allowed = access.hosts(os.environ.get(access.HOSTS_VARIABLE))
    everybodys = bool(decided.basic_auth or options.auth or options.unix_socket)
    if not guard.install(None if everybodys else allowed) and not everybodys:
        raise ConfigError(
            f"Flower {flower.__version__} is made otherwise than {flower_private.TESTED}, so that "
            "websites could read it through a browser on this machine; expected --basic-auth "
            f"({access.VARIABLE})"
        )


def _keep_tasks_apart(options: Any) -> None:
    """Stored tasks are unpickled, so by default they are not read from the working directory."""
    shelves.guard("--db")
    if options.persistent and options.db == _STOCK_DB:
        folder = user_cache() / "flower"
        try:
            make_folder(folder)
        except OSError as problem:
            raise ConfigError(
                f"{folder} cannot be made: {problem.strerror}; expected --db FILE"
            ) from None
        options.db = str(folder / "tasks")
