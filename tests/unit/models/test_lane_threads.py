"""A lane runs in one thread from its first run on."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping

import pytest
from helpers.wait import until

from inferq.shared.schema import Array
from inferq.workers.models.engine import Batch, Lane
from inferq.workers.models.lane_threads import LaneThreads


class Nothing(Lane):
    def run(self, batch: Batch) -> Mapping[str, Array]:
        return {}


def test_each_lane_keeps_its_thread_until_it_is_told_to_end() -> None:
    lanes, threads = [Nothing(), Nothing()], LaneThreads("m")
    seen: list[set[int]] = [set(), set()]
    for _ in range(5):
        threads.each(lanes, lambda number: seen[number].add(threading.get_ident()))
        threads.each(lanes[:1], lambda number: seen[number].add(threading.get_ident()))
    assert [len(each) for each in seen] == [1, 1]
    assert seen[0] != seen[1]
    own = threads.of(lanes[1])
    assert own.call(threading.get_ident).result(10) in seen[1]
    threads.end()
    until(lambda: not own.is_alive)


def test_lanes_begin_together_and_what_one_raises_is_raised_when_all_have_ended() -> None:
    lanes, threads = [Nothing(), Nothing(), Nothing()], LaneThreads("m")
    ended: list[int] = []

    def work(number: int) -> None:
        if number == 0:
            raise KeyError("the first one")
        time.sleep(0.01)
        ended.append(number)

    with pytest.raises(KeyError, match="the first one"):
        threads.each(lanes, work)
    assert sorted(ended) == [1, 2]
    threads.each(lanes, ended.append)
    assert len(ended) == 5, "its thread goes on"
    threads.end()
