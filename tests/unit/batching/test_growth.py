"""How outputs' sizes follow inputs' sizes is found from few of them, or not at all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferq.workers.batching.growth import Grid, Growth, find_growth

Law = Callable[[int], int]


def found(law: Law, grid: Grid, tops: list[int], patient: bool = True) -> tuple[Growth | None, int]:
    """What was found, and from how many sizes."""
    asked: set[int] = set()

    def measure(size: int) -> int:
        assert size in grid
        assert size <= tops[-1]
        asked.add(size)
        return law(size)

    sizes = sorted({n for top in tops for n in (top, top - grid.step) if n >= grid.first})
    return find_growth(measure, grid, sizes, patient=lambda: patient), len(asked)


LAWS: dict[str, Law] = {
    "the same": lambda n: n,
    "constant": lambda n: 7,
    "half, down": lambda n: n // 2,
    "half, up": lambda n: (n + 1) // 2,
    "shorter": lambda n: n - 2,
    "twice": lambda n: 2 * n,
    "twice less one": lambda n: 2 * n - 1,
    "half again": lambda n: 3 * n // 2,
    "two thirds": lambda n: 2 * n // 3,
    "a pyramid": lambda n: 8 * ((n + 7) // 8),
    "strides one after the other": lambda n: (((n - 3) // 2 + 1) - 3) // 3 + 5,
    "frames": lambda n: (n + 100) // 160 + 1,
    "a fifth of a second": lambda n: (n - 400) // 3200 + 3,
    "never less than 20": lambda n: max(n, 20),
}


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("first", [1, 3, 10])
def test_a_size_that_follows_is_told_at_every_size_from_few_of_them(name: str, first: int) -> None:
    grid = Grid(first)
    growth, asked = found(LAWS[name], grid, [64, 512, 20_000])
    assert growth is not None
    for n in range(first, 20_001):
        assert growth.at(n) == LAWS[name](n)
    assert asked < 120
    assert growth.constant == (name == "constant")


@given(
    times=st.integers(1, 4),
    by=st.integers(1, 40),
    plus=st.integers(-40, 40),
    more=st.integers(-3, 3),
    first=st.integers(1, 50),
    step=st.sampled_from([1, 2, 4, 32]),
)
def test_floors_of_fractions_are_found_on_every_grid(
    times: int, by: int, plus: int, more: int, first: int, step: int
) -> None:
    def law(n: int) -> int:
        return times * ((n + plus) // by) + more

    grid = Grid(first, step)
    growth, _ = found(law, grid, [first + step * k for k in (20, 199, 500)])
    if growth is not None:
        assert [growth.at(n) for n in range(first, first + 500 * step + 1, step)] == [
            law(n) for n in range(first, first + 500 * step + 1, step)
        ]
    assert growth is not None or step > 1, "with steps of one each of them is explained"


@pytest.mark.parametrize(
    "law",
    [
        lambda n: n * n,
        lambda n: n % 50,
        lambda n: min(n, 300),
        lambda n: n + (n > 200),
        lambda n: int(n**0.5),
    ],
)
def test_what_does_not_repeat_is_not_explained(law: Law) -> None:
    assert found(law, Grid(), [64, 512])[0] is None


@pytest.mark.parametrize("top", [1, 2, 3, 8, 60])
def test_few_sizes_are_all_measured_and_need_no_explanation(top: int) -> None:
    def law(n: int) -> int:
        return n * n % 11

    growth, _ = found(law, Grid(), [top])
    assert growth is not None
    assert [growth.at(n) for n in range(1, top + 1)] == [law(n) for n in range(1, top + 1)]


def test_in_a_hurry_few_sizes_have_to_do() -> None:
    growth, asked = found(lambda n: n // 2 + 1, Grid(), [64, 512, 20_000], patient=False)
    assert growth is None or growth.at(20_000) == 10_001
    assert asked < 25
    growth, asked = found(lambda n: n, Grid(), [64, 512, 20_000], patient=False)
    assert growth is not None
    assert asked == 5


def test_a_grid_holds_its_sizes_and_says_which() -> None:
    assert [n for n in range(12) if n in Grid(3, 4)] == [3, 7, 11]
    assert [n for n in range(5) if n in Grid(2)] == [2, 3, 4]
    assert str(Grid(2)) == "at least 2"
    assert str(Grid(4, 4)) == "4, 8, 12, …"
