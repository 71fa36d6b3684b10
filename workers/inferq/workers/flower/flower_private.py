"""What inferq changes in Flower. All that depends on Flower's private parts is here.

Flower reads its list of routes and its Tornado settings when it makes its application, so they are
changed in place before that: two pages and an endpoint are replaced by subclasses of themselves,
inferq's pages are added, and templates are looked for among inferq's first. The receiver of events
is replaced, too. No class of Flower is changed. The tests of this module hold for the release
`TESTED`; see `is_tested`.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
from celery.events import EventReceiver
from flower import events, urls
from flower.api.tasks import GetQueueLengths
from flower.views import BaseHandler
from flower.views.broker import BrokerView
from flower.views.monitor import Metrics
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from tornado import web
from tornado.routing import URLSpec
from tornado.template import Loader, ParseError, Template

from inferq.shared.celery_app import PING_S
from inferq.shared.connect import redact
from inferq.workers.flower import rows
from inferq.workers.flower.figures import WINDOW_S, Figures
from inferq.workers.flower.readings import Latest, Readings

#: The releases of Flower that this was tested with.
TESTED: Final = "2.2"
#: The end of the links to Flower's own pages in its navigation.
_LAST_LINK: Final = ">Broker</a>\n        </li>\n"
_OUR_LINK: Final = """\
        <li class="nav-item">
          <a class="nav-link{% if active_tab == 'inference' %} active{% end %}"
            href="{{ reverse_url('inference') }}"
            {% if active_tab == 'inference' %}aria-current="page"{% end %}>Inference</a>
        </li>
"""
_FOLDER: Final = Path(__file__).parent
_TEMPLATES: Final = ("broker.html", "inference.html")
_ASSETS: Final = {"inference.js": "text/javascript", "inference.css": "text/css"}


class Changed(Exception):
    """This Flower is not built like the tested one."""


def is_tested(version: str) -> bool:
    """Whether this module was tested with that release of Flower, up to its patch number."""
    return version.split(".")[:2] == TESTED.split(".")


def install(readings: Readings, redis_url: str) -> None:
    """Change the Flower of this process, whose application is not made yet. Raises `Changed`."""
    routes = _routes(urls.handlers)
    loader = _Templates(urls.settings["template_path"])
    loader.check()
    if getattr(events, "EventReceiver", None) is not EventReceiver:
        raise Changed("it receives events in another way")
    events.EventReceiver = WatchedReceiver
    urls.handlers[:] = routes
    urls.settings.update(
        template_loader=loader,
        inferq_readings=readings,
        inferq_figures=Figures(),
        inferq_redis_url=redact(redis_url),
    )


class WatchedReceiver(EventReceiver):  # type: ignore[misc]
    """Notices a dead connection, which kombu does only in event loops."""

    _cycle: Any = None
    _look_at = 0.0

    def get_consumers(self, consumer: Any, channel: Any) -> Any:
        self._cycle = channel.connection.cycle
        return super().get_consumers(consumer, channel)

    def on_iteration(self) -> None:
        """Called once a second, and for each event."""
        now = time.monotonic()
        if self._cycle is not None and now >= self._look_at:
            self._look_at = now + PING_S
            self._cycle.maybe_check_subclient_health()


def _routes(stock: Sequence[Any]) -> list[Any]:
    """Flower's routes with inferq's among them. They are tried in order."""
    replaced: dict[type, Any] = {
        BrokerView: web.url(r"/broker", BrokerPage, name="broker"),
        GetQueueLengths: (r"/api/queues/length", QueueLengths),
        Metrics: (r"/metrics", GuardedMetrics),
    }
    ours = [
        web.url(r"/inference", InferencePage, name="inference"),
        web.url(r"/inference/data", InferenceData, name="inference-data"),
        web.url(r"/inference/([a-z.]+)", InferenceAsset, name="inference-asset"),
    ]
    routes = []
    for route in stock:
        routes.append(replaced.pop(_handler(route), route))
    if replaced:
        missing = ", ".join(sorted(each.__name__ for each in replaced))
        raise Changed(f"it has no route to {missing}")
    return [*ours, *routes]


def _handler(route: Any) -> Any:
    return route.handler_class if isinstance(route, URLSpec) else route[1]


class _Templates(Loader):
    """inferq's templates, and Flower's for all other names. Paths are names in one folder."""

    def __init__(self, stock: str) -> None:
        super().__init__(stock)
        self._stock = Path(stock)

    def check(self) -> None:
        """Raises `Changed` if inferq's templates do not fit Flower's."""
        try:
            if _LAST_LINK not in (self._stock / "navbar.html").read_text():
                raise Changed("its navigation cannot be added to")
            for name in ("navbar.html", *_TEMPLATES):
                self.load(name)
        except (OSError, ParseError, SyntaxError) as problem:
            raise Changed(f"its templates cannot be read: {problem}") from problem

    def resolve_path(self, name: str, parent_path: str | None = None) -> str:
        return name

    def _create_template(self, name: str) -> Template:
        folder = _FOLDER / "templates" if name in _TEMPLATES else self._stock
        text = (folder / name).read_text()
        if name == "navbar.html":
            text = text.replace(_LAST_LINK, _LAST_LINK + _OUR_LINK, 1)
        return Template(text, name=name, loader=self)


async def _latest(handler: Any) -> Latest:
    readings: Readings = handler.settings["inferq_readings"]
    return await readings.latest({*_consumed(handler), handler.capp.conf.task_default_queue})


def _consumed(handler: Any) -> set[str]:
    """Queues that workers said they consume, when they were last asked."""
    return {
        str(queue.get("name"))
        for info in list(handler.application.workers.values())
        for queue in info.get("active_queues") or []
    }


class BrokerPage(BrokerView):  # type: ignore[misc]
    """All models' queues, and other queues that a worker consumes or that hold messages."""

    @web.authenticated
    async def get(self) -> None:
        told = await _latest(self)
        self.render(
            "broker.html",
            broker_url=self.settings["inferq_redis_url"],
            problem=told.problem,
            queues=rows.queues(told.reading, _consumed(self)) if told.reading else [],
            notes=told.reading.notes() if told.reading else [],
        )


