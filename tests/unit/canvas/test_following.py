"""What follows on a request is rebuilt from what it may consist of, however it was written."""

from __future__ import annotations

import json
from typing import Any

import pytest
from celery import Celery, chain, chord, group
from helpers.canvases import (
    PLACES,
    all_of,
    canvas,
    inside,
    plain,
    rebuilt,
)
from hypothesis import given
from hypothesis import strategies as st

from inferq.shared.errors import InvalidInput, PayloadTooLarge

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
