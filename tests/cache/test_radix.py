"""Prefix tree against a dictionary: it finds what was added, and keeps what is locked."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from slipway.cache.pages import Pages
from slipway.cache.radix import RadixTree

pytestmark = pytest.mark.host
NUM_PAGES = 12
BLOCKS = st.lists(st.sampled_from([b"a", b"b", b"c"]), max_size=4)
SALTS = st.sampled_from(["", "x"])


class RadixMachine(RuleBasedStateMachine):
    """Readers lock paths, extend them by pages of the pool, and leave.

    The model is a dictionary from paths to pages.
    """

    def __init__(self):
        super().__init__()
        self.pages = Pages(NUM_PAGES)
        self.tree = RadixTree(self.freed)
        self.readers = []  # (node, salt, path, generation)
        self.held = {}  # (generation, salt, path) -> page
        self.used = {}  # (generation, salt, path) -> when a reader last left
        self.generation = self.clock = 0

    def freed(self, node):
        self.pages.give_back([node.page])
        (key,) = [key for key, held in self.held.items() if held == node.page]
        assert not self.is_read(key), "a page freed under a reader"
        del self.held[key]

    def is_read(self, key):
        generation, salt, path = key
        return any(
            g == generation and s == salt and p[: len(path)] == path for _, s, p, g in self.readers
        )

    @rule(salt=SALTS, path=BLOCKS)
    def read(self, salt, path):
        node = self.tree.match(salt, path)
        found = tuple(path[: node.depth])
        expected = next(
            n
            for n in range(len(path), -1, -1)
            if n == 0 or (self.generation, salt, tuple(path[:n])) in self.held
        )
        assert node.depth == expected, "the longest prefix that is there"
        pages = [self.held[self.generation, salt, found[:n]] for n in range(1, len(found) + 1)]
        assert self.tree.pages(node) == pages
        self.tree.lock(node)
        self.readers.append((node, salt, found, self.generation))

    @precondition(lambda self: self.readers)
    @rule(data=st.data(), block=st.sampled_from([b"a", b"b", b"c"]))
    def grow(self, data, block):
        index = data.draw(st.integers(0, len(self.readers) - 1))
        node, salt, path, generation = self.readers[index]
        if (child := node.children.get(block)) is not None:
            child = self.tree.descend(node, child)
        elif self.pages.num_free:
            (page,) = self.pages.take(1)
            child = self.tree.extend(node, block, page)
            self.held[generation, salt, (*path, block)] = page
        else:
            return
        assert child.page == self.held[generation, salt, (*path, block)]
        self.readers[index] = child, salt, (*path, block), generation

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def leave(self, data):
        node, salt, path, generation = self.readers.pop(
            data.draw(st.integers(0, len(self.readers) - 1))
        )
        self.clock += 1
        for n in range(1, len(path) + 1):
            if not self.is_read((generation, salt, path[:n])):
                self.used[generation, salt, path[:n]] = self.clock
        self.tree.unlock(node)

    @rule(count=st.integers(1, NUM_PAGES))
    def evict(self, count):
        unread = [key for key in self.held if not self.is_read(key)]
        before = set(self.held)
        assert self.tree.evict(count) == min(count, len(unread))
        gone = before - set(self.held)
        if gone and len(gone) < len(unread):
            left = [self.used[key] for key in set(unread) - gone if self.is_leaf(key)]
            assert min(left) >= max(self.used[key] for key in gone), (
                "the least recently used went first"
            )

    def is_leaf(self, key):
        generation, salt, path = key
        return not any(
            g == generation and s == salt and p[:-1] == path for g, s, p in self.held if p
        )

    @rule()
    def flush(self):
        self.tree.flush()
        self.generation += 1
        assert all(self.is_read(key) for key in self.held), "pages without readers are freed"

    @invariant()
    def counts_agree(self):
        assert self.tree.num_pages == len(self.held) == NUM_PAGES - self.pages.num_free
        assert self.tree.num_unlocked == sum(not self.is_read(key) for key in self.held)

    def teardown(self):
        while self.readers:
            node, *_ = self.readers.pop()
            self.tree.unlock(node)
        self.tree.evict(NUM_PAGES)
        assert self.pages.num_free == NUM_PAGES
        assert self.tree.num_pages == 0
        assert self.tree.num_unlocked == 0
        assert self.tree.num_salts == 0, "clients choose the salts, so none may stay"


TestRadix = RadixMachine.TestCase
TestRadix.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, derandomize=True
)
