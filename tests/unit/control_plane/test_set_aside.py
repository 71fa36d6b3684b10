"""A worker that loads its models sets aside what cannot be loaded, and serves the others."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from celery import Celery
from helpers.repository import fake_model

from inferq.shared.errors import ConfigError, EngineError, FatalEngineError
from inferq.shared.settings import Settings
from inferq.workers.control_plane.repository_scan import scan_repository
from inferq.workers.control_plane.service import Service
from inferq.workers.engines.fake import FakeEngine
from inferq.workers.models.engine import LoadedModel
from inferq.workers.models.not_served import NotServed

Load = Callable[..., Service]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """``load(a=problem)`` has the model "a" raise that; "b" and "c" are good."""

    def loading(strict: bool = False, **problems: Exception) -> Service:
        opened = FakeEngine.load

        def refused(engine: FakeEngine) -> LoadedModel:
            if engine.spec.name in problems:
                raise problems[engine.spec.name]
            return opened(engine)

        monkeypatch.setattr(FakeEngine, "load", refused)
        for name in "abc":
            fake_model(tmp_path, name, knobs="warm_up = false")
            app = Celery(set_as_current=False)
        worker = SimpleNamespace(
            app=app, hostname="node", hub=None, task_events=False, consumer=None
        )
        settings = Settings.load(redis_url="redis://127.0.0.1:1", strict=strict)
        service = Service(worker, settings, scan_repository(tmp_path, "abc", on_cpu=True))
        try:
            service._load_models()
        finally:
            for model in service.models:
                model.close(timeout=5)
        return service

    return loading


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (ConfigError("no such device"), "model 'a': no such device"),
        (EngineError("no memory"), "model 'a': no memory"),
        (RuntimeError("odd\x1b[2J\nthing"), r"it could not be loaded: RuntimeError('odd\x1b[2J"),
        (MemoryError(), "it could not be loaded: MemoryError()"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_set_aside(
    load: Load, caplog: pytest.LogCaptureFixture, problem: Exception, reason: str
) -> None:
    service = load(a=problem)
    assert [model.name for model in service.models] == ["b", "c"]
    (found,) = service.not_served()
    assert (found.model, found.version) == ("a", None)
    assert found.reason.startswith(reason)
    (said,) = (each for each in caplog.records if each.levelno == logging.CRITICAL)
    assert "model 'a' is not served: " in said.getMessage()
    assert service.stats().not_served == [found]
    assert [model.model for model in service.stats().models] == ["b", "c"]
    assert service.info()["inferq_not_served"] == str(found)
    assert service.info()["inferq_models"] == "b:1, c:1"


def test_an_engine_beyond_use_ends_all(load: Load) -> None:
    with pytest.raises(FatalEngineError):
        load(b=FatalEngineError("sticky"))


def test_strict_ends_at_the_first(load: Load) -> None:
    with pytest.raises(ConfigError, match="model 'b': no"):
        load(strict=True, b=ConfigError("no"))


def test_with_no_model_left_there_is_nothing_to_serve(load: Load) -> None:
    problem = ConfigError("no")
    with pytest.raises(ConfigError, match="no model can be served"):
        load(a=problem, b=problem, c=problem)


def test_what_is_told_is_short_and_on_one_line() -> None:
    from inferq.workers.models.not_served import MAX_REASON_CHARS, listed, not_served  # noqa: PLC0415

    found = not_served("m\n", "x\n\ty" * 1000, 3)
    assert found.model == r"m\n"
    assert len(found.reason) == MAX_REASON_CHARS + 1
    assert listed([found, NotServed("b", "c")]) == f"{found}; b: c"
    assert str(found).isprintable()