class _Broker:
    """Stands in for Flower's client of a broker."""

    def __init__(self, handler: Any) -> None:
        self._handler = handler

    async def queues(self, names: Sequence[str]) -> list[Mapping[str, Any]]:
        told = await _latest(self._handler)
        if told.problem is not None or told.reading is None:
            raise web.HTTPError(503, "%s", told.problem or "Redis was not read yet")
        return [row.as_json() for row in rows.queues(told.reading, _consumed(self._handler))]


class QueueLengths(GetQueueLengths):  # type: ignore[misc]
    """The Broker page's figures as JSON."""

    def get_broker(self) -> _Broker:
        return _Broker(self)


class GuardedMetrics(Metrics):  # type: ignore[misc]
    """Flower's metrics and the depths, only for users who may see the pages."""

    async def get(self) -> None:
        if not self.current_user:
            raise web.HTTPError(403)
        self.application.purge_offline_worker_metrics()
        loop = asyncio.get_running_loop()  # reading the depths blocks
        self.set_header("Content-Type", CONTENT_TYPE_LATEST)
        self.write(await loop.run_in_executor(None, generate_latest))


class InferencePage(BaseHandler):  # type: ignore[misc]
    """The page Inference, without its figures."""

    @web.authenticated
    async def get(self) -> None:
        self.render("inference.html", asset=self._asset, window=f"{WINDOW_S:.0f}")

    def _asset(self, name: str) -> str:
        digest = hashlib.sha256(_asset(name)).hexdigest()[:12]
        return f"{self.reverse_url('inference-asset', name)}?v={digest}"


class InferenceAsset(BaseHandler):  # type: ignore[misc]
    """The page's script and style."""

    @web.authenticated
    async def get(self, name: str) -> None:
        if name not in _ASSETS:
            raise web.HTTPError(404)
        self.set_header("Content-Type", f"{_ASSETS[name]}; charset=UTF-8")
        self.set_header("Cache-Control", "private, max-age=86400")
        self.write(_asset(name))


@functools.cache
def _asset(name: str) -> bytes:
    return (_FOLDER / "static" / name).read_bytes()


class InferenceData(BaseHandler):  # type: ignore[misc]
    """The page's figures."""

    @web.authenticated
    async def get(self) -> None:
        told = await _latest(self)
        figures: Figures = self.settings["inferq_figures"]
        page = figures.page(told.reading, told.problem, time.monotonic())
        self.set_header("Content-Type", "application/json")
        self.set_header("Cache-Control", "no-store")
        self.write(msgspec.json.encode(page))
