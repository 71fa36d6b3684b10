"""What we lean on in Flower is there: this fails when an upgrade moves it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import flower
import flower.app
import flower.command
import flower.urls
import pytest
from flower.api.tasks import GetQueueLengths
from flower.views import BaseHandler
from flower.views.broker import BrokerView
from flower.views.monitor import Metrics
from tornado.web import RequestHandler

from inferq.workers.flower import flower_private


def test_the_installed_flower_is_the_tested_one_and_others_are_not() -> None:
    assert flower_private.is_tested(flower.__version__)
    assert flower_private.is_tested("2.2.17")
    assert not any(map(flower_private.is_tested, ["2.20.0", "2.3.0", "3.2.0", "2", "1.2.2", ""]))


def test_flower_reads_the_objects_that_we_change() -> None:
    assert flower.app.default_handlers is flower.urls.handlers
    assert flower.command.settings is flower.urls.settings
    assert Path(flower.urls.settings["template_path"], "navbar.html").is_file()
    assert "template_loader" in inspect.getsource(RequestHandler.create_template_loader)


def test_the_handlers_that_we_extend_work_as_they_did() -> None:
    assert "self.get_broker()" in inspect.getsource(inspect.unwrap(GetQueueLengths.get))
    assert "broker.queues(" in inspect.getsource(inspect.unwrap(GetQueueLengths.get))
    assert inspect.iscoroutinefunction(Metrics.get)
    assert inspect.iscoroutinefunction(inspect.unwrap(BrokerView.get))
    assert issubclass(BrokerView, BaseHandler)
    assert "compare_digest" in inspect.getsource(BaseHandler.get_current_user)
    for name in ("broker_url", "queues"):
        assert f"{name}=" in inspect.getsource(inspect.unwrap(BrokerView.get))


def test_routes_are_replaced_in_place_and_ours_added() -> None:
    stock = list(flower.urls.handlers)
    routes = flower_private._routes(stock)
    assert flower.urls.handlers == stock
    assert len(routes) == len(stock) + 3
    handlers = [flower_private._handler(route) for route in routes]
    assert not {BrokerView, GetQueueLengths, Metrics} & set(handlers)
    by_pattern: dict[str, Any] = {
        (route.regex.pattern if hasattr(route, "regex") else route[0]): route for route in routes
    }
    for pattern in ("/broker$", "/inference$", "/inference/data$", "/api/queues/length"):
        assert pattern in by_pattern
    assert by_pattern["/broker$"].name == "broker"


def test_a_flower_without_what_we_need_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = list(flower.urls.handlers)
    stock = [route for route in whole if flower_private._handler(route) is not BrokerView]
    settings = dict(flower.urls.settings)
    readings: Any = None
    monkeypatch.setattr(flower.urls, "settings", settings)
    monkeypatch.setattr(flower.urls, "handlers", list(stock))
    with pytest.raises(flower_private.Changed, match="no route to BrokerView"):
        flower_private.install(readings, "redis://h")
    assert flower.urls.handlers == stock

    monkeypatch.setattr(flower.urls, "handlers", list(whole))
    (tmp_path / "navbar.html").write_text("<nav>another one</nav>")
    for folder in (tmp_path, tmp_path / "gone"):
        settings["template_path"] = str(folder)
        with pytest.raises(flower_private.Changed):
            flower_private.install(readings, "redis://h")
    assert flower.urls.handlers == whole
    assert "template_loader" not in settings
