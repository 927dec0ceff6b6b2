"""Pool of pages under any order of calls: no page is lost, handed out twice or returned twice."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from slipway.cache.pages import Pages

pytestmark = pytest.mark.host
NUM_PAGES = 12


class PagesMachine(RuleBasedStateMachine):
    """Owners take and return pages; the model is a list of pages for each owner."""

    def __init__(self):
        super().__init__()
        self.pages = Pages(NUM_PAGES)
        self.owners = []

    @rule(n=st.integers(0, NUM_PAGES + 2))
    def take(self, n):
        if n > self.pages.num_free:
            with pytest.raises(AssertionError):
                self.pages.take(n)
            return
        taken = self.pages.take(n)
        assert len(taken) == n
        self.owners.append(taken)

    @rule(data=st.data())
    def give_back(self, data):
        if self.owners:
            self.pages.give_back(self.owners.pop(data.draw(st.integers(0, len(self.owners) - 1))))

    @rule(data=st.data())
    def a_page_that_is_free_is_refused(self, data):
        owned = {page for owner in self.owners for page in owner}
        if free := sorted(set(range(NUM_PAGES)) - owned):
            with pytest.raises(AssertionError):
                self.pages.give_back([data.draw(st.sampled_from(free))])

    @rule(data=st.data())
    def a_page_named_twice_is_refused(self, data):
        if owned := [page for owner in self.owners for page in owner]:
            with pytest.raises(AssertionError):
                self.pages.give_back([data.draw(st.sampled_from(owned))] * 2)

    @invariant()
    def every_page_has_one_owner_or_is_free(self):
        owned = [page for owner in self.owners for page in owner]
        assert len(owned) == len({*owned})
        assert {*owned} <= {*range(NUM_PAGES)}
        assert self.pages.num_free == NUM_PAGES - len(owned)

    def teardown(self):
        for owner in self.owners:
            self.pages.give_back(owner)
        assert sorted(self.pages.take(NUM_PAGES)) == list(range(NUM_PAGES))


TestPages = PagesMachine.TestCase
TestPages.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, derandomize=True
)
