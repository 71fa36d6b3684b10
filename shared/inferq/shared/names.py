"""Names of queues and Redis keys: the one place that knows how they are spelled.

Keys live under ``<prefix>inferq:1:`` where 1 is the protocol version and ``<prefix>`` is kombu's
``global_keyprefix``. ``<i>`` is a worker incarnation (random, never reused), ``<m>`` a model.

Queues, results and payloads are the same in every protocol version: a worker of one version serves
what a client of another pushed. Workers also announce themselves to clients of the version before,
and recover its workers. So workers may be upgraded one by one, and the clients after them.

    leases                ZSET   i -> Redis ms at which its lease ends
    fence:<i>             STRING no TTL; exists exactly as long as i may settle; holds the number of
                                 its last MULTI that did
    claims:<i>            HASH   claim key -> 1 once its messages were decoded without dying, else 0
    claim:<i>:<n>:<m>:<p> LIST   messages of one claim, oldest at the right end
    running:<i>           SET    "<m>/<id>" of requests now computing; "<m>/@<id>" of the one whose
                                 links are being published
    attempts:<m>          HASH   id -> how often a worker died computing it, expires;
                                 "#<sha1>" -> how often one died decoding these bytes,
                                 "@<id>" -> how often one died publishing what follows on it
    dead:<m>              LIST   dead letters, newest at the left end; expires
    quarantined:<m>       STRING about how many of these are quarantined; expires
    later                 ZSET   "<m>:<p>:<random>" -> Redis ms at which that request is due
    later:<m>:<p>:<random> LIST  its message
    model:<m>             STRING what workers announce of a model (msgpack), expires
    serving:<m>           ZSET   i -> Redis ms at which its lease ends
    stats:<i>             STRING what i has done so far (msgpack, see the workers'
                                 data_plane/counts.py), expires
    nowhere               never exists (see lua/force.lua)
    reply:<client>        channel on which a client hears the ids of its settled requests
    payload:<id>:<input>  STRING a claim-checked tensor, expires; under 1 in every version;
                                 a colon in the id is written %3A
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

PROTOCOL: Final = 1
TASK: Final = "inferq.infer"
QUEUE_PREFIX: Final = "inferq."
META_PREFIX: Final = "celery-task-meta-"
#: Message headers that inferq adds to Celery's.
HEADER_REPLY: Final = "inferq_reply"
HEADER_SENT_MS: Final = "inferq_sent_ms"
HEADER_DEADLINE_MS: Final = "inferq_deadline_ms"

#: kombu's defaults for Redis: sub-lists of a queue are `<queue><sep><step>`, step 0 is bare.
PRIORITY_STEPS: Final = (0, 3, 6, 9)
PRIORITY_SEP: Final = "\x06\x16"

_MODEL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,99}")


def is_model_name(name: str) -> bool:
    """Letters, digits, ``_ . -``; at most 100; starts with none of ``. -``."""
    return _MODEL.fullmatch(name) is not None


def queue_of(model: str) -> str:
    """The Celery queue of `model`, without kombu's key prefix."""
    return QUEUE_PREFIX + model


def model_of(queue: str) -> str | None:
    """The model that `queue` belongs to, or None for a foreign queue."""
    if not queue.startswith(QUEUE_PREFIX):
        return None
    model = queue.removeprefix(QUEUE_PREFIX)
    return model if is_model_name(model) else None


def glob_of(text: str) -> str:
    """`text` as a pattern for MATCH of Redis' SCAN that matches only itself."""
    return re.sub(r"([\\*?\[\]])", r"\\\1", text)


