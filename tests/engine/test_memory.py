"""Memory budget: pages of several pools, against a plain definition."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipway.engine.memory import Budget, PageCost
from slipway.errors import OutOfMemory

pytestmark = pytest.mark.host


@st.composite
def costs(draw):
    useful = draw(st.integers(1, 40))
    needed = draw(st.lists(st.integers(1, useful), max_size=2))
    sizes = draw(st.lists(st.integers(0, 9), min_size=len(needed) + 1, max_size=len(needed) + 1))
    return tuple(PageCost(size, need, useful) for size, need in zip(sizes, [useful, *needed]))


def plain(left, pages):
    """Hand out one page after the other, to all pools with the fewest.

    First up to the pages that are needed, then up to those that are useful.
    """
    held = [0] * len(pages)
    for most in ([cost.needed for cost in pages], [cost.useful for cost in pages]):
        while True:
            wanting = [i for i in range(len(pages)) if held[i] < most[i]]
            if not wanting:
                break
            fewest = min(held[i] for i in wanting)
            growing = [i for i in wanting if held[i] == fewest]
            if (price := sum(pages[i].size_bytes for i in growing)) > left:
                break
            left -= price
            for i in growing:
                held[i] += 1
    return held


@given(left=st.integers(0, 600), pages=costs())
def test_pages_are_given_one_after_the_other(left, pages):
    budget, expected = Budget(left + 7, 4, pages), plain(left, pages)
    if min(expected) < 1:
        with pytest.raises(OutOfMemory):
            budget.fit(3)
    else:
        assert list(budget.fit(3)) == expected
