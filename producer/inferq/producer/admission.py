"""Hop 1. Decides whether a request may be pushed, by its model's advert and its queue's depth.

One pipeline asks everything about a model. The answer is used for `ADVERT_AGE_S`, or for
`DEPTH_AGE_S` where the model has a `max_queue_depth`. A client that pushes often sends the
questions together with its pushes, so hardly any request waits for an answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from inferq.shared import codec
from inferq.shared.errors import ModelNotFound, QueueFull, RedisUnavailable
from inferq.shared.names import Names, is_model_name
from inferq.shared.resp import Command, Reply, first_error
from inferq.shared.schema import DTYPES, ModelAdvert, is_text

#: Seconds.
ADVERT_AGE_S: Final = 5.0
DEPTH_AGE_S: Final = 0.1
#: Share of an answer's lifetime after which the next push asks again.
_EARLY: Final = 0.5
#: Weight of the newest request in the means of rows and bytes per request.
_NEWEST: Final = 0.05


@dataclass(slots=True)
class ModelView:
    """What this client knows of one model."""

    advert: ModelAdvert
    #: For each worker that serves the model: when its lease ends, in Redis ms.
    lease_ends: tuple[float, ...]
    #: Requests in the queue when asked, and those that this client has pushed since.
    depth: int
    pushed: int
    #: `time.monotonic` seconds.
    asked_at: float
    #: Means of this client's requests.
    mean_rows: float = 1.0
    mean_bytes: float = 0.0
    #: The inputs' dtypes, by name.
    dtypes: Mapping[str, np.dtype[Any]] = field(default_factory=dict)
    #: Those of them that are text: ``string`` or ``bytes``.
    text: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        signature = self.advert.signature
        specs = signature.inputs + signature.optional
        self.dtypes = {spec.name: DTYPES[spec.dtype] for spec in specs}
        self.text = {spec.name: spec.dtype for spec in specs if is_text(spec.dtype)}

    @property
    def lifetime_s(self) -> float:
        bounded = self.advert.max_queue_depth or self.advert.max_queue_bytes
        return DEPTH_AGE_S if bounded else ADVERT_AGE_S

    def live_workers(self, redis_ms: float) -> int:
        """Workers whose lease runs."""
        return sum(end > redis_ms for end in self.lease_ends)


class Admission:
    """Views of models, and Redis' clock. No I/O: it returns the questions and takes the replies."""

    def __init__(self, names: Names) -> None:
        self._names = names
        self._views: dict[str, ModelView] = {}
        #: Redis ms minus `time.monotonic` ms.
        self._offset_ms = 0.0

    def redis_ms(self, now: float) -> float:
        """Redis' clock at monotonic time `now`, as of the last answer."""
        return now * 1000 + self._offset_ms

    def current(self, model: str, now: float) -> ModelView | None:
        """What is known of `model`; None if that is too old to admit a request by."""
        view = self._views.get(model)
        return view if view is not None and now - view.asked_at <= view.lifetime_s else None

    def expire(self, model: str) -> None:
        """Treat what is known of `model` as too old. It is asked about before the next request."""
        view = self._views.get(model)
        if view is not None:
            view.asked_at = -math.inf

    def is_due(self, view: ModelView, now: float) -> bool:
        """Whether the next push should also ask about the model."""
        return now - view.asked_at > _EARLY * view.lifetime_s

    def questions(self, model: str) -> list[Command]:
        """What to ask about `model`. ModelNotFound if no model can have that name."""
        if not is_model_name(model):
            raise ModelNotFound(
                f"model {str(model)[:120]!r}; expected at most 100 letters, digits or '_.-' "
                "that start with none of '.-'"
            )
        names = self._names
        return [
            ("TIME",),
            ("GET", names.model(model)),
            ("ZRANGE", names.serving(model), 0, -1, "WITHSCORES"),
            *[("LLEN", names.queue(model, step)) for step in names.priority_steps],
        ]

    def learn(
        self, model: str, replies: Sequence[Reply], asked_at: float, answered_at: float
    ) -> ModelView:
        """Take the replies to `questions`. ModelNotFound if nobody announces `model`."""
        refusal = first_error(replies)
        if refusal is not None:
            raise RedisUnavailable(f"Redis refused to tell about model {model!r}: {refusal}")
        (seconds, micros), announced, serving, *depths = replies
        redis_ms = int(seconds) * 1000 + int(micros) / 1000
        self._offset_ms = redis_ms - (asked_at + answered_at) * 500
        if announced is None:
            self._views.pop(model, None)
            raise ModelNotFound(
                f"model {model!r}: no worker serves it, or announced it in the last day "
                "(one that starts does so once it has loaded it)",
                model=model,
            )
        known = self._views.get(model)
        view = ModelView(
            advert=codec.decode_advert(announced),
            lease_ends=tuple(float(end) for _, end in serving),
            depth=sum(depths),
            pushed=0,
            asked_at=asked_at,
            mean_rows=known.mean_rows if known is not None else 1.0,
            mean_bytes=known.mean_bytes if known is not None else 0.0,
        )
        self._views[model] = view
        return view

    def admit(self, view: ModelView, rows: int, now: float) -> None:
        """Count one request of `rows` rows as pushed.

        QueueFull if the queue is at one of its limits.
        """
        view.mean_rows += _NEWEST * (rows - view.mean_rows)
        advert = view.advert
        depth = view.depth + view.pushed
        if advert.max_queue_depth and depth >= advert.max_queue_depth:
            expected = f"fewer than {advert.max_queue_depth} (max_queue_depth)"
            raise self._full(view, depth, f"{depth} requests queued", expected, now)
        size = int(depth * view.mean_bytes)
        if advert.max_queue_bytes and size >= advert.max_queue_bytes:
            expected = f"fewer than {advert.max_queue_bytes} bytes (max_queue_bytes)"
            found = f"{depth} requests of about {size} bytes queued"
            raise self._full(view, depth, found, expected, now)
        view.pushed += 1

    def weigh(self, view: ModelView, size: int) -> None:
        """Note the bytes of a request. Their mean, times its depth, is a queue's estimated size."""
        mean = view.mean_bytes
        view.mean_bytes = mean + _NEWEST * (size - mean) if mean else size

    def _full(
        self, view: ModelView, depth: int, found: str, expected: str, now: float
    ) -> QueueFull:
        wait = self._estimate(view, depth, now)
        about = "unknown" if wait is None else f"about {wait:.1f} s"
        return QueueFull(
            f"model {view.advert.name!r} has {found}; expected {expected}; estimated wait {about}",
            depth=depth,
            limit=view.advert.max_queue_depth,
            estimated_wait_s=wait,
            estimated_bytes=int(depth * view.mean_bytes),
            limit_bytes=view.advert.max_queue_bytes,
        )

    def _estimate(self, view: ModelView, depth: int, now: float) -> float | None:
        per_row = view.advert.seconds_per_row
        live = view.live_workers(self.redis_ms(now))
        if not per_row or not live:
            return None
        return depth * view.mean_rows * per_row / live

    def is_served(self, model: str, now: float) -> bool:
        """Whether some worker served `model` when last asked, and its lease has not run out."""
        view = self._views.get(model)
        return view is not None and view.live_workers(self.redis_ms(now)) > 0