@dataclass(frozen=True)
class Names:
    """Key names for one set of kombu transport options (and Celery's result prefix)."""

    prefix: str = ""
    result_prefix: str = ""
    priority_steps: tuple[int, ...] = PRIORITY_STEPS
    sep: str = PRIORITY_SEP
    protocol: int = PROTOCOL

    @property
    def root(self) -> str:
        return f"{self.prefix}inferq:{self.protocol}:"

    def all_protocols(self) -> tuple[Names, ...]:
        """These names, and those of the protocol version before, which workers still speak."""
        before = replace(self, protocol=self.protocol - 1)
        return (self, before) if before.protocol >= 1 else (self,)

    def step(self, priority: int) -> int:
        """kombu's rounding: the largest step that is not above `priority`."""
        fitting = [step for step in self.priority_steps if step <= priority]
        return fitting[-1] if fitting else self.priority_steps[-1]

    def queue(self, model: str, priority: int = 0) -> str:
        """The Redis list that holds `model`'s requests of this priority (0 is most urgent)."""
        return self.list_of(queue_of(model), priority)

    def list_of(self, queue: str, priority: int = 0) -> str:
        """The Redis list that holds what waits in any Celery queue with this priority."""
        step = self.step(priority)
        name = self.prefix + queue
        return f"{name}{self.sep}{step}" if step else name

    def lists_of(self, queue: str) -> list[str]:
        """The Redis lists of any queue of Celery's, the most urgent first."""
        name = self.prefix + queue
        return [f"{name}{self.sep}{step}" if step else name for step in self.priority_steps]

    def meta(self, request_id: str) -> str:
        """Celery's result key; also the channel that ``AsyncResult.get`` listens on."""
        return f"{self.result_prefix}{META_PREFIX}{request_id}"

    @property
    def leases(self) -> str:
        return f"{self.root}leases"

    def fence(self, incarnation: str) -> str:
        return f"{self.root}fence:{incarnation}"

    def claims(self, incarnation: str) -> str:
        return f"{self.root}claims:{incarnation}"

    def running(self, incarnation: str) -> str:
        return f"{self.root}running:{incarnation}"

    def claim_head(self, incarnation: str) -> str:
        """The prefix of the keys of all claims of `incarnation`."""
        return f"{self.root}claim:{incarnation}:"

    def claim(self, incarnation: str, number: int, model: str, step: int) -> str:
        return f"{self.claim_head(incarnation)}{number}:{model}:{step}"

    def parse_claim(self, key: str) -> ClaimName:
        """The parts of a key made by `claim`. ValueError if it is none."""
        head = f"{self.root}claim:"
        parts = key.removeprefix(head).split(":") if key.startswith(head) else []
        if len(parts) != 4 or not is_model_name(parts[2]):
            raise ValueError(f"not a claim key: {key!r}")
        return ClaimName(parts[0], int(parts[1]), parts[2], int(parts[3]))

    @property
    def nowhere(self) -> str:
        return f"{self.root}nowhere"

    def attempts(self, model: str) -> str:
        return f"{self.root}attempts:{model}"

    def dead(self, model: str) -> str:
        return f"{self.root}dead:{model}"

    def quarantined(self, model: str) -> str:
        return f"{self.root}quarantined:{model}"

    @property
    def scheduled(self) -> str:
        return f"{self.root}later"

    def scheduled_message(self, place: str) -> str:
        """The list that one message waits in; `place` is a member of `later`."""
        return f"{self.scheduled}:{place}"

    def model(self, model: str) -> str:
        return f"{self.root}model:{model}"

    def serving(self, model: str) -> str:
        return f"{self.root}serving:{model}"

    def stats(self, incarnation: str) -> str:
        return f"{self.root}stats:{incarnation}"

    def reply(self, client: str) -> str:
        return f"{self.root}reply:{client}"

    def payload(self, request_id: str, tensor: str) -> str:
        return f"{self._payloads(request_id)}{tensor}"

    def is_payload_of(self, key: str, request_id: str) -> bool:
        """Whether `key` is a payload key of this request. No other may be read or deleted."""
        return key.startswith(self._payloads(request_id))

    def _payloads(self, request_id: str) -> str:
        # Else the payloads of the request "a:b" would pass for some of the request "a".
        if ":" in request_id or "%" in request_id:
            request_id = request_id.replace("%", "%25").replace(":", "%3A")
        return f"{self.prefix}inferq:1:payload:{request_id}:"

    def is_reply(self, channel: str) -> bool:
        """Whether `channel` is a reply channel, of a client of any version.

        Workers publish on no other channel that a message names: Redis might not permit it, and
        would then refuse the whole MULTI with that command, however often it is sent.
        """
        return self._replies.match(channel) is not None

    @cached_property
    def _replies(self) -> re.Pattern[str]:
        return re.compile(rf"{re.escape(self.prefix)}inferq:\d{{1,6}}:reply:")


@dataclass(frozen=True)
class ClaimName:
    """The parts of a claim's key."""

    incarnation: str
    number: int
    model: str
    step: int
