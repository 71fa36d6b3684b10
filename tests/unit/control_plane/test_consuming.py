"""What a worker is told of its queues while it loads their models holds afterwards."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from celery import Celery
from helpers.repository import fake_model

from inferq.shared.settings import Settings
from inferq.workers.control_plane.repository_scan import scan_repository
from inferq.workers.control_plane.service import Service
from inferq.workers.engines.fake import FakeEngine
from inferq.workers.models.engine import LoadedModel


def test_a_queue_that_is_cancelled_while_its_model_loads_is_not_consumed_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        fake_model(tmp_path, name, knobs="warm_up = false")
    worker = SimpleNamespace(
        app=Celery(set_as_current=False),
        hostname="node",
        hub=None,
        task_events=False,
        consumer=None,
    )
    settings = Settings.load(redis_url="redis://127.0.0.1:1")
    service = Service(worker, settings, scan_repository(tmp_path, "ab", on_cpu=True))
    opened = FakeEngine.load

    def load(engine: FakeEngine) -> LoadedModel:
        if engine.spec.name == "a":
            assert service.consume("inferq.a", False)
        return opened(engine)

    monkeypatch.setattr(FakeEngine, "load", load)
    service._load_models()
    assert [(model.name, model.lanes, model.consuming) for model in service.models] == [
        ("a", 1, False),
        ("b", 1, True),
    ]
    assert not service.consume("inferq.c", False)
    for model in service.models:
        model.close(10)
