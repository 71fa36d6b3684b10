"""What follows on a request is rebuilt from what it may consist of, however it was written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery, chain, chord, group
from hypothesis import given
from hypothesis import strategies as st

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
    Following,
    check_bytes,
    check_few,
    following,
)
from inferq.workers.canvas.link_queues import MAX_QUEUE_BYTES, LinkQueues

NAMES = Names()
ANY = LinkQueues(NAMES)
#: Options that hold signatures.
ATTACHED = ("link", "link_error", "chain", "chord")
FIELDS = {"task", "args", "kwargs", "options", "subtask_type", "immutable", "chord_size"}
OPTIONS = {
    "queue", "priority", "eta", "countdown", "expires", "time_limit", "soft_time_limit",
    "ignore_result", "retries", "replaced_task_nesting", "task_id", "root_id", "parent_id",
    "reply_to", "group_id", "group_index", "shadow", "argsrepr", "kwargsrepr", "headers",
    "stamped_headers", "link", "link_error", "chain", "chord",
}  # fmt: skip
#: What once reached kombu's pooled connection, its producer, or the message's own properties.
REACHING: dict[str, Any] = {
    "retry": True, "retry_policy": {"global_keyprefix": "stolen:"}, "priority_steps": [],
    "connection": "redis://elsewhere", "producer": {}, "publisher": {}, "exchange": "",
    "routing_key": "x", "serializer": "pickle", "compression": "bzip2", "declare": [],
    "transport_options": {}, "delivery_mode": 1, "exchange_type": "fanout", "router": {},
    "result_cls": "x", "event_dispatcher": {}, "delivery_info": {"is_eager": True},
    "task_type": "x", "add_to_parent": True, "use_link": True, "app": {}, "eager": True,
    "interval": 1e-9, "max_retries": 1, "mandatory": True, "content_type": "x", "body": "x",
}  # fmt: skip


def plain(task: str = "app.task", **options: Any) -> dict[str, Any]:
    return {
        "task": task, "args": [], "kwargs": {}, "options": options, "subtask_type": None,
        "immutable": False,
    }  # fmt: skip


def canvas(kind: str, options: dict[str, Any] | None = None, **kwargs: Any) -> dict[str, Any]:
    return {**plain(f"celery.{kind}", **(options or {})), "kwargs": kwargs, "subtask_type": kind}


def rebuilt(embed: dict[str, Any], size: int = 0, queues: LinkQueues = ANY) -> Following:
    return following(embed, size, queues)


def inside(signature: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """`signature` wherever one may stand, by the name of the place."""
    return {
        "callbacks": {"callbacks": [signature]},
        "errbacks": {"errbacks": [signature]},
        "chain": {"chain": [plain(), signature]},
        "chord": {"chord": signature},
        "link": {"callbacks": [plain(link=[signature])]},
        "link alone": {"callbacks": [plain(link=signature)]},
        "link_error": {"chain": [plain(link_error=[signature])]},
        "chain option": {"callbacks": [plain(chain=[signature])]},
        "chord option": {"callbacks": [plain(chord=signature)]},
        "group": {"callbacks": [canvas("group", tasks=[plain(), signature])]},
        "chain's tasks": {"chord": canvas("chain", tasks=[plain(), signature])},
        "header": {"callbacks": [canvas("chord", header=[signature], body=plain(), kwargs={})]},
        "header's group": {
            "callbacks": [
                canvas("chord", header=canvas("group", tasks=[signature]), body=plain(), kwargs={})
            ]
        },
        "body": {"errbacks": [canvas("chord", header=[plain()], body=signature, kwargs={})]},
        "deep": {
            "callbacks": [
                plain(link=[canvas("group", tasks=[canvas("chain", tasks=[plain(), signature])])])
            ]
        },
    }


PLACES = list(inside(plain()))


def signatures_of(built: object) -> list[dict[str, Any]]:
    """Those in `built`. What a task is called with may look like one, and is its own."""
    found, waiting = [], [built]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            if "subtask_type" not in each:
                waiting += each.values()
                continue
            found.append(each)
            waiting += [each["options"].get(name) for name in ATTACHED]
            if each["subtask_type"] is not None:
                waiting += [each["kwargs"].get(name) for name in ("tasks", "header", "body")]
        elif isinstance(each, list):
            waiting += each
    return found


def all_of(follows: Following) -> list[dict[str, Any]]:
    return signatures_of([follows.callbacks, follows.errbacks, follows.chain, follows.chord])


# --- rebuilt --------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
def test_nothing_but_known_fields_and_options_is_left_wherever_a_signature_stands(
    place: str,
) -> None:
    wanted: dict[str, Any] = {"queue": "billing", "priority": 3, "countdown": 1.5}
    given = {**plain("app.task", **wanted, **REACHING), "app": 1, "_type": "x", "kwargs": {"n": 1}}
    found = all_of(rebuilt(inside(given)[place]))
    assert wanted in [each["options"] for each in found]
    for each in found:
        assert each.keys() <= FIELDS
        assert each["options"].keys() <= OPTIONS
    assert "stolen" not in json.dumps(found)


def test_stamps_and_headers_are_kept_unless_they_are_celerys_own() -> None:
    given = plain(
        "app.task",
        stamped_headers=["trace", "retry_policy", "gone", "producer"],
        trace=["a"],
        retry_policy={"global_keyprefix": "x"},
        producer=1,
        headers={"tenant": "t", "task": "other", "id": "other", "compression": "bzip2"},
    )
    (found,) = rebuilt({"callbacks": [given]}).callbacks
    assert found["options"] == {
        "headers": {"tenant": "t"},
        "stamped_headers": ["trace"],
        "trace": ["a"],
    }


@pytest.fixture(scope="module")
def app() -> Celery:
    return Celery("stock", broker="memory://", backend="cache+memory://", set_as_current=False)


def test_what_celery_itself_writes_is_kept_as_it_is(app: Celery) -> None:
    def s(name: str, *args: Any, **options: Any) -> Any:
        return app.signature(f"app.{name}", args=args, queue="q", **options)

    header = group((s("a", 1), s("b", 2)), app=app)
    steps = chain(s("c"), header, s("body").on_error(s("e")), s("d"), app=app)
    steps.freeze()
    whole = [
        steps,
        header,
        chord(header, s("body"), app=app),
        s("x", link=[s("y")], priority=7),
        s("z", expires=30, countdown=0.5, ignore_result=True, time_limit=3, task_id="mine"),
        s("accumulate").set(immutable=True),
    ]
    written = json.loads(json.dumps(whole))
    assert rebuilt({"callbacks": written}).callbacks == written


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [*sorted(FIELDS), *sorted(OPTIONS), "tasks", "header", "body", "retry_policy"]
            ),
            inner,
            max_size=5,
        )
        | st.builds(
            lambda kind, kwargs, options: {**plain(**options), "kwargs": kwargs, **kind},
            st.sampled_from([{}, *({"subtask_type": k} for k in ("group", "chain", "chord"))]),
            st.dictionaries(st.sampled_from(["tasks", "header", "body", "kwargs"]), inner),
            st.dictionaries(st.sampled_from(sorted(OPTIONS)), inner, max_size=3),
        )
    ),
    max_leaves=30,
)


@given(st.dictionaries(st.sampled_from(["callbacks", "errbacks", "chain", "chord"]), JSON))
def test_whatever_is_written_is_rebuilt_or_refused_and_what_is_rebuilt_stays_as_it_is(
    embed: dict[str, Any],
) -> None:
    try:
        follows = rebuilt(embed)
    except (InvalidInput, PayloadTooLarge):
        return
    for each in all_of(follows):
        assert each.keys() <= FIELDS
    again = {
        "callbacks": follows.callbacks,
        "errbacks": follows.errbacks,
        "chain": follows.chain,
        "chord": follows.chord,
    }
    assert rebuilt(again) == follows


# --- values ---------------------------------------------------------------------------------------


def of(option: str, *values: object) -> list[tuple[str, object]]:
    return [(option, value) for value in values]


@pytest.mark.parametrize(
    ("option", "value", "kept"),
    [
        ("priority", 4, 4),
        ("priority", 255, 9),
        ("priority", -1, 0),
        ("eta", "2030-01-01T00:00:00+00:00", "2030-01-01T00:00:00+00:00"),
        (
            "eta",
            {"__type__": "datetime", "__value__": "2030-01-01T00:00:00+00:00"},
            "2030-01-01T00:00:00+00:00",
        ),
        ("countdown", 0.25, 0.25),
        ("expires", 10, 10),
        ("expires", "2030-01-01T00:00:00", "2030-01-01T00:00:00"),
        ("task_id", "a:b", "a:b"),
    ],
)
def test_options_keep_their_values(option: str, value: Any, kept: object) -> None:
    (found,) = rebuilt({"callbacks": [plain(**{option: value})]}).callbacks
    assert found["options"] == {option: kept}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *of("priority", "high", 1.5, True, []),
        *of("eta", "soon", 5, {}, {"__type__": "datetime"}),
        *of("countdown", float("nan"), float("inf"), 1e300, "1", True),
        *of("expires", "never", float("nan"), -1e300, []),
        *of("task_id", 5, "a\nb", "a\x00", "x" * 1001),
        *of("group_id", {}, "victim.s", "victim.j", "victim.t"),
        *of("group_index", -1, "x", 10**30, True),
        ("ignore_result", "yes"),
        ("retries", -1),
        ("stamped_headers", ["x"] * 101),
        ("headers", {str(n): n for n in range(101)}),
        ("link", 5),
        ("link", ["x"]),
        ("chain", {"a": 1}),
        ("chord", [plain()]),
    ],
    ids=lambda value: f"{value!r:.40}",
)
def test_an_option_of_another_type_is_refused_by_name(option: str, value: Any) -> None:
    with pytest.raises(InvalidInput, match=rf"callbacks\[0\].*{option[:5]}"):
        rebuilt({"callbacks": [plain(**{option: value})]})


@pytest.mark.parametrize("kind", ["group", "chord"])
def test_the_id_of_a_group_is_none_of_a_chords_keys(kind: str) -> None:
    parts: dict[str, Any] = (
        {"tasks": [plain()]}
        if kind == "group"
        else {"header": [plain()], "body": plain(), "kwargs": {}}
    )
    with pytest.raises(InvalidInput, match="ends like a chord's keys"):
        rebuilt({"callbacks": [canvas(kind, {"task_id": "victim.s"}, **parts)]})


@pytest.mark.parametrize(
    "bad",
    [
        5,
        None,
        [],
        "text",
        {},
        {"task": 5},
        {"task": ""},
        {"task": "x", "args": 5},
        {"task": "x", "options": 5},
        {"task": "x", "kwargs": ["x"]},
        {"task": "x", "kwargs": {1: 2}},
        {"subtask_type": "group"},
        {"subtask_type": "chord"},
        {"subtask_type": 5, "task": "x"},
        canvas("group", tasks={}),
        canvas("chord", header=5, body=plain()),
        canvas("chord", header=[plain()], body=None),
        canvas("chord", header=[plain()], body=plain(), kwargs=5),
        {**plain(), "chord_size": "x"},
    ],
    ids=lambda value: f"{value!r:.40}",
)
@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_signature_is_refused_wherever_it_stands(place: str, bad: object) -> None:
    if not bad and place in {"chord", "link alone", "chord option"}:
        assert all_of(rebuilt(inside(bad)[place])) is not None  # type: ignore[arg-type]
        return
    with pytest.raises(InvalidInput):
        rebuilt(inside(bad)[place])  # type: ignore[arg-type]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "task",
    [
        "celery.map",
        "celery.starmap",
        "celery.chunks",
        "celery.chord_unlock",
        "celery.backend_cleanup",
        "celery.group",
        "celery.chain",
        "celery.chord",
        "celery.ping",
    ],
)
def test_celerys_own_tasks_are_refused_wherever_they_stand(place: str, task: str) -> None:
    with pytest.raises(InvalidInput, match="is Celery's own"):
        rebuilt(inside(plain(task))[place])


@pytest.mark.parametrize("kind", ["chunks", "xmap", "xstarmap"])
def test_signatures_that_multiply_themselves_are_refused(kind: str) -> None:
    given = {**plain(), "subtask_type": kind, "kwargs": {"task": plain(), "it": [1], "n": 1}}
    with pytest.raises(InvalidInput, match=r"subtask_type .*; expected group, chain, chord"):
        rebuilt({"callbacks": [given]})


def test_what_task_replace_puts_behind_a_group_is_kept() -> None:
    assert rebuilt({"chain": [plain("celery.accumulate")]}).chain[0]["task"] == "celery.accumulate"


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
