"""Client, worker and Celery's own side reach Redis through a Unix socket."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.repository import fake_model, numbered
from helpers.wait import until
from helpers.worker import Worker

from inferq.producer import Client
from inferq.shared.celery_app import make_app
from inferq.shared.settings import Settings
from inferq.workers.process.embedded import EmbeddedRedis


def test_a_request_goes_through_a_unix_socket(tmp_path: Path, redis_kind: str) -> None:
    fake_model(tmp_path / "models", "m")
    path = tmp_path / "redis.sock"
    url = f"unix://{path}?db=3"
    with (
        EmbeddedRedis(redis_kind, args=["--unixsocket", str(path)]),
        Worker(url, tmp_path / "models", ["m"], name="unix"),
        Client(url) as client,
    ):
        result = client.infer("m", {"x": numbered(1)}, timeout=30)
        np.testing.assert_array_equal(result.outputs["x"], numbered(1))
        app = make_app(Settings.load(redis_url=url))
        pinged = until(lambda: app.control.ping(timeout=5, limit=1), what="Celery's side is up")
        assert [list(reply.values()) for reply in pinged] == [[{"ok": "pong"}]]
        kwargs = {"model": "m", "inputs": {"x": [[1.0, 2.0, 3.0, 4.0]]}}
        sent = app.send_task("inferq.infer", kwargs=kwargs, queue="inferq.m")
        assert sent.get(timeout=30)["x"]["data"] == [[1.0, 2.0, 3.0, 4.0]]
        app.close()


@pytest.mark.parametrize(
    ("url", "celerys"),
    [
        ("unix:///run/redis.sock", "redis+socket:///run/redis.sock?virtual_host=0"),
        ("unix://u:p%40@/r.sock?db=2", "redis+socket://u:p%40@/r.sock?virtual_host=2"),
        ("redis://h:1/2", "redis://h:1/2"),
    ],
)
def test_celery_is_given_the_url_in_its_own_terms(url: str, celerys: str) -> None:
    conf = make_app(Settings.load(redis_url=url)).conf
    assert (conf.broker_url, conf.result_backend) == (celerys, celerys)
