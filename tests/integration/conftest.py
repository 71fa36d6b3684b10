"""Fixtures of the tests that kill, fill or set back their Redis: each has one of its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from inferq.workers.process.embedded import EmbeddedRedis


@pytest.fixture
def server(
    new_redis: Callable[..., EmbeddedRedis], request: pytest.FixtureRequest
) -> EmbeddedRedis:
    """A server of the test's own, started with the options that its module calls SERVER."""
    return new_redis(**request.module.SERVER)


@pytest.fixture
def redis_url(redis_url: str, request: pytest.FixtureRequest) -> str:
    """The URL of an empty database: in a module with SERVER, that of the test's own server."""
    if not hasattr(request.module, "SERVER"):
        return redis_url
    server: EmbeddedRedis = request.getfixturevalue("server")
    return server.url
