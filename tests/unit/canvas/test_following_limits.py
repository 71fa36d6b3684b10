"""Tasks that follow a request go only to queues of applications, and are bounded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from helpers.canvases import (
    ANY,
    NAMES,
    PLACES,
    all_of,
    canvas,
    inside,
    plain,
    rebuilt,
)

from inferq.shared.codec import MAX_MESSAGE_BYTES
from inferq.shared.errors import InvalidInput, PayloadTooLarge
from inferq.shared.names import Names
from inferq.workers.canvas.following import (
    FEW,
    MAX_CHORDS_NESTED,
    MAX_COPIES,
    MAX_FOLLOWING,
    MAX_NESTING,
    MAX_PUBLISHED_BYTES,
    check_bytes,
    check_few,
    following,
)
from inferq.workers.canvas.link_queues import MAX_QUEUE_BYTES, LinkQueues

# --- queues ---------------------------------------------------------------------------------------

OTHERS = Names(prefix="g:", result_prefix="r_", sep="|")


@pytest.mark.parametrize(
    "queue",
    [
        NAMES.attempts("m"),
        NAMES.scheduled,
        NAMES.leases,
        NAMES.fence("i"),
        NAMES.dead("m"),
        NAMES.scheduled_message("m:0:ab"),
        NAMES.payload("id", "x"),
        "inferq:2:later",
        "other:inferq:1:later",
        NAMES.meta("victim"),
        "other_celery-task-meta-victim",
        "celery-taskset-meta-g.s",
        "chord-unlock-g",
        "w@h.celery.pidbox",
        "reply.celery.pidbox",
        "id.reply.celery.pidbox",
        "celeryev",
        "celeryev.abc",
        "_kombu.binding.celery",
        "_kombu.x",
        "unacked",
        "unacked_index",
        "unacked_mutex",
        "inferq.m\x06\x163",
        "a\nb",
        "a\x7f",
        "\x85",
        "x" * (MAX_QUEUE_BYTES + 1),
        "é" * MAX_QUEUE_BYTES,
        "\ud800",
        5,
        ["a"],
        {"name": "a"},
    ],
    ids=lambda value: f"{value!a:.40}",
)
@pytest.mark.parametrize("place", PLACES)
def test_a_queue_that_is_none_of_an_applications_is_refused_by_name(
    place: str, queue: object
) -> None:
    with pytest.raises(InvalidInput, match=r"options\.queue"):
        rebuilt(inside(plain(queue=queue))[place])


@pytest.mark.parametrize("queue", ["inferq.other", "billing", "a.b/c:d", "é" * 100, "inferq"])
def test_any_other_queue_may_be_sent_to(queue: str) -> None:
    (found,) = rebuilt({"callbacks": [plain(queue=queue)]}).callbacks
    assert found["options"]["queue"] == queue


def test_prefixes_and_the_separator_of_the_settings_count() -> None:
    for queue in ("a|3", "r_celery-task-meta-x", "inferq:1:later"):
        with pytest.raises(InvalidInput):
            LinkQueues(OTHERS).check(queue)
    assert LinkQueues(OTHERS).check("a:b") == "a:b"


def test_patterns_narrow_the_queues_down() -> None:
    few = LinkQueues(NAMES, ("inferq.*", "billing-?"))
    for queue in ("inferq.m", "billing-1"):
        assert few.check(queue) == queue
    for queue in ("billing", "billing-10", "Inferq.m", "inferq:1:later"):
        with pytest.raises(InvalidInput):
            few.check(queue)
    with pytest.raises(InvalidInput, match="INFERQ_LINK_QUEUES"):
        rebuilt({"callbacks": [plain()]}, queues=few)
    within = canvas("group", {"queue": "inferq.m"}, tasks=[plain()])
    assert rebuilt({"callbacks": [within]}, queues=few).callbacks


def test_an_exchange_instead_of_a_queue_is_refused() -> None:
    with pytest.raises(InvalidInput, match="expected a queue"):
        rebuilt({"callbacks": [plain(exchange="tasks", routing_key="x")]})


# --- how much -------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
def test_signatures_are_counted_wherever_they_stand(place: str) -> None:
    around = len(all_of(rebuilt(inside(plain())[place]))) - 1
    most = MAX_FOLLOWING - around - 1
    within = canvas("group", tasks=[plain() for _ in range(most)])
    assert len(all_of(rebuilt(inside(within)[place], MAX_MESSAGE_BYTES))) == MAX_FOLLOWING
    within = canvas("group", tasks=[plain() for _ in range(most + 1)])
    with pytest.raises(InvalidInput, match=f"more than {MAX_FOLLOWING} signatures"):
        rebuilt(inside(within)[place], MAX_MESSAGE_BYTES)


def test_a_chords_body_counts_for_each_part_of_its_header() -> None:
    body = {**plain(), "args": ["x" * 100_000]}
    parts = [plain() for _ in range(MAX_PUBLISHED_BYTES // 100_000)]
    rebuilt({"callbacks": [canvas("chord", header=parts[:10], body=body)]})
    rebuilt({"callbacks": [canvas("chord", header=parts, body=body)]}, MAX_PUBLISHED_BYTES)
    with pytest.raises(PayloadTooLarge, match="bytes of messages"):
        rebuilt({"callbacks": [canvas("chord", header=parts, body=body)]}, 200_000)


def test_the_rest_of_a_chain_counts_for_each_part_of_its_first_group() -> None:
    rest = {**plain(), "args": ["x" * 100_000]}
    first = canvas("group", tasks=[plain() for _ in range(MAX_PUBLISHED_BYTES // 100_000)])
    with pytest.raises(PayloadTooLarge):
        rebuilt({"callbacks": [canvas("chain", tasks=[first, rest])]}, 200_000)
    with pytest.raises(PayloadTooLarge):
        rebuilt({"chain": [rest, first]}, 200_000)
    rebuilt({"chain": [rest, plain()]}, 200_000)


def test_one_message_may_be_as_large_as_the_request_that_it_follows_on() -> None:
    size = 2 * MAX_PUBLISHED_BYTES
    link = {**plain(), "args": ["x" * size]}
    assert rebuilt({"callbacks": [link] * (MAX_COPIES - 1)}, size).callbacks


def test_no_message_that_follows_is_larger_than_any_may_be() -> None:
    check_bytes(MAX_MESSAGE_BYTES, MAX_MESSAGE_BYTES)
    with pytest.raises(PayloadTooLarge, match=f"expected at most {MAX_MESSAGE_BYTES}"):
        check_bytes(MAX_MESSAGE_BYTES + 1, MAX_MESSAGE_BYTES + 1)


@pytest.mark.parametrize("kind", ["group", "chain", "link"])
def test_signatures_nest_only_so_deep(kind: str) -> None:
    def nested(levels: int) -> dict[str, Any]:
        found = plain()
        for _ in range(levels - 1):
            found = plain(link=[found]) if kind == "link" else canvas(kind, tasks=[found])
        return found

    assert rebuilt({"callbacks": [nested(MAX_NESTING)]})
    with pytest.raises(InvalidInput, match="nest more than"):
        rebuilt({"callbacks": [nested(MAX_NESTING + 1)]})
    with pytest.raises(InvalidInput, match="nest more than"):
        rebuilt({"callbacks": [nested(MAX_FOLLOWING)]})


@pytest.mark.parametrize("part", ["header", "body"])
def test_chords_nest_only_so_deep(part: str) -> None:
    def nested(levels: int) -> dict[str, Any]:
        found = plain()
        for _ in range(levels):
            parts: dict[str, Any] = {"header": [plain()], "body": plain(), "kwargs": {}}
            found = canvas("chord", **{**parts, part: [found] if part == "header" else found})
        return found

    assert rebuilt({"chord": nested(MAX_CHORDS_NESTED)})
    with pytest.raises(InvalidInput, match="chords nest more than"):
        rebuilt({"chord": nested(MAX_CHORDS_NESTED + 1)})


class Counted(list[Any]):
    """A list that counts how many of its items were looked at."""

    looked_at = 0

    def __iter__(self) -> Iterator[Any]:
        for each in super().__iter__():
            self.looked_at += 1
            yield each


def test_of_much_that_is_refused_no_more_is_looked_at_than_may_follow() -> None:
    tasks = Counted(plain(queue="q") for _ in range(20_000))
    with pytest.raises(InvalidInput, match="more than"):
        rebuilt({"callbacks": [canvas("group", tasks=tasks)]})
    assert tasks.looked_at <= MAX_FOLLOWING


def test_few_are_looked_at_before_the_request_is_computed_and_more_only_once_it_is() -> None:
    good, bad = plain(queue="q"), plain(queue="inferq:1:later")
    check_few({"callbacks": [good] * FEW}, 1_000, ANY)
    with pytest.raises(InvalidInput, match=r"callbacks\[1\]: options.queue"):
        check_few({"callbacks": [good, bad]}, 1_000, ANY)
    tasks = Counted([*[good] * 500, bad])
    embed = {"callbacks": [canvas("group", tasks=tasks)]}
    check_few(embed, 1_000, ANY)
    assert tasks.looked_at <= FEW
    with pytest.raises(InvalidInput, match=r"tasks\[500\]: options.queue"):
        following(embed, 1_000, ANY)
